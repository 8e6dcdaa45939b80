"""A controller that does what a test wants: it notes what nodes say and sends what it is given."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from fake_node import BASE, SIZE, letter_of, revision
from google.protobuf.duration_pb2 import Duration

from loraserve.v1 import common_pb2, controller_pb2, controller_pb2_grpc, node_pb2
from loraserve.v1.controller_pb2 import Command, HeartbeatResponse
from loraserve.wire import SERVER_OPTIONS, bind
from loraserve.wire_errors import typed_errors


def adapter(name: str) -> common_pb2.AdapterId:
    return common_pb2.AdapterId(tenant="default", base=BASE, name=name)


def load(command_id: int, name: str, letter: str, size: int = SIZE) -> Command:
    wanted = node_pb2.AdapterLoad(
        adapter=adapter(name), revision=revision(letter), size_bytes=size, max_rank=8
    )
    return Command(command_id=command_id, load=wanted)


def drop(command_id: int, name: str, letter: str) -> Command:
    wanted = controller_pb2.DropCommand(adapter=adapter(name), revision=revision(letter))
    return Command(command_id=command_id, drop=wanted)


def drain(command_id: int, seconds: float | None = None) -> Command:
    command = Command(command_id=command_id, drain=controller_pb2.DrainCommand())
    if seconds is not None:
        command.drain.timeout.FromMilliseconds(round(1000 * seconds))
    return command


class FakeController(controller_pb2_grpc.ControllerServiceServicer):
    """`silent`: heartbeats get no answer of their own."""

    def __init__(self, epoch: int = 3, period_s: float = 0.05) -> None:
        self.epoch = epoch
        self.period_s = period_s
        self.silent = False
        self.refuse: Exception | None = None
        self.registrations: list[Any] = []
        self.beats: list[Any] = []
        self.streams = 0
        self.states: dict[str, int] = {}
        self._outbox: asyncio.Queue[HeartbeatResponse | None] = asyncio.Queue()

    @property
    def results(self) -> dict[int, str]:
        """By command id: what went wrong, or nothing."""
        return {r.command_id: r.error.message for beat in self.beats for r in beat.results}

    def demand(self, name: str) -> tuple[int, int, int]:
        """Of all heartbeats that were answered."""
        found = [d for beat in self.beats for d in beat.demand if d.adapter.name == name]
        return (
            sum(d.requests for d in found),
            sum(d.prefill_tokens for d in found),
            sum(d.decode_tokens for d in found),
        )

    def send(self, *commands: Command, **fields: Any) -> None:
        fields.setdefault("epoch", self.epoch)
        self._outbox.put_nowait(HeartbeatResponse(commands=commands, **fields))

    def hang_up(self) -> None:
        self._outbox.put_nowait(None)

    @typed_errors
    async def RegisterNode(self, request: Any, context: Any) -> Any:
        self.registrations.append(request)
        if self.refuse is not None:
            raise self.refuse
        period = Duration()
        period.FromNanoseconds(round(self.period_s * 1e9))
        return controller_pb2.RegisterNodeResponse(
            epoch=self.epoch, heartbeat_period=period, missed_heartbeats_limit=3
        )

    @typed_errors
    async def Heartbeat(self, requests: Any, context: Any) -> Any:
        self.streams += 1
        reading = asyncio.create_task(self._read(requests))
        try:
            while (response := await self._outbox.get()) is not None:
                yield response
        finally:
            reading.cancel()

    async def _read(self, requests: Any) -> None:
        async for beat in requests:
            self.beats.append(beat)
            self._note(beat)
            if not self.silent:
                self.send()

    def _note(self, beat: Any) -> None:
        """Keeps `states`: copies as of the last heartbeat, which may say only what changed."""
        if not beat.since_generation:
            self.states = {}
        for copy in beat.residency:
            self.states[f"{copy.adapter.name}@{letter_of(copy.revision)}"] = copy.state
        for key in beat.removed:
            self.states.pop(f"{key.adapter.name}@{letter_of(key.revision)}", None)


@contextlib.asynccontextmanager
async def listening(fake: FakeController, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """The address where nodes reach it."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    controller_pb2_grpc.add_ControllerServiceServicer_to_server(fake, server)
    bound = bind(server, address, None)
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(None)
