"""The engine's log-probabilities and greedy tokens against transformers + PEFT."""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from oracle.adapters import ADAPTERS
from oracle.checkpoints import SPECS
from oracle.comparison import Comparison, compare
from oracle.store import OracleStore

from loraserve import Engine, EngineConfig, SamplingParams

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # nats, by weight dtype
# Around the edges of KV blocks (16), prefill chunks (64 here) and the Mistral window (21).
LENGTHS = (1, 2, 15, 16, 17, 21, 22, 64, 65, 130, 300)
ADAPTER_LENGTHS = (1, 37, 130)
TOP = 3


@dataclass(frozen=True)
class Case:
    """What one engine run is asked: prompts with their adapters, in one batch."""

    prompts: list[list[int]]
    adapters: list[str | None]


def make_case(vocab: int, seed: int) -> Case:
    rng = random.Random(seed)
    wanted: list[tuple[int, str | None]] = [(n, None) for n in LENGTHS]
    wanted += [(n, adapter) for adapter in ADAPTERS for n in ADAPTER_LENGTHS]
    wanted.append((300, rng.choice(list(ADAPTERS))))
    rng.shuffle(wanted)
    prompts = [[rng.randrange(vocab) for _ in range(n)] for n, _ in wanted]
    return Case(prompts, [adapter for _, adapter in wanted])


def run_and_compare(store: OracleStore, name: str, config: EngineConfig, weights: str) -> None:
    """Runs a case greedily on the engine and asserts all of it against the oracle."""
    tolerance = TOLERANCE[weights]
    reference = store.reference(name, weights)
    case = make_case(SPECS[name].vocab, seed=len(name))
    params = SamplingParams(
        max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=TOP, prompt_logprobs=True
    )
    with Engine(config) as engine:
        for loaded, directory in store.adapters(name).items():
            engine.load_adapter(loaded, directory)
        done = engine.generate(case.prompts, params, adapters=case.adapters)
    total = Comparison()
    for answer, prompt, adapter in zip(done, case.prompts, case.adapters, strict=True):
        assert len(answer.token_ids) == 12
        assert answer.finish_reason == "length"
        one = compare(answer, reference, prompt, adapter, tolerance=tolerance, greedy=True, top=TOP)
        assert one.agrees(tolerance), f"{name}, {adapter}, prompt of {len(prompt)}: {one}"
        total += one
    print(f"{name} {weights}: {total}")
    assert total.checked > 0
    if weights == "float32":
        assert total.excluded <= 0.01 * (total.checked + total.excluded), total


@pytest.mark.parametrize("name", [n for n in SPECS if SPECS[n].storage != "bfloat16"])
def test_float32(store: OracleStore, name: str) -> None:
    config = EngineConfig(
        model=store.checkpoint(name),
        weight_dtype="float32",
        max_batch_tokens=64,
        block_size=48 if name == "qwen2" else 16,
    )
    run_and_compare(store, name, config, "float32")


@pytest.mark.parametrize("name", ["llama-rope3", "mistral", "qwen2", "qwen3"])
def test_weights_rounded_to_bfloat16(store: OracleStore, name: str) -> None:
    """Only the base weights are rounded: adapters stored as float32 stay float32."""
    config = EngineConfig(model=store.checkpoint(name), weight_dtype="bfloat16")
    run_and_compare(store, name, config, "bfloat16")


def test_auto_keeps_a_bfloat16_checkpoint_exact(store: OracleStore) -> None:
    """Every number of the file is used as it is, so the float32 oracle is met within 2e-2."""
    run_and_compare(
        store, "qwen3-bf16", EngineConfig(model=store.checkpoint("qwen3-bf16")), "bfloat16"
    )


def test_a_bfloat16_checkpoint_in_float32(store: OracleStore) -> None:
    config = EngineConfig(model=store.checkpoint("qwen3-bf16"), weight_dtype="float32")
    run_and_compare(store, "qwen3-bf16", config, "float32")


def test_bfloat16_adapters(store: OracleStore) -> None:
    """`adapter_dtype` rounds A and B of every adapter, and nothing else."""
    config = EngineConfig(
        model=store.checkpoint("llama"), weight_dtype="float32", adapter_dtype="bfloat16"
    )
    tolerance = TOLERANCE["bfloat16"]
    reference = store.reference("llama", adapter_weights="bfloat16")
    prompts = [list(range(3 + i, 60 + 2 * i)) for i in range(len(ADAPTERS))]
    params = SamplingParams(
        max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=True
    )
    with Engine(config) as engine:
        for adapter, directory in store.adapters("llama").items():
            engine.load_adapter(adapter, directory)
        done = engine.generate(prompts, params, adapters=list(ADAPTERS))
    for answer, prompt, adapter in zip(done, prompts, ADAPTERS, strict=True):
        one = compare(answer, reference, prompt, adapter, tolerance=tolerance, greedy=True)
        assert one.agrees(tolerance), f"{adapter}: {one}"


def test_stops_at_the_checkpoints_end_token(store: OracleStore, tmp_path: Path) -> None:
    """`eos_token_id` may be a list; `ignore_eos` generates on past it."""
    prompt = [5, 9, 13]
    end = int(store.reference("llama").log_probs(prompt)[-1].argmax())
    model = tmp_path / "model"
    shutil.copytree(store.checkpoint("llama"), model)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**config, "eos_token_id": [2, end]}))
    with Engine(EngineConfig(model=model, weight_dtype="float32")) as engine:
        stopped, ignored = (
            engine.generate(
                [prompt],
                SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=ignore, logprobs=0),
            )[0]
            for ignore in (False, True)
        )
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_ids) <= 1  # whether the end token itself is returned is not said
    assert ignored.finish_reason == "length"
    assert len(ignored.token_ids) == 3
    assert ignored.token_ids[0] == end
