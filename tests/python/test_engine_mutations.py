"""A test of the tests: an engine that is wrong in one place fails the oracle comparison.

The mutated files go to the engine only. Each mutant's answer must disagree with the oracle of the
original files and agree with the oracle of the mutated ones: so it is the mutation that is seen.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle.adapters import ADAPTERS
from oracle.checkpoints import SPECS
from oracle.comparison import compare
from oracle.reference import Reference
from oracle.store import OracleStore
from safetensors.torch import load_file, save_file

from loraserve import Engine, EngineConfig, SamplingParams

TOLERANCE = 1e-4
Tensors = dict[str, torch.Tensor]


def edit_config(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def mutate(directory: Path) -> None:
        path = directory / name
        config = json.loads(path.read_text())
        before = json.dumps(config)
        change(config)
        assert json.dumps(config) != before
        path.write_text(json.dumps(config))

    return mutate


def edit_tensors(
    pattern: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Path], None]:
    """Changes the tensors whose name contains `pattern`, in whichever shard they are."""

    def mutate(directory: Path) -> None:
        changed = 0
        for path in sorted(directory.glob("*.safetensors")):
            tensors = load_file(path)
            for name in tensors:
                if pattern in name:
                    tensors[name] = change(tensors[name]).contiguous()
                    changed += 1
            save_file(tensors, path, metadata={"format": "pt"})
        assert changed, f"no tensor is called {pattern!r}"

    return mutate


def skip_layer(layer: int) -> Callable[[Path], None]:
    """Both of its blocks then add nothing to the residual stream."""

    def mutate(directory: Path) -> None:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            edit_tensors(f"layers.{layer}.{name}", torch.zeros_like)(directory)

    return mutate


def rename_tensors(old: str, new: str) -> Callable[[Path], None]:
    def mutate(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        assert any(old in name for name in tensors)
        assert not any(new in name for name in tensors)
        save_file({name.replace(old, new): t for name, t in tensors.items()}, path)
        config = directory / "adapter_config.json"
        values = json.loads(config.read_text())
        values["target_modules"] = [*values["target_modules"], new.rsplit(".", 1)[1]]
        config.write_text(json.dumps(values))

    return mutate


def drop_scaling(config: dict[str, Any]) -> None:
    """Makes alpha equal to the rank, everywhere."""
    config.update(lora_alpha=config["r"], use_rslora=False)
    config.update(alpha_pattern=dict(config["rank_pattern"]))


def plain_scaling(config: dict[str, Any]) -> None:
    config.update(use_rslora=False)


def no_alpha_pattern(config: dict[str, Any]) -> None:
    config.update(alpha_pattern={})


def rope(**changes: Any) -> Callable[[Path], None]:
    return edit_config("config.json", lambda c: c["rope_parameters"].update(changes))


def legacy_rope_scaling(config: dict[str, Any]) -> None:
    config["rope_scaling"] = None


def shift_window(config: dict[str, Any]) -> None:
    config["sliding_window"] += 1


@dataclass(frozen=True)
class Mutation:
    """`adapter` None mutates the checkpoint, else that adapter's directory."""

    what: str
    checkpoint: str
    adapter: str | None
    mutate: Callable[[Path], None]


