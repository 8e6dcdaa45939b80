"""`loraserve bench profile`: what the steps of an engine cost on this machine."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from loraserve.checkpoint.model_config import read_model_config
from loraserve.command_line import number
from loraserve.errors import InvalidArgumentError
from loraserve.named_files import named, wrong
from loraserve.placement.cost_model import Slo
from loraserve.placement.operating_point import LengthMix
from loraserve.profiler.profile_engine import ProfileOptions, measure, to_json
from loraserve.profiler.sweep import QUICK, Grid


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("bench", help="measure this machine")
    kinds = parser.add_subparsers(required=True, metavar="ACTION")
    profile = kinds.add_parser(
        "profile",
        help="measure what an engine's steps cost, for placement and simulation",
        description="Runs the engine through steps of many compositions, fits the linear cost "
        "model, checks it on points that were held out, and derives operating points. Nothing "
        "else should run meanwhile.",
    )
    defaults, slo, mix = ProfileOptions(Path()), Slo(), LengthMix()
    add = profile.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="Hugging Face directory")
    add("--base", default="", help="name of the base model (default: the directory's)")
    add("--device", default=defaults.device, help="cpu or cuda")
    add(
        "--weight-dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="that weights are kept in; auto: as in the files",
    )
    add(
        "--activation-dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="that base products read; bfloat16 on cpu rounds, and is faster with AVX512-BF16 "
        "(auto: float32 on cpu, bfloat16 on cuda)",
    )
    number(add, "--memory-bytes", defaults.memory_bytes, "BYTES", "half of it for adapters")
    number(add, "--max-batch-tokens", defaults.max_batch_tokens, "TOKENS", "in one engine step")
    number(add, "--max-sequences", defaults.max_sequences, "REQUESTS", "in one engine step")
    number(add, "--threads", 0, "THREADS", "of the engine; 0: one for each core")
    number(add, "--repeats", Grid().repeats, "TIMES", "that each point is measured")
    add("--quick", action="store_true", help="fewer points: a look, not a profile")
    number(add, "--ttft-p95", slo.ttft_p95_s, "SECONDS", "to the first token, of the SLO")
    number(add, "--tbt-p95", slo.tbt_p95_s, "SECONDS", "between tokens, of the SLO")
    number(add, "--prompt", mix.prompt, "TOKENS", "of a prompt, on average")
    number(add, "--output", mix.output, "TOKENS", "of an answer, on average")
    number(add, "--adapters", mix.adapters, "ADAPTERS", "distinct ones that share a node")
    add("-o", dest="out", type=Path, required=True, metavar="FILE", help="JSON file to write")
    profile.set_defaults(run=_profile)


def _profile(arguments: argparse.Namespace) -> int:
    if not 5 <= arguments.repeats <= 1000:
        raise InvalidArgumentError("repeats", f"{arguments.repeats} is not within 5 and 1000")
    if not arguments.out.parent.is_dir():
        raise wrong("-o", arguments.out.parent, "is no directory")
    grid = replace(QUICK if arguments.quick else Grid(), repeats=arguments.repeats)
    options = ProfileOptions(
        model=arguments.model,
        base=arguments.base,
        device=arguments.device,
        weight_dtype=arguments.weight_dtype,
        activation_dtype=arguments.activation_dtype,
        memory_bytes=arguments.memory_bytes,
        max_batch_tokens=arguments.max_batch_tokens,
        max_sequences=arguments.max_sequences,
        threads=arguments.threads,
        grid=grid,
    )
    slo = Slo(arguments.ttft_p95, arguments.tbt_p95)
    mix = LengthMix(arguments.prompt, arguments.output, arguments.adapters)
    with named("model", arguments.model):
        read_model_config(arguments.model)  # a wrong one is told before a bar of progress stands
    console = Console(stderr=True)
    with Progress(console=console) as bar, named("model", arguments.model):
        task = bar.add_task("scenarios", total=None)
        measured = measure(
            options, lambda done, total: bar.update(task, completed=done, total=total)
        )
    values = to_json(measured, slo, mix)
    arguments.out.write_text(json.dumps(values, indent=1) + "\n")
    print(f"{arguments.out}: {measured.profile.source}")
    for rank, rate in values["measured"]["operating_points_tokens_per_s"].items():
        print(f"operating point of rank {rank}: {rate:g} tokens/s")
    return 0
