"""Placement problems for tests."""

from dataclasses import replace

import numpy as np

from loraserve.placement.columns import Columns
from loraserve.placement.cost_model import CostModel, Profile, Slo
from loraserve.placement.load import LoadModel
from loraserve.placement.operating_point import LengthMix

RANKS, PARTS = (8, 16, 32, 64, 128), (0.30, 0.25, 0.20, 0.15, 0.10)
BYTES_PER_RANK = 1000


def model(rank_s: float = 0.5e-6, padded: bool = False, adapter_s: float = 0.0) -> LoadModel:
    """A GPU-like engine: 10 ms a step, 100 us a prefill token, 40 us a decode token."""
    cost = CostModel(
        step_s=0.010,
        prefill_token_s=100e-6,
        decode_token_s=40e-6,
        token_rank_s=0.0 if padded else rank_s,
        token_max_rank_s=rank_s if padded else 0.0,
        adapter_s=adapter_s,
    )
    profile = Profile("test", "base", "gpu", cost, 2048, 256, BYTES_PER_RANK, padded=padded)
    return LoadModel(profile, Slo(), LengthMix(512, 128, 8))


def problem(
    adapters: int,
    nodes: int,
    seed: int = 0,
    *,
    load: LoadModel | None = None,
    busy: float = 0.5,
    slack: float = 4.0,
    replicas: int = 1,
    zipf: float = 0.9,
    ranks: tuple[int, ...] = RANKS,
    **more: object,
) -> Columns:
    """Zipf demand that fills nodes to `busy` at their mean; `slack` times the memory needed."""
    random = np.random.default_rng(seed)
    load = load or model()
    parts = PARTS if ranks == RANKS else None
    rank = random.choice(ranks, adapters, p=parts).astype(np.int64)
    wanted = random.permutation(1 / np.arange(1, adapters + 1) ** zipf)
    size = rank * BYTES_PER_RANK
    made = Columns(
        size_bytes=size,
        rank=rank,
        prefill=wanted * 0.8,
        decode=wanted * 0.2,
        memory=np.full(nodes, int(slack * replicas * size.sum() / nodes) + 128 * BYTES_PER_RANK),
        max_rank=np.zeros(nodes, np.int64),
        domain=np.arange(nodes),
        speed=np.ones(nodes),
        adapter_ids=[f"a{i}" for i in range(adapters)],
        node_ids=[f"n{i}" for i in range(nodes)],
        adapter_base=np.zeros(adapters, np.int64),
        node_base=np.zeros(nodes, np.int64),
        replicas=replicas,
        load=load,
    )
    made = replace(made, **more)  # type: ignore[arg-type]
    factor = busy * made.capacity.sum() / max(float(made.alone.sum()), 1e-9)
    return replace(made, prefill=made.prefill * factor, decode=made.decode * factor)


def drifted(p: Columns, current: object, sigma: float, seed: int) -> Columns:
    """Each adapter's demand times a log-normal factor, the sum as it was."""
    factor = np.random.default_rng(seed).lognormal(0.0, sigma, p.adapters)
    factor *= p.alone.sum() / max(float((p.alone * factor).sum()), 1e-12)
    changed = replace(p, prefill=p.prefill * factor, decode=p.decode * factor)
    return replace(changed, current=current)  # type: ignore[arg-type]
