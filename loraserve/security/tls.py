"""TLS and mutual TLS from files. gRPC takes TLS 1.2 and 1.3 and checks host names itself."""

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from loraserve.errors import InvalidArgumentError
from loraserve.named_files import named, whole, why, wrong


@dataclass(frozen=True)
class TlsFiles:
    """PEM files. A server needs `cert` and `key`; with `ca` it demands client certificates of that
    authority. A client needs `ca` (None: the system's), and `cert` and `key` where the server
    demands them."""

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise InvalidArgumentError("tls", "certificate and key go together")


def _read(field: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    with named(field, path):
        data = path.read_bytes()
    # gRPC would take anything and fail every handshake later.
    if b"-----BEGIN " not in data:
        raise wrong(field, path, "is not a PEM file")
    return data


def _check(files: TlsFiles, ca_field: str) -> None:
    """Raises InvalidArgumentError that names the file which is no use."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for field, path in (("tls-cert", files.cert), (ca_field, files.ca)):
        if path is not None:
            try:
                context.load_verify_locations(path)
            except OSError as error:  # which ssl.SSLError is
                raise wrong(field, path, error) from None
    if files.cert is not None and files.key is not None:
        try:
            context.load_cert_chain(files.cert, files.key, password="")  # never asks for one
        except OSError as error:
            raise wrong("tls-key", files.key, f"with {whole(files.cert)}: {why(error)}") from None


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """As `channel_credentials`, for a connection of HTTP/2 that gRPC does not make itself."""
    _check(files, "tls-ca")
    context = ssl.create_default_context(cafile=files.ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    if files.cert is not None and files.key is not None:
        context.load_cert_chain(files.cert, files.key)
    return context


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Raises InvalidArgumentError that names the file."""
    cert, key = _read("tls-cert", files.cert), _read("tls-key", files.key)
    ca = _read("tls-client-ca", files.ca)
    if cert is None or key is None:
        raise InvalidArgumentError("tls", "a server needs a certificate and a key")
    _check(files, "tls-client-ca")
    return grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=ca is not None)


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """Raises InvalidArgumentError that names the file."""
    ca = _read("tls-ca", files.ca)
    cert, key = _read("tls-cert", files.cert), _read("tls-key", files.key)
    _check(files, "tls-ca")
    return grpc.ssl_channel_credentials(ca, key, cert)
