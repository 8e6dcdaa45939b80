"""A peer's slot read by a real sidecar from another."""

import asyncio
import os
import signal
from dataclasses import replace
from typing import Any

import pytest
from fake_node import until
from peer_fixtures import BLOB, HEADER, Reader, holding

from loraserve.errors import NotFoundError, UnavailableError
from loraserve.node.pool.arena import HostArena
from loraserve.node.transfer import Timing, TransferSidecar
from loraserve.node.transfer.process import SidecarProcess
from loraserve.node.transfer.program import find_program
from loraserve.v1 import node_pb2

pytestmark = pytest.mark.skipif(find_program() is None, reason="loraserve-transfer is not built")


async def sidecar_of(arena: HostArena) -> TransferSidecar:
    return await TransferSidecar.start(
        arena.fd, arena.capacity_bytes, timing=Timing(ping_interval_s=60.0)
    )


def test_a_slot_is_read_from_another_sidecar_and_after_its_end_as_a_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        async with holding(sidecar=sidecar_of) as holder:
            reader = Reader()
            ours = await sidecar_of(reader.pool.arena)
            reader.source._transfer = ours
            if not ours.info or not ours.info.transports:
                pytest.skip("no one-sided transport on this machine")
            holder.put(HEADER.revision, BLOB)
            try:
                assert await reader.read(holder.peer) == BLOB
                assert await reader.read(holder.peer) == BLOB
                # A lease that has ended: what it named is another slot by now.
                request = node_pb2.LeaseCopyRequest(revision=HEADER.revision)
                stale = await holder.stub.LeaseCopy(request)
                holder.pool.release(stale.lease_id)
                holder.pool.drop(HEADER.revision)
                with pytest.raises(NotFoundError):
                    await ours.read(stale.slot, len(BLOB), 4096, 60.0)
                holder.put(HEADER.revision, BLOB)
                with pytest.raises(NotFoundError):
                    await ours.read(stale.slot, len(BLOB), 4096, 60.0)
                # The holder's sidecar is killed: it comes back, and until then bytes are streamed.
                may_start, start = asyncio.Event(), SidecarProcess.start

                async def start_later(*arguments: Any) -> SidecarProcess:
                    await may_start.wait()
                    return await start(*arguments)

                monkeypatch.setattr(SidecarProcess, "start", start_later)
                os.kill(holder.sidecar.pid or 0, signal.SIGKILL)
                await until(lambda: holder.sidecar.info is None, "it is gone")
                assert await reader.read(holder.peer) == BLOB
                may_start.set()
                await until(lambda: holder.sidecar.info is not None, "it is back")
                assert await reader.read(holder.peer) == BLOB
                assert [transport for transport, _ in reader.reads] == ["ucx", "ucx", "grpc", "ucx"]
                # The reader's own one hangs: the attempt ends at its deadline.
                ours._timing = replace(ours._timing, grace_s=0.5)
                os.kill(ours.pid or 0, signal.SIGSTOP)
                reader.deadline_s = 0.5
                with pytest.raises(UnavailableError):
                    await reader.read(holder.peer)
            finally:
                if ours.pid:
                    os.kill(ours.pid, signal.SIGCONT)
                await ours.close()
                await reader.source.close()

    asyncio.run(asyncio.wait_for(test(), 180))
