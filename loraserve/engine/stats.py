"""Counters and gauges of an engine."""

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
    adapter_weight_bytes: int
    """Of their weights; `pages_adapter` pages hold them and some padding."""
    weight_bytes: int


def snapshot(stats: _engine.EngineStats) -> EngineStats:
    """A plain copy."""
    return EngineStats(**{f.name: getattr(stats, f.name) for f in fields(EngineStats)})
