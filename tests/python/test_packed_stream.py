"""A packed adapter in pieces: the same judgement as over the whole, as soon as it can be made."""

import contextlib
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.checkpoint.adapter_source import AdapterModule, AdapterSource
from loraserve.checkpoint.packed_adapter import pack, parse_packed
from loraserve.checkpoint.packed_header import CHUNK_BYTES, PackedHeader, parse_header
from loraserve.checkpoint.packed_stream import ArrivingData, ChunkCheck, PackedStream
from loraserve.checkpoint.safetensors_file import DTYPES
from loraserve.errors import InvalidCheckpointError, LoraServeError, UnsupportedError


def module(layer: int, rank: int, width: int, dtype: str) -> AdapterModule:
    a = (np.arange(rank * width, dtype=np.uint32) % 77 + 99).astype(DTYPES[dtype])
    a = a.reshape(rank, width)
    return AdapterModule(layer, "q_proj", rank, 0.5, dtype, a, np.ascontiguousarray(a.T))


# Three chunks, the last one short; matrices and dtypes end within chunks.
LARGE = pack(
    AdapterSource(
        "org/base",
        (module(0, 13, 9001, "F32"), module(1, 31, 8191 * 2, "BF16"), module(2, 3, 1500, "F16")),
    )
)
SMALL = pack(AdapterSource(None, (module(0, 2, 8, "F32"), module(1, 1, 8, "F16"))))
HEADER = parse_header(LARGE)
assert HEADER.chunk_count == 3


def streamed(data: bytes, splits: list[int], **options: object) -> PackedHeader:
    stream = PackedStream(**options)  # type: ignore[arg-type]
    ends = sorted(split % (len(data) + 1) for split in splits)
    for begin, end in zip([0, *ends], [*ends, len(data)], strict=True):
        stream.feed(data[begin:end])
        assert stream.received == end
    return stream.finish()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([LARGE, SMALL]),
    st.lists(st.integers(0, len(LARGE)), max_size=12),
    st.sampled_from(["xxh3", "sha256"]),
)
def test_any_split_gives_the_same_header(data: bytes, splits: list[int], verify: str) -> None:
    header = streamed(data, splits, verify=verify)
    assert header == parse_packed(data).header


def test_byte_by_byte() -> None:
    assert streamed(SMALL, list(range(len(SMALL)))).revision == parse_packed(SMALL).revision


def judged(data: bytes, splits: list[int], **options: object) -> str | None:
    try:
        return streamed(data, splits, **options).revision
    except (InvalidCheckpointError, UnsupportedError):
        return None


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_it_judges_as_the_reader_of_whole_adapters_does(data: st.DataObject) -> None:
    bad = bytearray(SMALL)
    match data.draw(st.sampled_from(["flip", "cut", "more"])):
        case "flip":
            bad[data.draw(st.integers(0, len(SMALL) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del bad[data.draw(st.integers(0, len(SMALL) - 1)) :]
        case "more":
            bad += bytes(data.draw(st.integers(1, 99)))
    splits = data.draw(st.lists(st.integers(0, len(SMALL)), max_size=4))
    try:
        whole: str | None = parse_packed(bytes(bad)).revision
    except (InvalidCheckpointError, UnsupportedError):
        whole = None
    assert judged(bytes(bad), splits) == whole
    assert judged(bytes(bad), splits, revision=parse_packed(SMALL).revision) is None


def test_a_wrong_chunk_is_seen_when_it_is_whole() -> None:
    bad = bytearray(LARGE)
    bad[HEADER.header_bytes + CHUNK_BYTES + 5] ^= 1
    stream = PackedStream()
    stream.feed(bad[: HEADER.header_bytes + 2 * CHUNK_BYTES - 1])
    with pytest.raises(InvalidCheckpointError, match="chunk 1: does not have its xxh3 sum"):
        stream.feed(bad[HEADER.header_bytes + 2 * CHUNK_BYTES - 1 :])
    for after in (lambda: stream.feed(b""), stream.finish):
        with pytest.raises(InvalidCheckpointError, match="chunk 1"):
            after()


def test_another_revision_is_seen_with_the_header() -> None:
    stream = PackedStream(revision="ab" * 32)
    with pytest.raises(InvalidCheckpointError, match="revision: the header is not that of abab"):
        stream.feed(LARGE[: HEADER.header_bytes])


def test_a_forged_xxh3_sum_passes_for_xxh3_only() -> None:
    """Both sums are in the header, so such a header is another revision; admission checks both."""
    bad = bytearray(SMALL)
    header = parse_header(SMALL)
    at = header.header_bytes - 48  # the only chunk's sums, then up to 63 zeros
    while bad[at : at + 32] != header.chunk_table[:32]:
        at -= 1
    bad[at] ^= 1
    assert judged(bytes(bad), []) == parse_packed(bytes(bad)).revision
    with pytest.raises(InvalidCheckpointError, match="sha256 sum"):
        streamed(bytes(bad), [], verify="sha256")


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (0, "magic: not a packed adapter"),
        (15, "magic: not a packed adapter"),
        (20, "header: ends after 20 bytes"),
        (HEADER.header_bytes, f"size_bytes: {HEADER.header_bytes} bytes, the header says"),
        (len(LARGE) - 1, f"size_bytes: {len(LARGE) - 1} bytes, the header says {len(LARGE)}"),
    ],
)
def test_what_ends_early_is_refused(end: int, words: str) -> None:
    with pytest.raises(InvalidCheckpointError, match=words):
        streamed(LARGE[:end], [])


def with_weight(dtype: str, bits: int, number: int) -> bytes:
    """A packed adapter, sums and all, with one bad weight: what a careless packer would make."""
    from loraserve.checkpoint import packed_adapter

    a = np.ones((2, 300_000), DTYPES[dtype])
    a.reshape(-1).view(np.uint32 if dtype == "F32" else np.uint16)[number] = bits
    source = AdapterSource(None, (AdapterModule(0, "k_proj", 2, 1.0, dtype, a, a.T),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_adapter, "check_finite", lambda *_: None)
        return pack(source)


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("F32", 0x7F800000), ("F32", 0x7FC00001), ("F16", 0xFC00), ("BF16", 0x7F80)],
)
@pytest.mark.parametrize("number", [0, 262_143, 262_144, 599_999])
def test_weights_that_are_not_finite_are_refused(dtype: str, bits: int, number: int) -> None:
    data = with_weight(dtype, bits, number)
    with pytest.raises(InvalidCheckpointError, match=r"k_proj of layer 0: .* NaN or infinite"):
        streamed(data, [1000, 1_100_000])
    with pytest.raises(InvalidCheckpointError, match="k_proj of layer 0"):
        parse_packed(data)
    assert streamed(data, [], finite=False).chunk_count == parse_header(data).chunk_count


