"""The CUDA work list: each token, rank, input and output once, and waits behind work."""

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve import _testing

GROUPS = [0, 0, 0, 1, 2, 2, 3]  # of each module: q k v, o, gate up, down

SIZES = st.sampled_from([8, 48, 256, 257, 896, 1024, 1025, 4096, 11008])
MODULE = st.one_of(
    st.just((0, 0, 0)),
    st.tuples(st.one_of(st.integers(1, 40), st.integers(1, 512)), SIZES, SIZES),
)
SHAPES = st.lists(MODULE, min_size=7, max_size=7)


@st.composite
def segments(draw: st.DrawFn) -> list[tuple[int, int, list[tuple[int, int, int]]]]:
    out = []
    row = 0
    for _ in range(draw(st.integers(0, 12))):
        row += draw(st.integers(0, 3))  # rows of the base model
        count = draw(st.one_of(st.integers(1, 9), st.integers(1, 300)))
        out.append((row, count, draw(SHAPES)))
        row += count
    return out


def intervals_tile(found: list[tuple[int, int]], size: int) -> bool:
    """Whether they cover [0, size) once, and reach past it with none but the last."""
    found = sorted(found)
    ends = [0, *(end for _, end in found)]
    starts_meet = all(begin == end for (begin, _), end in zip(found, ends, strict=False))
    return bool(found) and starts_meet and found[-1][0] < size <= found[-1][1]


@settings(max_examples=150, deadline=None)
@given(segments())
def test_every_part_of_the_work_is_listed_once(
    given_segments: list[tuple[int, int, list[tuple[int, int, int]]]],
) -> None:
    units, h, h_floats = _testing.plan_lora_units(given_segments)
    shrink = defaultdict(list)  # by (row begin, row count, module)
    expand = defaultdict(list)
    runs = defaultdict(set)  # of each (segment, module)
    started_waiting: set[int] = set()
    for group, is_expand, entry, row, count, module, span in units:
        assert GROUPS[module] == group
        if is_expand:
            started_waiting.add(group)
            expand[row, count, module].append(tuple(span[3:]))
        else:
            assert group not in started_waiting  # an expand unit waits for earlier tickets only
            shrink[row, count, module].append((span[0], tuple(span[1:3]), tuple(span[3:])))
        assert 0 <= entry < len(h)
    for row, count, module in shrink:
        (owner,) = (i for i, (begin, n, _) in enumerate(given_segments) if begin <= row < begin + n)
        begin, rows, shapes = given_segments[owner]
        assert row + count <= begin + rows
        runs[owner, module].add((row - begin, row - begin + count))
        rank, inputs, outputs = shapes[module]
        by_ranks = defaultdict(list)
        splits = {}
        for split, ranks, columns in shrink[row, count, module]:
            by_ranks[ranks].append(columns)
            assert splits.setdefault(split, columns) == columns  # one part of the inputs each
        assert intervals_tile(list(by_ranks), rank)
        assert all(intervals_tile(columns, inputs) for columns in by_ranks.values())
        assert intervals_tile(expand[row, count, module], outputs)
    assert set(shrink) == set(expand)
    wanted = {
        (i, m)
        for i, (_, _, shapes) in enumerate(given_segments)
        for m, (rank, _, _) in enumerate(shapes)
        if rank > 0
    }
    assert set(runs) == wanted
    for (owner, _), own in runs.items():
        assert intervals_tile(list(own), given_segments[owner][1])
        assert max(end for _, end in own) == given_segments[owner][1]
    # The partial sums of entries lie apart.
    assert sum(end - begin for begin, end in h) == h_floats
    assert sorted(h) == [
        (begin, end) for begin, end in sorted(h) if begin % 16 == 0 and 0 <= begin < end <= h_floats
    ]
    assert all(a[1] <= b[0] for a, b in zip(sorted(h), sorted(h)[1:], strict=False))


def test_no_adapter_no_work() -> None:
    assert _testing.plan_lora_units([]) == ([], [], 0)
    assert _testing.plan_lora_units([(0, 5, [(0, 0, 0)] * 7)]) == ([], [], 0)


def test_a_tile_holds_each_element_once() -> None:
    for index in (_testing.a_tile_index, _testing.b_tile_index):
        found = {index(rank, column) for rank in range(8) for column in range(256)}
        assert found == set(range(2048))
