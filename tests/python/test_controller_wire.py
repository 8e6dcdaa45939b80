"""What the controller does over the wire: routes around a lost node, deltas to many watchers,
residency told by its changes, soft state after a restart, and the cluster's status. How long things
took is printed and bounds nothing but what hangs; test_silent_nodes.py asserts what is in ticks.
"""

import asyncio
import time
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from controller_fixtures import DEVICE, FakeNode, Site, controller

from loraserve.controller.events import AdapterAdded, NodeRecord, NodeRegistered
from loraserve.controller.state import Settings
from loraserve.errors import FailedPreconditionError, InvalidArgumentError
from loraserve.placement.types import AdapterId, AdapterSpec
from loraserve.v1 import common_pb2, controller_pb2
from loraserve.wire_errors import from_rpc_error

WATCHERS = 100
# As daemons have it, but that no node is lost because the machine stood still.
REAL_TIME = Settings(tick_seconds=1.0, silent_ticks=120)
# Nothing but what the test does changes anything.
STILL = Settings(tick_seconds=3600.0)


def play(tmp_path: Path, script: Callable[[Site], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with controller(tmp_path, **options) as site:
            await asyncio.wait_for(script(site), 120)

    asyncio.run(run())


def packed(name: str, rank: int = 8) -> bytes:
    return f"PACKED base {rank} {name}".encode()


def holders(site: Site, name: str, tenant: str = "acme") -> list[str]:
    route = site.server.runtime.state.routes.adapters[AdapterId(tenant, "base", name)]
    return [h.node_id for r in route.revisions for h in r.holders]


async def until(holds: Callable[[], bool], what: str, timeout_s: float = 60.0) -> float:
    """How long it took; the bound is only there for what hangs."""
    begin = time.monotonic()
    while not holds():
        assert time.monotonic() - begin < timeout_s, what
        await asyncio.sleep(0.005)
    return time.monotonic() - begin


def test_a_lost_nodes_adapters_are_routed_around_it_and_replicated_again(tmp_path: Path) -> None:
    settings = Settings(tick_seconds=1.0, replicas=2)

    async def script(site: Site) -> None:
        nodes = {f"n{i}": FakeNode(site, f"n{i}") for i in range(3)}
        for node in nodes.values():
            await node.__aenter__()
        try:
            for i in range(6):
                await site.create(f"a{i}", packed(f"a{i}"))
            names = [f"a{i}" for i in range(6)]
            await until(lambda: all(len(holders(site, n)) == 2 for n in names), "two copies")
            victim = holders(site, "a0")[0]
            survivors = {n: [h for h in holders(site, n) if h != victim] for n in names}
            await nodes[victim].kill()
            # Routes leave the node out as soon as its stream has ended.
            took = await until(
                lambda: all(victim not in holders(site, n) for n in names), "routed around"
            )
            for name in names:
                assert holders(site, name) == survivors[name] or len(holders(site, name)) == 2
            again = await until(
                lambda: all(len(holders(site, n)) == 2 for n in names), "copies again"
            )
            print(f"routed around after {took:.2f} s, copies again after {again:.2f} s more")
            assert victim not in site.server.runtime.state.nodes
        finally:
            for node in nodes.values():
                await node.kill()

    play(tmp_path, script, settings=settings)


def test_a_change_reaches_each_of_a_hundred_watchers_in_one_message(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        runtime = site.server.runtime
        record = NodeRecord("n", 1, "n:1", "base", "", 1 << 60)
        await runtime.apply(NodeRegistered(record))
        for i in range(500):
            await runtime.apply(AdapterAdded(spec(f"old-{i}")))
        heard: asyncio.Queue[tuple[int, int, list[str]]] = asyncio.Queue()

        async def watch(index: int) -> None:
            async for message in site.watch("node"):
                if not message.full and not message.more:
                    names = [route.adapter.name for route in message.adapters]
                    heard.put_nowait((index, message.version, names))
                elif not message.more:
                    heard.put_nowait((index, message.version, []))

        tasks = [asyncio.create_task(watch(i)) for i in range(WATCHERS)]
        for _ in range(WATCHERS):
            await heard.get()
        times = []
        for i in range(7):
            begin = time.perf_counter()
            await runtime.apply(AdapterAdded(spec(f"new-{i}")))
            told = [await heard.get() for _ in range(WATCHERS)]
            times.append(time.perf_counter() - begin)
            version = runtime.state.routes.version
            assert sorted(told) == [(w, version, [f"new-{i}"]) for w in range(WATCHERS)]
        assert heard.empty()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        print(f"a change reaches {WATCHERS} watchers in {min(times):.3f} s")

    play(tmp_path, script, settings=STILL)


def spec(name: str, tenant: str = "acme") -> AdapterSpec:
    return AdapterSpec(AdapterId(tenant, "base", name), f"{abs(hash(name)):064x}"[:64], 1, 8)


def test_deltas_are_filtered_for_the_caller_and_name_only_what_changed(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        async with FakeNode(site, "n1"):
            await site.create("sql", packed("sql"))
            heard: dict[str, list[Any]] = {"acme": [], "zeta": [], "node": []}

            async def watch(who: str) -> None:
                async for message in site.watch(who):
                    heard[who].append(message)

            tasks = [asyncio.create_task(watch(who)) for who in heard]
            await until(lambda: all(heard.values()), "first tables")
            await site.create("poet", packed("poet"), who="zeta")
            await site.served("poet", ["n1"], who="zeta")
            await site.delete("poet", who="zeta")
            await site.create("last", packed("last"))
            await site.served("last", ["n1"])

            def told(who: str, *names: str) -> bool:
                seen = {r.adapter.name for m in heard[who] for r in m.adapters}
                return seen == set(names)

            def removed(who: str) -> list[str]:
                return [a.name for m in heard[who] for a in m.removed_adapters]

            await until(lambda: told("node", "sql", "poet", "last"), "all that changed")
            await until(lambda: told("acme", "sql", "last"), "its own")
            assert told("zeta", "poet")
            assert (removed("node"), removed("zeta"), removed("acme")) == (["poet"], ["poet"], [])
            for who, messages in heard.items():
                assert [m.full for m in messages] == [True] + [False] * (len(messages) - 1), who
                versions = [m.version for m in messages]
                assert versions == sorted(set(versions))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    play(tmp_path, script)


def test_a_watcher_that_was_away_hears_what_changed_since(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        for name in ("a", "b", "c"):
            await site.create(name, packed(name))
        async for message in site.watch("acme"):
            known = {"known_epoch": message.epoch, "known_version": message.version}
            break
        await site.create("d", packed("d"))
        await site.delete("a")
        async for message in site.watch("acme", **known):
            assert not message.full
            assert [r.adapter.name for r in message.adapters] == ["d"]
            assert [a.name for a in message.removed_adapters] == ["a"]
            break

    play(tmp_path, script)


# Heartbeats


class Speaker:
    """A node that says what the test wants."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.node = FakeNode(site, "n1")
        self.call: Any = None

    async def open(self) -> None:
        await self.node.register()
        self.call = self.site.controller.Heartbeat(metadata=self.site.auth("node"))

    async def say(self, generation: int, *names: str, **fields: Any) -> Any:
        """The controller's answer."""
        await self.call.write(beat(generation, *names, **fields))
        if fields.get("more"):
            return None
        return await self.call.read()


def copy(name: str) -> Any:
    who = common_pb2.AdapterId(tenant="acme", base="base", name=name)
    return common_pb2.AdapterResidency(adapter=who, revision="0" * 64, state=DEVICE, size_bytes=7)


def key(name: str) -> Any:
    who = common_pb2.AdapterId(tenant="acme", base="base", name=name)
    return controller_pb2.RevisionKey(adapter=who, revision="0" * 64)


def beat(generation: int, *names: str, **fields: Any) -> Any:
    return controller_pb2.HeartbeatRequest(
        node_id="n1",
        incarnation=1,
        generation=generation,
        residency=[copy(name) for name in names],
        **fields,
    )


def known(site: Site) -> list[str]:
    return sorted(a.name for a, _ in site.server.runtime.state.nodes["n1"].copies)


def test_residency_is_told_by_its_changes(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        speaker = Speaker(site)
        await speaker.open()
        assert not (await speaker.say(5, "a", "b")).send_full_residency
        assert known(site) == ["a", "b"]
        await speaker.say(7, "c", since_generation=5, removed=[key("a")])
        assert known(site) == ["b", "c"]
        await speaker.say(7, since_generation=7)
        assert known(site) == ["b", "c"]
        # A change that does not follow is not taken; the node is asked for everything.
        assert (await speaker.say(9, "d", since_generation=8)).send_full_residency
        assert known(site) == ["b", "c"]
        assert not (await speaker.say(9, "c", "d")).send_full_residency
        assert known(site) == ["c", "d"]
        assert site.server.runtime.state.nodes["n1"].used_bytes == 14

    play(tmp_path, script, settings=REAL_TIME)


def test_a_new_stream_begins_with_everything(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        speaker = Speaker(site)
        await speaker.open()
        await speaker.say(5, "a", "b")
        speaker.call.cancel()
        await speaker.open()
        assert (await speaker.say(6, "c", since_generation=5)).send_full_residency
        assert not (await speaker.say(6, "b", "c")).send_full_residency
        assert known(site) == ["b", "c"]

    play(tmp_path, script, settings=REAL_TIME)


def test_a_residency_in_parts_is_seen_when_it_is_whole(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        speaker = Speaker(site)
        await speaker.open()
        await speaker.say(5, "a")
        await speaker.say(8, "b", "c", more=True)
        await speaker.say(8, "d", more=True)
        assert known(site) == ["a"]
        await speaker.say(8, "e", draining=True)
        assert known(site) == ["b", "c", "d", "e"]
        assert site.server.runtime.state.nodes["n1"].draining
        await speaker.say(9, "f", more=True)
        await speaker.call.write(beat(10, "g"))
        with pytest.raises(grpc.RpcError) as caught:
            await speaker.call.read()
        error = from_rpc_error(caught.value)
        assert (type(error), error.field) == (InvalidArgumentError, "generation")

    play(tmp_path, script, settings=REAL_TIME)


def test_another_controllers_epoch(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        speaker = Speaker(site)
        await speaker.open()
        assert (await speaker.say(5, "a", epoch=99)).must_register
        assert known(site) == []
        with pytest.raises(grpc.RpcError) as caught:
            await FakeNode(site, "n2").register(heard_epoch=99)
        error = from_rpc_error(caught.value)
        assert (type(error), error.field) == (FailedPreconditionError, "heard_epoch")
        for speed in (float("nan"), -1.0):
            with pytest.raises(grpc.RpcError) as caught:
                await FakeNode(site, "n3").register(relative_speed=speed)
            assert from_rpc_error(caught.value).field == "relative_speed"

    play(tmp_path, script, settings=REAL_TIME)


# The cluster at one moment


def test_the_status_says_how_many_nodes_are_wanted_and_why(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        async with FakeNode(site, "n1", memory=100) as node:
            await node.register(
                incarnation=1,
                devices=[common_pb2.Device(failure_domain="rack-7")],
                relative_speed=0.5,
            )
            for i in range(9):
                await site.create(f"a{i}", packed(f"a{i}"))
            request = controller_pb2.GetClusterStatusRequest()

            async def status() -> Any:
                return await site.controller.GetClusterStatus(request, metadata=site.auth("admin"))

            while not (await status()).wanted_nodes or (await status()).wanted_nodes[0].nodes < 2:
                await asyncio.sleep(0.02)
            answer = await status()
            (wanted,) = answer.wanted_nodes
            assert (wanted.base, wanted.nodes, wanted.current_nodes) == ("base", 2, 1)
            assert wanted.reason == "2 wanted: 1 copies of every adapter need the memory"
            (n1,) = answer.nodes
            assert (n1.node_id, n1.failure_domain, n1.relative_speed) == ("n1", "rack-7", 0.5)
            assert (answer.adapters, answer.epoch) == (9, site.server.runtime.state.epoch)
            assert answer.unrouted_adapters == 9 - n1.wanted_adapters
            url = f"http://{site.server.metrics_address}/metrics"
            text = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
            assert 'loraserve_wanted_nodes{base="base"} 2.0' in text
            assert f"loraserve_adapters_unrouted {answer.unrouted_adapters}.0" in text

    settings = Settings(tick_seconds=0.02, silent_ticks=500, placement_interval_ticks=5)
    play(tmp_path, script, metrics_listen="127.0.0.1:0", settings=settings)


def test_ignored_reports_are_counted_for_all_to_see(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        speaker = Speaker(site)
        await speaker.open()
        stranger = common_pb2.AdapterId(tenant="acme", base="base", name="stranger")
        demand = [common_pb2.AdapterDemand(adapter=stranger, prefill_tokens=5)]
        await speaker.say(1, demand=demand, applied_command_id=1 << 50)
        url = f"http://{site.server.metrics_address}/metrics"
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
        for reason in ("demand of an unknown adapter", "command that was never sent"):
            assert f'loraserve_ignored_reports_total{{reason="{reason}"}} 1.0' in text

    play(tmp_path, script, metrics_listen="127.0.0.1:0", settings=REAL_TIME)


def test_soft_state_is_back_after_a_restart_and_nothing_moves(tmp_path: Path) -> None:
    names = [f"a{i}" for i in range(8)]

    async def run() -> None:
        settings = Settings(tick_seconds=1.0, replicas=2)
        async with controller(tmp_path, settings=settings) as site:
            nodes = [FakeNode(site, f"n{i}") for i in range(3)]
            for node in nodes:
                await node.__aenter__()
            for name in names:
                await site.create(name, packed(name))
            await until(lambda: all(len(holders(site, n)) == 2 for n in names), "placed")
            before = {n: holders(site, n) for n in names}
            for node in nodes:
                await node.kill()
        begin = time.monotonic()
        async with controller(tmp_path, keys=site.keys, settings=settings) as again:
            for node in nodes:
                node.site, node.commands = again, []
                await node.__aenter__()
            await until(lambda: {n: holders(again, n) for n in names} == before, "routes are back")
            print(f"routes are back {time.monotonic() - begin:.2f} s after the start")
            await asyncio.sleep(1.2)  # a tick, for whatever would move
            assert {n: holders(again, n) for n in names} == before
            assert not any(node.commands for node in nodes)
            for node in nodes:
                await node.kill()

    asyncio.run(asyncio.wait_for(run(), 120))
