"""kill -9 of the controller at any moment loses nothing that it acknowledged.

Clients add, update, re-point and remove adapters while the controller, a real process, is killed
again and again. After every start what it says must be what was acknowledged last; of a change
whose answer never came, either outcome. LORASERVE_LONG: many more kills.
"""

import contextlib
import multiprocessing
import os
import random
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from loraserve.checkpoint.adapter_source import AdapterModule, AdapterSource
from loraserve.checkpoint.durable_store import DurableStore
from loraserve.checkpoint.packed_adapter import PackedAdapter, open_packed, pack, parse_packed
from loraserve.client.sync import Client
from loraserve.controller.main import main
from loraserve.errors import (
    AlreadyExistsError,
    LoraServeError,
    NotFoundError,
    UnavailableError,
)

KILLS = 600 if os.environ.get("LORASERVE_LONG") else 30
WRITERS = 3
NAMES = 4
# From the start of the process to the first answer: promised for every start, and asked of every
# other one, as a busy machine may stand still for as long.
START_S = 5.0
# Below the ports that the kernel gives to whoever connects: between two lives nobody takes it.
PORTS = range(20_000, 30_000)


def packed(seed: int) -> PackedAdapter:
    draw = np.random.default_rng(seed)
    a = draw.standard_normal((4, 16)).astype("<f4")
    b = draw.standard_normal((16, 4)).astype("<f4")
    module = AdapterModule(0, "q_proj", 4, 1.0, "F32", a, b)
    return parse_packed(pack(AdapterSource("base", (module,))), verify="none")


PACKED = [packed(seed) for seed in range(4)]


def free_port() -> int:
    for port in random.Random(os.getpid()).sample(PORTS, len(PORTS)):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


class Controller:
    """The daemon on one port and one directory, life after life. A process that has imported it
    makes each life by fork: a start costs little."""

    def __init__(self, directory: Path) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["loraserve.controller.main"])
        self.address = f"127.0.0.1:{free_port()}"
        self._arguments = [
            *("--listen", self.address, "--data-dir", str(directory)),
            *("--heartbeat-period", "0.05", "--log-level", "error"),
        ]
        self._process: BaseProcess | None = None

    def start(self) -> None:
        self._process = self._context.Process(target=main, args=(self._arguments,), daemon=True)
        self._process.start()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            assert self._process.exitcode == -9

    def started(self, client: Client) -> float:
        """Waits for the first answer; how long it took."""
        begin = time.monotonic()
        while True:
            try:
                client.adapters.list()
            except UnavailableError:
                assert time.monotonic() - begin < 60, "does not start"
                time.sleep(0.01)
            else:
                return time.monotonic() - begin


class Writer:
    """Changes adapters of its own names and knows what may be true of each: the states that are
    possible, None for none. More than one where an answer never came."""

    def __init__(self, number: int, client: Client) -> None:
        self.number = number
        self._client = client
        self._random = random.Random(number)
        self.possible: dict[str, set[str | None]] = {
            f"writer-{number}-{i}": {None} for i in range(NAMES)
        }
        self._history: dict[str, list[str]] = {name: [] for name in self.possible}
        self.acknowledged = 0
        self.in_doubt = 0

    def change(self) -> None:
        """One change of one name. Raises UnavailableError where no answer came."""
        name = self._random.choice([*self.possible])
        (now,) = self.possible[name]
        wanted = self._random.choice(PACKED)
        calls = self._client.adapters
        draw = self._random.random()
        after: str | None = wanted.revision
        if now is None:
            self._history[name] = []
            self.begins(name, after)
            calls.add(name, wanted, base="base")
            self._history[name].append(wanted.revision)
        elif draw < 0.5:
            self.begins(name, after)
            calls.update(name, wanted, base="base")
            self._history[name].append(wanted.revision)
        elif draw < 0.7:
            after = self._random.choice(self._history[name])
            self.begins(name, after)
            calls.update(name, revision=after, base="base")
        else:
            after = None
            self.begins(name, after)
            calls.remove(name, base="base")
        self.possible[name] = {after}
        self.acknowledged += 1

    def begins(self, name: str, after: str | None) -> None:
        self.possible[name] = self.possible[name] | {after}

    def check(self, blobs: DurableStore) -> None:
        """What the controller says now is possible; from now on it is what is true."""
        for name, possible in self.possible.items():
            try:
                now: str | None = self._client.adapters.get(name, base="base").revision
            except NotFoundError:
                now = None
            assert now in possible, f"{name}: {now}, not one of {possible}"
            self.in_doubt += len(possible) > 1
            self.possible[name] = {now}
            if now is not None:
                # The bytes are there and whole, each against its sum.
                blob = blobs.local_path(now)
                assert blob is not None, f"the bytes of {name} are gone"
                open_packed(blob, verify="sha256")
                if now not in self._history[name]:
                    self._history[name].append(now)


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    made = Controller(tmp_path)
    yield made
    made.kill()


