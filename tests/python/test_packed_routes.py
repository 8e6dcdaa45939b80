"""Routes as bytes: what goes in comes out, older versions stay as they were, and it is small."""

import gc
import hashlib
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.client.packed_routes import CACHED_NAMES, PackedRoutes
from loraserve.client.routes import AdapterRoute, Holder, RevisionRoute
from loraserve.placement.types import AdapterId

DIGITS = [hashlib.sha256(bytes([i])).hexdigest() for i in range(3)]
revisions = st.sampled_from([*DIGITS, DIGITS[0].upper(), "r1", "", "é" * 40])
words = st.sampled_from(["a", "b", "aa", "tenant-1", "\x01a\x00"])
counts = st.integers(0, 2**64 - 1)

holder_lists = st.lists(st.builds(Holder, words, counts, st.integers(0, 7)), max_size=3).map(tuple)
routes = st.builds(
    AdapterRoute,
    st.builds(AdapterId, words, words, words),
    revisions,
    st.lists(st.builds(RevisionRoute, revisions, holder_lists, counts, counts), max_size=2).map(
        tuple
    ),
    st.sampled_from(["", "loading on n1", "ü" * 200]),
)
changes = st.lists(st.one_of(routes, st.builds(AdapterId, words, words, words)), max_size=6)


@settings(max_examples=200, deadline=None)
@given(st.lists(changes, max_size=6))
def test_it_is_a_mapping_that_is_never_changed(steps: list[list[AdapterRoute | AdapterId]]) -> None:
    packed, plain = PackedRoutes(), dict[AdapterId, AdapterRoute]()
    versions = [(packed, dict(plain))]
    for step in steps:
        removed = [x for x in step if isinstance(x, AdapterId)]
        put = [x for x in step if isinstance(x, AdapterRoute)]
        packed = packed.changed(put, removed)
        for adapter in removed:
            plain.pop(adapter, None)
        plain.update((route.adapter, route) for route in put)
        versions.append((packed, dict(plain)))
    for made, meant in versions:
        assert len(made) == len(meant)
        assert dict(made) == meant
        assert made == meant
        for name in {a.name for a in meant} | {"a"}:
            named = {r.adapter: r for r in made.named(name)}
            assert named == {a: r for a, r in meant.items() if a.name == name}
        assert AdapterId("a", "a", "nobody") not in made


def test_what_is_not_there_is_a_key_error() -> None:
    packed = PackedRoutes()
    with pytest.raises(KeyError):
        packed[AdapterId("t", "base", "sql")]
    assert "sql" not in packed


def test_the_cache_of_names_is_bounded_and_never_stale() -> None:
    def route(name: str, revision: str) -> AdapterRoute:
        return AdapterRoute(AdapterId("t", "base", name), revision)

    names = [f"n{i}" for i in range(2 * CACHED_NAMES)]
    first = PackedRoutes(route(n, "r1") for n in names)
    for name in names:
        assert first.named(name) == [route(name, "r1")]
    assert len(first._cache) <= CACHED_NAMES
    second = first.changed([route(names[-1], "r2")])
    assert second.named(names[-1]) == [route(names[-1], "r2")]
    assert first.named(names[-1]) == [route(names[-1], "r1")]


def test_a_route_that_is_too_long_is_refused() -> None:
    adapter = AdapterId("t", "base", "sql")
    with pytest.raises(ValueError, match="takes"):
        PackedRoutes([AdapterRoute(adapter, "r", (), "x" * 70_000)])
    with pytest.raises(ValueError, match="bytes must be in range"):
        PackedRoutes([AdapterRoute(AdapterId("t", "base", "n" * 300), "r")])


def test_a_hundred_thousand_adapters_take_less_than_ten_megabytes() -> None:
    """Measured with a tenth of them: the table grows evenly but for its empty shards."""
    count = 10_000
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        packed = PackedRoutes()
        for begin in range(0, count, 1000):
            packed = packed.changed(map(long_route, range(begin, begin + 1000)))
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(packed) == count
    empty = 4096 * (8 + 64)
    assert 10 * (held - empty) + empty < 10e6, held


def long_route(i: int) -> AdapterRoute:
    revision = hashlib.sha256(str(i).encode()).hexdigest()
    held = tuple(Holder(f"node-{(i + k) % 1000:04d}", 50, 4) for k in range(2))
    return AdapterRoute(
        AdapterId(f"tenant-{i % 500:03d}", "llama-3.1-8b", f"customer-adapter-{i:06d}"),
        revision,
        (RevisionRoute(revision, held, 16, 160 << 20),),
    )
