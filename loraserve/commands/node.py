"""`loraserve node`: what concerns the machine of one node."""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from loraserve.errors import LoraServeError
from loraserve.named_files import named
from loraserve.node.doctor import run_doctor
from loraserve.node.transfer.dry_run import (
    OFFER_SIZES,
    Holder,
    Offered,
    from_line,
    machine,
    read_offer,
    to_line,
)
from loraserve.node.transfer.gpudirect import open_reader, read_to_device

_OFFER_S = 600


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("node", help="the machine of a node")
    kinds = parser.add_subparsers(required=True, metavar="ACTION")
    doctor = kinds.add_parser("doctor", help="check whether this machine can run a node")
    doctor.add_argument(
        "--model", type=Path, metavar="DIR", help="Hugging Face directory to check too"
    )
    doctor.add_argument("--json", action="store_true", help="one JSON array")
    doctor.add_argument(
        "--offer", action="store_true", help="let another machine's doctor read from this one"
    )
    doctor.add_argument(
        "--read-from",
        metavar="FILE",
        help="read one-sided what another machine offers; -: ssh HOST loraserve node doctor "
        "--offer | loraserve node doctor --read-from -",
    )
    doctor.add_argument(
        "--gpudirect",
        action="store_true",
        help="read into a GPU's memory too, to prove that loraserve-node --gpudirect on will do; "
        "fails where that does not work",
    )
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    """Exit code 1 where a check failed."""
    if arguments.offer:
        return asyncio.run(_offer())
    if arguments.read_from:
        return _read_from(arguments.read_from, arguments.gpudirect)
    checks = run_doctor(arguments.model, gpudirect=arguments.gpudirect)
    if arguments.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        console = Console()
        words = {True: ("ok", "green"), False: ("FAILED", "bold red"), None: ("note", "yellow")}
        for check in checks:
            word, style = words[check.ok]
            console.print(Text.assemble((f"{word:>6}", style), f"  {check.name}: {check.detail}"))
    return 1 if any(check.ok is False for check in checks) else 0


async def _offer() -> int:
    """Until who reads the offer closes the pipe, or a while has passed."""
    try:
        holder = await Holder.start(OFFER_SIZES)
    except LoraServeError as error:
        print(f"nothing to offer: {error}", file=sys.stderr)
        return 1
    try:
        print(to_line(await holder.offer(OFFER_SIZES)), flush=True)
        for _ in range(_OFFER_S):
            await asyncio.sleep(1.0)
            print(flush=True)
    except BrokenPipeError:
        # Nothing is flushed at exit any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        await holder.close()
    return 0


def _to_device(offered: Sequence[Offered]) -> dict[str, Any]:
    """Reads the offer into a GPU's memory: what it took, or why it did not work."""
    try:
        reader = open_reader(max(one.size_bytes for one in offered))
        reads = asyncio.run(read_to_device(reader, offered))
    except LoraServeError as error:
        return {"device_error": str(error), "device_reads": []}
    return {"device_reads": [asdict(read) for read in reads]}


def _read_from(source: str, gpudirect: bool) -> int:
    """One JSON object: to be sent to whoever asks how fast it is there."""
    if source == "-":
        line = sys.stdin.readline()
    else:
        with named("read-from", source):
            line = Path(source).read_text()
    try:
        offered, holder = from_line(line)
        info, reads = asyncio.run(read_offer(offered))
    except LoraServeError as error:
        print(f"read nothing: {error}", file=sys.stderr)
        return 1
    for read in reads:
        print(
            f"{read.size_bytes >> 10:>8} KiB over {', '.join(read.transports) or 'UCX'}: "
            f"{read.seconds * 1e3:9.3f} ms {read.gb_per_s:7.2f} GB/s",
            file=sys.stderr,
        )
    result = {
        "ucx_version": info.ucx_version,
        "transports": info.transports,
        "same_host": offered[0].slot.host == info.host,
        "reads": [asdict(read) | {"gb_per_s": round(read.gb_per_s, 3)} for read in reads],
        "holder": holder,
        "reader": machine(),
    }
    if gpudirect:
        result |= _to_device(offered)
    print(json.dumps(result, indent=1))
    return 0
