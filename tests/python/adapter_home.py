"""HeldAdapters between an engine, a source and a registry in memory."""

import asyncio
from collections.abc import Awaitable, Callable

from fake_node import BASE, FakeEngine, FakeSource, read_fake, revision, spec, until

from loraserve.errors import NotFoundError
from loraserve.node.adapters import HeldAdapters
from loraserve.node.held import FETCHING, HeldAdapter
from loraserve.node.limits import Limits
from loraserve.node.requests import LiveRequest
from loraserve.node.sources import AdapterFetch, Blob
from loraserve.placement.types import AdapterId, AdapterSpec


class GatedSource(FakeSource):
    """Fetches of `stuck` revisions end only when they are taken off it."""

    def __init__(self, *letters: str) -> None:
        super().__init__(*letters)
        self.stuck: set[str] = set()

    async def fetch(self, wanted: str, max_bytes: int) -> Blob:
        blob = await super().fetch(wanted, max_bytes)
        while wanted[0] in self.stuck:
            await asyncio.sleep(0.001)
        return blob


class Home:
    """HeldAdapters with an engine, a source and a registry in memory. A name `x...` points to
    revision(`x`) unless `points` says otherwise; every adapter has 100 bytes."""

    def __init__(self, letters: str = "abcdef", memory: int = 1000, waiting: int = 64) -> None:
        self.engine = FakeEngine()
        self.source = GatedSource(*letters)
        self.points: dict[str, str] = {}
        self.resolved: list[str] = []
        self.now_s = 0.0
        self.changes = 0
        limits = Limits(adapter_memory_bytes=memory, max_waiting_per_adapter=waiting)
        self.held = HeldAdapters(
            self.engine,
            AdapterFetch([self.source], memory, read_fake),
            limits,
            resolve=self._resolve,
            on_change=self._changed,
            clock=lambda: self.now_s,
        )

    def _changed(self) -> None:
        self.changes += 1

    async def _resolve(self, adapter: AdapterId, wanted: str | None) -> AdapterSpec:
        self.resolved.append(adapter.name)
        await asyncio.sleep(0)
        letter = wanted[0] if wanted else self.points.get(adapter.name, adapter.name[0])
        if letter == "z":
            raise NotFoundError("adapter", "does not exist")
        return spec(adapter.name, letter)

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
        return {f"{r.adapter.name}@{r.revision[0]}": r.state for r in self.held.residency()}

    async def settle(self) -> None:
        """Until nothing is on its way any more."""
        await until(
            lambda: not self.held._cleanups and FETCHING not in self.states().values(), "settled"
        )


def play(script: Callable[[Home], Awaitable[None]], **options: object) -> None:
    async def run() -> None:
        home = Home(**options)  # type: ignore[arg-type]
        try:
            await asyncio.wait_for(script(home), 10)
        finally:
            await home.held.close()

    asyncio.run(run())
