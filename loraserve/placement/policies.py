"""The placement policies by the name that operators write."""

from collections.abc import Mapping

from loraserve.errors import InvalidArgumentError
from loraserve.placement.rank_fill import rank_fill
from loraserve.placement.types import PlacementPolicy

DEFAULT_POLICY = "rank_fill"

POLICIES: Mapping[str, PlacementPolicy] = {"rank_fill": rank_fill}


def policy_named(name: str) -> PlacementPolicy:
    """Raises InvalidArgumentError that lists the names."""
    if name not in POLICIES:
        raise InvalidArgumentError("policy", f"{name!r}: one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name]
