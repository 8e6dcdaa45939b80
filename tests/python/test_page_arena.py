"""PageArena against a plain Python model: no page is lost or handed out twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve._testing import PageArena, PageUse, StatusError

PAGES = 16


@given(st.lists(st.tuples(st.booleans(), st.integers(0, PAGES + 2), st.booleans()), max_size=60))
def test_any_sequence_of_calls_keeps_the_books(calls: list[tuple[bool, int, bool]]) -> None:
    arena = PageArena(4096, PAGES)
    held: dict[int, PageUse] = {}
    for allocate, n, kv in calls:
        use = PageUse.KV if kv else PageUse.ADAPTER
        if allocate and n > PAGES - len(held):
            with pytest.raises(StatusError, match="pages: asked for"):
                arena.allocate(n, use)
        elif allocate:
            pages = arena.allocate(n, use)
            assert len(set(pages)) == n
            assert not held.keys() & set(pages)
            held |= dict.fromkeys(pages, use)
        else:
            back = list(held)[:n]
            arena.free(back)
            for page in back:
                del held[page]
        for use in (PageUse.KV, PageUse.ADAPTER):
            assert arena.count(use) == sum(u == use for u in held.values())
        assert arena.count(PageUse.FREE) == PAGES - len(held)


@pytest.mark.parametrize("bad", [[0, 0], [0, 1, 5], [0, 99]])
def test_a_refused_free_changes_nothing(bad: list[int]) -> None:
    arena = PageArena(4096, 8)
    first = arena.allocate(2, PageUse.KV)
    assert sorted(first) == [0, 1]
    with pytest.raises(StatusError, match="pages: page"):
        arena.free(bad)
    assert arena.count(PageUse.KV) == 2
    assert arena.count(PageUse.FREE) == 6
    arena.free(first)
    assert sorted(arena.allocate(8, PageUse.ADAPTER)) == list(range(8))


@pytest.mark.parametrize(
    ("page_bytes", "field"), [(0, "page_bytes"), (63, "page_bytes"), (96, "page_bytes")]
)
def test_a_bad_page_size_is_named(page_bytes: int, field: str) -> None:
    with pytest.raises(StatusError, match=field):
        PageArena(page_bytes, 4)
    with pytest.raises(StatusError, match="num_pages"):
        PageArena(4096, 0)


def test_offsets_do_not_wrap_past_4_gib() -> None:
    assert PageArena(1 << 21, 4096).offset(4095) == 4095 << 21
