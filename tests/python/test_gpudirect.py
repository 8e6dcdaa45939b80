"""The sidecar's reader in this process, with host memory in the place of a GPU's; and refusals."""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transfer_site import require_sidecar

from loraserve.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from loraserve.node import doctor
from loraserve.node.peers.peering import OFF, UCX, Peering, PeerOptions
from loraserve.node.pool.arena import HostArena
from loraserve.node.pool.slots import HostPool
from loraserve.node.transfer import facts, in_node
from loraserve.node.transfer.gpudirect import DeviceReads
from loraserve.v1 import node_pb2

SLOT = node_pb2.RemoteSlot()
# UCX stays in a process that has loaded it, so it is another one.
READS = """
import asyncio, json, os, sys
import psutil
from loraserve.errors import LoraServeError
from loraserve.node.pool.arena import HostArena
from loraserve.node.transfer.dry_run import Holder
from loraserve.node.transfer.gpudirect import DeviceReads, open_reader, prove
from loraserve.v1 import node_pb2

os.environ["UCX_TLS"] = "tcp"  # what a user sets widens nothing
reader = open_reader(1 << 20, device="cpu", host_memory=True)

async def error_of(reading):
    try:
        await reading
    except LoraServeError as error:
        return [type(error).__name__, str(error)]

def changed(slot, **fields):
    other = node_pb2.RemoteSlot()
    other.CopyFrom(slot)
    for name, value in fields.items():
        setattr(other, name, value)
    return other

async def main():
    found = {"reads": [[r.size_bytes, r.transports] for r in await prove(reader, (1000, 1 << 20))]}
    holder = await Holder.start((5000, 2 << 20))
    try:
        small, large = await holder.offer((5000, 2 << 20))
        good = small.slot
        found["generation"] = await error_of(reader.read(changed(good, generation=7), 5000, 20.0))
        found["size"] = await error_of(reader.read(good, 4999, 20.0))
        found["too large"] = await error_of(reader.read(large.slot, large.size_bytes, 20.0))
        found["blob"] = await error_of(reader.read(changed(good, rkey=b"garbage"), 5000, 20.0))
        # Through device memory into a pool; what is too large for it, through the sidecar.
        pool = holder.arena.view(0, holder.arena.capacity_bytes)
        arena = HostArena(4 << 20)
        reads = DeviceReads(holder.sidecar, reader, arena.view)
        told = []
        await reads.read(good, 5000, 128, 20.0, skip_bytes=100, arrived=told.append)
        found["told"] = told
        found["same"] = arena.view(128, 4900) == pool[64 + 100 : 64 + 5000]
        found["stuck"] = reader.stuck
    finally:
        await holder.close()
    found["holder gone"] = await error_of(reader.read(good, 5000, 20.0))
    listening = [c for c in psutil.Process().net_connections() if c.status == "LISTEN"]
    found["listeners"] = len(listening)
    found["transports"] = reader.transports
    print(json.dumps(found))

asyncio.run(main())
"""