ADAPTER_CONFIG = "adapter_config.json"
MUTATIONS = [
    Mutation("scaling dropped", "llama", "r8", edit_config(ADAPTER_CONFIG, drop_scaling)),
    Mutation("scaling dropped, one rank", "qwen2", "r1", edit_config(ADAPTER_CONFIG, drop_scaling)),
    Mutation("rsLoRA ignored", "qwen3", "r16", edit_config(ADAPTER_CONFIG, plain_scaling)),
    Mutation(
        "alpha_pattern ignored", "mistral", "r17", edit_config(ADAPTER_CONFIG, no_alpha_pattern)
    ),
    Mutation("adapter skipped", "llama", "r3", edit_tensors("lora_B", torch.zeros_like)),
    Mutation("layer skipped", "llama-linear", "r64", edit_tensors("layers.2.", torch.zeros_like)),
    Mutation(
        "module skipped",
        "llama",
        "r100",
        edit_tensors("layers.1.self_attn.v_proj", torch.zeros_like),
    ),
    Mutation(
        "last rank column skipped",
        "qwen3",
        "r17",
        edit_tensors("layers.0.mlp.up_proj.lora_A", lambda a: torch.cat([a[:-1], 0 * a[-1:]])),
    ),
    Mutation(
        "wrong adapter module",
        "mistral",
        "r128",
        rename_tensors("layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"),
    ),
    Mutation(
        "attention skipped",
        "llama-linear",
        None,
        edit_tensors("layers.1.self_attn.o_proj", torch.zeros_like),
    ),
    Mutation("base layer skipped", "llama-linear", None, skip_layer(2)),
    Mutation("rope theta", "llama", None, rope(rope_theta=10100.0)),
    Mutation("rope factor", "llama-linear", None, rope(factor=4.04)),
    Mutation(
        "llama3 rope scaling ignored",
        "llama-rope3",
        None,
        edit_config("config.json", legacy_rope_scaling),
    ),
    Mutation("window off by one", "mistral", None, edit_config("config.json", shift_window)),
    Mutation(
        "weight changed", "llama", None, edit_tensors("layers.1.mlp.up_proj", lambda w: 1.003 * w)
    ),
    Mutation(
        "key heads swapped",
        "qwen3",
        None,
        edit_tensors("layers.1.self_attn.k_proj", lambda w: torch.cat(w.chunk(2)[::-1])),
    ),
    Mutation(
        "bias skipped",
        "qwen2",
        None,
        edit_tensors("layers.1.self_attn.v_proj.bias", torch.zeros_like),
    ),
    Mutation(
        "qk norm skipped", "qwen3", None, edit_tensors("layers.0.self_attn.q_norm", torch.ones_like)
    ),
]


def engine_answer(
    checkpoint: Path, adapter: Path | None, prompt: list[int], weight_dtype: str = "float32"
) -> Any:
    with Engine(EngineConfig(model=checkpoint, weight_dtype=weight_dtype)) as engine:
        if adapter is not None:
            # The adapter may name the original directory as its base.
            engine.load_adapter("a", adapter, allow_base_mismatch=True)
        params = SamplingParams(
            max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=True
        )
        return engine.generate([prompt], params, adapters=[None if adapter is None else "a"])[0]


def prompt_for(checkpoint: str) -> list[int]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(SPECS[checkpoint].vocab, (90,), generator=generator).tolist()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.checkpoint}, {m.what}")
def test_a_mutant_is_caught(store: OracleStore, tmp_path: Path, mutation: Mutation) -> None:
    checkpoint = store.checkpoint(mutation.checkpoint)
    adapter = store.adapters(mutation.checkpoint)[mutation.adapter] if mutation.adapter else None
    mutant = tmp_path / "mutant"
    shutil.copytree(adapter or checkpoint, mutant)
    mutation.mutate(mutant)
    prompt = prompt_for(mutation.checkpoint)
    if adapter:
        mutated = Reference(checkpoint)
        mutated.add_adapter("a", mutant, check=False)
        answer = engine_answer(checkpoint, mutant, prompt)
        of_mutant = compare(answer, mutated, prompt, "a", tolerance=TOLERANCE, greedy=True)
    else:
        answer = engine_answer(mutant, None, prompt)
        of_mutant = compare(answer, Reference(mutant), prompt, tolerance=TOLERANCE, greedy=True)
    original = compare(
        answer,
        store.reference(mutation.checkpoint),
        prompt,
        mutation.adapter,
        tolerance=TOLERANCE,
        greedy=True,
    )
    assert of_mutant.agrees(TOLERANCE), f"the engine is wrong on the mutant itself: {of_mutant}"
    assert not original.agrees(TOLERANCE), f"not seen: {original}"
    assert original.worst > 10 * TOLERANCE, f"seen only by luck: {original}"


