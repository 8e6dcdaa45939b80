"""The record of an answer: each token once, whatever the nodes send, and what goes on from it."""

import pytest
from answer_logs import REVISION, begun, half, log, of_prompt, refused, says, taken
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.client.types import Chunk
from loraserve.errors import UnavailableError
from loraserve.v1.inference_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    GenerateStart,
    PositionLogprobs,
    TokenLogprob,
    Usage,
)


def test_logprobs_of_a_prompt_come_with_the_first_token() -> None:
    made = log(prompt=[1, 2, 3, 4], sampling={"prompt_logprobs": True})
    assert made.request(0, None).sampling.prompt_logprobs
    start = begun(prompt_tokens=4)
    assert not taken(made, says(0, [], start=start, prompt_logprobs=of_prompt(-1.0, -2.0)))
    # The node is lost before the first token: the next one tells all of them again.
    assert made.request(1, None).sampling.prompt_logprobs
    taken(made, says(0, [], start=start, prompt_logprobs=of_prompt(-1.0)))
    (chunk,) = taken(made, says(0, [10], prompt_logprobs=of_prompt(-2.0, -4.0)))
    assert chunk.prompt_logprobs == [None, -1.0, -2.0, -4.0]
    assert chunk.prompt_top_logprobs == [None, {7: -0.5}, {7: -1.0}, {7: -2.0}]
    # Lost after it: they are not asked for again, and what comes again does not count.
    assert not made.request(2, None).sampling.prompt_logprobs
    (chunk,) = taken(
        made,
        says(1, [11], "x", start=start, finish_reason=FINISH_REASON_LENGTH, prompt_logprobs=[]),
    )
    assert chunk.prompt_logprobs is None
    assert made.completion(3).prompt_logprobs == [None, -1.0, -2.0, -4.0]


def test_logprobs_of_a_prompt_that_do_not_all_come_are_a_lost_stream() -> None:
    made = log(prompt=[1, 2, 3], sampling={"prompt_logprobs": True})
    made.request(0, None)
    start = begun(prompt_tokens=3)
    with pytest.raises(UnavailableError, match="1 logprobs for a prompt of 3 tokens"):
        made.accept(says(0, [10], start=start, prompt_logprobs=of_prompt(-1.0)))
    assert not made.started


def test_an_answer_from_one_node() -> None:
    made = log()
    chunks = taken(
        made,
        says(0, [10], start=begun(), attempt=0),
        says(1, [11, 12]),
        says(3, [], "", usage=Usage(prompt_tokens=2)),
        says(3, [13], "end", finish_reason=FINISH_REASON_LENGTH, usage=Usage(queue_time_us=5000)),
    )
    assert [(c.first_index, c.token_ids, c.text) for c in chunks] == [
        (0, [10], "<10>"),
        (1, [11, 12], "<11><12>"),
        (3, [13], "end"),
    ]
    assert [c.finish_reason for c in chunks] == [None, None, "length"]
    done = made.completion(1)
    assert (done.token_ids, done.text) == ([10, 11, 12, 13], "<10><11><12>end")
    assert (done.finish_reason, done.stop_reason) == ("length", None)
    assert (done.revision, done.seed, done.node_id) == (REVISION, 77, "n1")
    assert (done.prompt_tokens, done.attempts, done.queue_time_s) == (2, 1, 0.005)


@pytest.mark.parametrize(
    ("usage", "stop_reason"),
    [
        (Usage(stop_string="END"), "END"),
        (Usage(stop_token_id=0), 0),
        (Usage(), None),
    ],
)
def test_what_stopped_an_answer_is_told(usage: Usage, stop_reason: str | int | None) -> None:
    made = log()
    last = says(0, [10], start=begun(), finish_reason=FINISH_REASON_STOP, usage=usage)
    (chunk,) = taken(made, last)
    assert (chunk.finish_reason, chunk.stop_reason) == ("stop", stop_reason)
    assert made.completion(1).stop_reason == stop_reason


def test_an_aborted_answer_ends_without_a_token_more() -> None:
    made = log()
    end = says(1, [], "", finish_reason=FINISH_REASON_CANCELLED)
    chunks = taken(made, says(0, [10], start=begun()), end)
    assert (chunks[1].token_ids, chunks[1].finish_reason) == ([], "cancelled")


def test_held_back_text_comes_without_a_token() -> None:
    made = log()
    chunks = taken(made, says(0, [10], "", start=begun()), says(1, [], "x"))
    assert [(c.first_index, c.token_ids, c.text) for c in chunks] == [(0, [10], ""), (1, [], "x")]


def test_logprobs_belong_to_their_tokens() -> None:
    made = log(sampling={"logprobs": 1})

    def position(value: float) -> PositionLogprobs:
        return PositionLogprobs(logprob=value, top=[TokenLogprob(token_id=5, logprob=-0.25)])

    one = says(0, [10], start=begun(), logprobs=[position(-1.0)])
    more = says(0, [10, 11], "", logprobs=[position(-1.0), position(-2.0)])
    chunks = taken(made, one, more)
    assert [c.logprobs for c in chunks] == [[-1.0], [-2.0]]
    assert [c.top_logprobs for c in chunks] == [[{5: -0.25}], [{5: -0.25}]]
    assert made.completion(1).logprobs == [-1.0, -2.0]
    assert made.completion(1).top_logprobs == [{5: -0.25}] * 2
    refused(made, says(2, [12]), "0 logprobs for 1 tokens")
    refused(made, says(2, [12], logprobs=[position(-1.0)] * 2), "2 logprobs for 1 tokens")


