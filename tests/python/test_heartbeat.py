"""The line between a node and its controller, with a controller that does what the test wants."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import pytest
from fake_node import BASE, CONTEXT, FakeEngine, serving, spec, until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from heard_controller import FakeController, drain, drop, listening, load
from node_calls import answers, refused, run, store_with

from loraserve.errors import FailedPreconditionError, UnavailableError
from loraserve.node.demand import DemandCounter
from loraserve.node.held import DRAINING, FAILED, FETCHING, HOST
from loraserve.node.server import NodeServer

Script = Callable[[FakeController, NodeServer, FakeEngine, object], Awaitable[None]]


def play(
    tmp_path: Path, script: Script, fake: FakeController | None = None, **options: object
) -> None:
    """A node with the blobs a to d in its store, registered with `fake`."""

    async def test() -> None:
        controller, engine = fake or FakeController(), FakeEngine(step_s=0.005)
        async with listening(controller) as address:
            store = store_with(tmp_path, *"abcd")
            async with serving(engine, store, controller=address, **options) as (server, channel):  # type: ignore[arg-type]
                if controller.refuse is None:
                    await until(lambda: bool(controller.beats), "a heartbeat")
                await script(controller, server, engine, channel)

    run(test)


def test_a_node_says_who_it_is_and_what_it_has(tmp_path: Path) -> None:
    async def script(fake: FakeController, server: NodeServer, *_: object) -> None:
        (who,) = fake.registrations
        assert (who.node_id, who.address, who.base.name) == ("n1", server.address, BASE)
        assert (who.base.digest, who.incarnation) == ("d" * 64, server.node.incarnation)
        assert (who.limits.context_tokens, who.limits.max_rank) == (CONTEXT, 512)
        assert who.adapter_memory_bytes == server.node.adapters.memory_bytes == (64 << 10) * 7 // 8
        beat = fake.beats[0]
        assert (beat.node_id, beat.incarnation) == ("n1", who.incarnation)
        assert (beat.load.total_pages, beat.draining, beat.applied_command_id) == (100, False, 0)
        count = len(fake.beats)
        await until(lambda: len(fake.beats) > count + 2, "more, one each period")
        assert beat.generation == fake.beats[-1].generation

    play(tmp_path, script)


def test_commands_load_and_drop_and_their_results_are_told(tmp_path: Path) -> None:
    async def script(fake: FakeController, server: NodeServer, *_: object) -> None:
        fake.send(load(1, "sql", "a"), load(2, "none", "f"), load(3, "huge", "b", 1 << 40))
        await until(lambda: set(fake.results) == {1, 2, 3}, "results")
        assert fake.results[1] == ""
        assert fake.results[2]
        assert "bytes, of" in fake.results[3]
        # A command that failed at once leaves nothing; one that failed later is shown.
        await until(lambda: fake.states == {"sql@a": HOST, "none@f": FAILED}, "shown")
        assert fake.beats[-1].applied_command_id == 3
        fake.send(drop(4, "sql", "a"), drop(5, "none", "f"), drop(6, "never", "a"))
        await until(lambda: {4, 5, 6} <= set(fake.results), "dropped")
        assert not any(fake.results[i] for i in (4, 5, 6))
        await until(lambda: fake.states == {}, "gone")

    play(tmp_path, script)


def test_a_command_that_comes_twice_is_carried_out_once(tmp_path: Path) -> None:
    async def script(
        fake: FakeController, server: NodeServer, engine: FakeEngine, _: object
    ) -> None:
        for _ in range(3):
            fake.send(load(7, "sql", "a"))
        await until(lambda: 7 in fake.results, "loaded")
        fake.send(load(8, "sql", "a"))  # another one that asks for the same
        await until(lambda: 8 in fake.results, "loaded")
        assert fake.results == {7: "", 8: ""}
        assert len(engine.loaded) == 1
        fake.send(drop(9, "sql", "a"), drop(10, "sql", "a"))
        await until(lambda: {9, 10} <= set(fake.results), "dropped")
        fake.send(load(7, "sql", "a"))  # late, of before the drop
        count = len(fake.beats)
        await until(lambda: len(fake.beats) > count + 2, "time to do it")
        assert (fake.states, engine.loaded, len(engine.unloaded)) == ({}, {}, 1)

    play(tmp_path, script)


def test_a_load_and_its_drop_in_one_message_both_end(tmp_path: Path) -> None:
    async def script(
        fake: FakeController, server: NodeServer, engine: FakeEngine, _: object
    ) -> None:
        fake.send(load(1, "sql", "a"), drop(2, "sql", "a"), load(3, "sql", "b"))
        await until(lambda: set(fake.results) == {1, 2, 3}, "results")
        assert "dropped while it loaded" in fake.results[1]
        await until(lambda: fake.states == {"sql@b": HOST}, "only the last")
        assert len(engine.loaded) == 1

    play(tmp_path, script)


def test_what_a_command_does_shows_in_the_heartbeat_that_acknowledges_it(tmp_path: Path) -> None:
    async def script(
        fake: FakeController, server: NodeServer, engine: FakeEngine, _: object
    ) -> None:
        engine.may_load.clear()
        fake.send(load(1, "sql", "a"))
        await until(lambda: fake.beats[-1].applied_command_id == 1, "applied")
        assert fake.states == {"sql@a": FETCHING}
        assert 1 not in fake.results
        engine.may_load.set()
        await until(lambda: fake.states == {"sql@a": HOST}, "loaded")

    play(tmp_path, script)


def test_a_change_is_told_long_before_the_period_is_over(tmp_path: Path) -> None:
    async def script(fake: FakeController, server: NodeServer, *_: object) -> None:
        fake.send(load(1, "sql", "a"))
        await until(lambda: 1 in fake.results and fake.states == {"sql@a": HOST}, "told")
        server.node.adapters.begin_drop(server.node.adapters.copies(spec("sql", "a").adapter)[0])
        await until(lambda: fake.states == {}, "gone")
        generations = [beat.generation for beat in fake.beats]
        assert generations == sorted(generations)
        server.node.stop_accepting()
        await until(lambda: fake.beats[-1].draining, "drains")

    play(tmp_path, script, FakeController(period_s=3600))


def test_after_the_first_heartbeat_only_changes_are_told(tmp_path: Path) -> None:
    async def script(fake: FakeController, server: NodeServer, *_: object) -> None:
        fake.send(load(1, "sql", "a"), load(2, "code", "b"))
        await until(lambda: fake.states == {"sql@a": HOST, "code@b": HOST}, "loaded")
        assert fake.beats[0].since_generation == 0
        count = len(fake.beats)
        await until(lambda: len(fake.beats) > count + 2, "idle heartbeats")
        for before, beat in pairwise(fake.beats):
            assert beat.since_generation == before.generation
            assert (beat.epoch, len(beat.residency) <= 2) == (fake.epoch, True)
        assert not any(beat.residency or beat.removed for beat in fake.beats[count + 1 :])
        fake.send(send_full_residency=True)
        await until(lambda: fake.beats[-1].since_generation == 0, "everything again")
        assert len(fake.beats[-1].residency) == 2
        fake.send(drop(3, "sql", "a"))
        await until(lambda: fake.states == {"code@b": HOST}, "dropped")
        assert any(beat.removed for beat in fake.beats)
        fake.hang_up()
        await until(lambda: fake.streams == 2 and len(fake.registrations) == 2, "another stream")
        assert fake.registrations[1].heard_epoch == fake.epoch

    play(tmp_path, script)


def test_a_node_that_is_not_known_registers_again(tmp_path: Path) -> None:
    async def script(fake: FakeController, server: NodeServer, *_: object) -> None:
        fake.send(load(5, "sql", "a"))
        await until(lambda: 5 in fake.results, "loaded")
        fake.send(must_register=True)
        await until(lambda: len(fake.registrations) == 2 and fake.streams == 2, "registered")
        again = fake.registrations[0]
        again.heard_epoch = fake.epoch
        assert fake.registrations[1] == again
        await until(lambda: fake.beats[-1].applied_command_id == 0, "a new count")
        assert fake.states == {"sql@a": HOST}  # what it holds stays
        fake.send(load(1, "code", "b"))  # ids begin again
        await until(lambda: 1 in fake.results, "loaded")
        assert fake.states == {"sql@a": HOST, "code@b": HOST}

    play(tmp_path, script)


def test_an_older_leader_is_not_obeyed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def script(
        fake: FakeController, server: NodeServer, engine: FakeEngine, _: object
    ) -> None:
        fake.send(load(1, "sql", "a"), epoch=2)
        await until(lambda: fake.streams == 2, "another stream")
        assert engine.loaded == {}
        fake.epoch = 2
        fake.hang_up()
        count = len(fake.registrations)
        await until(lambda: len(fake.registrations) > count, "tried")
        await asyncio.sleep(0.1)
        assert fake.streams == 2  # no heartbeat goes to it
        fake.epoch = 4
        await until(lambda: fake.streams == 3, "a newer one is heard")
        fake.send(load(1, "sql", "a"))
        await until(lambda: 1 in fake.results, "loaded")

    with caplog.at_level(logging.WARNING):
        play(tmp_path, script)
    assert "epoch 2 is older than 3" in caplog.text


def test_a_controller_that_refuses_is_told_once_and_serving_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeController()
    fake.refuse = FailedPreconditionError("incarnation", "is the id used twice?")

    async def script(fake: FakeController, server: NodeServer, _: object, channel: object) -> None:
        await until(lambda: len(fake.registrations) >= 3, "tried again and again")
        assert await answers(channel)
        fake.refuse = None
        await until(lambda: bool(fake.beats), "taken at last")

    play(tmp_path, script, fake)
    told = "the controller refuses this node, serving goes on: incarnation: is the id"
    assert caplog.text.count(told) == 1


@pytest.mark.parametrize("period_s", [0.0, -1.0, 4000.0])
def test_a_period_that_makes_no_sense_is_refused(
    tmp_path: Path, period_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeController(period_s=period_s)

    async def script(fake: FakeController, *_: object) -> None:
        await until(lambda: len(fake.registrations) >= 2, "tried again")
        assert fake.streams == 0

    fake.refuse = UnavailableError("x", "not waited for")  # so that `play` waits for no heartbeat

    async def accept(fake: FakeController, *more: object) -> None:
        fake.refuse = None
        fake.registrations.clear()
        await script(fake, *more)

    play(tmp_path, accept, fake)
    assert "heartbeat_period: " in caplog.text


def test_demand_is_counted_once_whatever_becomes_of_the_line(tmp_path: Path) -> None:
    async def script(fake: FakeController, server: NodeServer, _: object, channel: object) -> None:
        fake.send(load(1, "sql", "a"))
        await until(lambda: 1 in fake.results, "loaded")
        await answers(channel, "r1", adapter={"name": "sql"}, sampling={"max_tokens": 4})
        await until(lambda: fake.demand("sql") == (1, 2, 4), "told")
        # The next heartbeats get no answer but that the node is not known.
        fake.silent = True
        await asyncio.sleep(0.1)
        kept = len(fake.beats)
        await answers(channel, "r2", adapter={"name": "sql"}, sampling={"max_tokens": 3})
        await until(lambda: fake.demand("sql") == (2, 4, 7), "sent")
        fake.silent = False
        del fake.beats[kept:]
        fake.send(must_register=True)
        await until(lambda: fake.demand("sql") == (2, 4, 7), "told again")
        count = len(fake.beats)
        await until(lambda: len(fake.beats) > count + 2, "more heartbeats")
        assert fake.demand("sql") == (2, 4, 7)

    play(tmp_path, script)


def test_demand_of_a_heartbeat_that_failed_goes_with_the_next() -> None:
    counter = DemandCounter()
    adapter = spec("sql", "a").adapter
    running = counter.of(adapter)
    running.users, running.requests, running.prefill_tokens = 1, 1, 5
    sample = counter.take()
    running.decode_tokens += 2
    counter.give_back(sample)
    assert counter.take() == {adapter: (1, 5, 2)}
    assert counter.take() == {}
    running.decode_tokens += 1  # still counted, though nothing was there meanwhile
    assert counter.take() == {adapter: (0, 0, 1)}
    running.users = 0
    counter.take()
    assert counter._demand == {}


def test_the_drain_command_ends_what_runs_too_long(tmp_path: Path) -> None:
    async def script(fake: FakeController, server: NodeServer, _: object, channel: object) -> None:
        running = asyncio.ensure_future(answers(channel, sampling={"max_tokens": 100_000}))
        await until(lambda: bool(len(server.node.requests)), "running")
        fake.send(drain(1, 3.0))
        await until(lambda: fake.beats[-1].draining, "drains")
        assert 1 not in fake.results
        assert (await refused(answers(channel, "late"))).code == "UNAVAILABLE"
        check = health_pb2_grpc.HealthStub(channel).Check
        status = (await check(health_pb2.HealthCheckRequest())).status
        assert status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await refused(running)).code == "UNAVAILABLE"
        await until(lambda: fake.results.get(1) == "", "drained")
        fake.send(drain(2))
        await until(lambda: fake.results.get(2) == "", "nothing left to do")

    play(tmp_path, script)


def test_a_command_of_a_newer_protocol_is_refused_not_fatal(tmp_path: Path) -> None:
    async def script(fake: FakeController, *_: object) -> None:
        unknown = load(1, "sql", "a")
        unknown.ClearField("load")
        bad = load(2, "sql", "a")
        bad.load.revision = "short"
        other = load(3, "sql", "a")
        other.load.adapter.base = "other"
        fake.send(unknown, bad, other, load(4, "sql", "a"))
        await until(lambda: set(fake.results) == {1, 2, 3, 4}, "results")
        assert "unknown to this node" in fake.results[1]
        assert "hexadecimal" in fake.results[2]
        assert "this node serves" in fake.results[3]
        assert fake.results[4] == ""
        assert fake.streams == 1

    play(tmp_path, script)


def test_a_node_that_stops_says_so_first(tmp_path: Path) -> None:
    async def test() -> None:
        fake = FakeController(period_s=3600)
        async with listening(fake) as address:
            async with serving(FakeEngine(), controller=address):
                await until(lambda: bool(fake.beats), "a heartbeat")
                assert not fake.beats[-1].draining
            assert fake.beats[-1].draining

    run(test)


def test_drops_wait_for_the_requests_that_use_the_copy(tmp_path: Path) -> None:
    async def script(
        fake: FakeController, server: NodeServer, engine: FakeEngine, channel: object
    ) -> None:
        fake.send(load(1, "sql", "a"))
        await until(lambda: 1 in fake.results, "loaded")
        slow = {"max_tokens": 60}
        engine.may_step.clear()
        running = asyncio.ensure_future(answers(channel, adapter={"name": "sql"}, sampling=slow))
        await until(lambda: bool(len(server.node.requests)), "running")
        fake.send(drop(2, "sql", "a"))
        await until(lambda: fake.states == {"sql@a": DRAINING}, "draining")
        last = next(beat for beat in reversed(fake.beats) if beat.residency)
        assert last.residency[0].active_requests == 1
        assert 2 not in fake.results
        engine.may_step.set()
        assert len(await running) == 60
        await until(lambda: fake.results.get(2) == "", "gone")
        assert fake.states == {}

    play(tmp_path, script)
