"""What reading an adapter from another process costs, transport by transport.

    python bench/adapter_transfer.py [--sizes N,...] [--rounds N] [--transports A,...] [--out FILE]

Reads of 64 KiB to 512 MiB into a host pool: memcpy from another mapping as the floor; one-sided
between two sidecars; a raw TCP socket on loopback; and a node's whole read over PeerService's gRPC
stream (from 1 MiB; with lease and every chunk checked, which the others do not do). The transports
take turns in every round, so that what else the machine does hurts all of them. Given are, for each
size, the shortest and the median time, bandwidth, CPU seconds for each GB of the reading and of the
holding side, and the bandwidth's ratio to memcpy's. One JSON object with machine, load, commit and
command.
"""

import argparse
import asyncio
import ctypes
import json
import mmap
import os
import socket
import statistics
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peer_stream
from measured_on import measured_on

from loraserve.errors import LoraServeError
from loraserve.node.load_info import Peer
from loraserve.node.pool.arena import HostArena
from loraserve.node.pool.slots import SLOT_HEADER_BYTES, SLOT_MAGIC
from loraserve.node.transfer import TransferSidecar
from loraserve.node.transfer.facts import shared_huge_pages
from loraserve.v1 import node_pb2

SIZES = tuple(64 << (10 + shift) for shift in range(0, 14))
GENERATION = 1


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process, those that have ended too, to the nanosecond: its CPU clock, as
    clock_getcpuclockid names it on Linux."""
    return time.clock_gettime((~pid << 3) | 2)


class Lane:
    """One way to read. `read(size)` brings the holder's first bytes into the reader's arena."""

    def __init__(
        self,
        name: str,
        read: Callable[[int], Awaitable[None]],
        reader: list[int],
        holder: list[int],
    ) -> None:
        self.name = name
        self.read = read
        self.reader = reader
        self.holder = holder

    async def measure(self, size: int, times: int) -> tuple[list[float], float, float]:
        """Seconds of each read; CPU seconds of reader and holder for all of them."""
        before = [sum(map(cpu_seconds, pids)) for pids in (self.reader, self.holder)]
        taken = []
        for _ in range(times):
            begun = time.perf_counter()
            await self.read(size)
            taken.append(time.perf_counter() - begun)
        after = [sum(map(cpu_seconds, pids)) for pids in (self.reader, self.holder)]
        return taken, after[0] - before[0], after[1] - before[1]


def address_of(arena: HostArena) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(arena.view(0, arena.capacity_bytes)))


def hold(pipe: Connection, fd: int, capacity: int) -> None:
    """The process that gives bytes over a TCP socket: a size in 8 bytes is asked for, so many come
    from the arena."""
    memory = mmap.mmap(fd, capacity)
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send(listener.getsockname()[1])
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    view = memoryview(memory)
    while request := connection.recv(8, socket.MSG_WAITALL):
        (size,) = struct.unpack("<Q", request)
        connection.sendall(view[SLOT_HEADER_BYTES : SLOT_HEADER_BYTES + size])


def read_tcp(connection: socket.socket, into: memoryview, size: int) -> None:
    connection.sendall(struct.pack("<Q", size))
    got = 0
    while got < size:
        got += connection.recv_into(into[got:size])


async def lanes(holder: HostArena, reader: HostArena, wanted: set[str]) -> list[Lane]:
    own = os.getpid()
    made = []
    source, target = address_of(holder), address_of(reader)
    if "memcpy" in wanted:

        async def memcpy(size: int) -> None:
            ctypes.memmove(target, source + SLOT_HEADER_BYTES, size)

        made.append(Lane("memcpy", memcpy, [own], []))
    if "one-sided" in wanted:
        try:
            giving = await TransferSidecar.start(holder.fd, holder.capacity_bytes)
            taking = await TransferSidecar.start(reader.fd, reader.capacity_bytes)
        except LoraServeError as error:
            print(f"one-sided: left out: {error}", file=sys.stderr)
        else:
            info = giving.info
            assert info is not None
            assert giving.pid is not None
            assert taking.pid is not None

            async def one_sided(size: int) -> None:
                header = struct.pack("<8sQQ40x", SLOT_MAGIC, GENERATION, size)
                holder.view(0, SLOT_HEADER_BYTES)[:] = header
                await taking.read(slot, size, 0, 60.0)

            rkey, address = await giving.export(0, holder.capacity_bytes)
            slot = node_pb2.RemoteSlot(
                ucx_version=info.ucx_version,
                worker_address=info.worker_address,
                rkey=rkey,
                address=address,
                header_bytes=SLOT_HEADER_BYTES,
                generation=GENERATION,
                host=info.host,
            )
            await one_sided(1)
            name = "+".join(taking.last_transports) or "ucx"
            made.append(Lane(name, one_sided, [own, taking.pid], [giving.pid]))
    if "tcp" in wanted:
        ours, theirs = get_context("fork").Pipe()
        process = get_context("fork").Process(
            target=hold, args=(theirs, holder.fd, holder.capacity_bytes), daemon=True
        )
        process.start()
        connection = socket.create_connection(("127.0.0.1", ours.recv()))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        into = reader.view(0, reader.capacity_bytes)

        async def tcp(size: int) -> None:
            read_tcp(connection, into, size)

        assert process.pid is not None
        made.append(Lane("tcp socket", tcp, [own], [process.pid]))
    return made


class Stream:
    """A node's read of an adapter of about the size from another's PeerService: lease, ReadCopy,
    every chunk checked. Its arenas are its own."""

    def __init__(self, size: int) -> None:
        blob = peer_stream.adapter_of(size >> 20)
        self._pipe, theirs = get_context("fork").Pipe()
        self._holder = get_context("fork").Process(
            target=peer_stream.hold, args=(theirs, blob), daemon=True
        )
        self._holder.start()
        address, plain = self._pipe.recv()
        self._reader = peer_stream.Reader(blob, Peer("holder", address), plain)

    @classmethod
    async def start(cls, size: int) -> "Stream":
        return await asyncio.to_thread(cls, size)

    @property
    def lane(self) -> Lane:
        async def read(size: int) -> None:
            await self._reader.peer()

        assert self._holder.pid is not None
        return Lane("grpc stream", read, [os.getpid()], [self._holder.pid])

    async def close(self) -> None:
        await self._reader.source.close()
        self._pipe.send("done")
        self._holder.join(5)
        self._holder.terminate()


def row(size: int, taken: list[float], reader_s: float, holder_s: float) -> dict[str, Any]:
    gigabytes = size * len(taken) / 1e9
    return {
        "size_bytes": size,
        "reads": len(taken),
        "min_ms": round(min(taken) * 1e3, 4),
        "median_ms": round(statistics.median(taken) * 1e3, 4),
        "min_gb_per_s": round(size / min(taken) / 1e9, 3),
        "median_gb_per_s": round(size / statistics.median(taken) / 1e9, 3),
        "reader_cpu_s_per_gb": round(reader_s / gigabytes, 4),
        "holder_cpu_s_per_gb": round(holder_s / gigabytes, 4),
    }


async def measure(sizes: list[int], rounds: int, wanted: set[str]) -> dict[str, Any]:
    result: dict[str, Any] = measured_on() | {"huge_pages": shared_huge_pages()}
    capacity = (max(sizes) + SLOT_HEADER_BYTES + 4095) // 4096 * 4096
    holder, reader = HostArena(capacity), HostArena(capacity)
    block = os.urandom(1 << 20)
    for at in range(0, capacity, len(block)):
        part = holder.view(at, min(len(block), capacity - at))
        part[:] = block[: len(part)]
    ways = await lanes(holder, reader, wanted)
    rows: dict[str, list[dict[str, Any]]] = {way.name: [] for way in ways}
    if "grpc" in wanted:
        rows["grpc stream"] = []
    fixed = ways
    for size in sizes:
        stream = await Stream.start(size) if "grpc" in wanted and size >= 1 << 20 else None
        ways = [*fixed, stream.lane] if stream else fixed
        times = max(1, min(50, (64 << 20) // size))
        taken: dict[str, list[float]] = {way.name: [] for way in ways}
        spent = {way.name: [0.0, 0.0] for way in ways}
        for number in range(rounds):
            for way in ways:
                if number == 0:
                    await way.read(size)
                seconds, reader_s, holder_s = await way.measure(size, times)
                taken[way.name] += seconds
                spent[way.name][0] += reader_s
                spent[way.name][1] += holder_s
        for way in ways:
            rows[way.name].append(row(size, taken[way.name], *spent[way.name]))
        floor = rows["memcpy"][-1] if "memcpy" in rows else None
        for way in ways:
            last = rows[way.name][-1]
            if floor is not None:
                for which in ("min", "median"):
                    ratio = last[f"{which}_gb_per_s"] / floor[f"{which}_gb_per_s"]
                    last[f"{which}_ratio_to_memcpy"] = round(ratio, 3)
            print(
                f"{size >> 10:>7} KiB {way.name:12} min {last['min_ms']:9.3f} ms "
                f"{last['min_gb_per_s']:6.2f} GB/s  median {last['median_gb_per_s']:6.2f} GB/s "
                f"({last.get('median_ratio_to_memcpy', 1):.2f} of memcpy)  CPU s/GB "
                f"{last['reader_cpu_s_per_gb']:.3f} / {last['holder_cpu_s_per_gb']:.4f}",
                file=sys.stderr,
            )
        if stream is not None:
            await stream.close()
    result["transports"] = rows
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--transports", default="memcpy,one-sided,tcp,grpc")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sizes = [int(word) for word in arguments.sizes.split(",")]
    result = asyncio.run(measure(sizes, arguments.rounds, set(arguments.transports.split(","))))
    text = json.dumps(result, indent=1) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
