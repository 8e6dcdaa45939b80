"""HeldAdapters between an engine, a source and a registry in memory."""

import asyncio
from collections.abc import Awaitable, Callable

from fake_node import (
    BASE,
    FakeEngine,
    FakeSource,
    host_copies,
    letter_of,
    load_of,
    pool_bytes,
    revision,
    until,
)

from loraserve.checkpoint.packed_header import PackedHeader
from loraserve.errors import NotFoundError
from loraserve.node.adapters import HeldAdapters
from loraserve.node.held import FETCHING, HeldAdapter
from loraserve.node.limits import Limits
from loraserve.node.load_info import AdapterLoadInfo
from loraserve.node.pool.checked_writer import CheckedWriter
from loraserve.node.requests import LiveRequest
from loraserve.placement.types import AdapterId


class GatedSource(FakeSource):
    """Fetches of `stuck` revisions end only when they are taken off it."""

    def __init__(self, *letters: str) -> None:
        super().__init__(*letters)
        self.stuck: set[str] = set()

    async def read_into(
        self, load: AdapterLoadInfo, header: PackedHeader, writer: CheckedWriter
    ) -> None:
        await super().read_into(load, header, writer)
        while letter_of(load.spec.revision) in self.stuck:
            await asyncio.sleep(0.001)


class Home:
    """HeldAdapters with an engine, a source and a registry in memory. A name `x...` points to
    revision(`x`) unless `points` says otherwise. `adapters`: how many fit into the host pool."""

    def __init__(self, letters: str = "abcdef", adapters: int = 10, waiting: int = 64) -> None:
        self.engine = FakeEngine()
        self.source = GatedSource(*letters)
        self.points: dict[str, str] = {}
        self.resolved: list[str] = []
        self.now_s = 0.0
        self.changes = 0
        self.host = host_copies(pool_bytes(adapters), self.source)
        self.held = HeldAdapters(
            self.engine,
            self.host,
            Limits(max_waiting_per_adapter=waiting),
            resolve=self._resolve,
            on_change=self._changed,
            clock=lambda: self.now_s,
        )

    def _changed(self) -> None:
        self.changes += 1

    async def _resolve(self, adapter: AdapterId, wanted: str | None) -> AdapterLoadInfo:
        self.resolved.append(adapter.name)
        await asyncio.sleep(0)
        letter = letter_of(wanted) if wanted else self.points.get(adapter.name, adapter.name[0])
        if letter == "z":
            raise NotFoundError("adapter", "does not exist")
        return load_of(adapter.name, letter)

    async def use(self, name: str, letter: str | None = None) -> tuple[HeldAdapter, LiveRequest]:
        """A request that has its copy; `done` lets go of it."""
        user = LiveRequest("default", name, 0)
        adapter = AdapterId("default", BASE, name)
        wanted = revision(letter) if letter else None
        held = self.held.acquire_now(adapter, wanted, user)
        if held is None:
            held = await self.held.acquire(adapter, wanted, user)
        assert held.engine_name in self.engine.loaded
        return held, user

    def begin(
        self, name: str, letter: str | None = None
    ) -> "asyncio.Task[tuple[HeldAdapter, LiveRequest]]":
        return asyncio.create_task(self.use(name, letter))

    def done(self, use: tuple[HeldAdapter, LiveRequest]) -> None:
        self.held.release(*use)

    async def touch(self, *names: str) -> None:
        """One request after another, a second apart."""
        for name in names:
            self.now_s += 1
            self.done(await self.use(name))

    def states(self) -> dict[str, int]:
        return {f"{r.adapter.name}@{letter_of(r.revision)}": r.state for r in self.held.residency()}

    async def settle(self) -> None:
        """Until nothing is on its way any more."""
        await until(
            lambda: not self.held._cleanups and FETCHING not in self.states().values(), "settled"
        )


def play(script: Callable[[Home], Awaitable[None]], **options: object) -> None:
    async def run() -> None:
        home = Home(**options)  # type: ignore[arg-type]
        try:
            await asyncio.wait_for(script(home), 120)
        finally:
            await home.held.close()

    asyncio.run(run())
