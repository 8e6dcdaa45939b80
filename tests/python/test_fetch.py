"""A fetch: the header from who is trusted, data from the first who has them right and in time."""

import asyncio
from typing import Any

import pytest
from fake_node import FakeSource, letter_of, revision
from fake_node import load_of as small_load
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_fixtures import (
    MemorySource,
    fetch_into_pool,
    fetched,
    flipped,
    header_of,
    hurry,
    large,
    load_of,
)

from loraserve.errors import (
    FailedPreconditionError,
    InvalidCheckpointError,
    LoraServeError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnavailableError,
)
from loraserve.node import fetch as fetch_module
from loraserve.node.fetch import AdapterFetch, SourceResult
from loraserve.node.load_info import AdapterLoadInfo, Peer
from loraserve.placement.types import AdapterId, AdapterSpec

DATA = large()
HEADER = header_of(DATA)
LOAD = load_of(DATA)
PEERS = (Peer("n1", "h:1"), Peer("n2", "h:2"), Peer("n3", "h:3"))


def test_what_comes_must_be_what_was_announced() -> None:
    assert fetched(LOAD, MemorySource(DATA)) == (DATA, "memory")
    assert fetched(load_of(DATA, size=0), MemorySource(DATA)) == (DATA, "memory")
    with pytest.raises(InvalidCheckpointError, match=f"size_bytes: {len(DATA)}, announced were 99"):
        fetched(load_of(DATA, size=99), MemorySource(DATA))
    wrong = AdapterSpec(AdapterId("default", "tiny", "sql"), HEADER.revision, len(DATA), 8)
    with pytest.raises(FailedPreconditionError, match="max_rank: 16, announced was 8"):
        fetched(AdapterLoadInfo(wrong), MemorySource(DATA))
    other = AdapterSpec(LOAD.spec.adapter, "ab" * 32, len(DATA), 16)
    with pytest.raises(InvalidCheckpointError, match="revision: the header is not that of abab"):
        fetched(AdapterLoadInfo(other), MemorySource(DATA))
    with pytest.raises(ResourceExhaustedError, match=f"{len(DATA)} bytes, over the 1000 that fit"):
        fetched(LOAD, MemorySource(DATA), max_bytes=1000)


def test_sources_are_asked_in_order_until_one_has_it(caplog: pytest.LogCaptureFixture) -> None:
    first, second, third = FakeSource(), FakeSource("a"), FakeSource("a")
    load = small_load("sql", "a")
    fetched(load, first, second, third)
    assert [len(s.fetches) for s in (first, second, third)] == [1, 1, 0]
    for trouble in (
        UnavailableError("store", "is away"),
        InvalidCheckpointError("chunk 1", "does not agree"),
        PermissionDeniedError("authorization", "no"),
        ValueError("a driver's own error"),
    ):
        first.error = trouble
        fetched(load, first, second)
    assert "a driver's own error" in caplog.text
    # What a source with the revision said counts more than that another one lacks it.
    first.error = InvalidCheckpointError("chunk 1", "does not agree")
    first.blobs = second.blobs
    with pytest.raises(InvalidCheckpointError, match="chunk 1"):
        fetched(load, first, FakeSource())
    with pytest.raises(NotFoundError, match="is not here"):
        fetched(load, FakeSource(), FakeSource())
    with pytest.raises(NotFoundError, match="no source of adapters"):
        fetched(load)


def test_a_header_that_is_known_is_not_asked_for_again() -> None:
    source = MemorySource(DATA)

    async def run() -> None:
        fetch = AdapterFetch([source], max_bytes=1 << 30)
        for _ in range(3):
            assert await fetch_into_pool(LOAD, fetch) == (DATA, "memory")

    asyncio.run(run())
    assert (source.started, len(source.reads)) == (1, 3)


def test_known_headers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "_KEPT_HEADER_BYTES", 2 * 400)
    source = FakeSource(*"abcdef")

    async def run() -> None:
        fetch = AdapterFetch([source], max_bytes=1 << 30)
        for letter in "abcdefa":
            await fetch_into_pool(small_load("sql", letter), fetch)
            assert fetch._known_bytes == sum(map(len, fetch._known.values())) <= 800
        assert [letter_of(r) for r in fetch._known][-1] == "a"

    asyncio.run(run())


