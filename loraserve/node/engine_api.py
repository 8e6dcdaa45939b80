"""What the daemon needs of an engine, so that its own logic runs and is tested without one."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from loraserve.sampling_params import SamplingParams


class OutputChunk(Protocol):
    """A piece of an answer; `first_index` counts this attempt's tokens from 0."""

    @property
    def first_index(self) -> int: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def text(self) -> str | None: ...
    @property
    def logprobs(self) -> list[float]: ...
    @property
    def top_logprobs(self) -> list[dict[int, float]]: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def stop_reason(self) -> str | int | None: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def queue_s(self) -> float:
        """In the first chunk: seconds from submission to the first step that ran the request."""


class RequestStream(Protocol):
    """A submitted request; `chunks` raises the typed error that ends it. Leaving `chunks` early
    aborts the request."""

    def chunks(self) -> AsyncIterator[OutputChunk]: ...
    def abort(self) -> None:
        """Ends the request with finish_reason "cancelled"; nothing happens where it has ended."""


class EngineGauges(Protocol):
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def pages_free(self) -> int: ...
    @property
    def pages_kv(self) -> int: ...
    @property
    def pages_adapter(self) -> int: ...


class ServedEngine(Protocol):
    """loraserve.engine.Engine as the daemon uses it. All methods are thread-safe; `load_adapter`,
    `unload_adapter` and `close` block."""

    def load_adapter(self, name: str, source: Any, *, allow_base_mismatch: bool = False) -> str: ...
    def unload_adapter(self, name: str, timeout_s: float | None = None) -> None: ...
    def installed(self) -> frozenset[str]:
        """Names of the adapters that are in pages now."""

    def encode(self, prompt: str | Sequence[int]) -> list[int]: ...
    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        adapter: str | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str = "",
        timeout_s: float | None = None,
        start_index: int = 0,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> RequestStream: ...
    def stats(self) -> EngineGauges: ...
    @property
    def backend_name(self) -> str: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class ModelFacts:
    """The base model of a node. `base_digest` is empty where it is not known."""

    base: str
    base_digest: str
    context_tokens: int
    vocabulary_size: int


@dataclass(frozen=True)
class LoadedModel:
    engine: ServedEngine
    facts: ModelFacts
