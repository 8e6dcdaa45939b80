"""A controller in this process, and nodes that do as they are told."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from loraserve.controller.admission import PackedFacts
from loraserve.controller.server import ControllerOptions, ControllerServer
from loraserve.controller.state import Settings
from loraserve.errors import InvalidCheckpointError, LoraServeError
from loraserve.security.identity import Role
from loraserve.security.keys import create_key
from loraserve.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    common_pb2,
    controller_pb2,
    controller_pb2_grpc,
)
from loraserve.wire import bearer_metadata, dial
from loraserve.wire_errors import from_rpc_error

PACKED = b"PACKED base 8 one"
BIGGER = b"PACKED base 64 " + b"x" * (3 << 20)
TICK_S = 0.02
# Nothing waits so long but what hangs.
PATIENCE_S = 60.0
DEVICE = common_pb2.RESIDENCY_STATE_DEVICE


class FakeCheck:
    """Takes b"PACKED <base> <rank> ..." for a packed adapter."""

    def __init__(self) -> None:
        self.data = b""

    def feed(self, data: bytes) -> None:
        self.data += data

    def finish(self) -> PackedFacts:
        data = self.data
        if not data.startswith(b"PACKED "):
            raise InvalidCheckpointError("header", "is not that of a packed adapter")
        _, base, rank, *_ = data.split(b" ")
        return PackedFacts(hashlib.sha256(data).hexdigest(), base.decode(), len(data), int(rank))


class Site:
    """The controller, its keys and stubs to call it with."""

    def __init__(self, server: ControllerServer, keys: dict[str, str]) -> None:
        self.server = server
        self.keys = keys
        self._channel = dial(server.address)
        self.adapters: Any = adapter_pb2_grpc.AdapterServiceStub(self._channel)
        self.controller: Any = controller_pb2_grpc.ControllerServiceStub(self._channel)

    def auth(self, who: str) -> Any:
        return bearer_metadata(self.keys[who])

    async def create(self, name: str, data: bytes, who: str = "acme", **fields: Any) -> Any:
        about = {"base": "base", "name": name, "size_bytes": len(data)} | fields
        first = adapter_pb2.CreateAdapterRequest(
            description=adapter_pb2.CreateAdapterDescription(**about)
        )
        chunks = (adapter_pb2.CreateAdapterRequest(chunk=c) for c in pieces(data))
        answer = await self.adapters.CreateAdapter([first, *chunks], metadata=self.auth(who))
        return answer.adapter

    async def update(self, name: str, data: bytes, who: str = "acme", **fields: Any) -> Any:
        about = {"base": "base", "name": name, "size_bytes": len(data)} | fields
        first = adapter_pb2.UpdateAdapterRequest(
            description=adapter_pb2.UpdateAdapterDescription(**about)
        )
        chunks = (adapter_pb2.UpdateAdapterRequest(chunk=c) for c in pieces(data))
        answer = await self.adapters.UpdateAdapter([first, *chunks], metadata=self.auth(who))
        return answer.adapter

    async def get(self, name: str, who: str = "acme") -> Any:
        ref = common_pb2.AdapterRef(name=name)
        request = adapter_pb2.GetAdapterRequest(adapter=ref)
        return (await self.adapters.GetAdapter(request, metadata=self.auth(who))).adapter

    async def delete(self, name: str, who: str = "acme", base: str = "base") -> None:
        ref = common_pb2.AdapterRef(base=base, name=name)
        request = adapter_pb2.DeleteAdapterRequest(adapter=ref)
        await self.adapters.DeleteAdapter(request, metadata=self.auth(who))

    async def served(self, name: str, by: Iterable[str], who: str = "acme") -> Any:
        """The adapter, once exactly these nodes hold it."""
        end = asyncio.get_running_loop().time() + PATIENCE_S
        while True:
            adapter = await self.get(name, who)
            if sorted(h.node_id for h in adapter.holders) == sorted(by):
                return adapter
            assert asyncio.get_running_loop().time() < end, f"{name}: {adapter}"
            await asyncio.sleep(TICK_S / 2)

    async def watch(self, who: str, **fields: Any) -> AsyncIterator[Any]:
        request = controller_pb2.WatchRoutesRequest(**fields)
        call = self.controller.WatchRoutes(request, metadata=self.auth(who))
        try:
            async for message in call:
                yield message
        finally:
            call.cancel()

    async def close(self) -> None:
        await self._channel.close()


def pieces(data: bytes, size: int = 1 << 20) -> Iterator[bytes]:
    for begin in range(0, len(data), size):
        yield data[begin : begin + size]


@contextlib.asynccontextmanager
async def controller(
    directory: Path, keys: dict[str, str] | None = None, **options: Any
) -> AsyncIterator[Site]:
    """With keys: users `acme` and `zeta`, `node` and `admin`. `keys`: those of an earlier start,
    none where it is empty."""
    path = directory / "keys.jsonl"
    if keys is None:
        path.unlink(missing_ok=True)
        keys = {
            "acme": create_key(path, "acme", "acme", Role.USER),
            "zeta": create_key(path, "zeta", "zeta", Role.USER),
            "node": create_key(path, "node", "cluster", Role.NODE),
            "admin": create_key(path, "admin", "acme", Role.ADMIN),
        }
    chosen: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "data_dir": directory / "data",
        "keys": path if keys else None,
        # Ten seconds: no node is taken for lost because its machine stood still.
        "settings": Settings(tick_seconds=TICK_S, silent_ticks=500),
        "new_check": FakeCheck,
    }
    server = ControllerServer(ControllerOptions(**(chosen | options)))
    site = None
    try:
        await server.start()
        site = Site(server, keys)
        yield site
    finally:
        if site is not None:
            await site.close()
        await server.stop(grace_s=0.1)


async def read(site: Site, revision: str, offset: int = 0) -> bytes:
    request = adapter_pb2.ReadAdapterRequest(revision=revision, offset_bytes=offset)
    call = site.adapters.ReadAdapter(request, metadata=site.auth("node"))
    messages = [m async for m in call]
    assert messages[0].size_bytes > 0
    return b"".join(m.chunk for m in messages)


def play(tmp_path: Path, script: Callable[[Site], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with controller(tmp_path, **options) as site:
            await asyncio.wait_for(script(site), 2 * PATIENCE_S)

    asyncio.run(run())


async def refused(call: Awaitable[Any]) -> LoraServeError:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return from_rpc_error(caught.value)


class FakeNode:
    """Registers, beats every tick, holds what it is told to hold, for as long as it runs."""

    def __init__(self, site: Site, node_id: str, memory: int = 10_000, incarnation: int = 1):
        self.site = site
        self.node_id = node_id
        self.memory = memory
        self.incarnation = incarnation
        self.held: dict[tuple[str, str, str], Any] = {}
        self.commands: list[Any] = []
        self.refuse: str | None = None
        self.registrations = 0
        self._results: list[Any] = []
        self._applied = 0
        self._generation = 0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "FakeNode":
        await self.register()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def kill(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                await self._task
            self._task = None

    async def register(self, **fields: Any) -> Any:
        about: dict[str, Any] = {
            "node_id": self.node_id,
            "incarnation": self.incarnation,
            "address": f"127.0.0.1:{9000 + len(self.node_id)}",
            "base": common_pb2.BaseModel(name="base"),
            "adapter_memory_bytes": self.memory,
        }
        request = controller_pb2.RegisterNodeRequest(**(about | fields))
        self.registrations += 1
        self._applied = 0
        return await self.site.controller.RegisterNode(request, metadata=self.site.auth("node"))

    def beat(self) -> Any:
        self._generation += 1
        results, self._results = self._results, []
        return controller_pb2.HeartbeatRequest(
            node_id=self.node_id,
            incarnation=self.incarnation,
            generation=self._generation,
            residency=list(self.held.values()),
            load=common_pb2.NodeLoad(queued_requests=7, kv_pages=3),
            results=results,
            applied_command_id=self._applied,
        )

    async def _run(self) -> None:
        while True:
            call = self.site.controller.Heartbeat(metadata=self.site.auth("node"))
            reading = asyncio.create_task(self._read(call))
            try:
                while not reading.done():
                    await call.write(self.beat())
                    await asyncio.sleep(TICK_S)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass
            finally:
                reading.cancel()
                call.cancel()
            await self.register()

    async def _read(self, call: Any) -> None:
        async for answer in call:
            if answer.must_register:
                return
            for command in answer.commands:
                self.apply(command)

    def apply(self, command: Any) -> None:
        self.commands.append(command)
        self._applied = command.command_id
        body = getattr(command, command.WhichOneof("action"))
        key = (body.adapter.tenant, body.adapter.name, body.revision)
        if command.WhichOneof("action") == "drop":
            self.held.pop(key, None)
        elif self.refuse:
            error = common_pb2.ErrorDetail(code=8, message=self.refuse)
            self._results.append(
                controller_pb2.CommandResult(command_id=command.command_id, error=error)
            )
        else:
            self.held[key] = common_pb2.AdapterResidency(
                adapter=body.adapter, revision=body.revision, state=DEVICE
            )
