"""A controller that says what a test tells it to, and may be stopped and started on one port."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from loraserve.errors import LoraServeError
from loraserve.v1 import common_pb2, controller_pb2, controller_pb2_grpc
from loraserve.v1.controller_pb2 import WatchRoutesRequest, WatchRoutesResponse
from loraserve.wire import SERVER_OPTIONS, bind
from loraserve.wire_errors import abort


def node_route(node_id: str, address: str, base: str = "tiny") -> controller_pb2.NodeRoute:
    return controller_pb2.NodeRoute(
        node_id=node_id, address=address, base=common_pb2.BaseModel(name=base), incarnation=1
    )


def adapter_route(name: str, *holders: str, base: str = "tiny") -> controller_pb2.AdapterRoute:
    revisions = []
    if holders:
        held = [
            controller_pb2.RouteHolder(
                node_id=h, weight=100, state=common_pb2.RESIDENCY_STATE_DEVICE
            )
            for h in holders
        ]
        revisions = [controller_pb2.RevisionRoute(revision="a" * 64, holders=held)]
    return controller_pb2.AdapterRoute(
        adapter=common_pb2.AdapterId(tenant="default", base=base, name=name),
        revision="a" * 64,
        revisions=revisions,
    )


def routes(version: int, epoch: int = 1, full: bool = True, **fields: Any) -> WatchRoutesResponse:
    return WatchRoutesResponse(epoch=epoch, version=version, full=full, **fields)


class FakeController(controller_pb2_grpc.ControllerServiceServicer):
    """`greeting` is what every watch begins with; `send` reaches the watches that are open.
    `refusal` ends new ones."""

    def __init__(self, *greeting: WatchRoutesResponse) -> None:
        self.greeting = list(greeting)
        self.refusal: LoraServeError | None = None
        self.address = "127.0.0.1:0"
        self.watches: list[WatchRoutesRequest] = []
        self._open: set[asyncio.Queue[WatchRoutesResponse | None]] = set()
        self._server: grpc.aio.Server | None = None

    async def WatchRoutes(  # type: ignore[override]
        self, request: WatchRoutesRequest, context: Any
    ) -> AsyncIterator[WatchRoutesResponse]:
        self.watches.append(request)
        if self.refusal is not None:
            await abort(context, self.refusal)
        for message in self.greeting:
            yield message
        queue: asyncio.Queue[WatchRoutesResponse | None] = asyncio.Queue()
        self._open.add(queue)
        try:
            while (message := await queue.get()) is not None:  # type: ignore[assignment]
                yield message
        finally:
            self._open.discard(queue)

    @property
    def open_watches(self) -> int:
        return len(self._open)

    def send(self, *messages: WatchRoutesResponse | None) -> None:
        """None ends the watches."""
        for queue in self._open:
            for message in messages:
                queue.put_nowait(message)

    async def start(self) -> None:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        controller_pb2_grpc.add_ControllerServiceServicer_to_server(self, self._server)
        self.address = bind(self._server, self.address, None)
        await self._server.start()

    async def stop(self) -> None:
        """Breaks every watch off."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None


@contextlib.asynccontextmanager
async def fake_controller(*greeting: WatchRoutesResponse) -> AsyncIterator[FakeController]:
    controller = FakeController(*greeting)
    await controller.start()
    try:
        yield controller
    finally:
        await controller.stop()
