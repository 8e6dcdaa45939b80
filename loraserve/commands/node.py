"""`loraserve node`: what concerns the machine of one node."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from loraserve.node.doctor import run_doctor


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("node", help="the machine of a node")
    kinds = parser.add_subparsers(required=True, metavar="ACTION")
    doctor = kinds.add_parser("doctor", help="check whether this machine can run a node")
    doctor.add_argument("--model", type=Path, help="Hugging Face directory to check too")
    doctor.add_argument("--json", action="store_true", help="one JSON array")
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    """Exit code 1 where a check failed."""
    checks = run_doctor(arguments.model)
    if arguments.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        console = Console()
        words = {True: ("ok", "green"), False: ("FAILED", "bold red"), None: ("note", "yellow")}
        for check in checks:
            word, style = words[check.ok]
            console.print(Text.assemble((f"{word:>6}", style), f"  {check.name}: {check.detail}"))
    return 1 if any(check.ok is False for check in checks) else 0
