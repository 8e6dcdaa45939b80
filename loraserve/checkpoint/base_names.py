"""When two names of a base model mean the same one.

PEFT writes down where the trainer had the model: an id of the Hub, or a path of its machine. So
names are compared by what both spellings have: the last part.
"""

import os
import re
from pathlib import Path
from typing import Protocol

from loraserve.errors import FailedPreconditionError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# The Hub's cache keeps org/name there; the last part is a commit.
_HUB_CACHE = re.compile(r"(?:^|/)models--([^/]+?)--([^/]+)/snapshots/[^/]+$")


def same_base(one: str, other: str) -> bool:
    """Whether the names mean one model: their last parts are equal, or, of two ids of the Hub
    (`org/name`), the whole. Upper and lower case are alike."""
    one, other = _cleaned(one), _cleaned(other)
    if _HUB_ID.fullmatch(one) and _HUB_ID.fullmatch(other):
        return one == other
    return one.rpartition("/")[2] == other.rpartition("/")[2] != ""


def _cleaned(name: str) -> str:
    """Lower case, with the separators of POSIX and none at the end; a path into the Hub's cache as
    the id that it is of."""
    path = name.strip().replace("\\", "/").rstrip("/").lower()
    cached = _HUB_CACHE.search(path)
    return "/".join(cached.groups()) if cached else path


def names_directory(name: str, directory: Path) -> bool:
    """Whether the base's name is a path to this very directory, links followed."""
    if not name:
        return False
    try:
        return os.path.realpath(os.path.expanduser(name)) == os.path.realpath(directory)
    except (OSError, ValueError):  # no path at all
        return False


class NamesItsBase(Protocol):
    """An adapter, packed or as an outline of it; what is not known is empty."""

    @property
    def base_name(self) -> str: ...
    @property
    def base_digest(self) -> str | None: ...


def names_served_model(adapter: NamesItsBase, model: Path) -> bool:
    """Whether the adapter was trained on the very directory that is served, however the path is
    spelled, and has no digest, which would say more."""
    return not adapter.base_digest and names_directory(adapter.base_name, model)


def check_base_name(name: str, base: str) -> None:
    """Raises FailedPreconditionError where an adapter that names its base names another one. An
    empty name says nothing."""
    if name and not same_base(name, base):
        raise FailedPreconditionError(
            "base",
            f"the adapter was made for {name!r}, not {base!r}; --allow-base-mismatch "
            "(allow_base_mismatch in code) admits it all the same",
        )
