"""One read over a transport whose every step is drawn: it ends once, rightly, with nothing left."""

import struct

import pytest
from fuzz_budget import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve import _testing

PIECE = _testing.TRANSFER_PIECE_BYTES
AHEAD = _testing.TRANSFER_PIECES_AHEAD
ADDRESS, HEADER = 1 << 40, 64


def header(generation: int, size_bytes: int, magic: bytes = b"LORASLOT") -> bytes:
    return struct.pack("<8sQQ40x", magic, generation, size_bytes)


class Peer:
    """The memory that is read, and a read of it. Bytes are the low bits of their address."""

    def __init__(
        self, size_bytes: int, skip_bytes: int = 0, generation: int = 7, timeout_s: float = 10.0
    ) -> None:
        self.size_bytes = size_bytes
        self.skip_bytes = skip_bytes
        self.generation = generation
        self.read = _testing.ScriptedRead(
            address=ADDRESS,
            generation=7,
            size_bytes=size_bytes,
            skip_bytes=skip_bytes,
            timeout_s=timeout_s,
            now_s=0.0,
        )

    def bytes_at(self, address: int, length: int) -> bytes:
        if address == ADDRESS:
            assert length == HEADER
            return header(self.generation, self.size_bytes)
        start = address - ADDRESS - HEADER
        assert self.skip_bytes <= start
        assert start + length <= self.size_bytes
        block = bytes(range(251))
        shift = start % 251
        return (block * (length // 251 + 2))[shift : shift + length]

    def finish(self, number: int, outcome: str = "done") -> None:
        (found,) = (get for get in self.read.gets() if get[0] == number)
        data = self.bytes_at(found[1], found[2]) if outcome == "done" else b""
        self.read.finish(number, outcome, data)

    def step(self, now_s: float = 0.0) -> None:
        """Ends what is outstanding, in order."""
        for number, _, _ in self.read.gets():
            self.finish(number)
        self.read.advance(now_s)

    def right(self) -> bool:
        length = self.size_bytes - self.skip_bytes
        return self.read.memory == self.bytes_at(ADDRESS + HEADER + self.skip_bytes, length)


def test_header_data_header() -> None:
    peer = Peer(5 * PIECE + 3)
    peer.read.advance(0.0)
    assert [get[1:] for get in peer.read.gets()] == [(ADDRESS, HEADER)]
    peer.step()
    assert len(peer.read.gets()) == AHEAD
    assert peer.read.arrived == 0
    peer.step()
    assert peer.read.arrived == AHEAD * PIECE
    peer.step()
    assert peer.read.arrived == 5 * PIECE + 3
    assert [get[1:] for get in peer.read.gets()] == [(ADDRESS, HEADER)]
    assert peer.read.ended is None
    peer.step()
    assert peer.read.ended == ("OK", "")
    assert peer.right()
    assert (peer.read.opens, peer.read.breaks, peer.read.memories) == (1, 0, 0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_generation_is_found_before_and_after(when: str) -> None:
    peer = Peer(100)
    if when == "before":
        peer.generation = 8
    peer.read.advance(0.0)
    peer.step()
    if when == "after":
        assert peer.read.ended is None
        peer.generation = 8
        peer.step()
        peer.step()
    assert peer.read.ended is not None
    assert peer.read.ended[0] == "NOT_FOUND"
    assert peer.read.memories == 0


@pytest.mark.parametrize(
    ("when", "ends"), [("before", "FAILED_PRECONDITION"), ("after", "NOT_FOUND")]
)
def test_another_size_is_no_reason_to_go_on_once_data_have_come(when: str, ends: str) -> None:
    """The first says that the slot may be read in another way."""
    peer = Peer(100)
    peer.read.advance(0.0)
    if when == "after":
        peer.step()
        peer.step()
        assert peer.read.arrived == 100
    peer.size_bytes = 99
    peer.step()
    assert peer.read.ended is not None
    assert peer.read.ended[0] == ends


def test_pieces_that_come_in_another_order_are_told_without_gaps() -> None:
    peer = Peer(4 * PIECE)
    peer.read.advance(0.0)
    peer.step()
    numbers = [get[0] for get in peer.read.gets()]
    seen = []
    for index in (2, 0, 3, 1):
        peer.finish(numbers[index])
        peer.read.advance(0.0)
        seen.append(peer.read.arrived // PIECE)
    assert seen == [0, 1, 1, 4]


def test_the_deadline_breaks_the_endpoint_and_waits_for_what_is_outstanding() -> None:
    peer = Peer(4 * PIECE, timeout_s=2.0)
    peer.read.advance(0.0)
    peer.step()
    assert peer.read.next_s == 2.0
    peer.read.advance(1.9)
    assert peer.read.breaks == 0
    peer.read.advance(2.0)
    assert peer.read.breaks == 1
    assert peer.read.ended is None  # the memory is still written to
    assert not peer.read.stuck(6.9)
    assert peer.read.stuck(7.1)
    for number, _, _ in peer.read.gets():
        peer.finish(number, "broken")
        peer.read.advance(2.1)
    assert peer.read.ended is not None
    assert peer.read.ended[0] == "DEADLINE_EXCEEDED"
    assert peer.read.breaks == 1


def test_a_read_broken_for_anothers_sake_goes_on_from_what_it_has_once() -> None:
    peer = Peer(6 * PIECE)
    peer.read.advance(0.0)
    peer.step()
    first, *others = [get[0] for get in peer.read.gets()]
    peer.finish(first)
    for number in others:
        peer.finish(number, "broken")
    peer.read.advance(0.1)
    assert peer.read.ended is None
    assert peer.read.arrived == PIECE
    peer.read.advance(0.1)
    assert peer.read.opens == 2
    assert [get[1] for get in peer.read.gets()] == [ADDRESS]  # the header is read again
    peer.step()
    assert min(get[1] for get in peer.read.gets()) == ADDRESS + HEADER + PIECE
    for number, _, _ in peer.read.gets():
        peer.finish(number, "broken")
    peer.read.advance(0.2)
    assert peer.read.ended is not None
    assert peer.read.ended[0] == "UNAVAILABLE"


def test_a_cancelled_read_asks_for_nothing_more_and_breaks_nothing_at_first() -> None:
    peer = Peer(8 * PIECE, timeout_s=100.0)
    peer.read.advance(0.0)
    peer.step()
    peer.read.cancel(1.0)
    peer.read.advance(1.0)
    assert peer.read.ended is None
    assert len(peer.read.gets()) == AHEAD
    assert peer.read.next_s == 3.0
    peer.read.advance(3.0)
    assert peer.read.breaks == 1
    for number, _, _ in peer.read.gets():
        peer.finish(number, "broken")
    peer.read.advance(3.0)
    assert peer.read.ended is not None
    assert peer.read.ended[0] == "CANCELLED"


def test_no_way_there_is_an_error_at_once() -> None:
    peer = Peer(100)
    peer.read.refuse_opening()
    peer.read.advance(0.0)
    assert peer.read.ended == ("FAILED_PRECONDITION", "scripted: no way")


@pytest.mark.parametrize(
    "request_fields",
    [
        {"size_bytes": 10, "skip_bytes": 10},
        {"address": (1 << 64) - 70},
        {"generation": 0},
        {"timeout_s": 0.0},
    ],
)
def test_requests_that_make_no_sense_are_refused(request_fields: dict[str, float]) -> None:
    fields = {
        "address": ADDRESS,
        "generation": 1,
        "size_bytes": 100,
        "skip_bytes": 0,
        "timeout_s": 1.0,
        "now_s": 0.0,
    }
    with pytest.raises(_testing.StatusError, match="INVALID_ARGUMENT"):
        _testing.ScriptedRead(**(fields | request_fields))


@settings(max_examples=examples(60), deadline=None)
@given(st.data())
def test_every_course_ends_once_with_nothing_outstanding(data: st.DataObject) -> None:
    pieces = data.draw(st.integers(1, 6))
    size = (pieces - 1) * PIECE + data.draw(st.sampled_from([1, 10, PIECE]))
    skip = data.draw(st.sampled_from([0, min(size - 1, 1), min(size - 1, 1500)]))
    peer = Peer(size, skip, timeout_s=5.0)
    now_s, arrived, changed, cancelled, failures = 0.0, 0, False, False, 0
    for _ in range(200):
        peer.read.advance(now_s)
        assert peer.read.arrived >= arrived
        arrived = peer.read.arrived
        if peer.read.ended is not None:
            break
        gets = peer.read.gets()
        assert len(gets) <= AHEAD
        action = data.draw(
            st.sampled_from(["done"] * 12 + ["fail", "broken", "wait", "other", "cancel"])
        )
        if action == "wait":
            now_s += 1.0
        elif action == "other":
            peer.generation, changed = 8, True
        elif action == "cancel" and not cancelled:
            peer.read.cancel(now_s)
            cancelled = True
        elif gets and action in ("done", "fail", "broken"):
            failures += action != "done"
            peer.finish(data.draw(st.sampled_from(gets))[0], action)
    else:
        now_s += 100.0
        peer.read.advance(now_s)
        for number, _, _ in peer.read.gets():
            peer.finish(number, "broken")
        peer.read.advance(now_s)
    assert peer.read.ended is not None
    assert peer.read.gets() == []
    assert peer.read.memories == 0
    code, _ = peer.read.ended
    if code == "OK":
        assert peer.right()
        assert peer.read.arrived == size - skip
        assert not cancelled
    elif code == "NOT_FOUND":
        assert changed
    elif code == "CANCELLED":
        assert cancelled
    elif code == "DEADLINE_EXCEEDED":
        assert now_s >= 5.0
    else:
        assert code == "UNAVAILABLE"
        assert failures
    before = peer.read.ended
    peer.read.advance(now_s + 50)
    assert peer.read.ended == before