def test_it_keeps_the_header_and_one_chunk_at_most() -> None:
    data = pack(AdapterSource("base", (module(0, 64, 70_000, "F32"),)))
    pieces = [data[at : at + 300_000] for at in range(0, len(data), 300_000)]
    stream = PackedStream(finite=False)
    tracemalloc.start()
    try:
        for piece in pieces:
            stream.feed(piece)
        assert tracemalloc.get_traced_memory()[1] < 3 * CHUNK_BYTES < len(data) / 8
    finally:
        tracemalloc.stop()
    stream.finish()


def test_a_header_that_announces_gigabytes_costs_nothing() -> None:
    huge = bytearray(SMALL[:80])
    huge[12:16] = (4 << 20).to_bytes(4, "little")
    huge[16:24] = (1 << 40).to_bytes(8, "little")
    tracemalloc.start()
    try:
        stream = PackedStream()
        stream.feed(huge)
        with pytest.raises(InvalidCheckpointError, match="header"):
            stream.finish()
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


# In place


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, len(LARGE)), max_size=8))
def test_data_that_arrive_in_place(steps: list[int]) -> None:
    blob = bytearray(LARGE[: HEADER.header_bytes]) + bytes(HEADER.data_bytes)
    arriving = ArrivingData(HEADER, memoryview(blob), "sha256")
    assert arriving.position == HEADER.header_bytes
    for step in steps:
        begin = arriving.position
        step = min(step, len(LARGE) - begin)
        blob[begin : begin + step] = LARGE[begin : begin + step]
        arriving.arrived(step)
    blob[:] = LARGE  # the rest, of which nothing was said
    arriving.finish()
    assert arriving.position == len(LARGE)


def test_a_bad_chunk_in_place_is_seen_when_it_has_arrived() -> None:
    blob = bytearray(LARGE)
    blob[HEADER.header_bytes + CHUNK_BYTES] ^= 1
    arriving = ArrivingData(HEADER, memoryview(blob), "xxh3")
    arriving.arrived(2 * CHUNK_BYTES - 1)
    with pytest.raises(InvalidCheckpointError, match="chunk 1"):
        arriving.arrived(1)
    unsaid = ArrivingData(HEADER, memoryview(blob), "xxh3")
    with pytest.raises(InvalidCheckpointError, match="chunk 1"):
        unsaid.finish()


@pytest.mark.parametrize("n_bytes", [-1, HEADER.data_bytes + 1])
def test_more_than_there_is_cannot_arrive(n_bytes: int) -> None:
    with pytest.raises(LoraServeError, match=f"more than the {len(LARGE)} bytes"):
        ArrivingData(HEADER, memoryview(LARGE), "xxh3").arrived(n_bytes)


def test_two_threads_that_say_what_arrived_check_every_chunk_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right, checked, met = ChunkCheck.check, [], threading.Barrier(2)

    def check(self: ChunkCheck, index: int, data: memoryview) -> None:
        checked.append(index)
        with contextlib.suppress(threading.BrokenBarrierError):
            met.wait(0.1)  # for another thread that checks at the same time
        right(self, index, data)

    monkeypatch.setattr(ChunkCheck, "check", check)
    bad = bytearray(LARGE)
    bad[-1] ^= 1
    arriving = ArrivingData(HEADER, memoryview(bad), "xxh3")
    errors: list[InvalidCheckpointError] = []

    def say(n_bytes: int) -> None:
        try:
            arriving.arrived(n_bytes)
        except InvalidCheckpointError as error:
            errors.append(error)

    threads = [
        threading.Thread(target=say, args=(n_bytes,)) for n_bytes in (HEADER.data_bytes - 1, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert checked == [0, 1, 2]
    assert len(errors) == 1
    with pytest.raises(InvalidCheckpointError):
        arriving.finish()
