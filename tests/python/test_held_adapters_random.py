"""Whatever the order of requests, drops, loads and failures: a node holds what it says it holds."""

import asyncio
import contextlib
from collections.abc import Sequence

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
from fuzz_budget import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.errors import LoraServeError, UnavailableError
from loraserve.node.adapters import HeldAdapters
from loraserve.node.held import FAILED, FETCHING, HOST, HeldAdapter
from loraserve.node.limits import Limits
from loraserve.node.load_info import AdapterLoadInfo
from loraserve.node.requests import LiveRequest
from loraserve.placement.types import AdapterId

MEMORY = pool_bytes(3)
NAMES, LETTERS = "pqr", "abcd"

Step = tuple[str, int, str, str, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["use", "use", "pinned", "done", "leave", "load", "drop", "end", "break"]),
        st.integers(0, 3),  # turns of the loop afterwards; 3: until nothing moves
        st.sampled_from(NAMES),
        st.sampled_from(LETTERS),
        st.integers(0, 9),
    ),
    max_size=25,
)


class Play:
    """Every name points to revision "a"; the others exist too."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.source = FakeSource(*LETTERS)
        self.now_s = 0.0
        self.waiting: list[asyncio.Task[HeldAdapter]] = []
        self.using: list[tuple[HeldAdapter, LiveRequest]] = []
        self.host = host_copies(MEMORY, self.source)
        self.held = HeldAdapters(
            self.engine,
            self.host,
            Limits(max_waiting_per_adapter=3),
            resolve=self._resolve,
            clock=lambda: self.now_s,
        )

    async def _resolve(self, adapter: AdapterId, wanted: str | None) -> AdapterLoadInfo:
        await asyncio.sleep(0)
        return load_of(adapter.name, letter_of(wanted) if wanted else "a")

    async def use(self, name: str, letter: str | None) -> HeldAdapter:
        user = LiveRequest("default", name, 0)
        adapter = AdapterId("default", BASE, name)
        wanted = revision(letter) if letter else None
        held = self.held.acquire_now(adapter, wanted, user)
        held = held or await self.held.acquire(adapter, wanted, user)
        assert letter in (None, letter_of(held.spec.revision))
        self.using.append((held, user))
        user.abort = lambda: self.done((held, user))
        return held

    def done(self, use: tuple[HeldAdapter, LiveRequest]) -> None:
        if use in self.using:
            self.using.remove(use)
            self.held.release(*use)

    def step(self, kind: str, name: str, letter: str, pick: int) -> None:
        self.now_s += pick
        copies = [h for h in self.held._all() if h.spec.adapter.name == name]
        match kind:
            case "use" | "pinned":
                wanted = letter if kind == "pinned" else None
                self.waiting.append(asyncio.create_task(self.use(name, wanted)))
            case "done" if self.using:
                self.done(self.using[pick % len(self.using)])
            case "leave" if self.waiting:
                self.waiting[pick % len(self.waiting)].cancel()
            case "load":
                with contextlib.suppress(LoraServeError):
                    self.held.begin_load(load_of(name, letter), placed=True)
            case "drop" if copies:
                self.held.begin_drop(copies[pick % len(copies)])
            case "end" if copies:
                self.held.begin_drop(copies[pick % len(copies)], 0.0)
            case "break":
                error = UnavailableError("source", "is away") if pick % 2 else None
                self.source.error = error

    def check(self) -> None:
        """True at every moment."""
        for held, user in self.using:
            assert user in held.users
            assert held.engine_name in self.engine.loaded
        for held in self.held._all():
            if held.state == HOST:
                assert held.engine_name in self.engine.loaded
                assert held.dropping is None

    async def rest(self) -> None:
        """Until nothing moves but what waits for its users, and node, engine and pool agree."""

        def kept() -> list[HeldAdapter]:
            return [h for h in self.held._all() if h.state != FAILED]

        def agree() -> bool:
            # The pool has what is held, once for all names of a revision, and nothing else.
            revisions = {h.spec.revision for h in kept()}
            return (
                sorted(self.engine.loaded) == sorted(h.engine_name for h in kept())
                and self.host.pool.bytes_free == MEMORY - pool_bytes(len(revisions))
                and set(self.host.pool._slots) == revisions
            )

        # Asked anew at every turn: users of a copy that is to go at once end a turn later.
        await until(lambda: self._at_rest() and agree(), "at rest and in agreement")
        assert {u for h in kept() for u in h.users} == {user for _, user in self.using}

    def _at_rest(self) -> bool:
        return (
            all(task.done() for task in self.waiting)
            and not self.held._waiting
            and not self.held._resolving._asking
            and not any(h.state == FETCHING for h in self.held._all())
            and all(h.users for h in self.held._all() if h.dropping is not None)
        )


@settings(max_examples=examples(120), deadline=None)
@given(STEPS)
def test_nothing_is_lost_leaked_or_taken_from_a_user(steps: Sequence[Step]) -> None:
    async def run() -> None:
        play = Play()
        try:
            for kind, turns, name, letter, pick in steps:
                play.step(kind, name, letter, pick)
                play.check()
                for _ in range(turns % 3):
                    await asyncio.sleep(0)
                    play.check()
                if turns == 3:
                    await play.rest()
            await play.rest()
            for use in list(play.using):
                play.done(use)
            for held in list(play.held._all()):
                play.held.begin_drop(held)
            await play.rest()
            assert play.held.residency() == []
            assert play.engine.loaded == {}
        finally:
            for task in play.waiting:
                task.cancel()
            refusals = await asyncio.gather(*play.waiting, return_exceptions=True)
            await play.held.close()
        for refusal in refusals:
            # Nobody saw an error that is not meant for it.
            assert isinstance(refusal, HeldAdapter | LoraServeError | asyncio.CancelledError)

    asyncio.run(run())
