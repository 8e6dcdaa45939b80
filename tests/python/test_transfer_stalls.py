"""Peers that stand still in the middle of a read: the deadline, and the endpoint closed by force.

cma reads without the peer's help, so there it cannot stand still. These tests run the same program
with the transport that the product never uses, TCP on loopback, between sidecars of their own.
"""

import asyncio
import os
import signal

import pytest
from transfer_site import PATIENCE_S, noise, over_tcp, run, site

from loraserve.errors import FailedPreconditionError, UnavailableError
from loraserve.v1 import node_pb2

LARGE = 32 << 20


def test_a_frozen_peer_costs_the_deadline_and_can_be_read_again() -> None:
    async def test() -> None:
        packed = noise(LARGE)
        async with (
            over_tcp(LARGE + 4096) as holder,
            over_tcp(LARGE + 4096) as reader,
            over_tcp(LARGE + 4096) as other,
        ):
            slot = await holder.lease(packed)
            assert await reader.reads(slot, packed)
            pid = reader.pid
            os.kill(holder.pid, signal.SIGSTOP)
            try:
                loop = asyncio.get_running_loop()
                begun = loop.time()
                with pytest.raises(UnavailableError, match="time is over"):
                    await reader.sidecar.read(slot, LARGE, 0, 0.5)
                # By the forced close; a sidecar that cannot end a read gives up after 5 s.
                assert loop.time() - begun < PATIENCE_S / 2
                assert reader.sidecar.restarts == 0
                assert await reader.reads(await other.lease(packed), packed)
            finally:
                os.kill(holder.pid, signal.SIGCONT)
            assert await reader.reads(slot, packed)
            assert reader.pid == pid

    run(test)


def test_another_reader_of_the_frozen_peer_begins_again_on_a_new_endpoint() -> None:
    async def test() -> None:
        size = LARGE // 2
        packed = noise(size)
        async with (
            over_tcp(2 * LARGE) as holder,
            over_tcp(2 * LARGE) as reader,
        ):
            slot = await holder.lease(packed)
            assert await reader.reads(slot, packed)
            os.kill(holder.pid, signal.SIGSTOP)
            patient = asyncio.create_task(reader.sidecar.read(slot, size, LARGE, PATIENCE_S))
            with pytest.raises(UnavailableError, match="time is over"):
                await reader.sidecar.read(slot, size, 0, 0.5)
            assert not patient.done()
            os.kill(holder.pid, signal.SIGCONT)
            await patient
            assert reader.holds(packed, LARGE)

    run(test)


def test_a_peer_that_dies_in_the_middle_is_an_error_at_once() -> None:
    async def test() -> None:
        packed = noise(LARGE)
        async with (
            over_tcp(LARGE + 4096) as holder,
            over_tcp(LARGE + 4096) as reader,
        ):
            slot = await holder.lease(packed)
            os.kill(holder.pid, signal.SIGSTOP)
            read = asyncio.create_task(reader.sidecar.read(slot, LARGE, 0, 10 * PATIENCE_S))
            await asyncio.sleep(0.2)  # frozen in the middle, or before it began: both must do
            os.kill(holder.pid, signal.SIGKILL)
            with pytest.raises(UnavailableError, match="peer"):
                await read
            assert reader.sidecar.restarts == 0

    run(test)


def test_a_peer_that_offers_tcp_alone_is_refused() -> None:
    async def test() -> None:
        async with over_tcp(1 << 20) as holder, site() as reader:
            slot = await holder.lease(noise(5000))
            assert isinstance(slot, node_pb2.RemoteSlot)
            for _ in range(2):
                with pytest.raises(FailedPreconditionError, match="worker_address"):
                    await reader.read(slot, 5000)
            assert reader.sidecar.restarts == 0
            assert holder.sidecar.info is not None
            assert holder.sidecar.info.transports == ()

    run(test)
