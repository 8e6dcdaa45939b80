"""PeerSource where both sides have a sidecar: one-sided reads of a leased slot."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from fake_node import until
from node_calls import run
from peer_fixtures import (
    BEGIN,
    BLOB,
    INFO,
    REVISION,
    FakeTransfer,
    Reader,
    failure,
    flipped,
    holding,
    released,
)

from loraserve.checkpoint.packed_stream import ChunkCheck
from loraserve.errors import (
    FailedPreconditionError,
    InvalidCheckpointError,
    LoraServeError,
    NotFoundError,
    UnavailableError,
)
from loraserve.node.peers import source as source_module
from loraserve.node.peers.exports import Exports

# The product's; while a test runs it is another.
CALL_TIMEOUT_S = source_module._CALL_TIMEOUT_S


def copying(reader: Reader, *, wrong: bool = False) -> Any:
    """A sidecar's read that brings BLOB in three pieces."""

    async def read(local_offset: int, skip: int, arrived: Any) -> None:
        data = flipped(5) if wrong else BLOB[skip:]
        third = -(-len(data) // 3)
        for at in range(0, len(data), third):
            piece = data[at : at + third]
            reader.pool.arena.view(local_offset + at, len(piece))[:] = piece
            arrived(len(piece))
            await asyncio.sleep(0)

    return read


@contextlib.asynccontextmanager
async def both() -> AsyncIterator[tuple[Any, FakeTransfer, Reader, FakeTransfer]]:
    """A holder of BLOB and a reader, each with a sidecar."""
    theirs, ours = FakeTransfer(), FakeTransfer()
    async with holding(transfer=theirs) as holder:
        holder.put(REVISION, BLOB)
        reader = Reader(ours)
        ours.on_read = copying(reader)
        yield holder, theirs, reader, ours


def test_where_both_have_a_sidecar_it_reads_the_slot_under_a_lease() -> None:
    async def test() -> None:
        async with both() as (holder, _, reader, ours):
            assert await reader.read(holder.peer) == BLOB
            assert reader.reads == [("ucx", len(BLOB))]
            (slot,) = ours.reads
            found = holder.pool.find(REVISION)
            assert (slot.generation, slot.header_bytes) == (found.generation, 64)
            await until(released(holder), "the lease is back")

    run(test)


@pytest.mark.parametrize(
    "case", ["no sidecar here", "none there", "version", "host", "no way after all"]
)
def test_where_no_lane_leads_to_the_slot_the_copy_comes_as_a_stream(case: str) -> None:
    async def test() -> None:
        async with both() as (holder, theirs, reader, ours):
            if case == "no sidecar here":
                ours.info = None
            elif case == "none there":
                theirs.info = None
            elif case == "version":
                theirs.info = replace(INFO, ucx_version="1.22.3")
            elif case == "host":
                theirs.info = replace(INFO, host="there")
            else:

                async def refuse(*_: Any) -> None:
                    raise FailedPreconditionError("transport", "no native lane")

                ours.on_read = refuse
            assert await reader.read(holder.peer) == BLOB
            assert reader.reads == [("grpc", len(BLOB))]
            await until(released(holder), "the lease is back")

    run(test)


@pytest.mark.parametrize("error", [UnavailableError("peer", "gone"), NotFoundError("lease", "old")])
def test_a_read_that_fails_ends_the_attempt(error: LoraServeError) -> None:
    async def test() -> None:
        async with both() as (holder, _, reader, ours):

            async def fail(*_: Any) -> None:
                raise error

            ours.on_read = fail
            assert type(await failure(reader, holder.peer)) is type(error)
            await until(released(holder), "the lease is back")

    run(test)


def test_wrong_bytes_end_the_read_before_it_has_ended() -> None:
    async def test() -> None:
        async with both() as (holder, _, reader, ours):
            ended = asyncio.Event()

            async def wrong(*arguments: Any) -> None:
                try:
                    await copying(reader, wrong=True)(*arguments)
                    await asyncio.Event().wait()  # as if there were more
                finally:
                    ended.set()

            ours.on_read = wrong
            assert isinstance(await failure(reader, holder.peer), InvalidCheckpointError)
            assert ended.is_set()
            await until(released(holder), "the lease is back")

    run(test)


class SlowCheck:
    """Checks of chunks that stand still until `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.running = 0
        right = ChunkCheck.check

        def check(chunk_check: ChunkCheck, index: int, data: memoryview) -> None:
            self.running += 1
            self.begun.set()
            assert self.go.wait(30)
            self.running -= 1
            right(chunk_check, index, data)

        monkeypatch.setattr(ChunkCheck, "check", check)


def arriving(reader: Reader, check: SlowCheck, data: bytes) -> Any:
    """All of `data` at once, and then, while its first chunk is checked, the read fails as it does
    where the holder's slot header has changed."""

    async def read(local_offset: int, skip: int, arrived: Any) -> None:
        reader.pool.arena.view(local_offset, len(data))[:] = data
        arrived(len(data))
        await until(check.begun.is_set, "the check has begun")
        asyncio.get_running_loop().call_later(0.05, check.go.set)
        raise FailedPreconditionError("size_bytes", "another one by now")

    return read


@pytest.mark.parametrize("wrong", [True, False])
def test_what_was_read_of_a_slot_that_changed_is_not_completed_by_a_stream(
    wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with both() as (holder, _, reader, ours):
            check = SlowCheck(monkeypatch)
            ours.on_read = arriving(reader, check, flipped(-1) if wrong else BLOB[BEGIN:])
            assert isinstance(await failure(reader, holder.peer), UnavailableError)
            assert check.running == 0  # the slot may be another's by now
            assert reader.reads == []
            await until(released(holder), "the lease is back")

    run(test)


def test_a_read_that_is_cancelled_ends_when_no_thread_checks_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        async with both() as (holder, _, reader, ours):
            check = SlowCheck(monkeypatch)

            async def read(local_offset: int, skip: int, arrived: Any) -> None:
                await copying(reader)(local_offset, skip, arrived)
                await asyncio.Event().wait()

            ours.on_read = read
            reading = asyncio.create_task(reader.read(holder.peer))
            await until(check.begun.is_set, "the check has begun")
            for _ in range(3):  # however often
                reading.cancel()
                await asyncio.sleep(0)
            asyncio.get_running_loop().call_later(0.05, check.go.set)
            with pytest.raises(asyncio.CancelledError):
                await reading
            assert check.running == 0

    run(test)


def test_a_holder_whose_sidecar_hangs_gives_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2 * Exports.EXPORT_TIMEOUT_S <= CALL_TIMEOUT_S
    monkeypatch.setattr(Exports, "EXPORT_TIMEOUT_S", 0.05)

    async def test() -> None:
        async with both() as (holder, theirs, reader, _):
            theirs.hangs = True
            try:
                assert await reader.read(holder.peer) == BLOB
                monkeypatch.setattr(Exports, "EXPORT_TIMEOUT_S", 1000.0)  # not waited for again
                assert await reader.read(holder.peer) == BLOB
                assert len(theirs.exported) == 1
            finally:
                theirs.hangs = False
            await until(lambda: not theirs.exporting, "it has answered")
            assert await reader.read(holder.peer) == BLOB
            assert [transport for transport, _ in reader.reads] == ["grpc", "grpc", "ucx"]

    run(test)


def test_a_reader_that_goes_during_an_export_leaves_it_to_others() -> None:
    async def test() -> None:
        async with both() as (holder, theirs, reader, _):
            theirs.hangs = True
            try:
                going = asyncio.create_task(reader.read(holder.peer))
                await until(lambda: theirs.exporting == 1, "exporting")
                going.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await going
            finally:
                theirs.hangs = False
            assert await reader.read(holder.peer) == BLOB
            assert reader.reads == [("ucx", len(BLOB))]

    run(test)


def test_a_holder_that_leases_another_size_lies() -> None:
    async def test() -> None:
        async with both() as (holder, _, reader, ours):
            holder.pool.drop(REVISION)
            holder.put(REVISION, BLOB + b"x")
            assert isinstance(await failure(reader, holder.peer), InvalidCheckpointError)
            assert ours.reads == []
            await until(released(holder), "the lease is back")

    run(test)
