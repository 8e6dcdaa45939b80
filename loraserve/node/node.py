"""What the services of one node share: its engine, adapters, requests and readiness."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from loraserve.errors import UnavailableError
from loraserve.node.adapters import HeldAdapters
from loraserve.node.demand import DemandCounter
from loraserve.node.engine_api import LoadedModel
from loraserve.node.limits import MAX_RANK, Limits
from loraserve.node.metrics import NodeMetrics
from loraserve.node.moved import MovedAdapters
from loraserve.node.pool.copies import HostCopies
from loraserve.node.requests import LiveRequests
from loraserve.node.resolving import Resolver
from loraserve.tracing import Tracer
from loraserve.v1 import common_pb2, node_pb2

_log = logging.getLogger(__name__)

# A snapshot of the load is told to every request; making one for each token would cost more than
# it is worth.
_LOAD_AGE_S = 0.1


class Node:
    """Made when the model is loaded. Lives on the event loop."""

    def __init__(
        self,
        node_id: str,
        model: LoadedModel,
        limits: Limits,
        host: HostCopies,
        *,
        metrics: NodeMetrics | None = None,
        resolve: Resolver | None = None,
        devices: Sequence[common_pb2.Device] = (),
        relative_speed: float = 1.0,
        drain_timeout_s: float = 30.0,
        on_change: Callable[[], None] = lambda: None,
        tracer: Tracer | None = None,
    ) -> None:
        """`on_change` is called when the controller should hear of something soon."""
        self.node_id = node_id
        # Rises with every start as long as the clock does not go back.
        self.incarnation = time.time_ns() // 1_000_000
        self.engine = model.engine
        self.facts = model.facts
        self.limits = limits
        self.devices = tuple(devices)
        self.relative_speed = relative_speed
        self.drain_timeout_s = drain_timeout_s
        self.metrics = metrics or NodeMetrics()
        self.tracer = tracer
        self.requests = LiveRequests(limits)
        self.demand = DemandCounter()
        self.moved = MovedAdapters()
        self.draining = False
        self._on_change = on_change
        self.adapters = HeldAdapters(
            self.engine,
            host,
            limits,
            resolve=resolve,
            on_change=on_change,
            on_load=self.metrics.adapter_load.observe,
            on_evict=self.metrics.evicted_from_host,
            on_lookup=self.metrics.looked_up,
        )
        self.metrics.observe(
            self.engine, self.requests, self.adapters, self.facts.base, limits.max_sequences
        )
        self._load: common_pb2.NodeLoad | None = None
        self._load_s = 0.0

    @property
    def base(self) -> common_pb2.BaseModel:
        return common_pb2.BaseModel(name=self.facts.base, digest=self.facts.base_digest)

    @property
    def wire_shape(self) -> common_pb2.ModelShape | None:
        """What adapters must fit, where that is known."""
        shape = self.facts.shape
        return None if shape is None else common_pb2.ModelShape(**vars(shape))

    @property
    def wire_limits(self) -> node_pb2.NodeLimits:
        return node_pb2.NodeLimits(
            context_tokens=self.facts.context_tokens,
            vocabulary_size=self.facts.vocabulary_size,
            max_sequences=self.limits.max_sequences,
            max_rank=MAX_RANK,
            max_queued_requests=self.limits.max_queued_requests,
        )

    def check_accepting(self) -> None:
        """Raises UnavailableError while the node drains."""
        if self.draining:
            raise UnavailableError("node", f"{self.node_id} drains and takes no new requests")

    def load(self) -> common_pb2.NodeLoad:
        """The load now or a moment ago. The same object until a new one is made; do not change."""
        now = time.monotonic()
        if self._load is None or now - self._load_s >= _LOAD_AGE_S:
            self._load, self._load_s = self._observe(), now
        return self._load

    def _observe(self) -> common_pb2.NodeLoad:
        stats = self.engine.stats()
        rank_sum, max_rank = self.requests.ranks()
        load = common_pb2.NodeLoad(
            running_requests=stats.running,
            queued_requests=max(0, len(self.requests) - stats.running),
            queued_prefill_tokens=self.requests.queued_prefill_tokens,
            free_pages=stats.pages_free,
            total_pages=stats.pages_free + stats.pages_kv + stats.pages_adapter,
            kv_pages=stats.pages_kv,
            adapter_pages=stats.pages_adapter,
            ttft_count=self.metrics.ttft.count,
            ttft_seconds_sum=self.metrics.ttft.sum,
            tbt_count=self.metrics.tbt.count,
            tbt_seconds_sum=self.metrics.tbt.sum,
            rank_sum=rank_sum,
            max_rank=max_rank,
        )
        load.observed_time.GetCurrentTime()
        return load

    def stop_accepting(self) -> None:
        """New requests are refused, and everybody who asks is told so."""
        if not self.draining:
            self.draining = True
            self._on_change()

    async def drain(self, timeout_s: float | None = None) -> int:
        """Takes no new requests; returns when those that run have ended. How many of them had to
        be ended because `timeout_s` (None: the node's default) was over."""
        timeout_s = self.drain_timeout_s if timeout_s is None else timeout_s
        self.stop_accepting()
        _log.info("draining: %d requests run, %.1f s at most", len(self.requests), timeout_s)
        if await self.requests.wait_empty(timeout_s):
            return 0
        ended = self.requests.end_all(UnavailableError("node", f"{self.node_id} has drained"))
        _log.warning("drained: %d requests were ended after %.1f s", ended, timeout_s)
        await self.requests.wait_empty(5.0)
        return ended

    async def close(self) -> None:
        """After a drain: the engine ends."""
        await self.adapters.close()
        await asyncio.to_thread(self.engine.close)
