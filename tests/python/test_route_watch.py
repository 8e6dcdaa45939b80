"""The route table of a client over a controller that restarts, goes away and sends old news."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import pytest
from fake_controller import (
    FakeController,
    adapter_route,
    fake_controller,
    node_route,
    routes,
)
from fake_node import until
from request_site import run

from loraserve.client.channels import Channels
from loraserve.client.route_table import RouteTable
from loraserve.client.route_watch import RouteWatch
from loraserve.errors import (
    LoraServeError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)

N1 = node_route("n1", "h:1")
SQL = adapter_route("sql", "n1")


class Watcher:
    def __init__(self, channels: Channels, address: str) -> None:
        self.seen: list[RouteTable] = []
        self.watch = RouteWatch(channels, address, self.seen.append)

    @property
    def at(self) -> tuple[int, int]:
        return (self.watch.table.epoch, self.watch.table.version)

    @property
    def names(self) -> list[str]:
        return sorted(a.name for a in self.watch.table.adapters)


@contextlib.asynccontextmanager
async def watching(controller: FakeController) -> AsyncIterator[Watcher]:
    channels = Channels()
    watcher = Watcher(channels, controller.address)
    watcher.watch.start()
    try:
        yield watcher
    finally:
        await watcher.watch.stop()
        await channels.close()


def test_the_first_table_and_what_changes_after_it() -> None:
    async def test() -> None:
        async with (
            fake_controller(
                routes(4, nodes=[N1], adapters=[adapter_route("sql", "n1")])
            ) as control,
            watching(control) as watcher,
        ):
            assert watcher.watch.age_s is None
            await watcher.watch.first_table(60)
            assert (watcher.at, watcher.names) == ((1, 4), ["sql"])
            assert watcher.watch.age_s == 0.0
            assert watcher.seen == [watcher.watch.table]
            assert (control.watches[0].known_epoch, control.watches[0].known_version) == (0, 0)
            waiting = asyncio.ensure_future(watcher.watch.changed(60))
            await until(lambda: control.open_watches == 1, "the watch stands")
            control.send(routes(5, full=False, adapters=[adapter_route("rot13", "n1")]))
            assert await waiting
            assert (watcher.at, watcher.names) == ((1, 5), ["rot13", "sql"])
            assert not await watcher.watch.changed(0.05)
            assert [t.version for t in watcher.seen] == [4, 5]

    run(test)


def test_a_table_in_parts_is_shown_when_it_is_whole() -> None:
    async def test() -> None:
        first = routes(2, nodes=[N1], adapters=[adapter_route("a", "n1")], more=True)
        async with fake_controller(first) as control, watching(control) as watcher:
            await until(lambda: control.open_watches == 1, "the watch stands")
            with pytest.raises(UnavailableError, match="no answer"):
                await watcher.watch.first_table(0.1)
            assert watcher.watch.age_s is None
            assert not watcher.seen
            control.send(routes(2, full=False, adapters=[adapter_route("b", "n1")]))
            await watcher.watch.first_table(60)
            assert watcher.names == ["a", "b"]

    run(test)


def test_the_last_table_stays_and_ages_while_the_controller_is_away() -> None:
    async def test() -> None:
        async with (
            fake_controller(routes(3, nodes=[N1])) as control,
            watching(control) as watcher,
        ):
            await watcher.watch.first_table(60)
            waiting = asyncio.ensure_future(watcher.watch.changed(60))
            now = asyncio.get_running_loop().time
            await asyncio.sleep(0.4)
            stopping = now()
            await control.stop()
            assert await waiting  # whoever waits for a table hears of the failure
            failed = now()
            assert (watcher.watch.age_s or 0) <= now() - stopping  # it was confirmed until then
            table = watcher.watch.table
            await asyncio.sleep(0.3)
            assert watcher.watch.table is table
            assert watcher.seen == [table]
            least_s, age_s = now() - failed, watcher.watch.age_s
            assert age_s is not None
            assert least_s <= age_s <= now() - stopping
            await watcher.watch.first_table(0.01)  # there is one, however old
            # Again on the same port: what the watch has is named, and the table is new again.
            control.greeting = [routes(3, full=False)]
            await control.start()
            await until(lambda: watcher.watch.age_s == 0.0, "the watch stands again")
            again = control.watches[-1]
            assert (again.known_epoch, again.known_version) == (1, 3)
            assert list(watcher.watch.table.nodes) == ["n1"]

    run(test)


def test_a_restarted_controller_has_a_higher_epoch_and_starts_versions_again() -> None:
    async def test() -> None:
        async with (
            fake_controller(
                routes(9, nodes=[N1], adapters=[adapter_route("old", "n1")])
            ) as control,
            watching(control) as watcher,
        ):
            await watcher.watch.first_table(60)
            await control.stop()
            fresh = routes(1, epoch=2, nodes=[N1], adapters=[adapter_route("new", "n1")])
            control.greeting = [fresh]
            await control.start()
            await until(lambda: watcher.at == (2, 1), "the new table")
            assert watcher.names == ["new"]

    run(test)


@pytest.mark.parametrize("epoch", [1, 2])
def test_older_news_end_the_watch_and_change_nothing(epoch: int) -> None:
    async def test() -> None:
        async with (
            fake_controller(routes(5, epoch=2, nodes=[N1])) as control,
            watching(control) as watcher,
        ):
            await watcher.watch.first_table(60)
            table = watcher.watch.table
            await until(lambda: control.open_watches == 1, "the watch stands")
            old = routes(9 if epoch == 1 else 4, epoch=epoch)
            control.greeting = [old]
            control.send(old, routes(6, epoch=2))
            # It is asked again and again, but never believed; nor is what follows on that watch.
            await until(lambda: len(control.watches) >= 3, "asked again")
            assert watcher.watch.table is table
            assert watcher.seen == [table]
            assert (watcher.watch.age_s or 0) > 0
            control.greeting = [routes(6, epoch=2, nodes=[N1])]
            await until(lambda: watcher.at == (2, 6), "the newer table")
            assert watcher.watch.age_s == 0.0

    run(test)


def test_parts_of_a_watch_that_broke_are_not_mixed_into_the_next() -> None:
    async def test() -> None:
        part = routes(2, nodes=[N1], adapters=[adapter_route("ghost", "n1")], more=True)
        async with (
            fake_controller(routes(1, nodes=[N1])) as control,
            watching(control) as watcher,
        ):
            await watcher.watch.first_table(60)
            await until(lambda: control.open_watches == 1, "the watch stands")
            control.greeting = [routes(2, full=False, adapters=[adapter_route("sql", "n1")])]
            control.send(part, None)
            await until(lambda: watcher.at == (1, 2), "the next watch")
            assert watcher.names == ["sql"]

    run(test)


def test_a_controller_that_ends_the_watch_is_asked_again() -> None:
    async def test() -> None:
        async with (
            fake_controller(routes(1, nodes=[N1])) as control,
            watching(control) as watcher,
        ):
            begin = asyncio.get_running_loop().time()
            for count in range(2, 32):
                await until(lambda: control.open_watches == 1, "the watch stands")
                control.send(None)
                await until(lambda c=count: len(control.watches) >= c, "asked again")  # type: ignore[misc]
            assert list(watcher.watch.table.nodes) == ["n1"]
            # Each time it answered, so each time it is asked soon: in 3 s as a rule. Were pauses to
            # grow, it would be 26 s at the least.
            assert asyncio.get_running_loop().time() - begin < 20

    run(test)


@pytest.mark.parametrize(
    "error",
    [UnauthenticatedError("authorization", "no key"), PermissionDeniedError("authorization", "no")],
    ids=lambda e: type(e).__name__,
)
def test_a_refused_key_surfaces_at_once(error: LoraServeError) -> None:
    async def test() -> None:
        async with fake_controller() as control, watching(control) as watcher:
            control.refusal = error
            for _ in range(2):
                with pytest.raises(type(error)) as caught:
                    await watcher.watch.first_table(3600)
                assert (caught.value.field, caught.value.message) == (error.field, error.message)
            # The key may be added while the client runs.
            control.refusal, control.greeting = None, [routes(1, nodes=[N1])]
            await until(lambda: watcher.at == (1, 1), "the table")
            await watcher.watch.first_table(60)

    run(test)


def test_a_refusal_after_a_table_costs_nothing() -> None:
    async def test() -> None:
        async with (
            fake_controller(routes(1, nodes=[N1])) as control,
            watching(control) as watcher,
        ):
            await watcher.watch.first_table(60)
            await until(lambda: control.open_watches == 1, "the watch stands")
            control.refusal = UnauthenticatedError("authorization", "revoked")
            control.send(None)
            await until(lambda: len(control.watches) >= 3, "refused")
            await watcher.watch.first_table(60)
            assert list(watcher.watch.table.nodes) == ["n1"]

    run(test)


def test_a_controller_that_is_not_there_is_named() -> None:
    async def test() -> None:
        async with fake_controller() as control:
            pass
        async with watching(control) as watcher:
            await until(lambda: watcher.watch._error is not None, "tried")
            begin = asyncio.get_running_loop().time()
            with pytest.raises(UnavailableError) as caught:
                await watcher.watch.first_table(0.3)
            assert asyncio.get_running_loop().time() - begin > 0.25
            assert caught.value.field == "controller"
            assert control.address in caught.value.message
            assert "no answer" not in caught.value.message

    run(test)


def test_one_unreadable_message_does_not_end_the_watch_for_good(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        channels = Channels()
        async with fake_controller(routes(1, nodes=[N1])) as control:
            calls = 0

            def on_table(table: RouteTable) -> None:
                nonlocal calls
                calls += 1
                if calls == 1:
                    raise RuntimeError("of the caller")

            watch = RouteWatch(channels, control.address, on_table)
            watch.start()
            try:
                await until(lambda: calls == 2, "told again")
            finally:
                await watch.stop()
                await channels.close()

    with caplog.at_level(logging.ERROR):
        run(test)
    assert "unexpected error in the route watch" in caplog.text


def test_stopping_ends_the_watch_at_the_controller() -> None:
    async def test() -> None:
        async with fake_controller(routes(1, nodes=[N1])) as control:
            async with watching(control) as watcher:
                await until(lambda: control.open_watches == 1, "the watch stands")
                await watcher.watch.stop()
                await watcher.watch.stop()
                await until(lambda: control.open_watches == 0, "ended")
            await asyncio.sleep(0.15)
            assert len(control.watches) == 1
            idle = Watcher(Channels(), control.address)
            await idle.watch.stop()

    run(test)
