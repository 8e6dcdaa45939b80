"""The adapters of a node: loaded once however many ask, dropped when idle, changes told."""

import asyncio

import pytest
from adapter_home import Home, play
from fake_node import BASE, load_of, revision, spec, until

from loraserve.errors import (
    FailedPreconditionError,
    InvalidCheckpointError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from loraserve.node.held import DEVICE, DRAINING, FAILED, FETCHING, HOST
from loraserve.placement.types import AdapterId


def test_all_who_ask_at_once_share_one_load() -> None:
    async def script(home: Home) -> None:
        uses = await asyncio.gather(*(home.use("a") for _ in range(20)))
        assert len({held.engine_name for held, _ in uses}) == 1
        assert (home.resolved, home.source.fetches) == (["a"], [revision("a")])
        assert home.held.residency()[0].active_requests == 20
        for use in uses:
            home.done(use)
        assert home.held.residency()[0].active_requests == 0
        assert home.states() == {"a@a": HOST}

    play(script)


def test_one_adapter_that_is_late_holds_up_no_other() -> None:
    async def script(home: Home) -> None:
        home.source.stuck = {"a"}
        late = [home.begin("a") for _ in range(3)]
        await home.touch("b", "c", "b")
        assert not any(task.done() for task in late)
        assert home.states()["a@a"] == FETCHING
        home.source.stuck.clear()
        assert len({held.serial for held, _ in await asyncio.gather(*late)}) == 1

    play(script)


def test_the_queue_of_an_adapter_is_bounded_and_its_own() -> None:
    async def script(home: Home) -> None:
        home.source.stuck = {"a"}
        waiting = [home.begin("a") for _ in range(2)]
        await until(lambda: home.states() == {"a@a": FETCHING}, "fetching")
        with pytest.raises(ResourceExhaustedError, match="adapter: 2 requests") as caught:
            await home.use("a")
        assert caught.value.retry_after_s
        await home.touch("b")
        waiting[0].cancel()
        await until(waiting[0].done, "cancelled")
        waiting.append(home.begin("a"))
        home.source.stuck.clear()
        await asyncio.gather(*waiting[1:])
        assert home.held.residency()[0].active_requests == 2

    play(script, waiting=2)


def test_an_adapter_dropped_before_its_load_began_ends_it() -> None:
    async def script(home: Home) -> None:
        held = home.held.begin_load(load_of("a", "a"), placed=True)
        home.held.begin_drop(held)
        await asyncio.wait_for(held.settled.wait(), 60)
        assert isinstance(held.error, UnavailableError)
        await home.settle()
        assert (home.states(), home.source.fetches) == ({}, [])

    play(script)


def test_an_adapter_dropped_while_it_is_fetched() -> None:
    async def script(home: Home) -> None:
        home.source.stuck = {"a"}
        waiting = home.begin("a")
        await until(lambda: bool(home.source.fetches), "fetching")
        (held,) = home.held.copies(spec("a", "a").adapter)
        home.held.begin_drop(held)
        with pytest.raises(UnavailableError, match="was dropped while it loaded"):
            await waiting
        await home.settle()
        assert (home.states(), home.engine.loaded) == ({}, {})

    play(script)


def test_an_adapter_dropped_while_the_engine_reads_it() -> None:
    async def script(home: Home) -> None:
        home.engine.may_load.clear()
        waiting = home.begin("a")
        await until(lambda: any(h.installing for h in home.held._all()), "installing")
        (held,) = home.held.copies(spec("a", "a").adapter)
        home.held.begin_drop(held)
        again = home.begin("a")
        home.engine.may_load.set()
        with pytest.raises(UnavailableError, match="was dropped while it loaded"):
            await waiting
        new, _ = await again
        assert new.serial > held.serial
        await home.settle()
        assert list(home.engine.loaded) == [new.engine_name]
        assert home.states() == {"a@a": HOST}

    play(script)


def test_what_is_dropped_and_wanted_again_stays() -> None:
    async def script(home: Home) -> None:
        use = await home.use("a")
        home.held.begin_drop(use[0])
        await asyncio.sleep(0)
        assert home.states() == {"a@a": DRAINING}
        assert (await home.use("a"))[0] is use[0]
        assert home.states() == {"a@a": HOST}
        home.done(use)
        await home.settle()
        assert (home.engine.unloaded, len(home.source.fetches)) == ([], 1)

    play(script)


def test_a_revision_that_drains_refuses_those_who_want_just_it() -> None:
    async def script(home: Home) -> None:
        use = await home.use("a")
        home.held.begin_drop(use[0])
        with pytest.raises(UnavailableError, match="is being dropped"):
            await home.use("a", "a")
        home.done(use)
        await home.settle()
        assert home.states() == {}

    play(script)


def test_a_copy_that_is_gone_comes_back_as_another() -> None:
    async def script(home: Home) -> None:
        use = await home.use("a")
        home.held.begin_drop(use[0])
        home.done(use)
        await until(lambda: use[0].unloading, "unloading")
        again = await home.use("a")
        assert again[0].engine_name != use[0].engine_name
        await home.settle()
        assert list(home.engine.loaded) == [again[0].engine_name]

    play(script)


def test_a_failure_is_remembered_then_tried_again() -> None:
    async def script(home: Home) -> None:
        home.source.error = UnavailableError("store", "is away")
        for tries, wait_s in ((1, 1.0), (2, 2.0), (3, 4.0)):
            with pytest.raises(UnavailableError, match="could not be loaded here: store: is away"):
                await home.use("a")
            assert len(home.source.fetches) == tries
            home.now_s += wait_s - 0.1
            with pytest.raises(UnavailableError, match="store: is away"):
                await home.use("a")  # too early: nothing is asked
            assert len(home.source.fetches) == tries
            home.now_s += 0.2
        (shown,) = home.held.residency()
        assert (shown.state, shown.error.field) == (FAILED, "store")
        home.source.error = None
        await home.touch("a")
        assert home.states() == {"a@a": HOST}
        assert not home.held.residency()[0].HasField("error")

    play(script)


def test_a_failed_load_takes_no_memory_and_hurts_no_other() -> None:
    async def script(home: Home) -> None:
        home.engine.load_error = InvalidCheckpointError("q_proj", "has shape [1, 2]")
        with pytest.raises(FailedPreconditionError, match="cannot be loaded: q_proj: has shape"):
            await home.use("a")
        home.engine.load_error = RuntimeError("secret of the server")
        with pytest.raises(UnavailableError, match="log says why") as caught:
            await home.use("b")
        assert "secret" not in str(caught.value)
        home.engine.load_error = None
        await home.touch("c")
        assert home.states() == {"a@a": FAILED, "b@b": FAILED, "c@c": HOST}
        (failed,) = home.held.copies(spec("a", "a").adapter)
        home.held.begin_drop(failed)
        await home.settle()
        assert home.states() == {"b@b": FAILED, "c@c": HOST}

    play(script, adapters=1)


def test_a_new_revision_stands_beside_the_old_one() -> None:
    async def script(home: Home) -> None:
        old = await home.use("sql", "a")
        home.points["sql"] = "b"
        coming = home.held.begin_load(load_of("sql", "b"), placed=True)
        assert (await home.use("sql"))[0] is old[0]  # until the new one serves
        await coming.settled.wait()
        assert (await home.use("sql"))[0] is coming
        assert (await home.use("sql", "a"))[0] is old[0]
        home.held.begin_drop(old[0])
        assert home.states() == {"sql@a": DRAINING, "sql@b": HOST}
        assert old[0].engine_name in home.engine.loaded  # for the requests that began with it
        for user in list(old[0].users):
            home.held.release(old[0], user)
        await home.settle()
        assert home.states() == {"sql@b": HOST}

    play(script, adapters=2)


def test_a_new_revision_that_fails_turns_nobody_away() -> None:
    async def script(home: Home) -> None:
        home.source.stuck = {"a"}
        waiting = home.begin("sql", "a")
        await until(lambda: home.states() == {"sql@a": FETCHING}, "fetching")
        broken = home.held.begin_load(load_of("sql", "y"), placed=True)
        await broken.settled.wait()
        assert broken.state == FAILED
        by_name = home.begin("sql")
        await asyncio.sleep(0.01)
        assert not by_name.done()
        home.source.stuck.clear()
        assert (await by_name)[0] is (await waiting)[0]

    play(script)


def test_a_drain_that_takes_too_long_ends_its_requests() -> None:
    async def script(home: Home) -> None:
        held, user = await home.use("a")
        user.abort = lambda: home.held.release(held, user)
        home.held.begin_drop(held)
        await asyncio.sleep(0.02)
        assert home.states() == {"a@a": DRAINING}
        assert user.ended_by is None
        home.held.begin_drop(held, 0.01)  # somebody else is less patient
        await home.settle()
        assert isinstance(user.ended_by, UnavailableError)
        assert (home.states(), home.engine.loaded) == ({}, {})

    play(script)


def test_a_revision_is_awaited_while_its_name_is_resolved() -> None:
    async def script(home: Home) -> None:
        adapter = AdapterId("default", BASE, "a")
        assert not home.held.has_or_awaits(adapter, revision("a"))
        task = home.begin("a")
        while not home.resolved:
            await asyncio.sleep(0)
        assert home.states() == {}
        for wanted in (None, revision("a")):
            assert home.held.has_or_awaits(adapter, wanted)
        home.done(await task)

    play(script)


def test_a_name_that_does_not_exist_leaves_nothing() -> None:
    async def script(home: Home) -> None:
        refusals = await asyncio.gather(*(home.use("z") for _ in range(3)), return_exceptions=True)
        assert [type(r) for r in refusals] == [NotFoundError] * 3
        assert home.resolved == ["z"]
        with pytest.raises(NotFoundError):
            await home.use("z")
        assert home.resolved == ["z", "z"]
        assert (home.states(), home.changes) == ({}, 0)
        assert not home.held._waiting

    play(script)


def test_a_waiting_request_that_leaves_does_not_end_the_load() -> None:
    async def script(home: Home) -> None:
        home.source.stuck = {"a"}
        first, second = home.begin("a"), home.begin("a")
        await until(lambda: bool(home.source.fetches), "fetching")
        first.cancel()
        await asyncio.sleep(0)
        home.source.stuck.clear()
        held, _ = await second
        assert len(held.users) == 1

    play(script)


def test_close_ends_what_is_on_its_way() -> None:
    async def script(home: Home) -> None:
        home.source.stuck = {"a"}
        fetching, new = home.begin("a"), home.held.begin_load(load_of("b", "b"), placed=True)
        used = await home.use("c")
        home.held.begin_drop(used[0])  # would wait for its user for ever
        await asyncio.sleep(0.01)
        await asyncio.wait_for(home.held.close(), 60)
        with pytest.raises(UnavailableError):
            await asyncio.wait_for(fetching, 60)
        await asyncio.wait_for(new.settled.wait(), 60)

    play(script)


def test_every_change_is_told_with_a_higher_generation() -> None:
    async def script(home: Home) -> None:
        seen = [home.held.generation]

        def check() -> None:
            assert home.held.generation > seen[-1]
            seen.append(home.held.generation)

        home._changed = check  # type: ignore[method-assign]
        home.held._on_change = check
        use = await home.use("a")  # fetching, here
        home.held.begin_drop(use[0])  # draining
        home.done(use)
        await home.settle()  # gone
        assert len(seen) == 5

    play(script)


def test_what_the_engine_has_in_pages_is_told_as_such() -> None:
    async def script(home: Home) -> None:
        await home.touch("a", "b")
        assert home.states() == {"a@a": HOST, "b@b": HOST}
        before = home.held.generation
        (copy,) = [h for h in home.held._all() if h.spec.adapter.name == "b"]
        home.engine.in_pages = {copy.engine_name}
        assert home.states() == {"a@a": HOST, "b@b": DEVICE}
        assert home.held.generation > before
        assert home.held.count_by_state() == {HOST: 1, DEVICE: 1}
        before = home.held.generation
        home.held.residency()
        assert home.held.generation == before

    play(script)