@pytest.mark.parametrize("given", ["r8", "r128", None])
def test_the_wrong_adapter_is_caught(store: OracleStore, given: str | None) -> None:
    wanted, prompt = "r16", prompt_for("llama")
    adapter = store.adapters("llama")[given] if given else None
    answer = engine_answer(store.checkpoint("llama"), adapter, prompt)
    reference = store.reference("llama")
    assert compare(answer, reference, prompt, given, tolerance=TOLERANCE).agrees(TOLERANCE)
    wrong = compare(answer, reference, prompt, wanted, tolerance=TOLERANCE, greedy=True)
    assert not wrong.agrees(TOLERANCE)
    assert wrong.wrong > 0


def test_bfloat16_weights_are_not_float32_weights(store: OracleStore) -> None:
    """Each oracle refuses the other's dtype, so rounding twice or not at all is seen."""
    prompt = prompt_for("llama")
    for dtype, other in (("float32", "bfloat16"), ("bfloat16", "float32")):
        answer = engine_answer(store.checkpoint("llama"), None, prompt, weight_dtype=dtype)
        assert not compare(
            answer, store.reference("llama", other), prompt, tolerance=TOLERANCE
        ).agrees(TOLERANCE)


def test_a_doctored_answer_is_caught(store: OracleStore) -> None:
    """The comparison looks at every part of an answer; here the oracle itself answers."""
    reference, prompt = store.reference("llama"), prompt_for("llama")[:20]
    rows = reference.log_probs(prompt)
    best = int(rows[-1].argmax())

    def top_of(row: Any) -> dict[int, float]:
        return {int(i): row[i].item() for i in row.topk(2).indices}

    top = top_of(rows[-1])
    right: dict[str, Any] = {
        "token_ids": [best],
        "logprobs": [rows[-1, best].item()],
        "top_logprobs": [top],
        "prompt_logprobs": [None] + [rows[i - 1, prompt[i]].item() for i in range(1, 20)],
        "prompt_top_logprobs": [None, *(top_of(row) for row in rows[:19])],
    }
    second = next(token for token in top if token != best)
    prompt_rows, prompt_tops = right["prompt_logprobs"], right["prompt_top_logprobs"]
    doctored: dict[str, dict[str, Any]] = {
        "nothing": {},
        "second best token": {"token_ids": [second], "logprobs": [top[second]]},
        "no tokens": {"token_ids": [], "logprobs": []},
        "no log-probabilities": {"logprobs": []},
        "NaN": {"logprobs": [float("nan")]},
        "off by 0.001": {"logprobs": [top[best] + 1e-3]},
        "one top only": {"top_logprobs": [{best: top[best]}]},
        "no top": {"top_logprobs": None},
        "another top token": {"top_logprobs": [{best: top[best], (second + 1) % 9: top[second]}]},
        "prompt shifted": {"prompt_logprobs": [None, *prompt_rows[2:], prompt_rows[1]]},
        "prompt too short": {"prompt_logprobs": prompt_rows[:-1]},
        "first of prompt": {"prompt_logprobs": [0.0, *prompt_rows[1:]]},
        "tops of prompt shifted": {"prompt_top_logprobs": [None, *prompt_tops[2:], prompt_tops[1]]},
        "tops of prompt too short": {"prompt_top_logprobs": prompt_tops[:-1]},
    }
    for what, change in doctored.items():
        answer: Any = SimpleNamespace(**{**right, **change})
        one = compare(answer, reference, prompt, tolerance=TOLERANCE, greedy=True, top=2)
        assert one.agrees(TOLERANCE) == (what == "nothing"), f"{what}: {one}"


def test_every_adapter_differs_from_every_other(store: OracleStore) -> None:
    """No two adapters could be confused without the comparison seeing it."""
    reference, prompt = store.reference("llama"), prompt_for("llama")
    rows = [reference.log_probs(prompt, name) for name in [None, *ADAPTERS]]
    for i, one in enumerate(rows):
        for other in rows[:i]:
            assert (one - other).abs().median() > 0.1
