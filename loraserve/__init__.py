"""LoRAServe: one base model, thousands of LoRA adapters, cost by each adapter's own rank."""

from typing import TYPE_CHECKING, Any

from loraserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from loraserve.client import AsyncClient, Client
    from loraserve.engine import Completion, Engine, EngineConfig

__all__ = ["AsyncClient", "Client", "Completion", "Engine", "EngineConfig", "SamplingParams"]


def __getattr__(name: str) -> Any:
    # Late: a client or a controller needs no engine, and its machine may not even run one; an
    # embedded engine needs no gRPC.
    if name in ("Completion", "Engine", "EngineConfig"):
        import loraserve.engine

        return getattr(loraserve.engine, name)
    if name in ("AsyncClient", "Client"):
        import loraserve.client

        return getattr(loraserve.client, name)
    raise AttributeError(name)
