"""What both ends of every connection share: channel options, limits, binding and dialling.

Keepalive is what finds a peer that went silent (a cut cable, a frozen host): gRPC's defaults do
not. Clients ping each second; servers must permit it, or they answer a ping with GOAWAY.
"""

import ipaddress
import socket
from collections.abc import Sequence

import grpc
import grpc.aio

from loraserve.errors import InvalidArgumentError, UnavailableError

MAX_MESSAGE_BYTES = 4 << 20
# Of a packed adapter, per message; well below the message limit.
CHUNK_BYTES = 1 << 20

# Initial metadata of an upload whose description was accepted.
UPLOAD_ACCEPTED = (("loraserve-upload", "accepted"),)
# Initial metadata of a node's registration: the mark of the controller's store.
STORE_MARK = "loraserve-store-mark"

KEEPALIVE_TIME_MS = 1000
KEEPALIVE_TIMEOUT_MS = 1000

Options = list[tuple[str, int]]

# Of one connection; a client's further calls wait in the client. Well over what a node takes.
MAX_STREAMS = 1024
# Of all connections, calls that the server's loop has not taken yet.
MAX_PENDING_CALLS = 1 << 20

SERVER_OPTIONS: Options = [
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    # Would refuse calls of a client that keeps to the bound but is a round trip behind.
    ("grpc.http.overload_protection", 0),
    # Would cancel calls by chance once a thousand wait for a loop that is busy, as when all nodes
    # and clients come back to a controller. What bounds them is the streams of each connection.
    ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A stream that waits for its first token is silent: its pings are not abuse.
    ("grpc.http2.min_ping_interval_without_data_ms", 100),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # The server looks for dead clients less eagerly: their requests are cancelled, not retried.
    ("grpc.keepalive_time_ms", 10 * KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", 5 * KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", 5 * KEEPALIVE_TIMEOUT_MS),
    # Two daemons on one port would each get half of the connections: refuse instead.
    ("grpc.so_reuseport", 0),
]


def channel_options(
    keepalive_time_ms: int = KEEPALIVE_TIME_MS, keepalive_timeout_ms: int = KEEPALIVE_TIMEOUT_MS
) -> Options:
    """Options of a client channel. A dead peer is found within the sum of the two times."""
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", keepalive_time_ms),
        ("grpc.keepalive_timeout_ms", keepalive_timeout_ms),
        # A ping of the bandwidth probe stands in for a keepalive ping, with a limit of its own
        # (60 s by default): without this a host that is up with a frozen process goes unnoticed.
        ("grpc.http2.ping_timeout_ms", keepalive_timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Nodes are peers, not web sites: a proxy of the environment would only break the stream.
        ("grpc.enable_http_proxy", 0),
        # Reconnect soon: routes, not back-off, keep load off a node in trouble.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]


def split_address(address: str, field: str = "address") -> tuple[str, int]:
    """host and port of "host:port" or "[v6]:port". Raises InvalidArgumentError about `field`."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidArgumentError(field, f"{address!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(address: str) -> bool:
    """Whether only processes of this machine can reach "host:port"."""
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_free(host: str, port: int) -> None:
    """Raises UnavailableError as the system words it; gRPC would only log that."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, where in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(where)
    except OSError as error:
        raise UnavailableError(
            "listen", f"cannot bind {host}:{port}: {error.strerror or error}"
        ) from None


def bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> str:
    """Binds "host:port", port 0 for a free one; returns the address that was bound.

    Raises UnavailableError where the address is taken or is not of this machine.
    """
    host, port = split_address(address)
    _check_free(host, port)
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise UnavailableError("listen", f"cannot bind {address}")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bearer_metadata(key: str | None) -> Sequence[tuple[str, str]]:
    """Metadata of a call that authenticate it; none without a key."""
    return (("authorization", f"Bearer {key}"),) if key else ()


def dial(
    address: str,
    credentials: grpc.ChannelCredentials | None = None,
    options: Options | None = None,
) -> grpc.aio.Channel:
    """A channel to "host:port"; connects when first used."""
    chosen = channel_options() if options is None else options
    if credentials is None:
        return grpc.aio.insecure_channel(address, chosen)
    return grpc.aio.secure_channel(address, credentials, chosen)
