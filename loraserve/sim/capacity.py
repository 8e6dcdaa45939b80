"""How many requests per second a node carries within the SLO, by the placement's own model."""

from collections.abc import Iterable

import numpy as np

from loraserve.placement.cost_model import Profile, Slo
from loraserve.placement.load import LoadModel
from loraserve.placement.operating_point import LengthMix
from loraserve.sim.workload import Workload


def load_model(profile: Profile, slo: Slo, workload: Workload, nodes: int) -> LoadModel:
    """With the workload's mean lengths, and as many adapters on a node as its share of them."""
    prompt = float(workload.prompt_tokens.mean()) if len(workload) else 512.0
    output = float(workload.output_tokens.mean()) if len(workload) else 128.0
    adapters = max(1, round(len(workload.ranks) / nodes))
    return LoadModel(profile, slo, LengthMix(prompt, output, adapters))


def node_rate(profile: Profile, slo: Slo, mix: LengthMix, ranks: Iterable[int]) -> float:
    """Requests/s of a node at its operating point, with requests equally over these ranks; 0 where
    the SLO cannot be met."""
    tokens = LoadModel(profile, slo, mix).points.tokens_per_s
    rates = np.array([tokens[rank] for rank in ranks]) / (mix.prompt + mix.output)
    return float(len(rates) / (1 / rates).sum()) if len(rates) and (rates > 0).all() else 0.0
