"""Keeps the route table current over WatchRoutes. A controller that is gone costs nothing: the last
table stays, however old."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable

from loraserve.client.channels import Channels, responses
from loraserve.client.messages import update_from_wire
from loraserve.client.route_table import RouteBook, RouteTable
from loraserve.errors import (
    LoraServeError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from loraserve.v1 import controller_pb2, controller_pb2_grpc

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0

_log = logging.getLogger(__name__)


class RouteWatch:
    """A task of the running event loop, from `start` to `stop`."""

    def __init__(
        self, channels: Channels, controller: str, on_table: Callable[[RouteTable], None]
    ) -> None:
        """`on_table` is called with every new table."""
        self._channels = channels
        self._controller = controller
        self._on_table = on_table
        self._book = RouteBook()
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._confirmed_at: float | None = None
        self._connected = False
        self._error: LoraServeError | None = None
        self._tries = 0

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._run(), name="loraserve-route-watch")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    @property
    def table(self) -> RouteTable:
        return self._book.table

    @property
    def age_s(self) -> float | None:
        """Seconds since the table was last known to be the controller's: 0 while the watch stands,
        None where there never was one."""
        if self._confirmed_at is None or self._loop is None:
            return None
        return 0.0 if self._connected else self._loop.time() - self._confirmed_at

    async def changed(self, timeout_s: float | None) -> bool:
        """Waits for the next table or failed try; False where neither came in time."""
        event = self._changed
        try:
            await asyncio.wait_for(event.wait(), timeout_s)
        except (TimeoutError, asyncio.TimeoutError):
            return False
        return True

    async def first_table(self, timeout_s: float) -> None:
        """Returns once there is a table. Raises UnavailableError where the controller cannot be
        reached in time, and what it refuses the watch with."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while self._confirmed_at is None:
            if isinstance(self._error, UnauthenticatedError | PermissionDeniedError):
                raise self._error
            left = end - loop.time()
            if left <= 0 or not await self.changed(left):
                reason = self._error.message if self._error else "no answer"
                raise UnavailableError("controller", f"{self._controller}: {reason}")

    async def _run(self) -> None:
        while True:
            self._tries += 1
            try:
                await self._watch()
                self._error = UnavailableError("controller", "ended the watch")
            except LoraServeError as error:
                self._error = error
            except Exception:
                # A message that cannot be read must not end the watch for good.
                _log.exception("unexpected error in the route watch")
                self._error = UnavailableError("controller", "sent what cannot be read")
            if self._connected:
                self._connected = False
                self._confirmed_at = asyncio.get_running_loop().time()
            _log.info("routes of %s: %s; trying again", self._controller, self._error)
            self._wake()
            longest = min(FIRST_BACKOFF_S * 2.0 ** min(self._tries - 1, 10), MAX_BACKOFF_S)
            await asyncio.sleep(longest * random.uniform(0.5, 1.0))

    async def _watch(self) -> None:
        stub = controller_pb2_grpc.ControllerServiceStub(self._channels.get(self._controller))
        request = controller_pb2.WatchRoutesRequest(
            known_epoch=self.table.epoch, known_version=self.table.version
        )
        call = stub.WatchRoutes(request, metadata=self._channels.metadata)
        self._book.begin()
        async with contextlib.aclosing(responses(self._channels, call)) as messages:
            async for message in messages:
                if not self._book.take(update_from_wire(message)):
                    raise UnavailableError(
                        "controller",
                        f"has routes of epoch {message.epoch} version {message.version}, which do "
                        f"not follow epoch {self.table.epoch} version {self.table.version}",
                    )
                self._tries = 0
                if message.more:
                    continue
                self._connected, self._error = True, None
                self._confirmed_at = asyncio.get_running_loop().time()
                self._on_table(self.table)
                self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
