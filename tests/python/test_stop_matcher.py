"""Stop strings against a naive search of the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.errors import InvalidArgumentError
from loraserve.text.stop_matcher import MAX_STOP_CHARACTERS, MAX_STOPS, StopMatcher


def _oracle(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The stop that ends first, the longest of those; by brute force."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


_SHORT = st.text("ab\n", min_size=1, max_size=5)


@settings(max_examples=500, deadline=None)
@given(
    stops=st.lists(_SHORT, max_size=4),
    pieces=st.lists(st.text("ab\n", max_size=6), max_size=8),
)
def test_equals_the_naive_search(stops: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(stops)
    text = "".join(pieces)
    want, want_stop = _oracle(text, stops)
    out, matched = "", None
    for i, piece in enumerate(pieces):
        result = matcher.push(piece)
        out += result.emit
        # Whatever comes next, what is out stays right.
        assert _oracle("".join(pieces[: i + 1]), stops)[0].startswith(out)
        matched = matched or result.matched
        assert result.matched == matched
    assert matched == want_stop
    rest = matcher.finish()
    assert out + rest == want
    assert matched is None or rest == ""
    # Nothing is held back that cannot become a stop string.
    assert rest == "" or any(stop.startswith(rest) and stop != rest for stop in stops)


def test_text_that_may_become_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.push("go ST").emit == "go "
    assert matcher.push("AR S").emit == "STAR "
    result = matcher.push("TOP and more")
    assert (result.emit, result.matched) == ("", "STOP")
    result = matcher.push("never seen")
    assert (result.emit, result.matched) == ("", "STOP")
    assert matcher.finish() == ""


def test_the_stop_completed_first_wins() -> None:
    result = StopMatcher(["abcd", "c"]).push("xabcd")
    assert (result.emit, result.matched) == ("xab", "c")


def test_of_stops_completed_together_the_longest_wins() -> None:
    result = StopMatcher(["c", "bc"]).push("abc")
    assert (result.emit, result.matched) == ("a", "bc")


def test_finish_gives_what_was_held() -> None:
    matcher = StopMatcher(["\n\n"])
    assert matcher.push("a\n").emit == "a"
    assert matcher.finish() == "\n"
    assert matcher.finish() == ""


def test_no_stops_hold_nothing() -> None:
    assert StopMatcher([]).push("abc").emit == "abc"


@pytest.mark.parametrize(
    ("stops", "limit"),
    [
        (["x"] * (MAX_STOPS + 1), str(MAX_STOPS)),
        ([""], "0 characters"),
        (["x" * (MAX_STOP_CHARACTERS + 1)], str(MAX_STOP_CHARACTERS)),
        ("stop", "list"),
        ([1], "list"),
        (None, "list"),
    ],
)
def test_limits(stops: list[str], limit: str) -> None:
    with pytest.raises(InvalidArgumentError, match=limit) as caught:
        StopMatcher(stops)
    assert caught.value.field == "stop"


def test_the_largest_allowed_stops_work() -> None:
    stops = [chr(97 + i) * MAX_STOP_CHARACTERS for i in range(MAX_STOPS)]
    matcher = StopMatcher(stops)
    assert matcher.push("a" * 255 + "b").emit == "a" * 255
    assert matcher.push("b" * 255).matched == "b" * 256
