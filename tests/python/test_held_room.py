"""Room for a node's adapters: the coldest that nobody uses goes; what is in use stays."""

import asyncio

import pytest
from adapter_home import Home, play
from fake_node import SIZE, load_of, revision

from loraserve.errors import (
    ResourceExhaustedError,
)
from loraserve.node.held import DRAINING, FETCHING, HOST


def test_the_coldest_that_nobody_uses_or_placed_goes_first() -> None:
    async def script(home: Home) -> None:
        placed = home.held.begin_load(load_of("a", "a"), placed=True)
        await placed.settled.wait()
        await home.touch("b", "c", "d")
        used = await home.use("b")  # the coldest but for `a`, and in use
        await home.touch("e")
        await home.settle()
        assert home.states() == {"a@a": HOST, "b@b": HOST, "d@d": HOST, "e@e": HOST}
        home.done(used)  # now the warmest
        await home.touch("c")
        await home.settle()
        assert home.states() == {"a@a": HOST, "b@b": HOST, "c@c": HOST, "e@e": HOST}
        assert [name.split("/")[1][0] for name in home.engine.unloaded] == ["c", "d"]

    play(script, adapters=4)


def test_memory_that_is_in_use_is_not_given_away() -> None:
    async def script(home: Home) -> None:
        used = await home.use("a")
        placed = home.held.begin_load(load_of("b", "b"), placed=True)
        await placed.settled.wait()
        with pytest.raises(ResourceExhaustedError, match="8192 of 8192 are in use") as caught:
            await home.use("c")
        assert caught.value.retry_after_s
        with pytest.raises(ResourceExhaustedError, match="of 8192 here") as caught:
            home.held.begin_load(load_of("big", "d", 8192), placed=True)
        assert caught.value.retry_after_s is None
        assert home.states() == {"a@a": HOST, "b@b": HOST}
        home.done(used)
        await home.touch("c")
        await home.settle()
        assert home.states() == {"b@b": HOST, "c@c": HOST}

    play(script, adapters=2)


def test_where_there_is_room_nothing_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(home: Home) -> None:
        def layout() -> None:
            raise AssertionError("with many copies, this takes long")

        monkeypatch.setattr(home.host.pool, "layout", layout)
        await home.touch("a", "b")
        monkeypatch.undo()
        await home.touch("c")
        await home.settle()
        assert home.states() == {"b@b": HOST, "c@c": HOST}

    play(script, adapters=2)


def test_a_lease_that_has_lapsed_keeps_nobody_out() -> None:
    """Its reader has died and will not release it."""

    async def script(home: Home) -> None:
        now_s = 0.0
        home.host.pool._clock = lambda: now_s
        await home.touch("a")
        home.host.pool.lease(revision("a"), 5.0)
        with pytest.raises(ResourceExhaustedError):
            await home.use("b")
        now_s = 5.0
        await home.touch("b")
        await home.settle()
        assert home.states() == {"b@b": HOST}

    play(script, adapters=1)


def test_an_adapter_of_unknown_size_is_weighed_when_it_is_there() -> None:
    async def script(home: Home) -> None:
        used = await home.use("a")
        held = home.held.begin_load(load_of("b", "b", size=0), placed=False)
        await held.settled.wait()
        assert isinstance(held.error, ResourceExhaustedError)
        home.done(used)
        held = home.held.begin_load(load_of("b", "b", size=0), placed=False)
        await held.settled.wait()
        assert (held.error, held.spec.size_bytes, held.spec.max_rank) == (None, SIZE, 8)
        await home.settle()
        assert home.states() == {"b@b": HOST}

    play(script, adapters=1)


def test_two_that_come_at_once_find_room_for_both() -> None:
    async def script(home: Home) -> None:
        await home.touch("a", "b", "c")
        both = await asyncio.gather(home.use("d"), home.use("e"))
        await home.settle()
        assert home.states() == {"c@c": HOST, "d@d": HOST, "e@e": HOST}
        for use in both:
            home.done(use)

    play(script, adapters=3)


def test_what_is_evicted_and_wanted_again_takes_no_more_than_there_is() -> None:
    async def script(home: Home) -> None:
        await home.touch("a", "b")
        coming = home.held.begin_load(load_of("c", "c"), placed=False)  # in place of `a`
        assert home.states() == {"a@a": DRAINING, "b@b": HOST, "c@c": FETCHING}
        back = home.held.begin_load(load_of("a", "a"), placed=False)  # in place of `b`
        await asyncio.gather(coming.settled.wait(), back.settled.wait())
        await home.settle()
        assert home.states() == {"a@a": HOST, "c@c": HOST}
        assert len(home.engine.loaded) == 2

    play(script, adapters=2)
