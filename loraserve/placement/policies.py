"""The placement policies by the name that operators write."""

from collections.abc import Mapping
from typing import TypeVar

from loraserve.errors import InvalidArgumentError
from loraserve.placement import baselines
from loraserve.placement.columns import ColumnPolicy
from loraserve.placement.convert import columns_of, placement_of
from loraserve.placement.paper import paper
from loraserve.placement.rank_aware import rank_aware
from loraserve.placement.types import Placement, PlacementPolicy, PlacementProblem

Policy = TypeVar("Policy")

DEFAULT_POLICY = "rank_aware"

COLUMN_POLICIES: Mapping[str, ColumnPolicy] = {
    "rank_aware": rank_aware,
    "paper": paper,
    "random": baselines.random,
    "contiguous": baselines.contiguous,
    "hash": baselines.hashed,
    "load_only": baselines.load_only,
    "request_level": baselines.request_level,
}


class ObjectPolicy:
    """A policy on columns, called with the objects of `types.py`."""

    def __init__(self, on_columns: ColumnPolicy) -> None:
        self.on_columns = on_columns

    def __call__(self, problem: PlacementProblem) -> Placement:
        columns = columns_of(problem)
        return placement_of(columns, self.on_columns(columns))


POLICIES: Mapping[str, PlacementPolicy] = {
    name: ObjectPolicy(policy) for name, policy in COLUMN_POLICIES.items()
}


def routed_by_rank(name: str) -> bool:
    """Whether the policy leaves it to routing which ranks meet on a node, so that clients are to
    choose by ranks."""
    return name == "request_level"


def policy_named(name: str) -> PlacementPolicy:
    """Raises InvalidArgumentError that lists the names."""
    return _named(name, POLICIES)


def column_policy_named(name: str) -> ColumnPolicy:
    """The same on columns, for large problems. Raises InvalidArgumentError that lists the names."""
    return _named(name, COLUMN_POLICIES)


def _named(name: str, policies: Mapping[str, Policy]) -> Policy:
    if name not in policies:
        raise InvalidArgumentError("policy", f"{name!r}: one of {', '.join(sorted(policies))}")
    return policies[name]
