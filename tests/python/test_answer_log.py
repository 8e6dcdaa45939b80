"""The record of an answer: each token once, whatever the nodes send, and what goes on from it."""

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.client.resume import AnswerLog
from loraserve.client.types import Chunk
from loraserve.errors import InvalidArgumentError, UnavailableError
from loraserve.sampling_params import SamplingParams
from loraserve.v1.inference_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    GenerateResponse,
    GenerateStart,
    PositionLogprobs,
    TokenLogprob,
    Usage,
)

REVISION = "a" * 64


def begun(**fields: Any) -> GenerateStart:
    about: dict[str, Any] = {
        "revision": REVISION,
        "base": {"name": "tiny", "digest": "d1"},
        "prompt_tokens": 2,
        "cached_prompt_tokens": 1,
        "seed": 77,
        "node_id": "n1",
    }
    return GenerateStart(**(about | fields))


def says(first: int, ids: list[int], text: str | None = None, **fields: Any) -> GenerateResponse:
    text = "".join(f"<{i}>" for i in ids) if text is None else text
    return GenerateResponse(request_id="r", first_index=first, token_ids=ids, text=text, **fields)


def log(max_tokens: int = 8, prompt: Any = (1, 2), **fields: Any) -> AnswerLog:
    params = SamplingParams(max_tokens=max_tokens, **fields.pop("sampling", {}))
    return AnswerLog("r", prompt, params, adapter="sql", **fields)


def taken(made: AnswerLog, *responses: GenerateResponse) -> list[Chunk]:
    chunks = (made.accept(response) for response in responses)
    return [chunk for chunk in chunks if chunk is not None]


def half() -> AnswerLog:
    """An answer of which two tokens are there and the node was lost."""
    made = log()
    taken(made, says(0, [10], start=begun()), says(1, [11]))
    made.request(1, None)
    return made


def refused(made: AnswerLog, response: GenerateResponse, match: str) -> None:
    """The response is refused, and what is here of the answer stays as it is."""
    before = copy.deepcopy(made.completion(1))
    with pytest.raises(UnavailableError, match=match) as caught:
        made.accept(response)
    assert caught.value.field == "stream"
    assert made.completion(1) == before or not made.started


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


# What is sent to go on


def test_a_first_request_carries_what_was_asked_for() -> None:
    made = AnswerLog(
        "r", "words", SamplingParams(max_tokens=4), adapter="sql", base="tiny", priority=-3
    )
    request = made.request(0, 2.5)
    assert (request.request_id, request.attempt, request.priority) == ("r", 0, -3)
    assert (request.adapter.name, request.adapter.base) == ("sql", "tiny")
    assert not request.adapter.HasField("revision")
    assert not request.sampling.HasField("seed")
    assert (request.text, request.sampling.max_tokens) == ("words", 4)
    assert (request.start_index, list(request.emitted_token_ids)) == (0, [])
    assert request.timeout.ToMicroseconds() == 2_500_000
    assert not made.request(0, None).HasField("timeout")
    # A moment is left: not the same as none, which would be refused, or forever.
    assert made.request(0, 1e-9).timeout.ToMicroseconds() == 1
    assert (made.base, made.revision, made.started) == ("tiny", None, False)


def test_a_request_that_goes_on_names_tokens_seed_revision_and_base() -> None:
    made = half()
    request = made.request(3, 1.0)
    assert (request.attempt, request.start_index) == (3, 2)
    assert list(request.emitted_token_ids) == [10, 11]
    assert list(request.token_ids.ids) == [1, 2]
    assert request.sampling.seed == 77
    assert request.sampling.max_tokens == 8  # of the whole answer
    assert (request.adapter.name, request.adapter.base) == ("sql", "tiny")
    assert request.adapter.revision == REVISION
    assert (made.base, made.revision, made.started) == ("tiny", REVISION, True)
    # The record is not the request: the next one has the next tokens.
    taken(made, says(2, [12], start=begun()))
    assert list(made.request(4, None).emitted_token_ids) == [10, 11, 12]


def test_a_seed_that_was_drawn_before_the_first_token_binds_nobody() -> None:
    made = log()
    taken(made, says(0, [], "", start=begun()))
    request = made.request(1, None)
    assert not request.sampling.HasField("seed")
    assert not request.adapter.HasField("revision")


