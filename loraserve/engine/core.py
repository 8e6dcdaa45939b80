"""The embedded engine: one model, many adapters, in this process."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from loraserve import _engine
from loraserve.background import run_in_background
from loraserve.checkpoint.model_config import read_model_config
from loraserve.checkpoint.model_weights import open_model_weights
from loraserve.engine import arguments
from loraserve.engine.adapters import AdapterInput, AdapterTable, LoadedAdapter, read_adapter
from loraserve.engine.assembly import Assembler, Chunk, Completion, typed_error
from loraserve.engine.config import EngineConfig
from loraserve.engine.delivery import Delivery, Mailbox, Receiver, StepSink
from loraserve.engine.loading import engine_model_config, engine_weights, weight_dtype
from loraserve.engine.native import assign, native_config, native_params
from loraserve.engine.request_handle import RequestHandle, Submitted, SunkRequest
from loraserve.engine.stats import EngineStats, StepRecord, snapshot, step_record
from loraserve.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
)
from loraserve.sampling_params import SamplingParams
from loraserve.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]


class Engine:
    """Loads a model and answers requests. Every method may be called from any thread.

    A context manager; `close` otherwise, or it runs until the program ends. Raises the typed errors
    of loraserve.errors, each naming the field it is about.
    """

    def __init__(self, config: EngineConfig) -> None:
        model_path = arguments.directory("model", config.model)
        self.config = config
        self.tokenizer: Tokenizer | None = None
        with arguments.reading("model"):
            self.model_config = read_model_config(model_path)
            weights = open_model_weights(model_path, self.model_config)
            if (model_path / "tokenizer.json").exists():
                self.tokenizer = Tokenizer.from_directory(model_path)
        self.base_digest: str = weights.digest
        self.weight_dtype = weight_dtype(config.weight_dtype, weights)
        native = native_config(config, self.weight_dtype)
        shape = engine_model_config(self.model_config)
        try:
            with engine_weights(weights) as views:
                self._native = _engine.Engine(native, shape, views)
        except _engine.StatusError as error:
            raise typed_error(*error.args) from None
        end_ids = set(self.model_config.eos_token_ids)
        if self.tokenizer is not None:
            end_ids.update(self.tokenizer.eos_ids)
        self._end_ids = frozenset(i for i in end_ids if i < self.model_config.vocab_size)
        self._table = AdapterTable(self._native, config, self.base_digest)
        self._delivery = Delivery(self._native, self._table.removed, self._table.installs)
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._live: set[str] = set()

    # Adapters

    def load_adapter(
        self,
        name: str,
        source: AdapterInput,
        config: Mapping[str, Any] | None = None,
        *,
        replace: bool = False,
        allow_base_mismatch: bool = False,
    ) -> str:
        """Makes `name` usable; returns its revision.

        `source` is a PEFT directory, a packed file, a PackedAdapter, or a mapping of PEFT's tensor
        names to arrays (DLPack) with its `config`. Loading what is loaded already changes nothing;
        another revision needs `replace`: requests in flight end on the old one.
        """
        arguments.text("adapter", name)
        with arguments.reading("adapter"):
            adapter = run_in_background(lambda: read_adapter(source, config))
        load = self._table.load(
            name, adapter, replace=replace, allow_base_mismatch=allow_base_mismatch
        )
        return load.revision

    def unload_adapter(self, name: str, timeout_s: float | None = None) -> None:
        """Refuses new requests for `name` at once, returns when the running ones have ended."""
        self._table.unload(name, timeout_s)

    def prefetch(self, name: str) -> None:
        """A hint that requests for `name` are about to come: writes it into pages meanwhile, in the
        place of what would be evicted next. Raises NotFoundError."""
        self._table.prefetch(name)

    def adapters(self) -> list[LoadedAdapter]:
        """What is loaded, by name."""
        return self._table.loads()

    def installed(self) -> frozenset[str]:
        """Names of the adapters that are in pages now, ready for the next step; the others loaded
        are in host memory. A moment old."""
        return self._table.installed()

    def register_host_memory(self, memory: memoryview) -> bool:
        """Has the GPU lock writable `memory` in place and copy adapters in it directly, without a
        copy by the host. False where the device has no use for it (the CPU). The engine keeps
        `memory` from being unmapped. Slow: every page is faulted in. Raises ResourceExhaustedError
        where so much cannot be locked, AlreadyExistsError for memory that overlaps an earlier one,
        UnavailableError; then nothing changes, adapters are read as before."""
        try:
            return self._native.register_host_memory(memory)
        except _engine.StatusError as error:
            raise typed_error(*error.args) from None

    # Requests

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        adapter: str | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str = "",
        timeout_s: float | None = None,
        start_index: int = 0,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> RequestHandle:
        """Queues a request. With `loop`, its chunks are read by a coroutine of that loop.

        `start_index` says that the last so many prompt ids were generated by an earlier attempt:
        penalties, min_tokens and draws go on as if there had been one; max_tokens is of the rest.
        """
        params = params or SamplingParams()
        prompt_ids = self.encode(prompt)
        mailbox = Mailbox(loop)
        engine_id, request_id = self._new_ids(request_id)
        request, end_ids = self._request(engine_id, prompt_ids, params, priority, start_index)
        resumed = max(0, min(start_index, len(prompt_ids)))
        assembler = Assembler(params, prompt_ids, self.tokenizer, end_ids, resumed)
        begun, load = self._begin(request, request_id, mailbox, adapter, tenant, timeout_s)
        return RequestHandle(begun, request_id, mailbox, assembler, load)

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
    ) -> SunkRequest:
        """As `submit`, for many requests of one reader: `sink` gets what each step brought to all
        of them at once, each request under its `key`, as tokens without text. Stop strings are
        refused (`stop`)."""
        if params.stop:
            raise InvalidArgumentError("stop", "needs text, of which a sink gets none")
        engine_id, request_id = self._new_ids(request_id)
        ids = self.encode(prompt_ids)
        request, end_ids = self._request(engine_id, ids, params, priority, start_index)
        begun, _ = self._begin(request, request_id, (sink, key), adapter, tenant, timeout_s)
        return SunkRequest(begun, Assembler(params, ids, None, end_ids))

    def _new_ids(self, request_id: str | None) -> tuple[int, str]:
        engine_id = next(self._ids)
        return engine_id, arguments.text("request_id", request_id or f"request-{engine_id}")

    def _request(
        self,
        engine_id: int,
        prompt_ids: list[int],
        params: SamplingParams,
        priority: int,
        start_index: int,
    ) -> "tuple[_engine.Request, frozenset[int]]":
        """The C++ request, and all tokens that end it."""
        request = _engine.Request()
        request.id = engine_id
        assign(request, "priority", priority)
        end_ids = frozenset(arguments.integers("stop_token_ids", params.stop_token_ids))
        if not params.ignore_eos:
            end_ids |= self._end_ids
        request.prompt = prompt_ids
        assign(request, "resumed_tokens", start_index, "start_index")
        request.params = native_params(params, end_ids)
        return request, end_ids

    def _begin(
        self,
        request: "_engine.Request",
        request_id: str,
        receiver: Receiver,
        adapter: str | None,
        tenant: str,
        timeout_s: float | None,
    ) -> tuple[Submitted, LoadedAdapter | None]:
        timeout = arguments.seconds("timeout_s", timeout_s)
        tenant = arguments.text("tenant", tenant)
        adapter = None if adapter is None else arguments.text("adapter", adapter)
        with self._lock:
            if request_id in self._live:
                raise AlreadyExistsError("request_id", f"{request_id!r} is in use")
            self._live.add(request_id)
        engine_id = request.id
        try:
            with self._table.using(adapter) as load:
                request.adapter = load.engine_id if load else 0
                request.cache_namespace = f"{tenant}\0{load.revision if load else ''}"
                self._delivery.register(engine_id, receiver)
                self._native.submit(request, timeout)
        except _engine.StatusError as error:
            self._ended(engine_id, request_id)
            raise typed_error(*error.args) from None
        except BaseException:
            self._ended(engine_id, request_id)
            raise
        begun = Submitted(
            lambda: self._native.abort(engine_id),
            lambda: self._ended(engine_id, request_id),
            len(request.prompt),
        )
        return begun, load

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> list[Completion]:
        """The answers, in order of the prompts. Raises the error of the first that fails."""
        if isinstance(prompts, str):
            raise InvalidArgumentError("prompts", "is one prompt; a sequence of them is needed")
        count = len(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * count
        adapters = [None] * count if adapters is None else adapters
        if len(params) != count or len(adapters) != count:
            raise InvalidArgumentError("prompts", "params and adapters must be as many")
        handles: list[RequestHandle] = []
        try:
            for prompt, one, adapter in zip(prompts, params, adapters, strict=True):
                handles.append(self.submit(prompt, one, adapter))
            return [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.abort()
            raise

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        adapter: str | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str = "",
        timeout_s: float | None = None,
        start_index: int = 0,
    ) -> AsyncIterator[Chunk]:
        """The answer in chunks as the engine makes it. Leaving the loop aborts the request."""
        handle = self.submit(
            prompt,
            params,
            adapter,
            request_id=request_id,
            priority=priority,
            tenant=tenant,
            timeout_s=timeout_s,
            start_index=start_index,
            loop=asyncio.get_running_loop(),
        )
        async for chunk in handle.chunks():
            yield chunk

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; ids pass unchanged."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidArgumentError("prompt", "is text, but there is no tokenizer")
            return self.tokenizer.encode(prompt)
        return arguments.integers("prompt", prompt)

    def _ended(self, engine_id: int, request_id: str) -> None:
        self._delivery.forget(engine_id)
        with self._lock:
            self._live.discard(request_id)

    # State

    def stats(self) -> EngineStats:
        """Counters since the start and gauges of the last step."""
        return snapshot(self._native.stats())

    def take_step_records(self) -> list[StepRecord]:
        """What the steps since the last call did, with EngineConfig.record_steps; else nothing."""
        return [step_record(record) for record in self._delivery.take_records()]

    @property
    def backend_name(self) -> str:
        """The device and what was chosen on it, such as "cpu x86-64-v4"."""
        return self._native.backend_name()

    def close(self) -> None:
        """Ends the engine after its current step; waiting callers get UnavailableError."""
        self._delivery.stop()
        self._table.closed()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