class Peers(MemorySource):
    """A peer source whose holders do as `ways` says: an error, or what data to send."""

    def __init__(self, *ways: LoraServeError | bytes) -> None:
        super().__init__(DATA, "peer")
        self.ways = ways

    async def read_start(self, load: AdapterLoadInfo) -> bytes:
        raise AssertionError("peers are not asked for headers")

    async def read_into(self, load: AdapterLoadInfo, header: Any, writer: Any) -> None:
        (peer,) = load.peers
        way = self.ways[PEERS.index(peer)]
        if isinstance(way, LoraServeError):
            self.reads.append(load)
            raise way
        self.data = way
        await super().read_into(load, header, writer)


@pytest.mark.parametrize(
    ("ways", "asked", "source"),
    [
        ([DATA], 1, "peer"),
        ([UnavailableError("peer", "is gone"), DATA], 2, "peer"),
        ([flipped(DATA, 2_000_000), DATA], 2, "peer"),
        ([NotFoundError("revision", "dropped"), flipped(DATA, -1), DATA], 2, "store"),
        ([large(2), DATA[:-1]], 2, "store"),
    ],
)
def test_a_bad_holder_costs_one_retry_then_the_store_is_asked(
    ways: list[Any], asked: int, source: str
) -> None:
    peers, store = Peers(*ways), MemorySource(DATA, "store")
    load = load_of(DATA, peers=PEERS[: len(ways)])
    assert fetched(load, store, peers=peers) == (DATA, source)
    assert [load.peers for load in peers.reads] == [(peer,) for peer in PEERS[:asked]]
    assert len(store.reads) == (source == "store")


def test_without_peers_the_store_is_asked_at_once() -> None:
    peers, store = Peers(DATA), MemorySource(DATA, "store")
    assert fetched(LOAD, store, peers=peers) == (DATA, "store")
    assert peers.reads == []


class OneSided(MemorySource):
    """Writes where the bytes are to lie and says what has arrived; or says nothing at all."""

    def __init__(self, data: bytes, step: int) -> None:
        super().__init__(data, "peer")
        self.step = step
        self.told = 0

    async def read_into(self, load: AdapterLoadInfo, header: Any, writer: Any) -> None:
        writer.view[writer.position :] = self.data[writer.position :]
        while self.step and writer.position < len(self.data):
            step = min(self.step, len(self.data) - writer.position)
            writer.arrived(step)
            self.told += step


@pytest.mark.parametrize("step", [0, 1_000_000, 1 << 20, 16 << 20])
@pytest.mark.parametrize("verify", ["xxh3", "sha256"])
def test_one_sided_reads_are_checked_too(step: int, verify: str) -> None:
    load = load_of(DATA, peers=PEERS[:1])
    options: Any = {"verify": verify}
    assert fetched(load, MemorySource(DATA), peers=OneSided(DATA, step), **options) == (
        DATA,
        "peer",
    )
    bad = OneSided(flipped(DATA, 1_000_000), step)
    assert fetched(load, MemorySource(DATA), peers=bad, **options) == (DATA, "memory")
    # A wrong chunk is seen when it has arrived, not at the end.
    assert bad.told <= max(0, step if step > 2 << 20 else 2 << 20)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_whatever_a_source_sends_the_right_bytes_or_none(data: st.DataObject) -> None:
    bad = bytearray(DATA)
    match data.draw(st.sampled_from(["flip", "cut", "more", "splice"])):
        case "flip":
            at = data.draw(st.integers(HEADER.header_bytes, len(DATA) - 1))
            bad[at] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del bad[data.draw(st.integers(HEADER.header_bytes, len(DATA) - 1)) :]
        case "more":
            bad += b"\0" * data.draw(st.integers(1, 64))
        case "splice":
            at = data.draw(st.integers(HEADER.header_bytes, len(DATA) - 100))
            bad[at:] = large(2)[at:]
    piece = data.draw(st.integers(10_000, 3 << 20))
    wrong = MemorySource(bytes(bad), "wrong", piece=piece)
    wrong.read_start = MemorySource(DATA).read_start  # type: ignore[method-assign]
    assert fetched(LOAD, wrong, MemorySource(DATA, "right")) == (DATA, "right")


