"""Module patterns match what PEFT's `re` matches, in bounded time."""

import contextlib
import re
import time

import numpy as np
import pytest
from fuzz_budget import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.checkpoint.module_pattern import MatchBudget, ModulePattern
from loraserve.checkpoint.peft_adapter import read_arrays
from loraserve.errors import InvalidCheckpointError, UnsupportedError

STEM = "base_model.model.model.layers"
Q_PROJ = f"{STEM}.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "((.*)*)*x", "(.|.|.)*(.|.)*(.?){99}z", "(.*.*.*)*y"]
)
def test_catastrophic_patterns_cost_little(pattern: str) -> None:
    ones = {"A": np.ones((2, 6), np.float32), "B": np.ones((4, 2), np.float32)}
    arrays = {
        f"{STEM}.{layer}.mlp.up_proj.lora_{side}.weight": array
        for layer in range(40)
        for side, array in ones.items()
    }
    start = time.thread_time()
    # Answered or given up, it is soon; re.match would outlive us. In the thread's own time: it is
    # no matter of what else the machine does.
    with contextlib.suppress(UnsupportedError):
        assert len(read_arrays(arrays, {"r": 2, "rank_pattern": {pattern: 3}}).modules) == 40
    assert time.thread_time() - start < 60


def test_a_hostile_pattern_is_stopped_by_the_budget() -> None:
    pattern = ModulePattern("rank_pattern", "(((((((.?){255}){255}){255}){255}){255}){255}x){255}z")
    budget = MatchBudget("rank_pattern", 20_000)
    with pytest.raises(UnsupportedError, match=r"^rank_pattern: .*too long"):
        [pattern.matches_suffix("model.layers.0.mlp.up_proj", budget) for _ in range(10_000)]


ATOMS = st.sampled_from(
    [*"abq_", ".", r"\.", r"\d", r"\w", r"\W", "[ab]", "[^q]", "[a-q_]", r"[\d.]", "1", "^", "$"]
)
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,}", "{0,2}", "*?"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=examples(400), deadline=None)
@given(PATTERNS, st.text("abq_.1", max_size=7))
def test_patterns_match_exactly_what_re_matches(pattern: str, name: str) -> None:
    budget = MatchBudget("pattern")
    ours = ModulePattern("pattern", pattern)
    expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
    assert ours.matches_suffix(name, budget) is expected
    assert ours.matches_whole(name, budget) is (re.fullmatch(pattern, name) is not None)


# The oracle warns of sets like [a||], which may mean something else one day.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@settings(max_examples=examples(300), deadline=None)
@given(st.text(r"ab(|)[]^-$*+?{},1\d.", max_size=12))
def test_any_pattern_text_is_answered_as_re_does_or_refused(pattern: str) -> None:
    try:
        ours = ModulePattern("pattern", pattern)
    except (InvalidCheckpointError, UnsupportedError):
        return
    for name in ("ab", "a.b", "1a.ab", ""):
        expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
        assert ours.matches_suffix(name, MatchBudget("pattern")) is expected
