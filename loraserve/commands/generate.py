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
    add = parser.add_argument
    add("--adapter", metavar="NAME", help="to answer with (default: none, the base model)")
    add(
        "--base",
        default="",
        metavar="NAME",
        help="of the base model, where there are several (default: the only one)",
    )
    add(
        "--max-tokens",
        type=int,
        default=defaults.max_tokens,
        metavar="TOKENS",
        help="the answer ends there",
    )
    add("--temperature", type=float, default=0.0, metavar="FACTOR", help="0 is greedy")
    add(
        "--top-p",
        type=float,
        default=defaults.top_p,
        metavar="SHARE",
        help="of probability that is drawn from, over 0 up to 1",
    )
    add(
        "--top-k",
        type=int,
        default=defaults.top_k,
        metavar="TOKENS",
        help="that are drawn from; 0: all",
    )
    add("--seed", type=int, metavar="N", help="of the draws (default: another one each time)")
    add("--stop", action="append", default=[], metavar="TEXT", help="may be given repeatedly")
    add("--ignore-eos", action="store_true", help="go on after the token that ends an answer")
    add(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="for the whole request (default: no limit)",
    )
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
