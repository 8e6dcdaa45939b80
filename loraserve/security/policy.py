"""What a server must have before it may listen."""

import logging
from pathlib import Path

from loraserve.errors import InvalidArgumentError
from loraserve.security.access import AccessInterceptor
from loraserve.security.identity import ANYONE
from loraserve.security.keys import KeyRing
from loraserve.security.tls import TlsFiles
from loraserve.wire import is_loopback

_log = logging.getLogger(__name__)


def check_exposure(address: str, keys: bool, tls: TlsFiles | None) -> None:
    """Raises InvalidArgumentError where listening on "host:port" would serve strangers; logs what
    is allowed but weak."""
    if not keys and not (tls and tls.ca):
        if not is_loopback(address):
            raise InvalidArgumentError(
                "keys", f"listening on {address}, which other machines reach, needs a key file"
            )
        _log.warning("%s is open to every process of this machine: no key file is given", address)
    elif tls is None and not is_loopback(address):
        _log.warning("%s is not encrypted: keys can be read on the way", address)


def authenticator(
    address: str, keys_path: Path | None, tls: TlsFiles | None = None
) -> AccessInterceptor:
    """The gate of a server that listens on "host:port".

    With client certificates (`tls.ca`) a SAN URI identifies a caller that sends no key.
    Raises InvalidArgumentError as KeyRing.load and check_exposure do.
    """
    keys = KeyRing.load(keys_path) if keys_path else None
    check_exposure(address, keys is not None, tls)
    certificates = bool(tls and tls.ca)
    everyone = ANYONE if keys is None and not certificates else None
    return AccessInterceptor(keys, certificates, everyone)
