"""Reads between two sidecars: every byte, in order, of the right generation."""

import asyncio
import os
import signal

import pytest
from transfer_site import PATIENCE_S, SLOT_HEADER, noise, pair, run, site, stopped_halfway

from loraserve.errors import FailedPreconditionError, InvalidCheckpointError, NotFoundError

PIECE = 16 << 20
LARGE = 6 * PIECE


@pytest.mark.parametrize(
    "sizes", [(1, 63, 64, 65, 4095, 4096, 4097, 1 << 20), (PIECE - 1, PIECE, PIECE + 1, 3 * PIECE)]
)
def test_every_byte_arrives_and_no_other_is_touched(sizes: tuple[int, ...]) -> None:
    async def test() -> None:
        async with pair(max(sizes) + (1 << 20)) as (holder, reader):
            for size in sizes:
                packed = noise(size)
                slot = await holder.lease(packed)
                for skip in {0, 1, size // 2, size - 1}:
                    if skip >= size:
                        continue
                    at, length = 4096, size - skip
                    memory = reader.arena.memory
                    memory[at - 8 : at], memory[at + length : at + length + 8] = (
                        b"before--",
                        b"--behind",
                    )
                    steps: list[int] = []
                    await reader.sidecar.read(
                        *(slot, size, at, PATIENCE_S), skip_bytes=skip, arrived=steps.append
                    )
                    assert reader.holds(packed[skip:], at)
                    assert memory[at - 8 : at] == b"before--"
                    assert memory[at + length : at + length + 8] == b"--behind"
                    assert sum(steps) == length
                    assert all(step > 0 for step in steps)
                    assert len(steps) <= -(-length // PIECE)
                await holder.sidecar.withdraw(0)
            assert reader.sidecar.last_transports

    run(test)


def test_bytes_are_there_when_they_are_said_to_be() -> None:
    async def test() -> None:
        packed = noise(LARGE)
        async with pair(LARGE + 4096) as (holder, reader):
            slot = await holder.lease(packed)
            told = 0

            def arrived(n_bytes: int) -> None:
                nonlocal told
                assert reader.holds(packed[told : told + n_bytes], told)
                told += n_bytes

            await reader.sidecar.read(slot, LARGE, 0, PATIENCE_S, arrived=arrived)
            assert told == LARGE

    run(test)


def test_many_reads_at_a_time_from_several_holders() -> None:
    size, count = 300_000, 48
    room = 2 * size

    async def test() -> None:
        async with pair(count * room) as (first, reader), site(count * room) as second:
            packed = [noise(size + i) for i in range(count)]
            slots = [
                await (first, second)[i % 2].lease(packed[i], generation=i + 1, offset=i * room)
                for i in range(count)
            ]
            reads = [
                reader.sidecar.read(slots[i], len(packed[i]), i * room, PATIENCE_S)
                for i in range(count)
            ]
            await asyncio.gather(*reads)
            for i in range(count):
                assert reader.holds(packed[i], i * room)

    run(test)


def test_a_slot_of_another_generation_is_not_taken_for_the_leased_one() -> None:
    async def test() -> None:
        async with pair() as (holder, reader):
            packed = noise(1000)
            slot = await holder.lease(packed, generation=7)
            for generation in (0, 6, 8):
                holder.arena.set_generation(0, generation)
                with pytest.raises(NotFoundError, match="generation"):
                    await reader.read(slot, 1000)
            holder.arena.set_generation(0, 7)
            assert await reader.reads(slot, packed)
            holder.arena.memory[0:8] = b"NOTASLOT"
            with pytest.raises(NotFoundError, match="slot"):
                await reader.read(slot, 1000)

    run(test)


def test_a_slot_of_another_size_is_refused() -> None:
    async def test() -> None:
        async with pair() as (holder, reader):
            slot = await holder.lease(noise(1000))
            with pytest.raises(FailedPreconditionError, match="size_bytes"):
                await reader.read(slot, 999)

    run(test)


def test_a_slot_that_is_sealed_anew_during_the_read_is_found_out() -> None:
    async def test() -> None:
        async with pair(LARGE + 4096) as (holder, reader):
            packed = noise(LARGE)
            slot = await holder.lease(packed)
            # The reader stands still while the holder drops the slot and writes another.
            read = await stopped_halfway(reader, slot, packed)
            holder.arena.set_generation(0, 8)
            os.kill(reader.pid, signal.SIGCONT)
            with pytest.raises(NotFoundError, match="generation"):
                await read

    run(test)


def test_what_the_callback_raises_ends_the_read() -> None:
    async def test() -> None:
        async with pair(LARGE + 4096) as (holder, reader):
            packed = noise(LARGE)
            slot = await holder.lease(packed)

            def damaged(n_bytes: int) -> None:
                raise InvalidCheckpointError("chunk", "does not agree with its hash")

            with pytest.raises(InvalidCheckpointError):
                await reader.sidecar.read(slot, LARGE, 0, PATIENCE_S, arrived=damaged)
            assert await reader.reads(slot, packed)

    run(test)


def test_nothing_is_written_after_a_cancelled_read() -> None:
    async def test() -> None:
        async with pair(LARGE + 4096) as (holder, reader):
            packed = noise(LARGE)
            slot = await holder.lease(packed)
            begun = asyncio.Event()
            task = asyncio.create_task(
                reader.sidecar.read(
                    *(slot, LARGE, 0, PATIENCE_S), arrived=lambda n_bytes: begun.set()
                )
            )
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            reader.arena.memory[:LARGE] = bytes(LARGE)
            # Whatever the sidecar still had to do for the cancelled read comes before this.
            assert await reader.sidecar.export(0, 4096)
            assert reader.holds(bytes(LARGE))
            assert await reader.reads(slot, packed)

    run(test)


def test_an_export_that_was_cancelled_or_withdrawn_meanwhile_is_forgotten() -> None:
    """The next slot at its offset is another one, though it may be as long."""

    async def test() -> None:
        async with site() as holder:
            sidecar = holder.sidecar
            cancelled = asyncio.create_task(sidecar.export(4096, 1000))
            await asyncio.sleep(0)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            await sidecar.withdraw(4096)
            exporting = asyncio.create_task(sidecar.export(4096, 2000))
            await asyncio.sleep(0)
            await asyncio.gather(exporting, sidecar.withdraw(4096))
            assert (sidecar._exports, sidecar._asked) == ({}, {})
            await sidecar.export(4096, 3000)
            assert sidecar._exports[4096][0] == 3000

    run(test)


def test_the_same_export_is_made_once_and_a_withdrawn_one_again() -> None:
    async def test() -> None:
        async with site() as holder:
            first = await holder.sidecar.export(4096, 100 + SLOT_HEADER.size)
            assert await holder.sidecar.export(4096, 100 + SLOT_HEADER.size) == first
            await holder.sidecar.withdraw(4096)
            await holder.sidecar.withdraw(4096)
            again = await holder.sidecar.export(4096, 500)
            assert again[1] == first[1]

    run(test)
