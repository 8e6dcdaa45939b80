"""Who may call what: keys, the table of RPCs, TLS. What the table does not name is refused."""

from loraserve.security.access import ACCESS, AccessInterceptor, current_identity
from loraserve.security.identity import DEFAULT_TENANT, Identity, Role
from loraserve.security.keys import KeyRing, create_key
from loraserve.security.policy import authenticator, check_exposure
from loraserve.security.tls import (
    TlsFiles,
    channel_credentials,
    client_context,
    server_credentials,
)

__all__ = [
    "ACCESS",
    "DEFAULT_TENANT",
    "AccessInterceptor",
    "Identity",
    "KeyRing",
    "Role",
    "TlsFiles",
    "authenticator",
    "channel_credentials",
    "check_exposure",
    "client_context",
    "create_key",
    "current_identity",
    "server_credentials",
]