def test_an_own_seed_and_revision_are_kept() -> None:
    made = log(sampling={"seed": -1}, revision="b" * 64)
    request = made.request(0, None)
    assert request.sampling.seed == 2**64 - 1
    assert request.adapter.revision == "b" * 64 == made.revision


def test_the_base_model_goes_on_as_the_base_model() -> None:
    made = AnswerLog("r", [1, 2], SamplingParams())
    taken(made, says(0, [10], start=begun(revision="")))
    request = made.request(1, None)
    assert (request.adapter.name, request.adapter.base) == ("", "tiny")
    assert not request.adapter.HasField("revision")
    assert made.revision is None
    assert made.completion(1).revision is None


def test_where_only_the_last_word_was_lost_the_answer_is_whole() -> None:
    made = log(max_tokens=2)
    taken(made, says(0, [10], start=begun()))
    assert made.finish_if_full(1) is None
    taken(made, says(1, [11]))
    assert made.finish_reason is None
    last = made.finish_if_full(3)
    assert last is not None
    assert (last.first_index, last.token_ids, last.text) == (2, [], "")
    assert (last.finish_reason, last.node_id, last.attempt) == ("length", "n1", 3)
    assert made.completion(1).finish_reason == made.finish_reason == "length"
    assert made.completion(1).cached_prompt_tokens == 1


def test_no_tokens_at_all_are_no_answer() -> None:
    assert log(max_tokens=0).finish_if_full(0) is None


def test_the_length_of_a_text_prompt_is_estimated_until_a_node_has_counted() -> None:
    made = log(prompt="é" * 20)
    assert made.prompt_tokens == 10
    assert log(prompt="x").prompt_tokens == 1
    taken(made, says(0, [], "", start=begun(prompt_tokens=7)))
    assert made.prompt_tokens == 7
    assert log(prompt=[1, 2, 3]).prompt_tokens == 3
    # None at all is a prompt too, for the node to refuse by its name.
    assert log(prompt=[]).request(0, None).WhichOneof("prompt") == "token_ids"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**32]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"priority": 2**31}, "priority"),
        ({"base": b"\xff"}, "base"),
        ({"adapter": 5}, "adapter"),
        ({"revision": 5}, "revision"),
        ({"request_id": "\udfff"}, "request_id"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": 2**32}, "top_k"),
        ({"logit_bias": {-1: 0.5}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"seed": "x"}, "seed"),
        ({"stop": ["\ud800"]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logprobs": -1}, "logprobs"),
        ({"ignore_eos": "x"}, "ignore_eos"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
    ],
)
def test_what_the_wire_cannot_carry_is_refused_by_field(fields: dict[str, Any], field: str) -> None:
    about: dict[str, Any] = {"request_id": "r", "prompt": [1], "adapter": "sql"}
    names = ("request_id", "prompt", "adapter", "base", "revision", "priority")
    about |= {k: v for k, v in fields.items() if k in names}
    params = SamplingParams(**{k: v for k, v in fields.items() if k not in names})
    with pytest.raises(InvalidArgumentError) as caught:
        AnswerLog(about.pop("request_id"), about.pop("prompt"), params, **about)
    assert caught.value.field == field


def test_sampling_fields_reach_the_wire() -> None:
    params = SamplingParams(
        7, 2, 0.5, 3, 0.25, 0.125, 1.5, 0.75, -0.5, {4: -1.0}, 9, "END", [6], True, 0
    )
    sent = AnswerLog("r", [1], params).request(0, None).sampling
    assert (sent.max_tokens, sent.min_tokens, sent.temperature, sent.top_k) == (7, 2, 0.5, 3)
    assert (sent.top_p, sent.min_p, sent.repetition_penalty) == (0.25, 0.125, 1.5)
    assert (sent.presence_penalty, sent.frequency_penalty) == (0.75, -0.5)
    assert (dict(sent.logit_bias), sent.seed, list(sent.stop)) == ({4: -1.0}, 9, ["END"])
    assert (list(sent.stop_token_ids), sent.ignore_eos) == ([6], True)
    assert sent.HasField("logprobs")
    assert not AnswerLog("r", [1], SamplingParams()).request(0, None).sampling.HasField("logprobs")


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
