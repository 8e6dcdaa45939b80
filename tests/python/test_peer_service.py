"""PeerService over real gRPC: leases, reads under a pin, and what a node refuses."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest
from fake_node import until
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st
from node_calls import refused, run
from peer_fixtures import INFO, FakeTransfer, holding

from loraserve.errors import (
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from loraserve.node.peers import servicer as servicer_module
from loraserve.node.peers.copy_messages import encode
from loraserve.node.peers.exports import Exports
from loraserve.node.peers.servicer import MAX_READS, MESSAGE_BYTES
from loraserve.node.pool import slots as slots_module
from loraserve.node.pool.slots import MAX_LEASE_S, SLOT_HEADER_BYTES
from loraserve.v1 import node_pb2, node_pb2_grpc
from loraserve.v1.node_pb2 import LeaseCopyRequest, ReadCopyRequest, ReleaseCopyRequest
from loraserve.wire import dial

REVISION, OTHER = "a" * 64, "b" * 64
SIZE = MESSAGE_BYTES + 17


def data_of(size: int) -> bytes:
    return bytes(i * 7 % 251 for i in range(1009)) * (size // 1009 + 1)


DATA = data_of(SIZE)[:SIZE]
# More than a connection takes in.
LONG = data_of(40 << 20)


def test_a_copy_is_read_whole_or_from_an_offset() -> None:
    async def test() -> None:
        async with holding() as holder:
            holder.put(REVISION, DATA)
            data, messages = await holder.read(REVISION)
            assert data == DATA
            assert [m.size_bytes for m in messages] == [SIZE, 0]
            assert max(len(m.chunk) for m in messages) == MESSAGE_BYTES
            assert (await holder.read(REVISION, 1 << 20))[0] == DATA[1 << 20 :]
            nothing, messages = await holder.read(REVISION, SIZE)
            assert (nothing, messages[0].size_bytes) == (b"", SIZE)
            error = await refused(holder.read(REVISION, SIZE + 1))
            assert (type(error), error.field) == (InvalidArgumentError, "offset_bytes")
            assert isinstance(await refused(holder.read(OTHER)), NotFoundError)
            assert isinstance(await refused(holder.read("../keys")), InvalidArgumentError)
            assert holder.pool.stats().leases == 0

    run(test)


def test_a_copy_that_is_evicted_while_it_is_read_is_read_to_its_end() -> None:
    async def test() -> None:
        async with holding() as holder:
            holder.put(REVISION, LONG)
            call = holder.stub.ReadCopy(ReadCopyRequest(revision=REVISION))
            first = await call.read()
            holder.pool.drop(REVISION)
            stats = holder.pool.stats()
            assert (stats.slots, stats.quarantined_bytes > len(LONG)) == (0, True)
            assert first.chunk + await rest_of(call) == LONG
            await until(holder.is_empty, "the memory is back")
            assert isinstance(await refused(holder.read(REVISION)), NotFoundError)

    run(test)


def test_a_reader_that_goes_frees_the_copy() -> None:
    async def test() -> None:
        async with holding() as holder:
            holder.put(REVISION, LONG)
            call = holder.stub.ReadCopy(ReadCopyRequest(revision=REVISION))
            await call.read()
            holder.pool.drop(REVISION)
            call.cancel()
            await until(holder.is_empty, "the memory is back")

    run(test)


def test_reads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(servicer_module, "READER_STALL_S", 1000.0)
        async with holding() as holder:
            holder.put(REVISION, LONG)
            request = ReadCopyRequest(revision=REVISION)
            calls = [holder.stub.ReadCopy(request) for _ in range(MAX_READS)]
            await asyncio.gather(*(call.read() for call in calls))
            error = await refused(holder.read(REVISION))
            assert isinstance(error, ResourceExhaustedError)
            assert error.retry_after_s
            holder.pool.drop(REVISION)
            for call in calls:
                call.cancel()
            await until(holder.is_empty, "the memory is back")
            assert isinstance(await refused(holder.read(REVISION)), NotFoundError)

    run(test)


@pytest.mark.parametrize(
    ("stall_s", "longest_s", "why"),
    [(0.2, 1000.0, "taken nothing for 0.2 s"), (1000.0, 0.2, "not taken the copy within")],
)
def test_a_reader_that_stalls_or_is_slow_is_given_up(
    stall_s: float, longest_s: float, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        monkeypatch.setattr(servicer_module, "READER_STALL_S", stall_s)
        monkeypatch.setattr(servicer_module, "SLACK_S", 0.0)
        async with holding(deadline_s=lambda size_bytes: longest_s / 2) as holder:
            holder.put(REVISION, LONG)
            slot = holder.pool.find(REVISION)
            assert slot is not None
            call = holder.stub.ReadCopy(ReadCopyRequest(revision=REVISION))
            await until(lambda: slot.pins == 1, "it is read")
            holder.pool.drop(REVISION)
            # Nobody takes anything: it is given up, and the memory goes back.
            await until(holder.is_empty, "the memory is back")
            error = await refused(rest_of(call))
            assert isinstance(error, UnavailableError)
            assert why in str(error)

    run(test)


async def rest_of(call: Any) -> bytes:
    data = b""
    while (message := await call.read()) is not grpc.aio.EOF:
        data += message.chunk
    return data


def test_a_lease_keeps_the_slot_as_it_is_until_it_ends() -> None:
    async def test() -> None:
        async with holding() as holder:
            holder.put(REVISION, DATA)
            first = await holder.stub.LeaseCopy(LeaseCopyRequest(revision=REVISION))
            second = await holder.stub.LeaseCopy(
                LeaseCopyRequest(revision=REVISION, ttl=Duration(seconds=5))
            )
            assert first.size_bytes == SIZE
            assert not first.HasField("slot")
            assert second.ttl == Duration(seconds=5)
            holder.pool.drop(REVISION)
            await holder.stub.ReleaseCopy(ReleaseCopyRequest(lease_id=first.lease_id))
            await holder.stub.ReleaseCopy(ReleaseCopyRequest(lease_id=first.lease_id))
            await holder.stub.ReleaseCopy(ReleaseCopyRequest(lease_id=12345))
            assert holder.pool.stats().quarantined_bytes > SIZE
            holder.clock.now_s += 5
            holder.pool.expire()
            assert holder.is_empty()

    run(test)


def test_the_memory_of_a_lease_that_lapses_goes_back_though_nobody_asks() -> None:
    async def test() -> None:
        async with holding() as holder:
            holder.put(REVISION, DATA)
            request = LeaseCopyRequest(revision=REVISION)
            request.ttl.FromMilliseconds(50)
            await holder.stub.LeaseCopy(request)
            holder.pool.drop(REVISION)
            assert not holder.is_empty()
            holder.clock.now_s += 1
            await until(holder.is_empty, "the memory is back")

    run(test)


def test_a_lease_is_no_longer_than_a_read_may_take() -> None:
    async def test() -> None:
        async with holding(deadline_s=lambda size_bytes: size_bytes / SIZE) as holder:
            holder.put(REVISION, DATA)
            for asked_s, given_s in ((10**6, 12), (5, 5)):
                request = LeaseCopyRequest(revision=REVISION, ttl=Duration(seconds=asked_s))
                assert (await holder.stub.LeaseCopy(request)).ttl == Duration(seconds=given_s)

    run(test)


def test_a_peer_has_a_part_of_the_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "MAX_PEER_LEASES", 2)

    async def test() -> None:
        async with holding() as holder:
            holder.put(REVISION, DATA)
            request = LeaseCopyRequest(revision=REVISION)
            first, _ = [await holder.stub.LeaseCopy(request) for _ in range(2)]
            # By whatever connection it comes.
            async with dial(holder.peer.address) as channel:
                stub: Any = node_pb2_grpc.PeerServiceStub(channel)
                error = await refused(stub.LeaseCopy(request))
                assert isinstance(error, ResourceExhaustedError)
                await holder.stub.ReleaseCopy(ReleaseCopyRequest(lease_id=first.lease_id))
                await stub.LeaseCopy(request)

    run(test)


def test_leases_are_bounded_in_number_and_in_time() -> None:
    async def test() -> None:
        async with holding(max_leases=2) as holder:
            holder.put(REVISION, DATA)

            async def lease(**fields: Any) -> Any:
                return await holder.stub.LeaseCopy(LeaseCopyRequest(**fields))

            long = await lease(revision=REVISION, ttl=Duration(seconds=10**6))
            assert long.ttl == Duration(seconds=int(MAX_LEASE_S))
            await lease(revision=REVISION)
            assert isinstance(await refused(lease(revision=REVISION)), ResourceExhaustedError)
            for bad in (Duration(seconds=-1), Duration()):
                error = await refused(lease(revision=REVISION, ttl=bad))
                assert (type(error), error.field) == (InvalidArgumentError, "ttl")
            assert isinstance(await refused(lease(revision=OTHER)), NotFoundError)
            assert isinstance(await refused(lease(revision="x")), InvalidArgumentError)
            assert holder.pool.stats().leases == 2

    run(test)


def test_a_slot_is_exported_and_withdrawn_when_its_memory_goes_back() -> None:
    async def test() -> None:
        transfer = FakeTransfer()
        async with holding(transfer=transfer) as holder:
            holder.put(REVISION, DATA)
            found = holder.pool.find(REVISION)
            assert found is not None
            request = LeaseCopyRequest(revision=REVISION)
            first, second = await asyncio.gather(*(holder.stub.LeaseCopy(request) for _ in "ab"))
            assert set(transfer.exported) == {(found.offset, SLOT_HEADER_BYTES + SIZE)}
            assert (
                first.slot
                == second.slot
                == node_pb2.RemoteSlot(
                    ucx_version="1.21.0",
                    worker_address=b"worker",
                    rkey=b"rkey",
                    address=4096 + found.offset,
                    header_bytes=SLOT_HEADER_BYTES,
                    generation=found.generation,
                    host="here",
                )
            )
            for lease in (first, second):
                await holder.stub.ReleaseCopy(ReleaseCopyRequest(lease_id=lease.lease_id))
            assert transfer.withdrawn == []  # the next reader has it at once
            holder.pool.drop(REVISION)
            await until(lambda: transfer.withdrawn == [found.offset], "withdrawn")
            await holder.stub.ReleaseCopy(ReleaseCopyRequest(lease_id=0))
            assert transfer.withdrawn == [found.offset]

    run(test)


@pytest.mark.parametrize("trouble", ["gone", "no transport", "refuses", "hangs", "dies"])
def test_without_a_sidecar_that_works_a_lease_has_no_slot(
    trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        monkeypatch.setattr(Exports, "EXPORT_TIMEOUT_S", 0.05 if trouble == "hangs" else 60.0)
        transfer = FakeTransfer()
        async with holding(transfer=transfer) as holder:
            holder.put(REVISION, DATA)
            made_so: dict[str, Callable[[], None]] = {
                "gone": lambda: setattr(transfer, "info", None),
                "no transport": lambda: setattr(transfer, "info", replace(INFO, transports=())),
                "dies": lambda: setattr(transfer, "dies", True),
                "refuses": lambda: setattr(transfer, "error", UnavailableError("x", "no")),
                "hangs": lambda: setattr(transfer, "hangs", True),
            }
            made_so[trouble]()
            lease = await holder.stub.LeaseCopy(LeaseCopyRequest(revision=REVISION))
            assert not lease.HasField("slot")
            transfer.info, transfer.error = INFO, None
            transfer.hangs = transfer.dies = False
            await until(lambda: not transfer.exporting, "it has answered")
            monkeypatch.setattr(Exports, "EXPORT_TIMEOUT_S", 60.0)
            lease = await holder.stub.LeaseCopy(LeaseCopyRequest(revision=REVISION))
            assert lease.HasField("slot")

    run(test)


@given(st.binary(max_size=300), st.integers(0, 2**64 - 1))
def test_encoded_messages_are_what_protobuf_reads(chunk: bytes, size: int) -> None:
    message = node_pb2.ReadCopyResponse.FromString(encode(memoryview(chunk), size or None))
    assert (message.chunk, message.size_bytes) == (chunk, size)
