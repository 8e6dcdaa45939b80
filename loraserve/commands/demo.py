"""`loraserve demo`: see loraserve.demo.show."""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from loraserve.demo.show import DemoOptions, run
from loraserve.errors import InvalidArgumentError

_PLAIN_WIDTH = 110


def add_parser(commands: Any) -> None:
    defaults = DemoOptions()
    parser = commands.add_parser(
        "demo",
        help="a small cluster on this machine answers with ten adapters",
        description="Starts a controller and nodes on free loopback ports, loads ten adapters of "
        "ranks 4 to 128, replays random requests, checks every answer and stops everything. Exit "
        "code 0 only if at least 95 % of the answers are right and none was lost.",
    )
    add = parser.add_argument
    add(
        "--seconds",
        type=float,
        default=defaults.seconds,
        metavar="SECONDS",
        help="for which requests come",
    )
    add(
        "--rate",
        type=float,
        default=defaults.rate_per_s,
        metavar="REQUESTS_PER_S",
        help="on average",
    )
    add(
        "--burst",
        type=int,
        default=defaults.burst,
        metavar="REQUESTS",
        help="at once, in the middle",
    )
    add("--nodes", type=int, default=defaults.nodes, metavar="NODES", help="to start")
    add("--seed", type=int, default=defaults.seed, metavar="N", help="of the requests")
    add("--json", action="store_true", help="the result as one object, last line")
    add(
        "--directory",
        type=Path,
        metavar="DIR",
        help="for data and logs, which stay (default: a temporary one, which goes)",
    )
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    if not 0 < arguments.seconds <= 86400:
        raise InvalidArgumentError("seconds", f"{arguments.seconds} is not over 0, up to 86400")
    if not 0 < arguments.rate <= 10000:
        raise InvalidArgumentError("rate", f"{arguments.rate} is not over 0, up to 10000")
    if not 1 <= arguments.nodes <= 16:
        raise InvalidArgumentError("nodes", f"{arguments.nodes} is not within 1 and 16")
    if not 0 <= arguments.burst <= 10000:
        raise InvalidArgumentError("burst", f"{arguments.burst} is not within 0 and 10000")
    options = DemoOptions(
        seconds=arguments.seconds,
        rate_per_s=arguments.rate,
        burst=arguments.burst,
        nodes=arguments.nodes,
        seed=arguments.seed,
        as_json=arguments.json,
        directory=arguments.directory,
    )
    # Lines stay whole where no terminal says how long they may be.
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, soft_wrap=True)
    return 0 if asyncio.run(run(options, console)).passed else 1
