"""What the record of an answer asks of the next node, and what the wire cannot carry."""

from typing import Any

import pytest
from answer_logs import REVISION, begun, half, log, says, taken

from loraserve.client.resume import AnswerLog
from loraserve.errors import InvalidArgumentError
from loraserve.sampling_params import SamplingParams

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
        ({"prompt_logprobs": "x"}, "prompt_logprobs"),
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
