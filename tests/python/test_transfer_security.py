"""What a sidecar opens, obeys and survives."""

import asyncio
import os
import random
import socket
import struct
import subprocess
from pathlib import Path

import pytest
from transfer_site import PATIENCE_S, Arena, noise, pair, require_sidecar, run, site

from loraserve.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    LoraServeError,
    UnavailableError,
)
from loraserve.node.transfer import Timing, messages
from loraserve.node.transfer.program import program_environment
from loraserve.v1 import node_pb2


def network_sockets(pid: int) -> list[str]:
    """Lines of the kernel's tables that are of the process."""
    inodes = set()
    for entry in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{entry}")
        except FileNotFoundError:  # of the listing itself
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = []
    for name in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
        table = Path(f"/proc/{pid}/net/{name}")
        if table.exists():
            lines = table.read_text().splitlines()[1:]
            found += [f"{name}: {line}" for line in lines if line.split()[9] in inodes]
    return found


def test_the_probe_sees_a_listener() -> None:
    with socket.create_server(("127.0.0.1", 0)):
        assert len(network_sockets(os.getpid())) >= 1


@pytest.mark.parametrize("wish", ["", "tcp", "all"])
def test_no_socket_of_a_network_is_opened_whatever_the_environment_asks(
    wish: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if wish:
        (tmp_path / "ucx.conf").write_text(f"UCX_TLS={wish}\nUCX_PROTO_EMULATION_ENABLE=y\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("UCX_CONFIG_DIR", str(tmp_path))
        monkeypatch.setenv("UCX_TLS", wish)
        monkeypatch.setenv("UCX_PROTO_EMULATION_ENABLE", "y")
        monkeypatch.setenv("UCX_MODULE_DIR", str(tmp_path))
        monkeypatch.setenv("UCX_NET_DEVICES", "lo")

    async def test() -> None:
        async with pair() as (holder, reader):
            packed = noise(100_000)
            assert await reader.reads(await holder.lease(packed), packed)
            for pid in (holder.pid, reader.pid):
                assert network_sockets(pid) == []
                if wish:  # it was started again with its own
                    environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
                    ucx = {line for line in environment if line.startswith("UCX_")}
                    assert "UCX_TLS=rc,dc,srd,cma,posix" in ucx
                    assert "UCX_PROTO_EMULATION_ENABLE=n" in ucx
                    assert not any(line.startswith(("UCX_MODULE", "UCX_CONFIG")) for line in ucx)
                    assert "UCX_NET_DEVICES=lo" in ucx  # picks hardware, widens nothing

    run(test)


def test_it_does_nothing_while_nothing_is_asked() -> None:
    def ticks(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    async def test() -> None:
        async with pair() as (holder, reader):
            packed = noise(100_000)
            await reader.read(await holder.lease(packed), len(packed))
            # Of several windows one is quiet, whatever was still to be done in the first; what
            # polls has a hundred ticks in each.
            seen = []
            for _ in range(5):
                before = [ticks(site.pid) for site in (holder, reader)]
                await asyncio.sleep(1.0)
                after = [ticks(site.pid) for site in (holder, reader)]
                seen.append([a - b for b, a in zip(before, after, strict=True)])
                if max(seen[-1]) <= 1:
                    return
            raise AssertionError(seen)

    run(test)


def wrapped(kind: int, blob: bytes) -> bytes:
    """As csrc/transfer/envelope.h: what a peer that lies on purpose would send."""
    mask = (1 << 64) - 1
    value = ((0xCBF29CE484222325 ^ kind) * 0x100000001B3) & mask
    for byte in blob:
        value = ((value ^ byte) * 0x100000001B3) & mask
    return struct.pack("<HBBIQ", 0x5542, kind, 1, len(blob), value) + blob


def changed(slot: node_pb2.RemoteSlot, **fields: object) -> node_pb2.RemoteSlot:
    copy = node_pb2.RemoteSlot()
    copy.CopyFrom(slot)
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy


def test_a_slot_that_is_described_wrongly_is_a_typed_error_and_nobody_dies() -> None:
    async def test() -> None:
        async with pair() as (holder, reader):
            packed = noise(5000)
            slot = await holder.lease(packed)
            rkey, address = slot.rkey, slot.worker_address
            pids = holder.pid, reader.pid
            blobs = [b"", b"x", b"garbage" * 100, os.urandom(64), bytes(16), b"y" * 20_000]
            for wrong in (
                *({"rkey": blob} for blob in (*blobs, rkey[:-1], rkey + b"z", address)),
                *(
                    {"worker_address": blob}
                    for blob in (*blobs, address[:-3], address + b"zz", rkey)
                ),
                *({"address": a} for a in (0, 8, 1 << 40, slot.address + (1 << 30), (1 << 63) - 1)),
                {"address": (1 << 64) - 1},
                {"address": slot.address + 1},
                *({"header_bytes": n} for n in (0, 63, 65, (1 << 32) - 1)),
                {"header_bytes": 1 << 40},
                {"generation": 0},
                {"generation": (1 << 64) - 1},
            ):
                with pytest.raises(LoraServeError) as raised:
                    await reader.read(changed(slot, **wrong), len(packed))
                assert type(raised.value) is not LoraServeError, (wrong, raised.value)
                assert await reader.reads(slot, packed)
            assert pids == (holder.pid, reader.pid)

    run(test)


def test_blobs_made_up_on_purpose_cost_the_reader_a_life_at_most() -> None:
    """Wrapped rightly, and not UCX's, which reads both kinds without a length."""

    async def test() -> None:
        draw = random.Random(7)
        # It may die at every one of them.
        again = Timing(ping_interval_s=PATIENCE_S, first_backoff_s=0.05, max_backoff_s=0.1)
        async with pair(timing=again) as (holder, reader):
            packed = noise(5000)
            slot = await holder.lease(packed)
            pid = holder.pid

            def disturbed(own: bytes) -> bytes:
                blob = bytearray(own)
                for _ in range(draw.randint(1, 8)):
                    blob[draw.randrange(len(blob))] = draw.randrange(256)
                return bytes(blob)

            lies: list[dict[str, bytes]] = []
            for _ in range(20):
                lies.append({"worker_address": wrapped(1, disturbed(slot.worker_address[16:]))})
            for _ in range(10):
                lies.append({"rkey": wrapped(2, disturbed(slot.rkey[16:]))})
            lies += [{"rkey": wrapped(2, draw.randbytes(n))} for n in (9, 64, 1000)]
            for lie in lies:
                before = reader.sidecar.restarts
                try:
                    await reader.sidecar.read(changed(slot, **lie), len(packed), 0, 2.0)
                except LoraServeError:
                    pass
                else:  # it changed what does not matter
                    assert reader.holds(packed)
                while reader.sidecar.info is None:
                    await asyncio.sleep(0.01)
                try:
                    assert await reader.reads(slot, packed)
                except UnavailableError:  # it ended only after its answer
                    while reader.sidecar.info is None:
                        await asyncio.sleep(0.01)
                    assert await reader.reads(slot, packed)
                assert reader.sidecar.restarts - before <= 1
            assert holder.pid == pid

    run(test)


def test_a_read_past_the_arena_is_refused() -> None:
    async def test() -> None:
        async with pair() as (holder, reader):
            slot = await holder.lease(noise(5000))
            for wrong in (
                {"size_bytes": 0},
                {"size_bytes": 1 << 63},
                {"size_bytes": -1},
                {"local_offset": 1 << 20},
                {"local_offset": (1 << 64) - 1},
                {"local_offset": (1 << 20) - 4999},
                {"skip_bytes": 5000},
                {"skip_bytes": 1 << 64},
            ):
                given = {"size_bytes": 5000, "local_offset": 0} | wrong
                with pytest.raises(InvalidArgumentError):
                    await reader.sidecar.read(slot, timeout_s=PATIENCE_S, **given)
            assert reader.sidecar.restarts == 0

    run(test)


def test_an_export_past_the_arena_is_refused() -> None:
    async def test() -> None:
        async with site() as holder:
            for offset, length in ((0, 0), (0, (1 << 20) + 1), (1 << 20, 1), ((1 << 64) - 1, 2)):
                with pytest.raises(InvalidArgumentError):
                    await holder.sidecar.export(offset, length)
            await holder.sidecar.export(0, 100)
            holder.sidecar._exports.clear()
            with pytest.raises(LoraServeError, match="is exported with 100"):
                await holder.sidecar.export(0, 200)

    run(test)


def test_peers_without_a_way_between_them_are_found_before_anything_is_tried() -> None:
    async def test() -> None:
        async with pair() as (holder, reader):
            slot = await holder.lease(noise(100))
            major, minor, patch = slot.ucx_version.split(".")
            for version in ("", "1", f"{major}.{int(minor) + 1}.{patch}", "2.0.0", "x" * 5000):
                with pytest.raises(FailedPreconditionError, match="ucx_version"):
                    await reader.read(changed(slot, ucx_version=version), 100)
            await reader.read(changed(slot, ucx_version=f"{major}.{minor}.99"), 100)
            if reader.sidecar.info and reader.sidecar.info.transports == ("cma",):
                for host in ("", "elsewhere", slot.host + "1"):
                    with pytest.raises(FailedPreconditionError, match="transports"):
                        await reader.read(changed(slot, host=host), 100)

    run(test)


class Raw:
    """The program, spoken to without the node's code."""

    def __init__(self, program: Path, capacity_bytes: int = 1 << 20) -> None:
        self.arena = Arena(capacity_bytes)
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(PATIENCE_S)
        self.process = subprocess.Popen(
            [program, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=program_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        theirs.close()

    def hello(self) -> None:
        frame = messages.encode(messages.HELLO, 0, messages.hello(self.arena.capacity_bytes))
        socket.send_fds(self.socket, [frame], [self.arena.fd])

    def answers(self) -> bytes:
        """Until it closes its end."""
        received = bytearray()
        try:
            while block := self.socket.recv(1 << 16):
                received += block
        except ConnectionResetError:
            pass
        return bytes(received)

    def end(self) -> int:
        self.socket.close()
        code = self.process.wait(PATIENCE_S)
        self.arena.close()
        return code


def test_garbage_from_the_node_ends_the_sidecar_in_order() -> None:
    program = require_sidecar()
    frame = messages.encode
    for before, garbage in (
        (False, os.urandom(10_000)),
        (False, frame(messages.HELLO, 0, messages.hello(1 << 20))),  # without a descriptor
        (False, frame(messages.PING, 1)),
        (True, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (True, frame(messages.HELLO, 0, messages.hello(1 << 20))),
    ):
        raw = Raw(program)
        if before:
            raw.hello()
        raw.socket.sendall(garbage)
        raw.answers()
        assert raw.end() == 3, garbage[:40]


def test_mutated_requests_are_answered_or_end_it_in_order() -> None:
    program = require_sidecar()
    draw = random.Random(11)
    requests = [
        messages.encode(messages.EXPORT, 1, messages.export(4096, 8192)),
        messages.encode(messages.WITHDRAW, 2, messages.withdraw(4096)),
        messages.encode(messages.CANCEL, 3),
        messages.encode(messages.PING, 4),
        messages.encode(
            *(messages.READ, 5),
            messages.read(
                address=1 << 30,
                generation=1,
                size_bytes=100,
                skip_bytes=0,
                local_offset=0,
                timeout_s=0.2,
                header_bytes=64,
                worker_address=b"a" * 50,
                rkey=b"k" * 9,
            ),
        ),
    ]
    for _ in range(4):
        raw = Raw(program)
        raw.hello()
        stream = bytearray(b"".join(draw.choice(requests) for _ in range(20)))
        for _ in range(draw.randint(1, 4)):
            stream[draw.randrange(len(stream))] = draw.randrange(256)
        try:
            raw.socket.sendall(stream)
            raw.socket.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        raw.answers()
        assert raw.end() in (0, 3)


def test_files_that_are_no_pool_are_refused() -> None:
    program = require_sidecar()
    raw = Raw(program)
    unsealed = os.memfd_create("unsealed")
    os.ftruncate(unsealed, 1 << 20)
    reading, writing = os.pipe()
    for descriptor, capacity in (
        (unsealed, 1 << 20),
        (reading, 1 << 20),
        (raw.arena.fd, (1 << 20) + 1),
        (raw.arena.fd, 0),
        (raw.arena.fd, 1 << 63),
    ):
        frame = messages.encode(messages.HELLO, 0, messages.hello(capacity))
        socket.send_fds(raw.socket, [frame], [descriptor])
        kind, length, _ = messages.head(raw.socket.recv(messages.HEAD_BYTES, socket.MSG_WAITALL))
        answer = messages.decode(kind, raw.socket.recv(length, socket.MSG_WAITALL))
        assert isinstance(answer, messages.Failed)
        assert isinstance(answer.error, InvalidArgumentError)
    for descriptor in (unsealed, reading, writing):
        os.close(descriptor)
    assert raw.end() == 0


def test_the_program_is_nothing_to_start_by_hand() -> None:
    program = require_sidecar()
    for words in ([], ["7"]):
        done = subprocess.run([program, *words], capture_output=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 2
        assert b"loraserve-node" in done.stderr


def test_memory_that_the_node_has_not_taken_is_not_taken_by_the_sidecar() -> None:
    async def test() -> None:
        async with site(256 << 20) as holder:
            for _ in range(50):
                await holder.lease(noise(5000))
                await holder.sidecar.withdraw(0)
            taken_bytes = 512 * os.fstat(holder.arena.fd).st_blocks
            # The slot; with huge pages, one of them.
            assert taken_bytes <= 2 << 20

    run(test)
