"""`loraserve generate`: one answer from a cluster."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from loraserve.commands.connection import add_connection, connect
from loraserve.sampling_params import SamplingParams


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("generate", help="ask a cluster or a node for one answer")
    defaults = SamplingParams()
    parser.add_argument("prompt", help="text; - reads it from standard input")
    parser.add_argument("--adapter", help="default: the base model")
    parser.add_argument(
        "--base", default="", help="name of the base model, where there are several"
    )
    parser.add_argument("--max-tokens", type=int, default=defaults.max_tokens)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top-p", type=float, default=defaults.top_p)
    parser.add_argument("--top-k", type=int, default=defaults.top_k, help="0 (default) is off")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", default=[], help="may be given more than once")
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for the whole request")
    parser.add_argument("--json", action="store_true", help="one JSON object, when it is whole")
    add_connection(parser, nodes=True)
    parser.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    # The end of the last line is the shell's, not the prompt's.
    prompt = sys.stdin.read().removesuffix("\n") if arguments.prompt == "-" else arguments.prompt
    params = SamplingParams(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
        ignore_eos=arguments.ignore_eos,
    )
    with (
        connect(arguments) as client,
        client.stream(
            prompt,
            params,
            adapter=arguments.adapter,
            base=arguments.base,
            timeout_s=arguments.timeout,
        ) as stream,
    ):
        for chunk in stream:
            if not arguments.json:
                print(chunk.text, end="", flush=True)
        completion = stream.completion()
    print(json.dumps(asdict(completion)) if arguments.json else "")
    return 0