# Time


def test_a_source_that_stalls_is_closed_and_the_next_one_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hurry(monkeypatch, "slow", 0.2)
    slow, quick = MemorySource(DATA, "slow"), MemorySource(DATA, "quick")
    closed = []

    async def stall() -> None:
        try:
            if slow.reads:
                await asyncio.Event().wait()
        finally:
            closed.append(len(slow.reads))

    slow.before = stall
    assert fetched(LOAD, slow, quick, min_bytes_per_s=1e9) == (DATA, "quick")
    assert closed == [1]


def test_the_deadline_follows_the_size() -> None:
    fetch = AdapterFetch([], max_bytes=1 << 30, min_bytes_per_s=1e6)
    assert fetch._deadline_s(0) == fetch_module.FETCH_GRACE_S
    assert fetch._deadline_s(30_000_000) == fetch_module.FETCH_GRACE_S + 30.0


def test_a_writer_that_was_taken_away_touches_nothing() -> None:
    """A thread that hangs in a read may come back when the slot is another adapter's."""
    kept: list[Any] = []

    class Late(MemorySource):
        async def read_into(self, load: AdapterLoadInfo, header: Any, writer: Any) -> None:
            kept.append(writer)
            raise UnavailableError("late", "hangs")

    async def run() -> None:
        fetch = AdapterFetch([Late(DATA), MemorySource(DATA)], max_bytes=1 << 30)
        await fetch_into_pool(LOAD, fetch)
        before = bytes(kept[0].view)
        with pytest.raises(UnavailableError, match="another source is read by now"):
            kept[0].write(b"x" * 100)
        assert bytes(kept[0].view) == before

    asyncio.run(run())


def test_a_fetch_that_is_cancelled_cancels_its_source() -> None:
    source = MemorySource(DATA)
    begun, ended = asyncio.Event(), []

    async def wait() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    source.before = wait

    async def run() -> None:
        task = asyncio.create_task(fetch_into_pool(LOAD, AdapterFetch([source], max_bytes=1 << 30)))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == [True]

    asyncio.run(run())


# What is told


def test_every_attempt_is_told_with_its_end() -> None:
    told: list[SourceResult] = []
    peers = Peers(NotFoundError("revision", "dropped"), flipped(DATA, 500_000))
    broken = MemorySource(DATA, "store")

    async def away() -> None:
        raise UnavailableError("store", "is away")

    broken.before = away
    load = load_of(DATA, peers=PEERS)
    fetched(load, broken, MemorySource(DATA, "controller"), peers=peers, on_result=told.append)
    assert [(r.source, r.outcome) for r in told] == [
        ("peer", "missing"),
        ("peer", "corrupt"),
        ("store", "failed"),
        ("controller", "fetched"),
    ]
    assert told[-1].size_bytes == len(DATA)


def test_a_wrong_header_is_told() -> None:
    told: list[SourceResult] = []
    forged = FakeSource()
    forged.blobs[revision("a")] = FakeSource("b").blobs[revision("b")]
    fetched(small_load("sql", "a"), forged, FakeSource("a"), on_result=told.append)
    assert [r.outcome for r in told] == ["corrupt", "corrupt", "fetched"]


def test_costs_are_those_of_the_quickest_source_as_measured() -> None:
    clock = 0.0

    async def slow() -> None:
        nonlocal clock
        clock += 1.0

    source = MemorySource(DATA, "store", piece=1 << 20)
    source.before = slow

    async def run() -> None:
        fetch = AdapterFetch([source], peers=Peers(DATA), max_bytes=1 << 30, clock=lambda: clock)
        before = fetch.cost_s(LOAD)
        for _ in range(20):
            await fetch_into_pool(LOAD, fetch)
        assert fetch.cost_s(LOAD) == pytest.approx(3.0, rel=0.1)
        assert before < 0.3
        assert fetch.cost_s(load_of(DATA, size=0)) < 0.01
        assert fetch.cost_s(load_of(DATA, peers=PEERS)) == before  # from a peer

    asyncio.run(run())
    assert AdapterFetch([], max_bytes=1).cost_s(LOAD) == 0.0
