"""How busy nodes would be under assigned demands, as the cost model predicts it.

With t the mean step time at the operating point of a rank (`operating_point.py`), its balance
q w + (step_s + a) / t = 1 says that token work and adapter reads share what fixed step costs leave:

    utilisation = (work per second + reads per step / t) / (1 - step_s / t)

0 for an idle node, 1 at the SLO; at one rank and the stated mix it is tokens / OP[rank]. An adapter
that takes a share of its demand to a node is read in 1 - exp(-appearances per second x t) of the
steps, so spreading an adapter costs reads. Work includes installing an adapter from host memory for
requests that find it evicted from the device, exp(-requests per second x `kept_s`) of them. A
proportional engine charges each adapter by its own rank; an engine that pads charges all tokens of
a node by the largest rank among the adapters that have demand there. A node of speed s has
s - step_s / t instead of 1 - step_s / t.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from loraserve.placement.arrays import Floats, Ints
from loraserve.placement.cost_model import CostModel, Profile, Slo
from loraserve.placement.operating_point import (
    MAX_RANK,
    LengthMix,
    OperatingPoints,
    operating_points,
)

# A node so slow that its fixed costs fill every step still has this part of its speed.
LEAST_CAPACITY = 0.01

DEFAULT_PROFILE = Profile(
    name="built-in guess",
    base="",
    device="data-centre GPU, 8B parameters, bf16",
    cost=CostModel(
        step_s=10.5e-3,
        prefill_token_s=100e-6,
        decode_token_s=44e-6,
        context_token_s=87e-9,
        token_rank_s=0.17e-6,
        adapter_s=20e-6,
        adapter_byte_s=0.67e-12,
    ),
    max_batch_tokens=2048,
    max_sequences=256,
    bytes_per_rank=5_242_880,
    source="Order of magnitude until a profile is measured: step and decode from a published "
    "linear fit for Llama-3.1-8B (10.54 ms + 0.0438 ms per sequence); prefill 16 GFLOP at half of "
    "312 TFLOP/s; context 128 KiB at 1.5 TB/s; rank 5.2 MFLOP at 31 TFLOP/s; bytes at 1.5 TB/s",
)


@dataclass(frozen=True)
class LoadModel:
    """Charges demands to nodes. Equal values are equal models."""

    profile: Profile = DEFAULT_PROFILE
    slo: Slo = field(default_factory=Slo)
    mix: LengthMix = field(default_factory=LengthMix)

    @property
    def points(self) -> OperatingPoints:
        return _points(self)

    @property
    def padded(self) -> bool:
        return self.profile.padded

    def charges(self, size_bytes: Ints, rank: Ints, prefill: Floats, decode: Floats) -> "Charges":
        """Of adapters with this demand (tokens/s), as columns."""
        points = self.points
        rank = np.minimum(rank, MAX_RANK)
        t = points.step_s[rank]
        usable = 1 - self.profile.cost.step_s / t
        prefill_seen = prefill / min(self.mix.prompt, self.profile.max_batch_tokens)
        seen = (decode + prefill_seen) * t
        cost = self.profile.cost.loaded()
        asked = prefill / self.mix.prompt
        with np.errstate(invalid="ignore"):
            missing = np.where(asked > 0, np.exp(-asked * points.kept_s[rank]), 0.0)
        install = asked * missing * size_bytes * self.profile.install_byte_s
        if not self.padded:
            work = prefill * points.prefill_work_s[rank] + decode * points.decode_work_s[rank]
            work = (work + install) / usable
            read = (cost.adapter_s + cost.adapter_byte_s * size_bytes) / (t * usable)
            return Charges(work[:, None], read, seen, np.ones((MAX_RANK + 1, 1)))
        usable = 1 - cost.step_s / points.step_s
        weights = np.column_stack(
            [
                points.prefill_work_s,
                points.decode_work_s,
                np.ones_like(usable),
                points.read_s / points.step_s,
            ]
        )
        weights /= usable[:, None]
        features = np.column_stack([prefill, decode, install, np.zeros_like(decode)])
        return Charges(features, np.ones(len(rank)), seen, weights)

    def capacity(self, speed: Floats) -> Floats:
        """Of nodes, in units of a node of speed 1."""
        fixed = self.profile.cost.step_s / float(np.median(self.points.step_s))
        return np.maximum((speed - fixed) / (1 - fixed), LEAST_CAPACITY * speed)


@dataclass(frozen=True, eq=False)
class Charges:
    """What each adapter adds to a node. A node's utilisation is the sum of its adapters' features
    times `weights` at the node's rank, over its capacity."""

    linear: Floats
    """[adapters, features]: grow with the share of the demand."""
    read: Floats
    """[adapters]: added to the last feature times the part of steps that need the adapter."""
    seen: Floats
    """[adapters]: appearances in a step if the whole demand goes to one node."""
    weights: Floats
    """[ranks, features]."""

    def features(self, adapter: npt.NDArray[np.integer], share: Floats) -> Floats:
        """[entries, features] of shares of adapters."""
        out = self.linear[adapter] * share[:, None]
        out[:, -1] -= self.read[adapter] * np.expm1(-self.seen[adapter] * share)
        return np.asarray(out)

    def alone(self, rank: Ints) -> Floats:
        """[adapters]: each whole on a node of its own, in nodes of speed 1."""
        features = self.linear.copy()
        features[:, -1] -= self.read * np.expm1(-self.seen)
        return np.asarray((features * self.weights[np.minimum(rank, MAX_RANK)]).sum(axis=1))


@lru_cache(maxsize=16)
def _points(model: LoadModel) -> OperatingPoints:
    return operating_points(model.profile, model.slo, model.mix)


@lru_cache(maxsize=1)
def default_load_model() -> LoadModel:
    """Of the built-in profile, for a cluster that nobody has measured yet."""
    return LoadModel()
