"""Runs an engine through scenarios and collects what its steps cost.

A scenario is a set of decoding sequences with their adapters, and prefills of several sizes that
come while they decode, one after the other. Scenarios are run in turn, several times over, so that
a slow moment of the machine falls on all of them alike.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles

import numpy as np

from loraserve.engine import Engine, RequestHandle
from loraserve.engine.stats import StepRecord
from loraserve.errors import FailedPreconditionError
from loraserve.placement.cost_model import StepLoad
from loraserve.profiler.fit import Point
from loraserve.sampling_params import SamplingParams

RANKS = (8, 16, 32, 64, 128)
# Contexts that are told apart within a decoding run, tokens.
_CONTEXT_BUCKET = 64
_PROMPT_TOKENS = 8
_TIMEOUT_S = 120.0
# What submitting one request takes at the most, for engines whose steps are as short.
_SUBMIT_S = 0.0003


@dataclass(frozen=True)
class Scenario:
    """`adapters`: one entry for each decoding sequence, its rank and which adapter of that rank;
    None for the base model. `prefills`: prompts that come meanwhile, tokens, with the first
    sequence's adapter; without sequences they come alone."""

    adapters: tuple[tuple[int, int] | None, ...]
    prefills: tuple[int, ...]
    prefill_adapter: tuple[int, int] | None = None
    decode_steps: int = 16


@dataclass(frozen=True)
class Grid:
    """What a sweep covers; sizes that the engine cannot take are left out."""

    decodes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    prefills: tuple[int, ...] = (16, 64, 128, 256, 448)
    ranks: tuple[int, ...] = RANKS
    adapters_per_rank: int = 8
    repeats: int = 6
    prefill_samples: int = 3
    """Of each prefill, one after the other within a repeat: a decode step comes many times."""


QUICK = Grid(decodes=(1, 4, 16), prefills=(16, 128), ranks=(8, 32, 128), adapters_per_rank=4)


