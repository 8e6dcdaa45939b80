"""One request from its first attempt to its last token: choose a node, send, and where the node
fails, again or on from there."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import Protocol, cast

import grpc.aio

from loraserve.client.channels import Channels, responses
from loraserve.client.messages import load_from_wire
from loraserve.client.resume import AnswerLog, Response, lost
from loraserve.client.retry import RetryBudget, RetryPolicy, RetryState, node_is_lost
from loraserve.client.route_table import NodeRoute
from loraserve.client.route_watch import RouteWatch
from loraserve.client.routing import Router, RouteRequest
from loraserve.client.step_mux import StepMux
from loraserve.client.traced import in_span
from loraserve.client.types import Chunk
from loraserve.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    LoraServeError,
    NotFoundError,
    ResourceExhaustedError,
    StaleRouteError,
    UnavailableError,
)
from loraserve.tracing import Span
from loraserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

# How long a request waits for a holder while its adapter is on its way to one, before it asks
# another node to load it.
HOLDER_WAIT_S = 2.0
FIRST_TABLE_WAIT_S = 3.0
# How long a request that a node has turned away waits for newer routes, before another node is
# asked to load the adapter.
NEWER_ROUTES_WAIT_S = 2.0
LONGEST_TIMEOUT_S = 30 * 24 * 3600.0
# What the deadline leaves to the node's own error before the RPC's ends the call.
DEADLINE_GRACE_S = 0.25


@dataclass
class Site:
    """What the requests of a client share. `watch` is None for a list of nodes, `mux` where each
    request is an RPC of its own."""

    channels: Channels
    router: Router
    watch: RouteWatch | None
    policy: RetryPolicy
    budget: RetryBudget
    mux: StepMux | None = None


class _Source(Protocol):
    """What a node answers to one attempt."""

    async def get(self) -> Response | list[int]:
        """A message, or tokens that are all there is to tell. Raises LoraServeError."""

    async def close(self) -> None:
        """Cancels what has not ended."""


class _RpcAttempt:
    """An attempt that is an RPC of its own."""

    def __init__(
        self,
        messages: AsyncGenerator[inference_pb2.GenerateResponse, None],
        observe: Callable[[common_pb2.NodeLoad], None],
    ) -> None:
        self._messages = messages
        self._observe = observe

    async def get(self) -> inference_pb2.GenerateResponse:
        message = await anext(self._messages, None)
        if message is None:
            raise lost("the node ended the stream before the answer")
        if message.HasField("load"):
            self._observe(message.load)
        return message

    async def close(self) -> None:
        await self._messages.aclose()


@dataclass(frozen=True)
class _Hint:
    """What a node that turned the request away knew of the holders of a revision."""

    revision: str | None = None
    version: tuple[int, int] = (0, 0)
    holders: frozenset[str] = frozenset()


def _check_timeout(timeout_s: float | None) -> None:
    """Raises InvalidArgumentError. Zero and less have passed already, which is no mistake."""
    if timeout_s is not None and not timeout_s <= LONGEST_TIMEOUT_S:
        raise InvalidArgumentError(
            "timeout_s", f"{timeout_s} is not a number of seconds up to {LONGEST_TIMEOUT_S:g}"
        )


class RequestRun:
    def __init__(
        self,
        site: Site,
        log: AnswerLog,
        route: RouteRequest,
        timeout_s: float | None,
        span: Span | None = None,
    ) -> None:
        """`span`: each attempt is a child of it. Raises InvalidArgumentError (`timeout_s`)."""
        _check_timeout(timeout_s)
        self._site = site
        self._log = log
        self._span = span
        self._route = route
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_s
        self._end = None if timeout_s is None else self._loop.time() + timeout_s
        self._retry = RetryState(site.policy, site.budget)
        self._avoid: set[str] = set()
        self._trusts_table = True
        # Nodes that turned the request away, with the revision that they do not hold.
        self._stale: dict[str, str | None] = {}
        self._hint = _Hint()
        # Nobody may turn the request away any more.
        self._on_demand = False

    @property
    def attempts(self) -> int:
        return self._retry.attempt + 1

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """The answer. Leaving it cancels the request. Raises LoraServeError."""
        while True:
            node = await self._choose()
            had = len(self._log.token_ids)
            try:
                async with contextlib.aclosing(self._traced(node)) as attempt:
                    async for chunk in attempt:
                        yield chunk
                return
            except LoraServeError as error:
                if node_is_lost(error) and not self._site.channels.closed:
                    self._site.router.failed(node.node_id)
                last = self._log.finish_if_full(self._retry.attempt)
                if last is None:
                    await self._after(error, node, len(self._log.token_ids) > had)
            if last is not None:
                yield last
                return

    def _left(self) -> float | None:
        """Seconds. Raises DeadlineExceededError."""
        if self._end is None:
            return None
        left = self._end - self._loop.time()
        if left <= 0:
            raise self._late()
        return left

    def _late(self) -> DeadlineExceededError:
        return DeadlineExceededError(
            "timeout_s",
            f"{self._timeout_s:g} s have passed, {len(self._log.token_ids)} tokens came",
        )

    async def _choose(self) -> NodeRoute:
        """Raises UnavailableError where no node can be asked, NotFoundError for a base that nobody
        has heard of."""
        site, watch = self._site, self._site.watch
        if watch is not None:
            await watch.first_table(min(self._left() or FIRST_TABLE_WAIT_S, FIRST_TABLE_WAIT_S))
        route = self._route_now()
        first = not (self._log.started or self._avoid or self._on_demand)
        if watch is not None and first:
            await self._wait_for_holder(watch, route)
        node = site.router.pick(route)
        if node is None and route.avoid:
            # Nobody else is there: the only node may have recovered, or load the adapter again.
            self._avoid.clear()
            node = site.router.pick(replace(route, avoid=frozenset()))
        if node is None:
            raise self._no_node(route)
        return node

    def _route_now(self) -> RouteRequest:
        """The route that the next attempt wants."""
        wanted = self._log.revision or self._routed_revision()
        stale = {n for n, revision in self._stale.items() if revision == wanted}
        table, hint = self._site.router.table, self._hint
        newer = hint.revision == wanted and hint.version > (table.epoch, table.version)
        return RouteRequest(
            self._log.base,
            self._route.adapter,
            self._log.revision,
            frozenset(self._avoid | stale),
            hinted=hint.holders if newer else None,
        )

    def _routes_of(self, node: NodeRoute) -> tuple[int, int] | None:
        """What makes the node turn the request away where it does not hold the adapter; None where
        it is to load it."""
        route = self._route_now()
        if node.node_id in self._stale or self._on_demand or not self._trusts_table:
            return None
        if not self._site.router.routed(route, node.node_id):
            return None
        table = self._site.router.table
        return self._hint.version if route.hinted is not None else (table.epoch, table.version)

    async def _wait_for_holder(self, watch: RouteWatch, route: RouteRequest) -> None:
        """Only for what the table knows: the rest is the nodes' to find or refuse."""
        router = self._site.router
        known = router.table.find(route.base, route.adapter) if route.adapter else None
        if route.revision is not None and (known is None or known.revision != route.revision):
            return
        end = self._loop.time() + HOLDER_WAIT_S
        while (
            route.adapter is not None
            and not router.has_holder(route)
            and router.table.find(route.base, route.adapter) is not None
            and (left := end - self._loop.time()) > 0
        ):
            own = self._left()
            await watch.changed(left if own is None else min(left, own))
            self._left()

    def _no_node(self, route: RouteRequest) -> LoraServeError:
        table = self._site.router.table
        if not table.nodes:
            return UnavailableError("nodes", "none has registered with the controller")
        known = table.find(route.base, route.adapter) if route.adapter else None
        base, bases = known.adapter.base if known else route.base, table.bases()
        if not base or bases & {base, ""}:
            return UnavailableError("nodes", "all are draining")
        served = ", ".join(sorted(bases))
        if known is None and not self._log.started:
            return NotFoundError("base", f"no node serves {base!r}, but {served}")
        # The cluster knows the base: its nodes may come back.
        return UnavailableError("nodes", f"none serves {base!r}, but {served}")

    def _traced(self, node: NodeRoute) -> AsyncGenerator[Chunk, None]:
        """An attempt, in a span of its own where the request is traced."""
        if self._span is None:
            return self._attempt(node)
        number = self._retry.attempt
        return in_span(
            self._span, node.node_id, number, self._log, lambda t: self._attempt(node, t)
        )

    async def _attempt(self, node: NodeRoute, traceparent: str = "") -> AsyncGenerator[Chunk, None]:
        left = self._left()
        request = self._log.request(
            self._retry.attempt, left, self._routed_revision(), self._routes_of(node)
        )
        if traceparent:
            request.traceparent = traceparent
        router = self._site.router
        tokens = self._log.prompt_tokens + len(self._log.token_ids)
        counts = router.table.rank_costs is not None
        rank = router.rank_of(self._route_now()) if counts else 0
        ticket = router.began(node.node_id, tokens, rank)
        source: _Source | None = None
        try:
            left = None if left is None else left + DEADLINE_GRACE_S
            source = self._source(node, request, left)
            answered = False
            while True:
                message = await source.get()
                if type(message) is list:
                    yield self._log.accept_tokens(message)
                    continue
                chunk = self._log.accept(cast(Response, message))
                if not answered:
                    answered = True
                    router.answered(node.node_id, ticket)
                if chunk is not None:
                    yield chunk
                if self._log.finish_reason is not None:
                    return
        finally:
            if source is not None:
                await source.close()
            router.ended(node.node_id, ticket)

    def _source(
        self, node: NodeRoute, request: inference_pb2.GenerateRequest, timeout_s: float | None
    ) -> "_Source":
        """Sends the request. Raises LoraServeError."""
        router, channels, mux = self._site.router, self._site.channels, self._site.mux

        def observe(load: common_pb2.NodeLoad) -> None:
            router.observe(node.node_id, load_from_wire(load))

        if mux is not None:
            return mux.begin(node.address, request, timeout_s, observe)
        stub = inference_pb2_grpc.InferenceServiceStub(channels.get(node.address))
        metadata = channels.metadata
        if self._span is not None and request.traceparent:
            metadata = grpc.aio.Metadata(*metadata, ("traceparent", request.traceparent))
        call = stub.Generate(request, metadata=metadata, timeout=timeout_s)
        return _RpcAttempt(responses(channels, call), observe)

    def _routed_revision(self) -> str | None:
        """What the adapter's name means by the table; None where that does not tell."""
        if self._route.adapter is None or not self._trusts_table:
            return None
        known = self._site.router.table.find(self._log.base, self._route.adapter)
        return known.revision if known else None

    async def _after(self, error: LoraServeError, node: NodeRoute, progress: bool) -> None:
        """Returns when the next attempt may begin. Raises where there is none."""
        if isinstance(error, DeadlineExceededError):
            self._left()  # the client's own words where it is the client's deadline
            raise error
        if self._site.channels.closed:
            raise error
        if (
            isinstance(error, NotFoundError)
            and not self._log.started
            and self._log.revision is None
            and self._routed_revision() is not None
        ):
            # The table may be old: the name is asked for, whatever it means now.
            self._trusts_table = False
            self._retry.attempt += 1
            return
        if isinstance(error, StaleRouteError):
            await self._redirected(error, node)
            return
        self._avoid.add(node.node_id)
        wait_s = self._retry.after(error, progress, self._log.started)
        if wait_s is None:
            raise self._final(error, node)
        if isinstance(error, ResourceExhaustedError) and self._other_holder():
            wait_s = 0.0  # that node is full, not the others
        left = self._left()
        if left is not None and wait_s >= left:
            raise error
        if wait_s:
            await asyncio.sleep(wait_s)

    def _other_holder(self) -> bool:
        return self._site.router.has_holder(self._route_now())

    async def _redirected(self, error: StaleRouteError, node: NodeRoute) -> None:
        """Returns when a holder is known, or newer routes name none, or do not come, or the request
        was turned away too often: then a node is to load the adapter. Raises `error` where that
        turned it away too."""
        if self._on_demand:
            raise error
        wanted = self._log.revision or self._routed_revision()
        self._stale[node.node_id] = wanted
        if error.version >= self._hint.version or self._hint.revision != wanted:
            self._hint = _Hint(wanted, error.version, frozenset(error.holders))
        if not self._retry.redirected():
            self._on_demand = True
            return
        router, watch = self._site.router, self._site.watch
        end = self._loop.time() + NEWER_ROUTES_WAIT_S
        while watch is not None and not self._other_holder():
            old = (router.table.epoch, router.table.version) < error.version
            left = end - self._loop.time()
            if left <= 0 or not (old or router.routed(self._route_now(), node.node_id)):
                return
            own = self._left()
            await watch.changed(left if own is None else min(left, own))
            self._left()

    def _final(self, error: LoraServeError, node: NodeRoute) -> LoraServeError:
        count = len(self._log.token_ids)
        if self.attempts > 1 and self._log.started and isinstance(error, NotFoundError):
            # Not the adapter is missing, as the caller would read it, but the way to go on.
            return UnavailableError(
                "resume", f"cannot go on after {count} tokens on {node.address}: {error}"
            )
        if node_is_lost(error):
            after = f" after {count} tokens" if count else ""
            return UnavailableError(
                "node", f"{node.address}{after}, attempt {self.attempts}: {error.message}"
            )
        return error