def test_the_reader_in_the_node_reads_checks_and_refuses() -> None:
    require_sidecar()
    pytest.importorskip("psutil")
    done = subprocess.run(
        [sys.executable, "-c", READS], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert [size for size, _ in found["reads"]] == [1000, 1 << 20]
    assert all("tcp" not in name for _, over in found["reads"] for name in over)
    assert found["generation"][0] == "NotFoundError"
    assert found["size"][0] != "LoraServeError"
    assert "size_bytes" in found["size"][1]
    assert found["too large"][0] == "InvalidArgumentError"
    assert found["blob"][0] == "InvalidArgumentError"
    assert found["told"] == [4900]
    assert found["same"]
    assert found["holder gone"][0] in ("UnavailableError", "FailedPreconditionError")
    assert not found["stuck"]
    assert found["listeners"] == 0
    assert found["transports"] == ["cma"]


def test_a_node_that_does_not_ask_for_it_never_loads_it() -> None:
    program = (
        "import sys, loraserve.node.main, loraserve.node.transfer.gpudirect\n"
        "assert 'loraserve._transfer_reader' not in sys.modules\n"
        "assert not any('libucp' in line for line in open('/proc/self/maps'))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def peering(pool: HostPool, options: PeerOptions) -> Any:
    return Peering.start("n1", pool, options, lambda size: 1.0, lambda *_: None)


def test_what_is_missing_is_named_and_the_node_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_sidecar()
    pool = HostPool(HostArena(1 << 20), time.monotonic)
    monkeypatch.setattr(facts, "rdma_devices", list)
    with pytest.raises(FailedPreconditionError, match=r"gpudirect: .*no RDMA device"):
        asyncio.run(peering(pool, PeerOptions(UCX, gpudirect="cuda")))
    with pytest.raises(InvalidArgumentError, match="gpudirect: needs one-sided reads"):
        PeerOptions(OFF, gpudirect="cuda")


def test_the_doctor_says_that_it_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "rdma_devices", list)
    check = doctor._gpudirect_proof()
    assert check.ok is False
    assert check.detail.startswith("not proven: gpudirect: ")
    assert "no RDMA device" in check.detail


class Staging:
    size_bytes = 1000

    def copy_to_host(self, offset: int, into: memoryview) -> None:
        into[:] = bytes([7]) * len(into)


class Reader:
    """Of device memory, whose reads the test lets end."""

    def __init__(self) -> None:
        self.staging = Staging()
        self.stuck = False
        self.reads = 0
        self.go = asyncio.Event()
        self.error: Exception | None = None

    async def read(self, *_: Any, **__: Any) -> tuple[str, ...]:
        self.reads += 1
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return ("rc_mlx5",)


class Sidecar:
    def __init__(self) -> None:
        self.reads: list[int] = []

    async def read(self, remote: Any, size_bytes: int, *_: Any, **__: Any) -> None:
        self.reads.append(size_bytes)


def test_what_the_staging_cannot_take_goes_through_the_sidecar() -> None:
    async def go() -> None:
        memory = bytearray(2000)
        reader, sidecar = Reader(), Sidecar()
        reads = DeviceReads(
            sidecar,  # type: ignore[arg-type]
            reader,  # type: ignore[arg-type]
            lambda offset, length: memoryview(memory)[offset : offset + length],
        )
        first = asyncio.ensure_future(reads.read(SLOT, 500, 100, 1.0))
        await asyncio.sleep(0)
        await reads.read(SLOT, 501, 0, 1.0)  # while it is in use
        assert sidecar.reads == [501]
        reader.go.set()
        await first
        assert memory == bytes(100) + bytes([7]) * 500 + bytes(1400)
        await reads.read(SLOT, 1001, 0, 1.0)  # larger
        assert (sidecar.reads, reader.reads) == ([501, 1001], 1)
        reader.error = FailedPreconditionError("transports", "a peer without RDMA")
        await reads.read(SLOT, 502, 0, 1.0)
        assert (sidecar.reads[-1], reader.reads) == (502, 2)
        reader.error = UnavailableError("peer", "gone")
        with pytest.raises(UnavailableError, match="gone"):
            await reads.read(SLOT, 503, 0, 1.0)
        reader.stuck = True
        await reads.read(SLOT, 504, 0, 1.0)
        assert (sidecar.reads[-1], reader.reads) == (504, 3)

    asyncio.run(go())


def test_memory_is_freed_after_its_registration_or_never() -> None:
    freed: list[str] = []

    class Owned:
        def __init__(self, name: str, stuck: bool = False) -> None:
            self.name, self.stuck = name, stuck

        def __del__(self) -> None:
            freed.append(self.name)

    def reader(stuck: bool) -> in_node.InNodeReader:
        made = object.__new__(in_node.InNodeReader)
        made.staging = Owned("memory")  # type: ignore[assignment]
        made._native = Owned("registration", stuck)
        return made

    reader(stuck=True)  # and gone
    assert freed == []
    in_node._never_freed.clear()
    freed.clear()
    reader(stuck=False)
    assert freed == ["registration", "memory"]


@pytest.mark.long
def test_one_command_makes_the_report_of_an_operator(tmp_path: Path) -> None:
    require_sidecar()
    root = Path(__file__).parents[2]
    program = tmp_path / "loraserve"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m loraserve.cli "$@"\n')
    program.chmod(0o755)
    out = tmp_path / "report.json"
    done = subprocess.run(
        [root / "bench/rdma_report.sh", "local", out],
        env={"PATH": "/usr/bin:/bin", "LORASERVE": str(program)},
        cwd=root,
        timeout=300,
    )
    report = json.loads(out.read_text())
    # Without a GPU the doctor of this end fails.
    parts = ("here_doctor", "there_doctor", "reads")
    assert done.returncode == (1 if any(report[part]["exit"] for part in parts) else 0)
    assert report["loraserve_rdma_report"] == 1
    assert report["reads"]["exit"] == 0
    assert all(read["seconds"] > 0 for read in report["reads"]["found"]["reads"])
    assert "device_reads" in report["reads"]["found"]
    assert {check["name"] for check in report["there_doctor"]["found"]} > {"rdma", "gpudirect"}
    assert "worker_address" not in out.read_text()
    assert "rkey" not in out.read_text()
