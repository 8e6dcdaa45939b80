"""The client SDK for asyncio."""

import asyncio
import contextlib
import random
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from types import TracebackType

from loraserve.client.adapter_calls import AdapterCalls
from loraserve.client.channels import Channels
from loraserve.client.local_text import LocalText
from loraserve.client.request_run import RequestRun, Site
from loraserve.client.resume import AnswerLog
from loraserve.client.retry import RetryBudget, RetryPolicy
from loraserve.client.route_table import RouteTable, static_table
from loraserve.client.route_watch import RouteWatch
from loraserve.client.routing import Router, RouteRequest
from loraserve.client.step_mux import StepMux
from loraserve.client.types import AdapterInfo, Chunk, Completion, Prompt
from loraserve.errors import (
    REFUSED,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from loraserve.sampling_params import SamplingParams
from loraserve.security.tls import TlsFiles
from loraserve.text.tokenizer import Tokenizer
from loraserve.tracing import Span

# Streams on a node that left the table may go on for so long; it may only be out of the
# controller's sight.
_RETIRED_CHANNEL_S = 600.0
# Longer prompts are tokenized in a thread, so that what else the loop does goes on.
_INLINE_CHARACTERS = 4096


class AnswerStream:
    """An answer as it comes: an async iterator of chunks. Leaving it early (`aclose`, or the end of
    `async with`) cancels the request."""

    def __init__(
        self, run: RequestRun, log: AnswerLog, prepare: Callable[[], None] | None = None
    ) -> None:
        """`prepare`: runs in a thread before anything is sent."""
        self._run = run
        self._log = log
        self._chunks = run.chunks() if prepare is None else self._prepared(prepare)

    async def _prepared(self, prepare: Callable[[], None]) -> AsyncGenerator[Chunk, None]:
        await asyncio.to_thread(prepare)
        async with contextlib.aclosing(self._run.chunks()) as chunks:
            async for chunk in chunks:
                yield chunk

    def __aiter__(self) -> "AnswerStream":
        return self

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        await self._chunks.aclose()

    async def __aenter__(self) -> "AnswerStream":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    @property
    def prompt_tokens(self) -> int:
        """As the node counted them; estimated for text before the first chunk."""
        return self._log.prompt_tokens

    def completion(self) -> Completion:
        """The whole answer, once the stream has ended. Raises FailedPreconditionError before."""
        if self._log.finish_reason is None:
            raise FailedPreconditionError("stream", "the answer has not ended")
        return self._log.completion(self._run.attempts)


class AsyncClient:
    """A client of one cluster. Lives on one event loop; an async context manager, `close`
    otherwise.

    It keeps the controller's route table, picks a node for each request and sends it there:
    tokens never pass through the controller. A request whose node fails goes on on another one.
    Errors are those of loraserve.errors.
    """

    def __init__(
        self,
        controller: str | None = None,
        *,
        nodes: Sequence[str] = (),
        api_key: str | None = None,
        tls: TlsFiles | None = None,
        retry: RetryPolicy | None = None,
        multiplex: bool = False,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """`controller`: host:port. Without one, `nodes` are the host:port of nodes that serve
        alone. `multiplex`: all requests on one stream to each node, which costs both sides less
        where many run; a request alone gets its tokens as soon either way. `tokenizer`: that of the
        base model of all requests; with it the client tokenizes prompts and makes texts itself,
        which nodes then need not, but where a request has stop strings. Connects when first used.
        Raises InvalidArgumentError."""
        if (controller is None) == (not nodes):
            raise InvalidArgumentError(
                "controller", "exactly one of controller and nodes is needed"
            )
        policy = retry or RetryPolicy()
        self._channels = Channels(api_key, tls)
        self._controller = controller
        router = Router(
            time.monotonic, random.random, None if controller else static_table(tuple(nodes))
        )
        watch = RouteWatch(self._channels, controller, self._on_table) if controller else None
        mux = StepMux(self._channels) if multiplex else None
        self._site = Site(self._channels, router, watch, policy, RetryBudget(policy), mux)
        self._tokenizer = tokenizer
        self._watching = False
        self._retired: set[asyncio.Task[None]] = set()
        self.adapters = AdapterCalls(self._channels, controller)
        """Adding, changing, listing and removing adapters."""

    # Requests

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        base: str = "",
        revision: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        request_id: str | None = None,
        span: Span | None = None,
    ) -> AnswerStream:
        """The answer in chunks, each token exactly once.

        `adapter`: None for the base model. `revision`: of the adapter, by default what its name
        points to. `timeout_s`: for the whole request, retries included. `span`: what attempts are
        traced under.
        """
        self._watch()
        params = params or SamplingParams()
        text: LocalText | None = None
        later = False
        tokenizer = None if params.stop else self._tokenizer
        if tokenizer is not None:
            later = isinstance(prompt, str) and len(prompt) > _INLINE_CHARACTERS
            if isinstance(prompt, str) and not later:
                prompt = tokenizer.encode(prompt)
            text = None if isinstance(prompt, str) else LocalText(tokenizer, prompt)
        log = AnswerLog(
            request_id if request_id is not None else uuid.uuid4().hex,
            prompt,
            params,
            adapter=adapter,
            base=base,
            revision=revision,
            priority=priority,
            text=text,
        )
        run = RequestRun(self._site, log, RouteRequest(base, adapter, revision), timeout_s, span)
        if not later:
            return AnswerStream(run, log)

        def prepare() -> None:
            assert isinstance(prompt, str)
            assert tokenizer is not None
            ids = tokenizer.encode(prompt)
            log.set_token_ids(ids, LocalText(tokenizer, ids))

        return AnswerStream(run, log, prepare)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        base: str = "",
        revision: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Completion:
        """The whole answer; see `stream`."""
        async with self.stream(
            prompt,
            params,
            adapter=adapter,
            base=base,
            revision=revision,
            priority=priority,
            timeout_s=timeout_s,
            request_id=request_id,
        ) as stream:
            async for _ in stream:
                pass
            return stream.completion()

    # Routes

    @property
    def routes(self) -> RouteTable:
        """The table that requests are routed by; the last one where the controller is away."""
        return self._site.router.table

    @property
    def pages(self) -> tuple[int, int]:
        """Pages of the nodes' engines, (in use, all), as their last answers to this client told."""
        return self._site.router.pages()

    @property
    def routes_age_s(self) -> float | None:
        """Seconds since the controller confirmed the table; None before the first and where there
        is no controller."""
        return self._site.watch.age_s if self._site.watch else None

    async def wait_routable(
        self,
        adapters: Iterable[str],
        *,
        base: str = "",
        timeout_s: float = 30.0,
        revision: str | None = None,
    ) -> None:
        """Returns when every named adapter has a holder; with none named, when there is a node.

        `revision`: the adapters named mean it by then, as after an update, whose answer comes
        before routes tell of it. Raises DeadlineExceededError, which names one that has none and
        why; at once FailedPreconditionError where every node has found that it can never load one.
        """
        watch = self._site.watch
        if watch is None:
            return
        self._watch()
        names = list(adapters)
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        await watch.first_table(timeout_s)
        while (missing := self._missing(names, base, revision)) is not None:
            self._check_loadable(names, base, revision)
            left = end - loop.time()
            if left <= 0:
                raise DeadlineExceededError("timeout_s", f"{timeout_s:g} s have passed: {missing}")
            await watch.changed(left)

    async def wait_admitted(self, added: Iterable[AdapterInfo], *, timeout_s: float = 30.0) -> None:
        """As `wait_routable`, of adapters that were just added. Each that no node can ever load is
        taken back: its name is free again when FailedPreconditionError says why. That error is
        raised rather than DeadlineExceededError about another one."""
        end = asyncio.get_running_loop().time() + timeout_s
        refused: FailedPreconditionError | None = None
        late: DeadlineExceededError | None = None
        for info in added:
            left = max(0.0, end - asyncio.get_running_loop().time())
            try:
                await self.wait_routable(
                    [info.name], base=info.base, timeout_s=left, revision=info.revision
                )
            except FailedPreconditionError as error:
                refused = refused or error
                with contextlib.suppress(NotFoundError):
                    await self._take_back(info)
            except DeadlineExceededError as error:
                late = late or error  # of those after it, what is known by now still counts
        if failed := refused or late:
            raise failed

    async def _take_back(self, info: AdapterInfo) -> None:
        """Unless the name means something else by now. Raises NotFoundError where it is gone."""
        current = await self.adapters.get(info.name, base=info.base)
        if current.revision == info.revision and current.unrouted_reason.startswith(REFUSED):
            await self.adapters.remove(info.name, base=info.base)

    async def wait_table(self, timeout_s: float = 3.0) -> None:
        """Returns when there is a route table, at once where there is one. Raises
        UnavailableError, and what the controller refuses to give one with."""
        if self._site.watch is not None:
            self._watch()
            await self._site.watch.first_table(timeout_s)

    async def wait_routes(self, met: Callable[[RouteTable], bool], timeout_s: float) -> bool:
        """Waits until the table meets the condition; False where it does not in time."""
        watch = self._site.watch
        end = asyncio.get_running_loop().time() + timeout_s
        while not met(self.routes):
            left = end - asyncio.get_running_loop().time()
            if watch is None or left <= 0:
                return False
            self._watch()
            await watch.changed(left)
        return True

    def _check_loadable(self, names: Sequence[str], base: str, revision: str | None) -> None:
        """Raises FailedPreconditionError where no node ever serves one of them."""
        for name in names:
            route = self._site.router.table.find(base, name)
            if route is None or revision not in (None, route.revision):
                continue  # what is told of the name may be of an adapter that was removed
            if route.unrouted_reason.startswith(REFUSED):
                raise FailedPreconditionError("adapter", f"{name!r}: {route.unrouted_reason}")

    def _missing(self, names: Sequence[str], base: str, revision: str | None) -> str | None:
        router = self._site.router
        if not router.table.nodes:
            return "no node has registered"
        for name in names:
            route = router.table.find(base, name)
            if route is not None and revision not in (None, route.revision):
                return f"adapter {name!r} still means revision {route.revision[:12]}"
            if not router.has_holder(RouteRequest(base, name)):
                if route is None:
                    return f"adapter {name!r} is not in the route table"
                return (
                    f"adapter {name!r}: {route.unrouted_reason or 'its holders take nothing new'}"
                )
        return None

    def _watch(self) -> None:
        if self._site.watch is not None and not self._watching:
            self._watching = True
            self._site.watch.start()

    def _on_table(self, table: RouteTable) -> None:
        self._site.router.set_table(table)
        used = {node.address for node in table.nodes.values()} | {self._controller}
        if self._site.mux is not None:
            self._site.mux.keep({node.address for node in table.nodes.values()})
        for channel in self._channels.drop(self._channels.addresses - used):
            closing = asyncio.ensure_future(channel.close(_RETIRED_CHANNEL_S))
            self._retired.add(closing)
            closing.add_done_callback(self._retired.discard)

    async def close(self) -> None:
        """Ends what runs with UnavailableError. Idempotent."""
        if self._site.watch is not None:
            await self._site.watch.stop()
        await self._channels.close()
        for closing in self._retired:
            closing.cancel()
        await asyncio.gather(*self._retired, return_exceptions=True)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
