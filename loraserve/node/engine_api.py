"""What the daemon needs of an engine, so that its own logic runs and is tested without one."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from loraserve.checkpoint.model_shape import ModelShape
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
    def prompt_logprobs(self) -> list[float | None] | None:
        """In the first chunk, where asked for; None of the first token."""

    @property
    def prompt_top_logprobs(self) -> list[dict[int, float] | None] | None: ...
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


SinkOutput = Any
"""An output of the engine that is not plain; `SunkStream.chunk` reads it."""


class StepOutputs(Protocol):
    """What came for the requests of one sink: `others`, by key, then one further token for each of
    `keys`."""

    @property
    def keys(self) -> list[Any]: ...
    @property
    def tokens(self) -> list[int]: ...
    @property
    def others(self) -> list[tuple[Any, SinkOutput]]: ...


class StepSink(Protocol):
    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...
    def take(self, step: Any) -> None:
        """Gets StepOutputs, on the loop."""


class SunkStream(Protocol):
    """A submitted request whose outputs go to a sink."""

    def abort(self) -> None: ...
    def chunk(self, output: SinkOutput) -> OutputChunk:
        """Without text. Raises the typed error that ends the request."""

    def close(self) -> None:
        """After its last output, or when nobody wants it any more."""


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
    @property
    def adapters_installing(self) -> int: ...
    @property
    def adapter_installs(self) -> int: ...
    @property
    def adapter_evictions(self) -> int: ...
    @property
    def adapter_install_seconds(self) -> float: ...
    @property
    def adapter_waits(self) -> int: ...
    @property
    def adapter_wait_seconds(self) -> float: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def prefix_hit_tokens(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def step_seconds(self) -> float: ...


class ServedEngine(Protocol):
    """loraserve.engine.Engine as the daemon uses it. All methods are thread-safe; `load_adapter`,
    `unload_adapter` and `close` block."""

    def load_adapter(self, name: str, source: Any, *, allow_base_mismatch: bool = False) -> str: ...
    def unload_adapter(self, name: str, timeout_s: float | None = None) -> None: ...
    def installed(self) -> frozenset[str]:
        """Names of the adapters that are in pages now."""

    def register_host_memory(self, memory: memoryview) -> bool:
        """Blocks. Raises ResourceExhaustedError or UnavailableError where it cannot be locked."""

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
    def submit_to(
        self,
        sink: StepSink,
        key: Any,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        adapter: str | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str = "",
        timeout_s: float | None = None,
        start_index: int = 0,
    ) -> SunkStream: ...
    def stats(self) -> EngineGauges: ...
    @property
    def backend_name(self) -> str: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class ModelFacts:
    """The base model of a node. `base_digest` is empty, `shape` None where it is not known."""

    base: str
    base_digest: str
    context_tokens: int
    vocabulary_size: int
    shape: ModelShape | None = None


@dataclass(frozen=True)
class LoadedModel:
    engine: ServedEngine
    facts: ModelFacts
