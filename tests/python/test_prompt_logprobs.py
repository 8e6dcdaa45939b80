"""Log-probabilities of prompts over the wire: those of the engine, whole, whatever their number."""

from pathlib import Path

import pytest
from demo_node import serving_demo
from fake_node import FakeEngine, serving
from node_calls import answers, refused, run

from loraserve import Engine, EngineConfig
from loraserve.client import AsyncClient
from loraserve.demo import MODEL_DIRECTORY, adapter_directory
from loraserve.node import answer
from loraserve.sampling_params import SamplingParams

PROMPT = "stressed=" * 9
PARAMS = SamplingParams(max_tokens=3, temperature=0.0, logprobs=4, prompt_logprobs=True)


@pytest.mark.parametrize("multiplex", [False, True])
@pytest.mark.parametrize("part", [3, 1024])
def test_they_are_those_of_the_engine(
    multiplex: bool, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "_PROMPT_LOGPROBS_PART", part)
    with Engine(EngineConfig(model=str(MODEL_DIRECTORY), threads=1)) as engine:
        engine.load_adapter("reverse", adapter_directory("reverse"))
        (right,) = engine.generate([PROMPT], PARAMS, adapters=["reverse"])
    assert right.prompt_logprobs is not None
    assert right.prompt_top_logprobs is not None
    assert len(right.prompt_logprobs) == len(right.prompt_top_logprobs) == right.prompt_tokens
    assert {len(top) for top in right.prompt_top_logprobs[1:] if top} == {4}

    async def test() -> None:
        async with (
            serving_demo("reverse") as (server, _),
            AsyncClient(nodes=[server.address], multiplex=multiplex) as client,
        ):
            got = await client.generate(PROMPT, PARAMS, adapter="reverse")
            assert got.prompt_logprobs == right.prompt_logprobs
            assert got.prompt_top_logprobs == right.prompt_top_logprobs
            assert got.logprobs == right.logprobs
            plain = SamplingParams(max_tokens=3, temperature=0.0)
            assert (await client.generate(PROMPT, plain)).prompt_logprobs is None

    run(test)


def test_a_request_that_goes_on_does_not_get_them_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(FakeEngine()) as (_, channel):
            sampling = {"max_tokens": 5, "prompt_logprobs": True}
            going_on = {"start_index": 2, "emitted_token_ids": [9, 9], "sampling": sampling}
            error = await refused(answers(channel, **going_on))
            assert (error.code, error.field) == ("INVALID_ARGUMENT", "prompt_logprobs")

    run(test)
