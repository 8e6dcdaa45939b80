"""Daemons that die, stop and come back, while a client goes on. Times are printed and bound nothing
but what hangs."""

import asyncio
import concurrent.futures
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from served_cluster import running

from loraserve import AsyncClient, Client, SamplingParams
from loraserve.client import Chunk, Completion
from loraserve.demo import MODEL_NAME, adapter_directory
from loraserve.demo.cluster import Cluster, Daemon
from loraserve.demo.skills import held_out_words, prompt
from loraserve.errors import UnavailableError

GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
LONG = 220
STREAMS = 48
# Only what hangs takes so long, on any machine.
PATIENCE_S = 60.0


def long_params(index: int) -> SamplingParams:
    """Greedy and seeded in turn; neither ends before the last token."""
    return SamplingParams(
        max_tokens=LONG, temperature=(0.0, 1.0)[index % 2], seed=index, ignore_eos=True
    )


async def collect(client: AsyncClient, index: int, begins: Callable[[], None]) -> Completion:
    """One long answer; what its chunks say is checked on the way."""
    chunks: list[Chunk] = []
    word = held_out_words(STREAMS, seed=2)[index]
    stream = client.stream(
        prompt(word),
        long_params(index),
        adapter=(None, "upper")[index // 2 % 2],
        timeout_s=2 * PATIENCE_S,
    )
    async with stream:
        async for chunk in stream:
            if not chunks:
                begins()
            chunks.append(chunk)
    completion = stream.completion()
    assert [t for c in chunks for t in c.token_ids] == completion.token_ids
    assert "".join(c.text for c in chunks) == completion.text
    return completion


async def all_long(address: str, victim: Daemon | None) -> list[Completion]:
    """All answers; `victim` is killed when half of the streams have begun."""
    begun = 0

    def begins() -> None:
        nonlocal begun
        begun += 1
        if victim is not None and begun == STREAMS // 2:
            victim.process.kill()  # before it has answered more

    async with AsyncClient(address) as client:
        return await asyncio.gather(*(collect(client, i, begins) for i in range(STREAMS)))


def test_streams_of_a_killed_node_go_on_elsewhere_token_by_token(tmp_path: Path) -> None:
    replicas = ["--replicas", "2"]
    with running(tmp_path, skills=["upper"], controller_options=replicas) as (cluster, client):
        deadline = time.monotonic() + PATIENCE_S
        while len(client.adapters.get("upper").holders) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        undisturbed = asyncio.run(all_long(cluster.address, None))
        victim = cluster.nodes["node-1"]
        disturbed = asyncio.run(all_long(cluster.address, victim))
        for before, after in zip(undisturbed, disturbed, strict=True):
            assert after.token_ids == before.token_ids
            assert after.text == before.text
            # One whose last tokens were on their way already needed no other node.
            assert after.node_id == "node-2" or after.attempts == 1
        resumed = sum(c.attempts > 1 for c in disturbed)
        assert resumed >= 5, "the killed node had next to nothing to do"

        # It comes back, and is used again.
        asyncio.run(cluster.ready(cluster.spawn_node("node-1")))
        deadline = time.monotonic() + PATIENCE_S
        while client.generate(prompt("again"), GREEDY, adapter="upper").node_id != "node-1":
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_serving_outlives_the_controller_and_the_registry_its_death(tmp_path: Path) -> None:
    with running(tmp_path, skills=["upper", "reverse"]) as (cluster, client):
        assert cluster.controller is not None
        before = client.adapters.list()
        cluster.controller.process.kill()
        cluster.controller.process.wait()
        for word in held_out_words(10):
            assert client.generate(prompt(word), GREEDY, adapter="upper").text == word.upper()
        with pytest.raises(UnavailableError):
            client.adapters.list()
        asyncio.run(cluster.start_controller())
        # Nodes have registered again, routes are whole, nothing acknowledged is lost.
        began = time.monotonic()
        with Client(cluster.address) as fresh:
            fresh.wait_routable(["upper", "reverse"], timeout_s=PATIENCE_S)
            print(f"routes are whole {time.monotonic() - began:.2f} s after the restart")
            after = fresh.adapters.list()
            assert [(a.name, a.revision, a.created) for a in after] == [
                (a.name, a.revision, a.created) for a in before
            ]
            assert fresh.generate(prompt("word"), GREEDY, adapter="reverse").text == "drow"
        # The client that was there all along hears of what is new.
        client.adapters.add("late", adapter_directory("zigzag"), base=MODEL_NAME)
        client.wait_routable(["late"])
        assert client.generate(prompt("word"), GREEDY, adapter="late").text == "wOrD"


def test_adapters_of_a_lost_node_are_served_by_the_other(tmp_path: Path) -> None:
    skills = ["upper", "reverse", "sort", "stars"]
    fast = ["--heartbeat-period", "0.2"]
    with running(tmp_path, skills=skills, controller_options=fast) as (cluster, client):
        at_first = {a.name: {node for node, _ in a.holders} for a in client.adapters.list()}
        assert set().union(*at_first.values()) == {"node-1", "node-2"}
        cluster.nodes["node-2"].process.kill()
        answers = {name: client.generate(prompt("dragon"), GREEDY, adapter=name) for name in skills}
        assert {name: a.text for name, a in answers.items()} == {
            "upper": "DRAGON",
            "reverse": "nogard",
            "sort": "adgnor",
            "stars": "dr*g*n",
        }
        deadline = time.monotonic() + PATIENCE_S
        while any({n for n, _ in a.holders} != {"node-1"} for a in client.adapters.list()):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_node_that_is_told_to_stop_ends_what_it_began(tmp_path: Path) -> None:
    with running(tmp_path, nodes=2, skills=["upper"]) as (cluster, client):
        (holder,) = [node for node, _ in client.adapters.get("upper").holders]
        daemon = cluster.nodes[holder]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            streams = [
                client.stream(prompt("steady"), long_params(i), adapter="upper") for i in range(8)
            ]
            firsts = [next(stream) for stream in streams]
            assert {chunk.node_id for chunk in firsts} == {holder}
            daemon.process.terminate()
            rests = list(pool.map(list, streams))
        for first, rest in zip(firsts, rests, strict=True):
            assert {c.node_id for c in (first, *rest)} == {holder}
            assert {c.attempt for c in rest} == {0}
            assert sum(len(c.token_ids) for c in (first, *rest)) == LONG
        assert daemon.process.wait(PATIENCE_S) == 0
        assert "drained" not in daemon.log.read_text(), "a request was cut off"
        # New ones go to the other node, which loads the adapter.
        answer = client.generate(prompt("steady"), GREEDY, adapter="upper")
        assert answer.text == "STEADY"
        assert answer.node_id != holder


# The demo as a person runs it

DEMO = [sys.executable, "-m", "loraserve.cli", "demo"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids_of(directory: Path, process: "subprocess.Popen[str]", wanted: int) -> list[int]:
    """The daemons' pids, from the demo's first lines."""
    assert process.stdout is not None
    found: list[int] = []
    while len(found) < wanted:
        line = process.stdout.readline()
        assert line, "the demo ended early"
        if "(pid " in line:
            found.append(int(line.partition("(pid ")[2].partition(")")[0]))
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_demo_leaves_no_process(tmp_path: Path, number: int) -> None:
    process = subprocess.Popen(
        [*DEMO, "--directory", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # Tests that run in the background may have been given an ignored one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        pids = pids_of(tmp_path, process, 3)
        process.send_signal(number)
        process.wait(PATIENCE_S)
    finally:
        process.kill()
        assert process.stdout is not None
        process.stdout.close()
    deadline = time.monotonic() + PATIENCE_S
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, f"still there: {[p for p in pids if alive(p)]}"
        time.sleep(0.05)
    assert (process.returncode == 130) == (number == signal.SIGINT)


def test_a_cluster_that_cannot_start_says_why(tmp_path: Path) -> None:
    async def start() -> None:
        async with Cluster(tmp_path, nodes=1, model=tmp_path / "nowhere"):
            pass

    with pytest.raises(UnavailableError, match="nowhere: is no directory"):
        asyncio.run(start())
