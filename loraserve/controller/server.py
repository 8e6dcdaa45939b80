"""The controller's parts put together: storage, core, servicers, health, reflection, metrics."""

import asyncio
import contextlib
import gc
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loraserve.checkpoint.durable_store import DurableStore
from loraserve.controller.adapter_servicer import AdapterServicer
from loraserve.controller.admission import Admission, PackedCheck, UploadCheck
from loraserve.controller.controller_servicer import ControllerServicer
from loraserve.controller.metrics import ControllerMetrics
from loraserve.controller.registry import AdapterRegistry
from loraserve.controller.runtime import Runtime
from loraserve.controller.state import Settings
from loraserve.controller.store import SqliteStore
from loraserve.errors import InvalidArgumentError
from loraserve.named_files import named
from loraserve.placement.load import LoadModel, default_load_model
from loraserve.placement.policies import DEFAULT_POLICY, policy_named, routed_by_rank
from loraserve.security import TlsFiles, authenticator, server_credentials
from loraserve.serving import Health, MetricsServer, serve_metrics
from loraserve.v1 import adapter_pb2, adapter_pb2_grpc, controller_pb2, controller_pb2_grpc
from loraserve.wire import SERVER_OPTIONS, bind, split_address

_log = logging.getLogger(__name__)

# For the process of a controller: what it reads at its start and what nodes report then stays, and
# looking for garbage in hundreds of thousands of records again and again, while they come, took a
# third of a restart.
GC_THRESHOLDS = (50_000, 20, 100)
# A start waits so long for the store's mark; what is far away, or down, keeps nobody from serving.
MARK_WAIT_S = 1.0
SERVICES = (
    adapter_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
    controller_pb2.DESCRIPTOR.services_by_name["ControllerService"].full_name,
)


@dataclass(frozen=True)
class ControllerOptions:
    """`listen` and `metrics_listen` are host:port, port 0 for a free one. Packed adapters go to
    `store` (path or URL), DATA_DIR/adapters by default. `load`: what demands cost nodes."""

    listen: str
    data_dir: Path
    keys: Path | None = None
    tls: TlsFiles | None = None
    metrics_listen: str | None = None
    store: str | None = None
    policy: str = DEFAULT_POLICY
    settings: Settings = field(default_factory=Settings)
    load: LoadModel = field(default_factory=default_load_model)
    new_check: Callable[[], UploadCheck] = PackedCheck


def _check_load(load: LoadModel) -> None:
    """Raises InvalidArgumentError where no rate at all is within the SLO: placement by such a model
    would be worth nothing."""
    if not load.points.tokens_per_s[0] > 0:
        raise InvalidArgumentError(
            "profile", f"{load.profile.name!r} cannot meet the SLO at any rate with this length mix"
        )
    if load.profile.base:
        _log.info("placing by profile %r, of base %r", load.profile.name, load.profile.base)


class _RequestCounter(grpc.aio.ServerInterceptor):
    """Comes after the access check, so that strangers cannot make series."""

    def __init__(self, metrics: ControllerMetrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[Any]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        self._metrics.requests.labels(handler_call_details.method).inc()
        return await continuation(handler_call_details)


class ControllerServer:
    """One controller. `start`, then `stop`; both once."""

    def __init__(self, options: ControllerOptions) -> None:
        """Raises LoraServeError for options that cannot work; nothing listens yet."""
        self._options = options
        split_address(options.listen, "listen")
        gate = authenticator(options.listen, options.keys, options.tls)
        policy = policy_named(options.policy)
        _check_load(options.load)
        self._credentials = server_credentials(options.tls) if options.tls else None
        with named("data-dir", options.data_dir):
            options.data_dir.mkdir(parents=True, exist_ok=True)
        store = options.store or str(options.data_dir / "adapters")
        with named("store" if options.store else "data-dir", store):
            self._blobs = DurableStore(store)
        # First of all, as its lock keeps a second controller away from what the first one writes.
        self._store = SqliteStore(options.data_dir / "controller.sqlite")
        self.metrics = ControllerMetrics()
        self._metrics_server: MetricsServer | None = None
        self._ticking: asyncio.Task[None] | None = None
        try:
            self._admission = self._clean(options)
            records = self._store.adapters()
            self.runtime = Runtime.start(
                self._store, records, options.settings, policy, options.load
            )
        except BaseException:
            self._store.close()
            raise
        self._store_mark = ""
        marking = threading.Thread(target=self._mark, name="store-mark", daemon=True)
        marking.start()
        marking.join(MARK_WAIT_S)
        self.metrics.observe(self.runtime, options.load)
        self._registry = AdapterRegistry(
            self.runtime, records, self._blobs, lambda: time.time_ns() // 1000
        )
        self._gate = gate
        self.address = ""
        self.metrics_address = ""

    def _clean(self, options: ControllerOptions) -> Admission:
        """Admission, and away with what a controller that was killed left half written."""
        with named("data-dir", options.data_dir):
            self._blobs.remove_staged()
            return Admission(options.data_dir / "staging", options.new_check)

    def _mark(self) -> None:
        """Of the store; empty until it is there, or where it takes none: then no node can compare.
        Blocks as long as the store does."""
        try:
            self._store_mark = self._blobs.make_mark()
        except Exception as error:  # a file system's driver raises what it likes
            _log.warning("store %s takes no mark: %s", self._blobs.url, error)

    async def start(self) -> None:
        """Listens and serves. Raises UnavailableError where an address is taken; then `stop` is
        still to be called."""
        options = self._options
        self._server = grpc.aio.server(
            interceptors=[self._gate, _RequestCounter(self.metrics)], options=SERVER_OPTIONS
        )
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(
            AdapterServicer(self.runtime, self._registry, self._admission, self._blobs),
            self._server,
        )
        costs = None
        if routed_by_rank(options.policy):
            own, padded = (options.load or default_load_model()).profile.cost.per_rank()
            costs = controller_pb2.RankCosts(own=own, padded=padded)
        controller_pb2_grpc.add_ControllerServiceServicer_to_server(
            ControllerServicer(self.runtime, self.metrics, costs, lambda: self._store_mark),
            self._server,
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
        # A registry of 100,000 adapters stays: looking for garbage in it costs heartbeats.
        gc.collect()
        gc.freeze()
        self._ticking = asyncio.create_task(self.runtime.run())
        await self._health.tell(serving=True)
        _log.info("serving on %s", self.address)

    async def stop(self, grace_s: float = 5.0) -> None:
        """Refuses new calls, ends the streams, lets uploads end for `grace_s`, closes the store."""
        if self._ticking is not None:
            await self._health.enter_graceful_shutdown()
            self._ticking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticking
        await self.runtime.close()
        if hasattr(self, "_server"):
            # From now on new calls are refused; what still runs is cancelled once no upload does.
            ending = asyncio.ensure_future(self._server.stop(grace_s))
            while self._admission.running and not ending.done():
                await asyncio.sleep(0.02)
            await self._server.stop(None)
            await ending
        if self._metrics_server is not None:
            self._metrics_server.close()
        self._store.close()