# What nodes may send that is no continuation


def test_tokens_that_are_here_are_dropped_with_their_text() -> None:
    made = half()
    chunks = taken(
        made,
        says(0, [10], start=begun(node_id="n2")),
        says(1, [11]),
        says(1, [11, 12], ""),
        says(3, [13], attempt=1),
    )
    assert [(c.first_index, c.token_ids, c.text) for c in chunks] == [
        (2, [12], ""),
        (3, [13], "<13>"),
    ]
    assert [(c.node_id, c.attempt) for c in chunks] == [("n2", 0), ("n2", 1)]
    assert made.completion(2).text == "<10><11><13>"


def test_text_of_old_and_new_tokens_cannot_be_told_apart() -> None:
    refused(half(), says(1, [11, 12], start=begun()), "cannot be told apart")


def test_repeated_tokens_must_be_those_that_are_here() -> None:
    refused(half(), says(0, [10, 99], start=begun()), "another answer")
    refused(half(), says(1, [10], "", start=begun()), "another answer")


def test_an_answer_cannot_end_before_what_is_here() -> None:
    early = says(0, [10], start=begun(), finish_reason=FINISH_REASON_STOP)
    refused(half(), early, "ends after 1 tokens, but 2")
    empty = says(0, [], "", start=begun(), finish_reason=FINISH_REASON_STOP)
    refused(half(), empty, "ends after 0 tokens")
    made = half()
    exact = says(0, [10, 11], "", start=begun(), finish_reason=FINISH_REASON_STOP)
    assert [c.finish_reason for c in taken(made, exact)] == ["stop"]


def test_a_gap_is_refused() -> None:
    refused(half(), says(3, [13], start=begun()), "tokens 2 to 2 are missing")
    refused(log(), says(5, [13], start=begun()), "tokens 0 to 4 are missing")
    # Even one that brings nothing: what ended there is not this answer.
    end = says(3, [], "", start=begun(), finish_reason=FINISH_REASON_LENGTH)
    refused(half(), end, "missing")


def test_every_attempt_must_say_what_serves_it() -> None:
    refused(log(), says(0, [10]), "does not say what serves")
    refused(half(), says(2, [12]), "does not say what serves")
    made = half()
    assert taken(made, says(2, [12], start=begun()), says(3, [13]))


@pytest.mark.parametrize(
    ("start", "match"),
    [
        (begun(revision="b" * 64), "another revision"),
        (begun(revision=""), "another revision"),
        (begun(base={"name": "tiny", "digest": "d2"}), "another revision or base"),
        (begun(prompt_tokens=3), "tokenizes the prompt differently"),
    ],
)
def test_another_answer_cannot_go_on(start: GenerateStart, match: str) -> None:
    refused(half(), says(2, [12], start=start), match)


def test_before_the_first_token_any_revision_may_answer() -> None:
    made = log()
    assert taken(made, says(0, [], "", start=begun(revision="b" * 64, seed=1))) == []
    made.request(1, None)
    taken(made, says(0, [10], start=begun()))
    assert made.revision == REVISION
    assert (made.completion(2).seed, made.prompt_tokens) == (77, 2)


def test_a_node_that_does_not_know_its_digest_may_go_on() -> None:
    made = half()
    assert taken(made, says(2, [12], start=begun(base={"name": "tiny"})))
    assert made.completion(2).node_id == "n1"


# Whatever happens on the way


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_cuts_and_repeats_join_to_the_answer(data: st.DataObject) -> None:
    """Nodes that send the same answer in any pieces, lost anywhere, some of them repeating."""
    answer = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
    made = log(max_tokens=len(answer))
    chunks: list[Chunk] = []
    attempt = 0
    while made.finish_reason is None:
        request = made.request(attempt, None)
        assert list(request.emitted_token_ids) == answer[: request.start_index]
        at = max(0, request.start_index - data.draw(st.integers(0, 2)))
        start: GenerateStart | None = begun(node_id=f"n{attempt}")
        for size in data.draw(st.lists(st.integers(1, 4), max_size=3)) or [len(answer)]:
            if at < request.start_index:
                size = min(size, request.start_index - at)
            ids = answer[at : at + size]
            at += len(ids)
            end = FINISH_REASON_LENGTH if at == len(answer) else 0
            chunks += taken(made, says(at - len(ids), ids, start=start, finish_reason=end))
            start = None
            if made.finish_reason is not None:
                break
        attempt += 1
    assert made.token_ids == answer == [i for c in chunks for i in c.token_ids]
    assert made.completion(attempt).text == "".join(f"<{i}>" for i in answer)
    assert "".join(c.text for c in chunks) == made.completion(attempt).text
    ends = [c.first_index + len(c.token_ids) for c in chunks]
    assert [c.first_index for c in chunks] == [0, *ends[:-1]]