def scenarios(
    grid: Grid, adapters_per_rank: int, max_sequences: int, max_prompt: int
) -> list[Scenario]:
    """Base only, one adapter shared, several of one rank, and ranks mixed. `adapters_per_rank`:
    those that are loaded."""
    prefills = tuple(p for p in grid.prefills if p <= max_prompt)
    decodes = [d for d in grid.decodes if d < max_sequences]
    found = [Scenario((None,) * d, prefills) for d in (0, *decodes)]
    for rank in grid.ranks:
        found.append(Scenario((), prefills, (rank, 0)))
        for count in decodes:
            for distinct in sorted({1, min(count, adapters_per_rank)}):
                adapters = tuple((rank, i % distinct) for i in range(count))
                found.append(Scenario(adapters, prefills[::2], adapters[0]))
    for count in decodes[2:]:
        mixed = tuple(
            (grid.ranks[i % len(grid.ranks)], i // len(grid.ranks) % adapters_per_rank)
            for i in range(count)
        )
        found.append(Scenario(mixed, prefills[1::2], mixed[0]))
        found.append(Scenario((*mixed[: count // 2], *[None] * (count - count // 2)), ()))
    return found


def _points_of(records: Sequence[StepRecord]) -> dict[tuple[float, ...], list[StepRecord]]:
    """Steps of one composition together. Steps that installed an adapter are left out."""
    groups: dict[tuple[float, ...], list[StepRecord]] = {}
    for r in records:
        if r.installs:
            continue
        bucket = r.context_tokens // max(1, r.decode_tokens) // _CONTEXT_BUCKET
        key = (r.prefill_tokens, r.decode_tokens, r.token_ranks, r.adapter_bytes, bucket)
        groups.setdefault(key, []).append(r)
    return groups


def _load(records: Sequence[StepRecord]) -> StepLoad:
    first = records[0]
    tokens = first.token_ranks and (first.prefill_tokens + first.decode_tokens)
    return StepLoad(
        prefill_tokens=first.prefill_tokens,
        decode_tokens=first.decode_tokens,
        context_tokens=fmean(r.context_tokens for r in records),
        chunk_context=fmean(r.chunk_context for r in records),
        token_ranks=first.token_ranks,
        token_max_rank=tokens * first.max_rank,
        adapters=first.adapters,
        adapter_bytes=first.adapter_bytes,
    )


def _undisturbed_s(group: Sequence[StepRecord]) -> float:
    """The lower quartile of steps that are alike: what else the machine does only adds time."""
    seconds = [r.seconds for r in group]
    return quantiles(seconds, n=4, method="inclusive")[0] if len(seconds) > 1 else seconds[0]


class Sweep:
    """Measures one engine, which nobody else uses: record_steps on, the prefix cache off."""

    def __init__(self, engine: Engine, grid: Grid, seed: int = 0) -> None:
        self._engine = engine
        self._grid = grid
        self._rng = random.Random(seed)
        self._step_s = 0.0
        self._vocabulary = engine.model_config.vocab_size

    def load_adapters(self, max_bytes: int) -> int:
        """Random adapters of every rank, as many as fit; how many of each rank there are."""
        shape = self._engine.model_config
        generator = np.random.default_rng(0)
        sizes = {
            "q_proj": (shape.hidden_size, shape.num_heads * shape.head_dim),
            "k_proj": (shape.hidden_size, shape.num_kv_heads * shape.head_dim),
            "v_proj": (shape.hidden_size, shape.num_kv_heads * shape.head_dim),
            "o_proj": (shape.num_heads * shape.head_dim, shape.hidden_size),
            "gate_proj": (shape.hidden_size, shape.intermediate_size),
            "up_proj": (shape.hidden_size, shape.intermediate_size),
            "down_proj": (shape.intermediate_size, shape.hidden_size),
        }
        per_rank = sum(i + o for i, o in sizes.values()) * shape.num_layers * 4
        count = int(max_bytes // (per_rank * sum(self._grid.ranks)))
        count = min(count, self._grid.adapters_per_rank)
        if count < 1:
            raise FailedPreconditionError(
                "memory_bytes", f"no room for adapters of ranks {self._grid.ranks}"
            )
        for rank in self._grid.ranks:
            arrays = {}
            for layer in range(shape.num_layers):
                for name, (inputs, outputs) in sizes.items():
                    block = "self_attn" if name[0] in "qkvo" else "mlp"
                    prefix = f"base_model.model.model.layers.{layer}.{block}.{name}"
                    a = generator.standard_normal((rank, inputs), dtype=np.float32)
                    b = generator.standard_normal((outputs, rank), dtype=np.float32)
                    arrays[f"{prefix}.lora_A.weight"] = a * np.float32(0.01)
                    arrays[f"{prefix}.lora_B.weight"] = b * np.float32(0.01)
            config = {"r": rank, "lora_alpha": rank, "target_modules": list(sizes)}
            config |= {"peft_type": "LORA"}
            for index in range(count):
                # The same values under each name, and other bytes in memory.
                self._engine.load_adapter(f"r{rank}-{index}", arrays, config)
        return count

    def _prompt(self, tokens: int) -> list[int]:
        return [self._rng.randrange(self._vocabulary) for _ in range(tokens)]

    def _submit(self, prompt: int, steps: int, adapter: tuple[int, int] | None) -> RequestHandle:
        params = SamplingParams(max_tokens=steps, temperature=0.0, ignore_eos=True)
        name = adapter and f"r{adapter[0]}-{adapter[1]}"
        return self._engine.submit(self._prompt(prompt), params, name)

    def run(self, scenario: Scenario) -> list[StepRecord]:
        """The steps of one scenario, from where all its sequences decode together. Those before
        find the caches cold and are of accidental compositions."""
        steps = self._steps(scenario)
        running = [self._submit(_PROMPT_TOKENS, steps, a) for a in scenario.adapters]
        records = []
        if running:
            records += self._until_decoding(len(running))
        for tokens in self._prefills(scenario):
            self._submit(tokens, 1, scenario.prefill_adapter).result(_TIMEOUT_S)
        for handle in running:
            handle.result(_TIMEOUT_S)
        records += self._engine.take_step_records()
        together = (i for i, r in enumerate(records) if r.decode_tokens == len(running))
        return records[next(together, len(records)) :]

    def _prefills(self, scenario: Scenario) -> list[int]:
        return [p for p in scenario.prefills for _ in range(self._grid.prefill_samples)]

    def _steps(self, scenario: Scenario) -> int:
        """Long enough for all sequences to decode together, and beside every prefill."""
        if not self._step_s:
            self._submit(_PROMPT_TOKENS, 32, None).result(_TIMEOUT_S)
            self._step_s = median(r.seconds for r in self._engine.take_step_records())
        waits_s = _SUBMIT_S * (len(scenario.adapters) + 4 * len(self._prefills(scenario)) + 8)
        steps = scenario.decode_steps + math.ceil(waits_s / self._step_s)
        return min(steps, self._engine.model_config.max_position - _PROMPT_TOKENS - 1)

    def _until_decoding(self, count: int) -> list[StepRecord]:
        """Returns once all sequences decode together, or none has anything left to do."""
        records: list[StepRecord] = []
        while not any(r.decode_tokens == count for r in records):
            stats = self._engine.stats()
            if not stats.running and not stats.waiting:
                break
            time.sleep(0.0005)
            records += self._engine.take_step_records()
        return records

    def points(
        self, wanted: Sequence[Scenario], on_done: Callable[[], None] = lambda: None
    ) -> list[Point]:
        """Every composition that occurred in all repeats. The first round warms up and is left
        out."""
        times: dict[tuple[float, ...], list[float]] = {}
        loads: dict[tuple[float, ...], StepLoad] = {}
        for repeat in range(self._grid.repeats + 1):
            for number in self._order(len(wanted)):
                for key, group in _points_of(self.run(wanted[number])).items():
                    if repeat:
                        times.setdefault((number, *key), []).append(_undisturbed_s(group))
                        loads.setdefault((number, *key), _load(group))
                on_done()
        return [
            Point(loads[key], tuple(seconds))
            for key, seconds in times.items()
            if len(seconds) == self._grid.repeats
        ]

    def _order(self, count: int) -> Iterator[int]:
        numbers = list(range(count))
        self._rng.shuffle(numbers)
        return iter(numbers)
