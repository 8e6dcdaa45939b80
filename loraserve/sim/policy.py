"""Placement policies that know the engine's profile."""

from dataclasses import replace

from loraserve.placement.load import LoadModel
from loraserve.placement.types import Placement, PlacementPolicy, PlacementProblem


def with_load_model(policy: PlacementPolicy, load: LoadModel) -> PlacementPolicy:
    """The policy, told what demands cost on this engine."""

    def place(problem: PlacementProblem) -> Placement:
        return policy(replace(problem, load=load))

    return place
