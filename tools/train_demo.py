"""Trains the demo model and its adapters: `python tools/train_demo.py --out loraserve/demo`.

The base learns every skill behind a tag, and to repeat the word where there is none. An adapter
then only has to make an untagged prompt act like a tagged one, which even rank 4 learns in a minute
on two cores. Needs torch, transformers and peft. `--evaluate` prints the accuracy on held-out
words.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from demo_accuracy import measure, print_table
from demo_data import (
    BEGIN_ID,
    END_ID,
    IGNORED_LABEL,
    PAD_ID,
    VOCAB_SIZE,
    Batch,
    BatchMaker,
    save_tokenizer,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from loraserve.demo import MODEL_NAME, skills

SEED = 20240229
BASE_STEPS, BASE_ROWS, BASE_LEARNING_RATE = 1800, 256, 2e-3
ADAPTER_STEPS, ADAPTER_ROWS, ADAPTER_LEARNING_RATE = 300, 192, 1e-3
WARM_UP_STEPS = 100
CHECKPOINT_STEPS = 500
LOG_STEPS = 100
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def model_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )


def adapter_config(skill: skills.Skill) -> LoraConfig:
    """alpha = 2 rank, except where the demo shows what else PEFT's format can say."""
    config = LoraConfig(
        r=skill.rank,
        lora_alpha=2 * skill.rank,
        target_modules=list(MODULES),
        base_model_name_or_path=MODEL_NAME,
        task_type="CAUSAL_LM",
    )
    if skill.name == "reverse":
        config.use_rslora, config.lora_alpha = True, 16
    if skill.name == "piglatin":
        config.rank_pattern = {"down_proj": skill.rank // 2}
        config.alpha_pattern = {"down_proj": skill.rank}
    return config


def answer_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross entropy of the answers' tokens; the prompt's are not trained."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(
            input_ids=batch.ids, logits_to_keep=batch.labels.shape[1], use_cache=False
        ).logits
    return functional.cross_entropy(
        logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED_LABEL
    )


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warm_up = min(WARM_UP_STEPS, steps // 5)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.01)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch_of: Callable[[int], Batch],
    steps: range,
    peak: float,
    label: str,
) -> Iterator[int]:
    """Runs the steps of the range, `steps.stop` being the end of the schedule; yields each one."""
    started, total = time.monotonic(), 0.0
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = peak * learning_rate_factor(step, steps.stop)
        loss = answer_loss(model, batch_of(step))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if (step + 1) % LOG_STEPS == 0:
            seconds = time.monotonic() - started
            print(f"{label} {step + 1}: loss {total / LOG_STEPS:.4f}, {seconds:.0f} s", flush=True)
            total = 0.0
        yield step


def train_base(work: Path) -> LlamaForCausalLM:
    """Continues from `work`/base.pt where an interrupted run left one."""
    torch.manual_seed(SEED)
    config = model_config()
    # On a CPU, the backward pass of the fused attention takes most of a step.
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    print(f"base: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    optimizer = optimizer_of(model)
    checkpoint, begin = work / "base.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
    maker = BatchMaker(SEED, BASE_ROWS)
    steps = range(begin, BASE_STEPS)
    for step in train(model, optimizer, maker.tagged, steps, BASE_LEARNING_RATE, "base"):
        if (step + 1) % CHECKPOINT_STEPS == 0:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(checkpoint)
    return model


def save_base(model: LlamaForCausalLM, directory: Path) -> None:
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, bos_token_id=BEGIN_ID, eos_token_id=END_ID, pad_token_id=PAD_ID
    )
    model.bfloat16().save_pretrained(directory)
    save_tokenizer(directory, model.config.max_position_embeddings)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    # Readers from before transformers 5 look for it here.
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    make_readable(directory)


def make_readable(directory: Path) -> None:
    """For everyone: safetensors files are written for their owner alone."""
    for path in directory.iterdir():
        path.chmod(0o644)


def train_adapter(model_directory: Path, skill: skills.Skill, directory: Path) -> None:
    """Trains against the base as stored, rounding included."""
    torch.manual_seed(SEED + skill.rank)
    base = LlamaForCausalLM.from_pretrained(
        model_directory, dtype=torch.float32, attn_implementation="eager"
    )
    base.name_or_path = MODEL_NAME  # PEFT writes it down; a path would name this machine.
    model = get_peft_model(base, adapter_config(skill))
    maker = BatchMaker(SEED + 1, ADAPTER_ROWS)
    for _ in train(
        model,
        optimizer_of(model),
        lambda step: maker.untagged(skill, step),
        range(ADAPTER_STEPS),
        ADAPTER_LEARNING_RATE,
        skill.name,
    ):
        pass
    model.bfloat16().save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
    settle_config(directory / "adapter_config.json")
    make_readable(directory)


def settle_config(path: Path) -> None:
    """PEFT writes the modules as a set, in another order each time."""
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("loraserve/demo"))
    parser.add_argument("--work", type=Path, default=Path("build/train_demo"), help="checkpoints")
    # A second thread gains little and loses much where another program wants the core.
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skill", action="append", help="train this adapter alone")
    parser.add_argument("--evaluate", action="store_true", help="train nothing, print the accuracy")
    parser.add_argument("--words", type=int, default=500, help="held-out words for --evaluate")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model_directory = arguments.out / "model"
    if not arguments.evaluate:
        if not arguments.skill:
            arguments.work.mkdir(parents=True, exist_ok=True)
            save_base(train_base(arguments.work), model_directory)
            # Else a later run would take this base for its own interrupted one.
            (arguments.work / "base.pt").unlink()
        for skill in skills.SKILLS:
            if not arguments.skill or skill.name in arguments.skill:
                train_adapter(model_directory, skill, arguments.out / "adapters" / skill.name)
    if not arguments.skill:
        print_table(measure(arguments.out, skills.held_out_words(arguments.words)))


if __name__ == "__main__":
    main()
