"""The embedded engine: one model, many adapters, in this process."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from loraserve import _engine
from loraserve.checkpoint.model_config import read_model_config
from loraserve.checkpoint.model_weights import open_model_weights
from loraserve.engine import arguments
from loraserve.engine.adapters import AdapterInput, AdapterTable, LoadedAdapter, read_adapter
from loraserve.engine.assembly import Assembler, Chunk, Completion, typed_error
from loraserve.engine.config import EngineConfig
from loraserve.engine.delivery import Delivery, Mailbox
from loraserve.engine.loading import engine_model_config, engine_weights, weight_dtype
from loraserve.engine.native import assign, native_config, native_params
from loraserve.engine.stats import EngineStats, StepRecord, snapshot, step_record
from loraserve.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    InvalidArgumentError,
    LoraServeError,
)
from loraserve.sampling_params import SamplingParams
from loraserve.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]


class RequestHandle:
    """A submitted request. Read by one thread or coroutine at a time."""

    def __init__(
        self,
        engine: "Engine",
        engine_id: int,
        request_id: str,
        mailbox: Mailbox,
        assembler: Assembler,
        adapter: LoadedAdapter | None,
        prompt_tokens: int,
    ) -> None:
        self._engine = engine
        self._engine_id = engine_id
        self._mailbox = mailbox
        self._assembler = assembler
        self._prompt_tokens = prompt_tokens
        self._chunks: list[Chunk] = []
        self._error: LoraServeError | None = None
        self._done = False
        self.request_id = request_id
        self.revision = adapter.revision if adapter else None

    def abort(self) -> None:
        """Ends the request; what was generated so far stays, with finish_reason "cancelled"."""
        self._engine._abort(self._engine_id)

    def _end(self) -> None:
        self._done = True
        self._engine._ended(self._engine_id, self.request_id)

    def _take(self, raw: Any) -> Chunk:
        try:
            chunk = self._assembler.push(raw)
        except LoraServeError as error:
            self._error = error
            self._end()
            raise
        if chunk.finish_reason is not None:
            self._end()
        if self._assembler.matched:
            self.abort()
        self._chunks.append(chunk)
        return chunk

    def result(self, timeout_s: float | None = None) -> Completion:
        """The whole answer. Raises the request's error, or DeadlineExceededError if it takes more
        than `timeout_s` for the next token; the request itself then goes on."""
        if self._error is not None:
            raise self._error
        while not self._done:
            raw = self._mailbox.get(timeout_s)
            if raw is None:
                raise DeadlineExceededError("timeout_s", f"no output within {timeout_s} s")
            self._take(raw)
        return self._completion()

    async def chunks(self) -> AsyncIterator[Chunk]:
        """The answer as it comes. Leaving the loop early aborts the request."""
        try:
            while not self._done:
                yield self._take(await self._mailbox.aget())
        finally:
            if not self._done:
                self.abort()
                self._end()

    def _completion(self) -> Completion:
        chunks = self._chunks
        last = chunks[-1]
        texts = [chunk.text for chunk in chunks if chunk.text is not None]
        tops = [top for chunk in chunks for top in chunk.top_logprobs]
        return Completion(
            token_ids=[token for chunk in chunks for token in chunk.token_ids],
            text="".join(texts) if texts else None,
            logprobs=[value for chunk in chunks for value in chunk.logprobs],
            top_logprobs=tops or None,
            finish_reason=last.finish_reason or "",
            stop_reason=last.stop_reason,
            prompt_logprobs=chunks[0].prompt_logprobs,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=chunks[0].cached_tokens,
            queue_s=chunks[0].queue_s,
            revision=self.revision,
        )


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
            adapter = read_adapter(source, config)
        load = self._table.load(
            name, adapter, replace=replace, allow_base_mismatch=allow_base_mismatch
        )
        return load.revision

    def unload_adapter(self, name: str, timeout_s: float | None = None) -> None:
        """Refuses new requests for `name` at once, returns when the running ones have ended."""
        self._table.unload(name, timeout_s)

    def adapters(self) -> list[LoadedAdapter]:
        """What is loaded, by name."""
        return self._table.loads()

    def installed(self) -> frozenset[str]:
        """Names of the adapters that are in pages now, ready for the next step; the others loaded
        are in host memory. A moment old."""
        return self._table.installed()

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
        timeout = arguments.seconds("timeout_s", timeout_s)
        tenant = arguments.text("tenant", tenant)
        adapter = None if adapter is None else arguments.text("adapter", adapter)
        engine_id = next(self._ids)
        request_id = arguments.text("request_id", request_id or f"request-{engine_id}")
        request = _engine.Request()
        request.id = engine_id
        assign(request, "priority", priority)
        end_ids = frozenset(arguments.integers("stop_token_ids", params.stop_token_ids))
        if not params.ignore_eos:
            end_ids |= self._end_ids
        request.prompt = prompt_ids
        assign(request, "resumed_tokens", start_index, "start_index")
        request.params = native_params(params, end_ids)
        resumed = max(0, min(start_index, len(prompt_ids)))
        assembler = Assembler(params, prompt_ids, self.tokenizer, end_ids, resumed)
        mailbox = Mailbox(loop)
        with self._lock:
            if request_id in self._live:
                raise AlreadyExistsError("request_id", f"{request_id!r} is in use")
            self._live.add(request_id)
        try:
            with self._table.using(adapter) as load:
                request.adapter = load.engine_id if load else 0
                request.cache_namespace = f"{tenant}\0{load.revision if load else ''}"
                self._delivery.register(engine_id, mailbox)
                self._native.submit(request, timeout)
        except _engine.StatusError as error:
            self._ended(engine_id, request_id)
            raise typed_error(*error.args) from None
        except BaseException:
            self._ended(engine_id, request_id)
            raise
        return RequestHandle(self, engine_id, request_id, mailbox, assembler, load, len(prompt_ids))

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

    def _abort(self, engine_id: int) -> None:
        self._native.abort(engine_id)

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
