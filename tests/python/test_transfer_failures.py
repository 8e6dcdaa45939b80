"""Sidecars that die, freeze or hang, their node's and others'."""

import asyncio
import os
import select
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from transfer_site import (
    PATIENCE_S,
    QUICK,
    noise,
    pair,
    require_sidecar,
    run,
    site,
    stopped_halfway,
)

from loraserve.errors import FailedPreconditionError, LoraServeError, UnavailableError
from loraserve.node.transfer import Timing

LARGE = 96 << 20
AGAIN = replace(QUICK, max_backoff_s=0.1)  # however often it dies


def test_a_holder_that_is_killed_during_a_read_costs_one_error() -> None:
    async def test() -> None:
        packed = noise(LARGE)
        async with pair(LARGE + 4096, AGAIN) as (holder, reader), site(LARGE + 4096) as other:
            pid, victim = reader.pid, holder.pid
            read = await stopped_halfway(reader, await holder.lease(packed), packed)
            os.kill(victim, signal.SIGKILL)
            os.kill(pid, signal.SIGCONT)
            with pytest.raises(UnavailableError):
                await read
            slot = await other.lease(packed)
            assert await reader.reads(slot, packed)
            assert reader.pid == pid
            # And from the holder's next life, by what it says now.
            await holder.back(victim)
            assert await reader.reads(await holder.lease(packed), packed)

    run(test)


def test_a_dead_holder_is_an_error_and_its_next_life_is_another_address() -> None:
    async def test() -> None:
        async with pair(timing=QUICK) as (holder, reader):
            packed = noise(5000)
            slot = await holder.lease(packed)
            assert await reader.reads(slot, packed)
            pid, before = holder.pid, holder.sidecar.info
            os.kill(pid, signal.SIGKILL)
            await holder.back(pid)
            for _ in range(3):
                with pytest.raises(LoraServeError):
                    await reader.read(slot, 5000)
            assert holder.sidecar.info != before
            assert holder.sidecar.restarts == 1
            assert await reader.reads(await holder.lease(packed), packed)

    run(test)


def test_a_frozen_holder_is_read_all_the_same() -> None:
    """cma asks nothing of the holder's process; whether the bytes are right says the generation."""

    async def test() -> None:
        async with pair() as (holder, reader):
            packed = noise(1 << 18)
            slot = await holder.lease(packed)
            if holder.sidecar.info and holder.sidecar.info.transports != ("cma",):
                pytest.skip("there is more than cma here")
            os.kill(holder.pid, signal.SIGSTOP)
            try:
                assert await reader.reads(slot, packed)
            finally:
                os.kill(holder.pid, signal.SIGCONT)

    run(test)


def test_a_sidecar_that_dies_fails_what_it_was_asked_and_comes_back() -> None:
    async def test() -> None:
        async with pair(LARGE + 4096, QUICK) as (holder, reader):
            packed = noise(LARGE)
            slot = await holder.lease(packed)
            pid = reader.pid
            os.kill(pid, signal.SIGSTOP)
            read = asyncio.create_task(reader.sidecar.read(slot, LARGE, 0, PATIENCE_S))
            await asyncio.sleep(0)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(UnavailableError, match="ended with -9"):
                await read
            await reader.back(pid)
            assert await reader.reads(slot, packed)

    run(test)


def test_where_reads_killed_the_sidecar_twice_nothing_is_read_for_a_while() -> None:
    async def test() -> None:
        async with pair(timing=AGAIN) as (holder, reader):
            packed = noise(5000)
            slot = await holder.lease(packed)

            async def die() -> None:
                pid = reader.pid
                os.kill(pid, signal.SIGSTOP)
                read = asyncio.create_task(reader.read(slot, 5000))
                await asyncio.sleep(0)
                os.kill(pid, signal.SIGKILL)
                with pytest.raises(UnavailableError):
                    await read
                await reader.back(pid)

            await die()
            assert await reader.reads(slot, packed)  # that was an accident
            await die()
            await die()
            with pytest.raises(FailedPreconditionError, match="died 2 times"):
                await reader.read(slot, 5000)
            # After a while it is tried again, once.
            right = reader.sidecar._timing
            reader.sidecar._timing = replace(right, suspicion_s=0.0)
            await die()
            reader.sidecar._timing = right
            with pytest.raises(FailedPreconditionError, match="died 2 times"):
                await reader.read(slot, 5000)
            reader.sidecar._timing = replace(right, suspicion_s=0.0)
            assert await reader.reads(slot, packed)
            reader.sidecar._timing = right
            assert await reader.reads(slot, packed)

    run(test)


def test_a_sidecar_that_hangs_is_killed_by_the_reads_deadline() -> None:
    async def test() -> None:
        timing = Timing(grace_s=0.5, ping_interval_s=PATIENCE_S, first_backoff_s=0.05)
        async with site() as holder, site(timing=timing) as reader:
            packed = noise(5000)
            slot = await holder.lease(packed)
            pid = reader.pid
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(UnavailableError):
                await reader.sidecar.read(slot, 5000, 0, 0.5)
            await reader.back(pid)
            assert await reader.reads(slot, packed)

    run(test)


def test_a_sidecar_that_hangs_with_nothing_to_do_is_found_by_a_ping() -> None:
    async def test() -> None:
        timing = Timing(ping_interval_s=0.1, ping_timeout_s=3.0, first_backoff_s=0.05)
        async with site(timing=timing) as lonely:
            pid = lonely.pid
            os.kill(pid, signal.SIGSTOP)
            await lonely.back(pid)
            assert await lonely.sidecar.export(0, 4096)

    run(test)


def test_requests_while_it_is_not_there_are_errors() -> None:
    async def test() -> None:
        timing = Timing(ping_interval_s=0.1, first_backoff_s=PATIENCE_S)
        async with site(timing=timing) as gone, site() as holder:
            slot = await holder.lease(noise(100))
            os.kill(gone.pid, signal.SIGKILL)
            while gone.sidecar.info is not None:
                await asyncio.sleep(0.01)
            with pytest.raises(UnavailableError):
                await gone.sidecar.export(0, 4096)
            with pytest.raises(UnavailableError):
                await gone.sidecar.read(slot, 100, 0, 1.0)
            await gone.sidecar.withdraw(0)

    run(test)


ORPHAN = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from transfer_site import Arena
from loraserve.node.transfer import TransferSidecar

async def main():
    arena = Arena(1 << 20)
    sidecar = await TransferSidecar.start(arena.fd, arena.capacity_bytes)
    print(sidecar.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_a_sidecar_ends_with_its_node() -> None:
    require_sidecar()
    folder = os.path.dirname(__file__)
    node = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, folder], stdout=subprocess.PIPE, text=True
    )
    assert node.stdout is not None
    pid = int(node.stdout.readline() or pytest.skip("no sidecar starts here"))
    ended = os.pidfd_open(pid)
    node.kill()
    node.wait()
    node.stdout.close()
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    assert poll.poll(1000 * PATIENCE_S)
    os.close(ended)