def test_nothing_acknowledged_is_lost(controller: Controller, tmp_path: Path) -> None:
    pick, blobs = random.Random(1), DurableStore(str(tmp_path / "adapters"))
    clients = [Client(controller.address) for _ in range(WRITERS)]
    writers = [Writer(i, client) for i, client in enumerate(clients)]
    starts: list[float] = []
    failures: list[BaseException] = []

    def work(writer: Writer, stopping: threading.Event) -> None:
        try:
            while not stopping.is_set():
                writer.change()
        except UnavailableError:
            pass  # killed in the middle
        except LoraServeError as error:
            # gRPC's own trouble with a connection that broke comes without a type. What was
            # refused for a reason is a fault of ours.
            if type(error) is not LoraServeError:
                failures.append(error)

    try:
        for turn in range(KILLS):
            controller.start()
            starts.append(controller.started(clients[0]))
            for writer in writers:
                writer.check(blobs)
            stopping = threading.Event()
            threads = [threading.Thread(target=work, args=(w, stopping)) for w in writers]
            acknowledged = sum(w.acknowledged for w in writers)
            for thread in threads:
                thread.start()
            end = time.monotonic() + 60
            # At any moment, the first changes among them; in every other life after some.
            while turn % 2 and sum(w.acknowledged for w in writers) < acknowledged + 3:
                assert any(thread.is_alive() for thread in threads), failures
                assert time.monotonic() < end, "nothing is acknowledged"
                time.sleep(0.001)
            time.sleep(pick.uniform(0.0, 0.15))
            controller.kill()
            stopping.set()
            for thread in threads:
                thread.join()
            assert not failures, failures
        controller.start()
        starts.append(controller.started(clients[0]))
        for writer in writers:
            writer.check(blobs)
        no_staged_files_are_left(controller, clients[0], tmp_path / "adapters")
        listed = {a.name: a.revision for a in clients[0].adapters.list()}
        assert listed == {
            name: revision
            for writer in writers
            for name, possible in writer.possible.items()
            for revision in possible
            if revision is not None
        }
    finally:
        for client in clients:
            client.close()
    assert sum(w.acknowledged for w in writers) >= KILLS
    # Kills did hit changes in the middle.
    assert sum(w.in_doubt for w in writers) >= KILLS // 4
    assert statistics.median(starts) < START_S, starts


def no_staged_files_are_left(controller: Controller, client: Client, store: Path) -> None:
    """What a kill in the middle of a write left goes with the first start after a day, as another
    controller may be writing to the same store."""
    for left in store.rglob("*.part"):
        os.utime(left, (0, 0))
    controller.kill()
    controller.start()
    controller.started(client)
    assert not list(store.rglob("*.part"))


def test_a_name_that_was_removed_can_be_added_by_another_life(
    controller: Controller,
) -> None:
    with Client(controller.address) as client:
        controller.start()
        controller.started(client)
        client.adapters.add("sql", PACKED[0], base="base")
        client.adapters.remove("sql", base="base")
        controller.kill()
        controller.start()
        controller.started(client)
        client.adapters.add("sql", PACKED[1], base="base")
        with pytest.raises(AlreadyExistsError):
            client.adapters.add("sql", PACKED[1], base="base")
