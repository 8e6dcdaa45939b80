"""Who may call which path: one table, and what it does not name is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loraserve.errors import PermissionDeniedError, UnauthenticatedError
from loraserve.gateway.http import Request
from loraserve.security import Identity, KeyRing, Role, TlsFiles, check_exposure
from loraserve.security.identity import ANYONE
from loraserve.wire import is_loopback, split_address

_USER = frozenset({Role.USER, Role.ADMIN})
_ADMIN = frozenset({Role.ADMIN})
_OPEN: frozenset[Role] = frozenset()

# An empty set: open, even without a key.
ACCESS: Mapping[tuple[str, str], frozenset[Role]] = {
    ("GET", "/health"): _OPEN,
    ("GET", "/ping"): _OPEN,
    ("POST", "/ping"): _OPEN,
    ("GET", "/ready"): _OPEN,
    ("GET", "/version"): _OPEN,
    ("GET", "/openapi.json"): _OPEN,
    ("GET", "/metrics"): _ADMIN,
    ("GET", "/v1/models"): _USER,
    ("GET", "/v1/models/"): _USER,
    ("POST", "/v1/completions"): _USER,
    ("POST", "/v1/chat/completions"): _USER,
    ("POST", "/tokenize"): _USER,
    ("POST", "/detokenize"): _USER,
    ("POST", "/v1/load_lora_adapter"): _ADMIN,
    ("POST", "/v1/unload_lora_adapter"): _ADMIN,
}


@dataclass(frozen=True)
class Caller:
    """`key` is what the cluster is asked with on the caller's behalf; None where it has no keys."""

    identity: Identity
    key: str | None


class Gate:
    """Deny by default."""

    def __init__(self, address: str, keys: Path | None, tls: TlsFiles | None = None) -> None:
        """`keys`: the key file of the cluster; without one, only loopback may be listened on and a
        caller's key is not looked at. `tls`: what is served with. Raises InvalidArgumentError."""
        self._keys = KeyRing.load(keys) if keys else None
        self._host = split_address(address, "listen")[0].lower()
        check_exposure(address, self._keys is not None, tls)

    def admit(self, request: Request, roles: frozenset[Role]) -> Caller:
        """Raises UnauthenticatedError, PermissionDeniedError."""
        if self._keys is None and roles:
            self._check_site(request)
        if self._keys is None or not roles:
            return Caller(ANYONE, None)
        key = _bearer(request)
        identity = self._keys.identify(key)
        if identity is None:
            raise UnauthenticatedError("authorization", "nobody has this key")
        if not roles & identity.roles:
            held = ", ".join(sorted(role.value for role in identity.roles))
            raise PermissionDeniedError("authorization", f"role {held} may not call this")
        return Caller(identity, key)

    def _check_site(self, request: Request) -> None:
        """Without keys, whoever reaches this machine's loopback may call: pages that its browsers
        show must not, whatever name they were served under. Raises PermissionDeniedError."""
        for value in request.header(b"host"):
            if not self._is_here(value.decode("latin-1")):
                raise PermissionDeniedError(
                    "Host", "is not this machine's; without keys it must be"
                )
        for value in request.header(b"origin"):
            _, _, host = value.decode("latin-1").partition("://")
            if not host or not self._is_here(host):
                raise PermissionDeniedError("Origin", "is another site; without keys none may call")

    def _is_here(self, host: str) -> bool:
        """`host`: with or without a port."""
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        name = name.lower()
        return name == self._host or (name != "" and is_loopback(f"{name}:0"))


def _bearer(request: Request) -> str:
    found = request.header(b"authorization")
    if len(found) != 1:
        raise UnauthenticatedError("authorization", "needs `Bearer KEY` with a key of this cluster")
    scheme, _, key = found[0].decode("latin-1").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise UnauthenticatedError("authorization", "is not `Bearer KEY`")
    return key.strip()
