"""Which copies leave a host pool: the least worth, and no more of them than needed."""

import itertools

import pytest
from fuzz_budget import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.node.pool.eviction import Part, victims, worth


def arena(*pieces: tuple[str, int, float]) -> list[Part]:
    """(kind, length, worth): "." free, "#" stays, any other letter a copy that may go."""
    parts, offset = [], 0
    for number, (kind, length, value) in enumerate(pieces):
        if kind == ".":
            parts.append(Part(offset, length, free=True))
        elif kind != "#":
            parts.append(Part(offset, length, kind, (value, number)))
        offset += length
    return parts


def gone(parts: list[Part], need: int, free: int = 0) -> str | None:
    found = victims(parts, need, max(need, free))
    return None if found is None else "".join(str(part.key) for part in found)


def test_nothing_goes_where_there_is_room() -> None:
    assert gone(arena(("a", 4, 1), (".", 3, 0), ("#", 1, 0)), 3) == ""


def test_the_least_worth_goes_first() -> None:
    parts = arena(("a", 4, 3), ("#", 1, 0), ("b", 4, 1), ("#", 1, 0), ("c", 4, 2))
    assert gone(parts, 4) == "b"
    assert gone(parts, 4, free=5) == "bc"
    assert gone(parts, 5) is None


def test_among_equals_the_one_used_longest_ago_goes() -> None:
    parts = [Part(0, 4, "a", (1.0, 9)), Part(5, 4, "b", (1.0, 2)), Part(10, 4, "c", (1.0, 5))]
    assert gone(parts, 4) == "b"


def test_neighbours_go_together_where_one_piece_is_wanted() -> None:
    parts = arena(("a", 2, 9), ("b", 2, 1), ("c", 2, 8), ("#", 1, 0), ("d", 2, 2), (".", 2, 0))
    assert gone(parts, 2) == ""
    assert gone(parts, 4) == "d"  # with the free piece beside it; `b` alone is too small
    assert gone(parts, 6) == "bca"
    assert gone(parts, 7) is None


def test_copies_that_do_not_help_stay() -> None:
    # `a` and `b` are worth least, but only `c` and the gap beside it are long enough together.
    parts = arena(("a", 1, 1), ("#", 1, 0), ("b", 1, 2), ("#", 1, 0), ("c", 2, 3), (".", 2, 0))
    assert gone(parts, 4) == "c"


def test_worth_weighs_what_it_costs_to_come_back() -> None:
    near, far = 0.01, 1.0  # seconds from a peer, and from a store far away
    assert worth(0, near, 1000, 1) < worth(0, far, 1000, 1)
    assert worth(0, far, 1000, 1) < worth(0, far, 1000, 2)
    # The same seconds for fewer bytes: the large one frees more for the same price.
    assert worth(0, far, 100_000, 1) < worth(0, far, 1000, 1)
    # What was dear once is overtaken by what is used when the pool has aged.
    assert worth(0, far, 1000, 1) < worth(1e-3, near, 1000, 2)


PIECES = st.lists(
    st.tuples(st.sampled_from(".#abcdef"), st.integers(1, 5), st.integers(0, 3)),
    min_size=1,
    max_size=9,
)


def fits(parts: list[Part], taken: set[int], need: int, free: int) -> bool:
    covered = sorted((p.offset, p.length) for p in parts if p.free or p.offset in taken)
    longest = run = end = 0
    for offset, length in covered:
        run = run + length if offset == end else length
        end = offset + length
        longest = max(longest, run)
    return longest >= need and sum(n for _, n in covered) >= free


@settings(max_examples=examples(400), deadline=None)
@given(PIECES, st.integers(1, 14), st.integers(0, 20))
def test_it_finds_room_wherever_there_is_any(
    pieces: list[tuple[str, int, int]], need: int, free: int
) -> None:
    parts = arena(*((kind, length, float(value)) for kind, length, value in pieces))
    found = victims(parts, need, free)
    mine = [part for part in parts if part.key is not None]
    possible = fits(parts, {p.offset for p in mine}, need, free)
    assert (found is not None) == possible
    if found is None:
        return
    taken = {part.offset for part in found}
    assert len(taken) == len(found)
    assert fits(parts, taken, need, free)
    assert [p.worth for p in found] == sorted(p.worth for p in found)
    # None of them is worth more than the dearest of the k least worthy that are enough.
    order = sorted(mine, key=lambda p: p.worth)
    enough = next(
        k for k in itertools.count() if fits(parts, {p.offset for p in order[:k]}, need, free)
    )
    assert taken <= {p.offset for p in order[:enough]}


@pytest.mark.parametrize("copies", [2000])
def test_it_is_quick_for_many_copies(copies: int) -> None:
    parts = arena(*(("x", 4096, float(i * 7919 % copies)) for i in range(copies)))
    found = victims(parts, 64 * 4096, 64 * 4096)
    assert found is not None
    assert len(found) == 64
