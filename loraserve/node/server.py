"""The node's parts put together: engine, services, health, reflection, metrics, controller."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loraserve.checkpoint.durable_store import DurableStore
from loraserve.checkpoint.packed_adapter import PackedAdapter
from loraserve.errors import InvalidArgumentError, LoraServeError, UnavailableError
from loraserve.named_files import named
from loraserve.node.engine_api import LoadedModel, ServedEngine
from loraserve.node.fetch import FETCH_GRACE_S, AdapterFetch
from loraserve.node.heartbeat import ControllerClient, ControllerLink
from loraserve.node.limits import Limits
from loraserve.node.metrics import NodeMetrics
from loraserve.node.node import Node
from loraserve.node.node_service import NodeServicer
from loraserve.node.peers.exports import Exports
from loraserve.node.peers.peering import Peering, PeerOptions
from loraserve.node.peers.servicer import SERVICE as PEER_SERVICE
from loraserve.node.peers.servicer import PeerServicer, add_to_server
from loraserve.node.pool.arena import HostArena
from loraserve.node.pool.copies import HostCopies
from loraserve.node.pool.disk_cache import DiskCache
from loraserve.node.pool.options import PoolOptions, open_arena
from loraserve.node.pool.slots import SLOT_HEADER_BYTES, HostPool
from loraserve.node.servicer import InferenceServicer
from loraserve.node.sources import ControllerSource, LastingSource, StoreSource
from loraserve.node.store_check import check_store
from loraserve.placement.types import AdapterId
from loraserve.security import (
    DEFAULT_TENANT,
    TlsFiles,
    authenticator,
    channel_credentials,
    server_credentials,
)
from loraserve.security.identity import check_base, check_name
from loraserve.serving import Health, MetricsServer, serve_metrics
from loraserve.tracing import Tracer
from loraserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc, node_pb2, node_pb2_grpc
from loraserve.wire import SERVER_OPTIONS, bearer_metadata, bind, dial, split_address

_log = logging.getLogger(__name__)

SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    node_pb2.DESCRIPTOR.services_by_name["NodeService"].full_name,
    PEER_SERVICE,
)
_WILDCARDS = ("0.0.0.0", "::")
_STOP_GRACE_S = 1.0
# For the word that this node drains; routes leave it out from then on.
_FLUSH_S = 1.0


@dataclass(frozen=True)
class NodeOptions:
    """Addresses are host:port, port 0 for a free one to listen on. `adapters` are loaded at start
    for the default tenant: name to PEFT directory or packed file."""

    node_id: str
    base: str
    listen: str = "127.0.0.1:0"
    advertise: str | None = None
    """Where clients reach the node; None: where it listens."""
    controller: str | None = None
    controller_key: str | None = None
    controller_tls: TlsFiles | None = None
    store: str | None = None
    keys: Path | None = None
    tls: TlsFiles | None = None
    metrics_listen: str | None = None
    limits: Limits = field(default_factory=Limits)
    pool: PoolOptions = field(default_factory=PoolOptions)
    peers: PeerOptions = field(default_factory=PeerOptions)
    drain_timeout_s: float = 30.0
    devices: tuple[common_pb2.Device, ...] = ()
    relative_speed: float = 1.0
    adapters: Mapping[str, Path] = field(default_factory=dict)
    tracer: Tracer | None = None
    """Closed with the node."""


class NodeServer:
    """One node. `start`, then `stop`; both once."""

    def __init__(
        self,
        options: NodeOptions,
        open_model: Callable[[], LoadedModel],
        read_adapter: Callable[[Path], PackedAdapter],
    ) -> None:
        """`open_model` and `read_adapter` run in a thread. Raises LoraServeError for options that
        cannot work; nothing listens yet."""
        check_name("node-id", options.node_id)
        check_base("base", options.base)
        for name in options.adapters:
            check_name("adapter", name)
        split_address(options.listen, "listen")
        if options.controller:
            split_address(options.controller, "controller")
        host, _ = split_address(options.advertise or options.listen, "advertise")
        if options.controller and host in _WILDCARDS:
            raise InvalidArgumentError("advertise", "is needed where the node listens on any host")
        self._options = options
        self._open_model = open_model
        self._read_adapter = read_adapter
        self._gate = authenticator(options.listen, options.keys, options.tls)
        self._credentials = server_credentials(options.tls) if options.tls else None
        self._store = self._open_store(options.store)
        self.metrics = NodeMetrics()
        self._metrics_server: MetricsServer | None = None
        self._server: grpc.aio.Server | None = None
        self._channel: grpc.aio.Channel | None = None
        self._arena: HostArena | None = None
        self._pool: HostPool | None = None
        self._peering: Peering | None = None
        self._disk: DiskCache | None = None
        # Made, and ready: with the adapters that it starts with.
        self._made: Node | None = None
        self._node: Node | None = None
        self._link: ControllerLink | None = None
        self._linking: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = ""
        self.metrics_address = ""

    @staticmethod
    def _open_store(url: str | None) -> DurableStore | None:
        if not url:
            return None
        with named("store", url):
            return DurableStore(url, make=False)

    @property
    def node(self) -> Node:
        """Raises UnavailableError until the node is ready."""
        if self._node is None:
            raise UnavailableError("node", f"{self._options.node_id} is loading its model")
        return self._node

    def _copies(self) -> HostPool:
        if self._pool is None:
            raise UnavailableError("node", f"{self._options.node_id} has no copies yet")
        return self._pool

    async def start(self) -> None:
        """Listens, loads, serves. Health says SERVING when this returns. Raises LoraServeError;
        then `stop` is still to be called."""
        await self._listen()
        await self._connect()
        self._arena = await asyncio.to_thread(open_arena, self._options.pool)
        self._pool = HostPool(self._arena, time.monotonic)
        self._disk = await asyncio.to_thread(self._open_disk_cache)
        self._peering = await self._start_peering(self._pool)
        model = await asyncio.to_thread(self._open_model)
        _log.info(
            "model %s is loaded on %s: context %d, vocabulary %d",
            *(model.facts.base, model.engine.backend_name),
            *(model.facts.context_tokens, model.facts.vocabulary_size),
        )
        await self._lock_pages(self._arena, model.engine)
        self._made = node = self._make_node(model, self._make_host(self._pool, self._peering))
        for name, path in self._options.adapters.items():
            await self._hold(node, name, path)
        self._node = node
        if self._channel is not None:
            self._link = ControllerLink(self._client, node, self._options.advertise or self.address)
            self._linking = asyncio.create_task(self._link.run())
            if self._store is not None:
                self._checking = asyncio.create_task(check_store(self._store, self._link))
        await self._health.tell(serving=True)
        _log.info("node %s serves on %s", self._options.node_id, self.address)

    async def _lock_pages(self, arena: HostArena, engine: ServedEngine) -> None:
        """A GPU copies adapters straight from the pool; where it cannot, by a copy more."""
        memory = arena.view(0, arena.capacity_bytes)
        begun = time.monotonic()
        try:
            arena.page_locked = await asyncio.to_thread(engine.register_host_memory, memory)
        except LoraServeError as error:
            _log.warning("the host pool is not page-locked, adapters install slower: %s", error)
            return
        if arena.page_locked:
            _log.info(
                "host pool: %d bytes are page-locked for the GPU, after %.1f s",
                *(arena.capacity_bytes, time.monotonic() - begun),
            )

    async def _hold(self, node: Node, name: str, path: Path) -> None:
        try:
            packed = await asyncio.to_thread(self._read_adapter, path)
            await node.adapters.hold(AdapterId(DEFAULT_TENANT, self._options.base, name), packed)
        except LoraServeError as error:
            raise InvalidArgumentError(f"adapter {name}", str(error)) from None
        _log.info("adapter %s from %s: rank %d", name, path, packed.max_rank)

    async def _listen(self) -> None:
        options = self._options
        self._server = grpc.aio.server(interceptors=[self._gate], options=SERVER_OPTIONS)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceServicer(lambda: self.node), self._server
        )
        node_pb2_grpc.add_NodeServiceServicer_to_server(
            NodeServicer(lambda: self.node), self._server
        )
        add_to_server(
            PeerServicer(self._copies, lambda: self._exports, self._deadline_s), self._server
        )
        self._health = Health(SERVICES)
        await self._health.tell(serving=False)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.address = bind(self._server, options.listen, self._credentials)
        if options.metrics_listen:
            self._metrics_server = serve_metrics(options.metrics_listen, self.metrics.registry)
            self.metrics_address = self._metrics_server.address
        await self._server.start()

    async def _connect(self) -> None:
        options = self._options
        if not options.controller:
            return
        tls = options.controller_tls
        self._channel = dial(options.controller, channel_credentials(tls) if tls else None)
        self._metadata = bearer_metadata(options.controller_key)
        self._client = ControllerClient(self._channel, options.base, self._metadata)

    @property
    def _exports(self) -> Exports | None:
        return self._peering.exports if self._peering else None

    def _deadline_s(self, size_bytes: int) -> float:
        """What a read from node to node may take."""
        return FETCH_GRACE_S + size_bytes / self._options.pool.min_fetch_bytes_per_s

    async def _start_peering(self, pool: HostPool) -> Peering:
        return await Peering.start(
            self._options.node_id,
            pool,
            self._options.peers,
            self._deadline_s,
            self.metrics.peer_read,
        )

    def _make_node(self, model: LoadedModel, host: HostCopies) -> Node:
        return Node(
            self._options.node_id,
            model,
            self._options.limits,
            host,
            metrics=self.metrics,
            resolve=self._client.resolve if self._channel is not None else None,
            devices=self._options.devices,
            relative_speed=self._options.relative_speed,
            drain_timeout_s=self._options.drain_timeout_s,
            on_change=self._changed,
            tracer=self._options.tracer,
        )

    def _open_disk_cache(self) -> DiskCache | None:
        pool = self._options.pool
        if pool.disk_cache is None:
            return None
        return DiskCache(
            pool.disk_cache, pool.disk_cache_bytes, on_evict=self.metrics.evicted_from_disk
        )

    def _make_host(self, pool: HostPool, peering: Peering) -> HostCopies:
        lasting: list[LastingSource] = []
        if self._store is not None:
            lasting.append(StoreSource(self._store))
        if self._channel is not None:
            lasting.append(ControllerSource(self._channel, self._metadata))
        fetch = AdapterFetch(
            lasting,
            peers=peering.source,
            disk=self._disk,
            max_bytes=pool.capacity_bytes - SLOT_HEADER_BYTES,
            verify=self._options.pool.verify,
            min_bytes_per_s=self._options.pool.min_fetch_bytes_per_s,
            on_result=self.metrics.source_result,
        )
        _log.info(
            "adapters come from: %s; between nodes over: %s",
            *(", ".join(fetch.names), peering.transports()),
        )
        return HostCopies(pool, fetch, self._disk)

    def _changed(self) -> None:
        if self._link is not None:
            self._link.wake()
        if self._node is not None and self._node.draining:
            telling = asyncio.create_task(self._health.tell(serving=False))
            self._tasks.add(telling)
            telling.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Takes no new requests, lets those that run end within the drain timeout, then closes
        everything."""
        if self._node is not None:
            self._node.stop_accepting()
            if self._link is not None and self._link.registered.is_set():
                await self._link.flush(_FLUSH_S)
            await self._node.drain()
        if self._checking is not None:
            self._checking.cancel()
        if self._linking is not None:
            self._linking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._linking
        if self._server is not None:
            await self._server.stop(_STOP_GRACE_S)
        if self._made is not None:
            await self._made.close()
        if self._peering is not None:
            await self._peering.close()
        if self._disk is not None:
            self._disk.close()
        if self._arena is not None:
            self._arena.close()
        if self._channel is not None:
            await self._channel.close()
        if self._metrics_server is not None:
            self._metrics_server.close()
        if self._options.tracer is not None:
            await asyncio.to_thread(self._options.tracer.close)
