"""Who a caller is. It comes from the caller's key or certificate, never from a message."""

import enum
import re
from dataclasses import dataclass

from loraserve.errors import InvalidArgumentError

DEFAULT_TENANT = "default"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class Role(enum.Enum):
    USER = "user"  # uses and changes the adapters of its tenant
    ADMIN = "admin"  # a user that also operates nodes
    NODE = "node"  # a daemon of the cluster: acts for any tenant


@dataclass(frozen=True)
class Identity:
    """`name` is for logs; `tenant` owns what the caller makes."""

    name: str
    tenant: str
    roles: frozenset[Role]

    @property
    def sees_all_tenants(self) -> bool:
        return Role.NODE in self.roles


# Everything, for a server that runs without keys: on loopback, for one person.
ANYONE = Identity("anyone", DEFAULT_TENANT, frozenset(Role))


def check_name(field: str, name: str) -> str:
    """`name` where it is a valid name of an adapter, a tenant, a node or a key.

    Names never hold a slash or begin with a dot, so no path can be made of one.
    Raises InvalidArgumentError.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidArgumentError(
            field,
            f"{name[:80]!r} is not a name: 1 to 64 of a-z 0-9 . _ - beginning with a letter or "
            "digit, without two dots in a row",
        )
    return name


def check_revision(field: str, revision: str) -> str:
    """`revision` where it is 64 lower-case hexadecimal digits. Raises InvalidArgumentError."""
    if not re.fullmatch(r"[0-9a-f]{64}", revision):
        raise InvalidArgumentError(field, "is not 64 lower-case hexadecimal digits")
    return revision


def check_base(field: str, base: str) -> str:
    """`base` where it is a valid name of a base model: as a name, also with upper case and inner
    slashes, as models are named in public. Raises InvalidArgumentError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}", base) or ".." in base:
        raise InvalidArgumentError(
            field, f"{base[:80]!r} is not a base name: 1 to 128 of letters, digits, . _ - /"
        )
    return base
