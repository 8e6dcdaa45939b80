"""Reading an adapter from another node over gRPC, beside a plain TCP socket.

    python bench/peer_stream.py [--mib N ...] [--rounds N] [--out FILE]

Two processes on this machine, over loopback. The holder serves an adapter by PeerService as a node
does; and the same bytes on a TCP socket, by sendall. The reader brings them into a slot of a host
pool that has been written before, in turns: `socket`, by recv_into; `checked socket`, which checks
each chunk of 1 MiB against the header as it comes, as a node does; `peer`, as a node reads from
another (lease, ReadCopy, every chunk checked, the lease given back). Ratios are of reads next to
each other; given are medians, quartiles and the least of each. CPU seconds are of both processes.
One JSON object with machine, load, commit and command.

On a machine that others use too, `chrt -f 5 python bench/peer_stream.py` keeps them out for the
seconds that it takes; `scheduled` says so.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
from measured_on import measured_on

from loraserve.checkpoint.adapter_source import AdapterModule, AdapterSource
from loraserve.checkpoint.packed_adapter import pack
from loraserve.checkpoint.packed_header import PackedHeader, parse_header
from loraserve.node.load_info import AdapterLoadInfo, Peer
from loraserve.node.peers.channels import PeerChannels
from loraserve.node.peers.servicer import PeerServicer, add_to_server
from loraserve.node.peers.source import PeerSource
from loraserve.node.pool.arena import HostArena
from loraserve.node.pool.checked_writer import CheckedWriter
from loraserve.node.pool.slots import HostPool, SlotWriter
from loraserve.placement.types import AdapterId, AdapterSpec
from loraserve.wire import SERVER_OPTIONS, bind

RANK = 512
DEADLINE_S = 120.0


def adapter_of(mib: int) -> bytes:
    """Random weights, a packed adapter of about so many MiB."""
    width = (mib << 20) // (2 * 4 * RANK)
    values = np.random.default_rng(0).standard_normal((RANK, width), np.float32)
    up = np.ascontiguousarray(values.T)
    return pack(AdapterSource("base", (AdapterModule(0, "up_proj", RANK, 2.0, "F32", values, up),)))


def hold(to_reader: Connection, blob: bytes) -> None:
    """The holder's process: tells its addresses, serves until the reader is done."""
    header = parse_header(blob)
    # Room for two leases of one peer: that of the read before may be on its way back.
    pool = HostPool(HostArena(4 * len(blob) + (1 << 20)), time.monotonic)
    slot = pool.reserve(len(blob))
    slot.view[:] = blob
    view = slot.seal(header.revision).view

    def plain() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1)
                connection.sendall(view[header.header_bytes :])

    async def serve() -> None:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        add_to_server(PeerServicer(lambda: pool), server)
        address = bind(server, "127.0.0.1:0", None)
        await server.start()
        to_reader.send((address, listener.getsockname()))
        await asyncio.to_thread(to_reader.recv)
        await server.stop(0)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=plain, daemon=True).start()
        asyncio.run(serve())


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Reader:
    def __init__(self, blob: bytes, peer: Peer, plain: tuple[str, int]) -> None:
        self.header: PackedHeader = parse_header(blob)
        self._start = blob[: self.header.header_bytes]
        self._plain = plain
        self._slot: SlotWriter = HostPool(HostArena(len(blob) + (1 << 20)), time.monotonic).reserve(
            len(blob)
        )
        self._slot.view[:] = blob  # not its first touch
        spec = AdapterSpec(AdapterId("t", "base", "bench"), self.header.revision, len(blob), RANK)
        self._load = AdapterLoadInfo(spec, (peer,))
        self.source = PeerSource("reader", PeerChannels(), lambda size_bytes: DEADLINE_S)

    def _writer(self) -> CheckedWriter:
        self._slot.view[: len(self._start)] = self._start
        return CheckedWriter(self._slot, self.header, "xxh3")

    async def peer(self) -> None:
        writer = self._writer()
        await self.source.read_into(self._load, self.header, writer)
        writer.finish()

    def _receive(self, writer: CheckedWriter, step: int, checked: bool) -> None:
        with socket.create_connection(self._plain) as connection:
            connection.sendall(b"x")
            at, end = self.header.header_bytes, self.header.size_bytes
            while at < end:
                whole = min(end, at + step)
                begin = at
                while at < whole:
                    at += connection.recv_into(writer.view[at:whole])
                if checked:
                    writer.arrived(at - begin)

    async def plain(self) -> None:
        writer = self._writer()
        await asyncio.to_thread(self._receive, writer, self.header.size_bytes, False)

    async def checked_plain(self) -> None:
        writer = self._writer()
        await asyncio.to_thread(self._receive, writer, 1 << 20, True)


def spread(values: list[float], digits: int) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": round(middle, digits),
        "quartiles": [round(low, digits), round(high, digits)],  # type: ignore[dict-item]
        "least": round(min(values), digits),
    }


async def compare(reader: Reader, rounds: int, holder_pid: int) -> dict[str, Any]:
    ways: dict[str, Callable[[], Any]] = {
        "socket": reader.plain,
        "checked socket": reader.checked_plain,
        "peer": reader.peer,
    }
    for way in ways.values():
        await way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            before = cpu_seconds(os.getpid()) + cpu_seconds(holder_pid)
            begin = time.perf_counter()
            await ways[name]()
            seconds[name].append(time.perf_counter() - begin)
            cpu[name].append(cpu_seconds(os.getpid()) + cpu_seconds(holder_pid) - before)
    await reader.source.close()

    def ratio(name: str) -> list[float]:
        return [a / b for a, b in zip(seconds["peer"], seconds[name], strict=True)]

    return {
        "seconds": {name: spread(found, 4) for name, found in seconds.items()},
        "cpu_seconds_mean": {name: round(statistics.mean(c), 3) for name, c in cpu.items()},
        "peer_over_socket": spread(ratio("socket"), 2),
        "peer_over_checked_socket": spread(ratio("checked socket"), 2),
        "least_over_least": round(min(seconds["peer"]) / min(seconds["socket"]), 2),
    }


def measured(mib: int, rounds: int) -> dict[str, Any]:
    blob = adapter_of(mib)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    holder = context.Process(target=hold, args=(theirs, blob), daemon=True)
    holder.start()
    try:
        address, plain = ours.recv()
        reader = Reader(blob, Peer("holder", address), plain)
        found = asyncio.run(compare(reader, rounds, holder.pid or 0))
        ours.send("done")
    finally:
        holder.join(5)
        holder.terminate()
    return {"bytes": len(blob), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, nargs="*", default=[1, 16, 256])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    fifo = os.sched_getscheduler(0) == os.SCHED_FIFO
    result = measured_on() | {"rounds": given.rounds, "scheduled": "fifo" if fifo else "shared"}
    result["sizes"] = [measured(mib, given.rounds) for mib in given.mib]
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
