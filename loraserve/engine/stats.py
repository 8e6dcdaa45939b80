"""Counters and gauges of an engine, and records of its steps."""

from dataclasses import dataclass, fields

from loraserve import _engine


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, then gauges of now."""

    steps: int
    prompt_tokens: int
    """Computed in prefill, recomputation after preemption included."""
    generated_tokens: int
    preemptions: int
    prefix_hit_tokens: int
    adapter_installs: int
    adapter_evictions: int
    adapter_install_seconds: float
    """Of all installs, each from its start to its end; several may go on at a time."""
    adapter_waits: int
    """Requests that came before their adapter was in pages."""
    adapter_wait_seconds: float
    """Of theirs, from the request's coming until the adapter was there."""
    step_seconds: float
    """Spent in steps."""

    running: int
    waiting: int
    page_bytes: int
    pages_free: int
    pages_kv: int
    pages_adapter: int
    adapters_installed: int
    """In pages, ready for the next step; the others loaded are in host memory."""
    adapters_installing: int
    """On their way into pages; they have theirs already."""
    adapter_direct_bytes: int
    """Of packed adapters, read by a GPU from host memory that it knows
    (Engine.register_host_memory), since the start."""
    adapter_staged_bytes: int
    """Those read from elsewhere. Both 0 on the CPU."""
    adapter_weight_bytes: int
    """Of their weights; `pages_adapter` pages hold them and some padding."""
    weight_bytes: int


@dataclass(frozen=True)
class StepRecord:
    """What one step did and how long it took; counts are of tokens unless they say otherwise."""

    seconds: float
    prefill_tokens: int
    decode_tokens: int
    context_tokens: int
    """Sum over decoding sequences of their contexts."""
    chunk_context: float
    """Sum over prefill chunks of their tokens times the mean context while they are computed."""
    token_ranks: int
    """Sum over tokens of their adapter's largest rank."""
    adapters: int
    """Distinct ones."""
    adapter_bytes: int
    """Of the distinct ones, as they lie in pages."""
    max_rank: int
    installs: int
    """Adapters that were being written into pages beside the step."""


def step_record(record: _engine.StepRecord) -> StepRecord:
    """A plain copy."""
    return StepRecord(**{f.name: getattr(record, f.name) for f in fields(StepRecord)})


def snapshot(stats: _engine.EngineStats) -> EngineStats:
    """A plain copy."""
    return EngineStats(**{f.name: getattr(stats, f.name) for f in fields(EngineStats)})
