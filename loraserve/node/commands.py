"""Carries out the controller's commands and keeps what is to be told of them."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from loraserve.errors import LoraServeError
from loraserve.node.convert import adapter_id_from_wire, load_from_wire, seconds
from loraserve.node.moved import Moved
from loraserve.node.node import Node
from loraserve.v1 import controller_pb2
from loraserve.wire_errors import to_detail

_log = logging.getLogger(__name__)


class Commands:
    """Of one registration after another; `wake` is called when a result is there to be sent."""

    def __init__(self, node: Node, wake: Callable[[], None]) -> None:
        self._node = node
        self._wake = wake
        self._registration = 0
        self._results: list[controller_pb2.CommandResult] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.applied_id = 0

    def restart(self) -> None:
        """The node has registered: what it was told before is forgotten, its effects stay."""
        self._registration += 1
        self._results = []
        self.applied_id = 0

    def take_results(self) -> list[controller_pb2.CommandResult]:
        taken, self._results = self._results, []
        return taken

    def apply(self, command: controller_pb2.Command) -> None:
        """Its effect shows in the residency when this returns, or a result is there."""
        if command.command_id <= self.applied_id:
            return
        finished = partial(self._finished, self._registration, command.command_id)
        try:
            work = self._begin(command)
        except LoraServeError as error:
            finished(error)
        else:
            task = asyncio.create_task(self._follow(work, finished))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self.applied_id = command.command_id

    async def _follow(
        self,
        work: "asyncio.Future[LoraServeError | None]",
        finished: Callable[[LoraServeError | None], None],
    ) -> None:
        finished(await work)

    def _begin(self, command: controller_pb2.Command) -> "asyncio.Future[LoraServeError | None]":
        adapters, base = self._node.adapters, self._node.facts.base
        match command.WhichOneof("action"):
            case "load":
                load_info = load_from_wire(command.load, base)
                held = adapters.begin_load(load_info, placed=True)
                self._node.moved.forget((load_info.spec.adapter, load_info.spec.revision))

                async def load() -> LoraServeError | None:
                    await held.settled.wait()
                    return held.error

                return asyncio.ensure_future(load())
            case "drop":
                adapter = adapter_id_from_wire(command.drop.adapter, base)
                revision = command.drop.revision
                dropping = [h for h in adapters.copies(adapter) if h.spec.revision == revision]
                routes = command.drop.routes
                moved = Moved(tuple(command.drop.holder_node_ids), (routes.epoch, routes.version))
                self._node.moved.note((adapter, revision), moved)
                for copy in dropping:
                    adapters.begin_drop(copy)

                async def drop() -> LoraServeError | None:
                    tasks = {h.dropping for h in dropping if h.dropping is not None}
                    if tasks:
                        await asyncio.wait(tasks)
                    return None

                return asyncio.ensure_future(drop())
            case "drain":
                given = command.drain.HasField("timeout")
                timeout_s = seconds(command.drain.timeout) if given else None

                async def drain() -> LoraServeError | None:
                    await self._node.drain(timeout_s)
                    return None

                self._node.stop_accepting()
                return asyncio.ensure_future(drain())
            case other:
                raise LoraServeError("action", f"{other} is unknown to this node")

    def _finished(self, registration: int, command_id: int, error: LoraServeError | None) -> None:
        if registration != self._registration:
            return
        result = controller_pb2.CommandResult(command_id=command_id)
        if error is not None:
            _log.warning("command %d failed: %s", command_id, error)
            result.error.CopyFrom(to_detail(error))
        self._results.append(result)
        self._wake()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
