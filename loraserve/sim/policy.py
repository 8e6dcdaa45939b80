"""Placement policies that know the engine's profile."""

from dataclasses import fields, replace
from typing import Any

from loraserve.placement.cost_model import Profile, Slo
from loraserve.placement.types import Placement, PlacementPolicy, PlacementProblem


def with_profile(policy: PlacementPolicy, profile: Profile, slo: Slo) -> PlacementPolicy:
    return policy
