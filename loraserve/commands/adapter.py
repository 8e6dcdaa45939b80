"""`loraserve adapter`: the adapters of a cluster, and packed adapters as files."""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loraserve.checkpoint.packed_adapter import describe, load_adapter_source, write_packed
from loraserve.checkpoint.peft_adapter import read_peft_directory
from loraserve.client import AdapterInfo, Client
from loraserve.commands.connection import add_connection, connect
from loraserve.errors import AlreadyExistsError, DeadlineExceededError
from loraserve.named_files import named, wrong

_BASE = "name of the base model, where there are several (default: the only one)"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("adapter", help="the adapters of a cluster; packing and looking")
    kinds = parser.add_subparsers(required=True, metavar="ACTION")

    add = kinds.add_parser("add", help="admit an adapter to the cluster")
    add.add_argument("name", help="that requests use: 1 to 64 of a-z 0-9 . _ -")
    add.add_argument("path", type=Path, help="PEFT directory or packed file")
    add.add_argument("--base", default="", help=_BASE)
    add.add_argument("--replace", action="store_true", help="where the name is taken, update it")
    add.add_argument(
        "--allow-base-mismatch",
        action="store_true",
        help="admit it though it names another base; shapes must fit all the same",
    )
    add.add_argument(
        "--wait",
        type=float,
        metavar="SECONDS",
        help="for the cluster, and until it serves this adapter (default: does not wait)",
    )
    add_connection(add)
    add.set_defaults(run=_add)

    listing = kinds.add_parser("list", help="all adapters of the cluster")
    listing.add_argument("--base", default="", help="of this base model only (default: of all)")
    listing.add_argument("--json", action="store_true", help="one JSON array")
    add_connection(listing)
    listing.set_defaults(run=_list)

    show = kinds.add_parser("show", help="one adapter of the cluster, and where it is")
    show.add_argument("name", help="of the adapter")
    show.add_argument("--base", default="", help=_BASE)
    show.add_argument("--json", action="store_true", help="one JSON object")
    add_connection(show)
    show.set_defaults(run=_show)

    remove = kinds.add_parser("remove", help="take an adapter out of the cluster")
    remove.add_argument("name", help="of the adapter")
    remove.add_argument("--base", default="", help=_BASE)
    add_connection(remove)
    remove.set_defaults(run=_remove)

    pack = kinds.add_parser("pack", help="write a PEFT directory as one packed file")
    pack.add_argument("source", type=Path, help="PEFT directory")
    pack.add_argument("target", type=Path, help="file to write")
    pack.add_argument(
        "--base-digest", metavar="HEX", help="64 hex digits that name the base model's weights"
    )
    pack.set_defaults(run=_pack)

    inspect = kinds.add_parser("inspect", help="check an adapter file by file and tell about it")
    inspect.add_argument("path", type=Path, help="PEFT directory or packed file")
    inspect.add_argument("--json", action="store_true", help="one JSON object, with every module")
    inspect.set_defaults(run=_inspect)


def _to_json(info: AdapterInfo) -> dict[str, Any]:
    fields = dict(vars(info))
    fields["created"], fields["updated"] = info.created.isoformat(), info.updated.isoformat()
    fields["holders"] = [{"node_id": node, "state": state} for node, state in info.holders]
    return fields


def _where(info: AdapterInfo) -> str:
    if not info.holders:
        return info.unrouted_reason or "-"
    return ", ".join(f"{node} ({state})" for node, state in info.holders)


def _print_one(info: AdapterInfo) -> None:
    for field, value in _to_json(info).items():
        if field == "holders":
            value = ", ".join(f"{node} ({state})" for node, state in info.holders) or "none"
        if value != "":
            print(f"{field}: {value}")


def _add(arguments: argparse.Namespace) -> int:
    options = {"base": arguments.base, "allow_base_mismatch": arguments.allow_base_mismatch}
    with named("path", arguments.path):
        packed = load_adapter_source(arguments.path)
    with connect(arguments) as client:
        if arguments.wait is not None:  # also for the cluster itself
            with _time_of_wait():
                client.wait_routable((), timeout_s=arguments.wait)
        added = True
        try:
            info = client.adapters.add(arguments.name, packed, **options)
        except AlreadyExistsError as error:
            if not arguments.replace:
                raise AlreadyExistsError("name", f"{error.message} (--replace)") from None
            info = client.adapters.update(arguments.name, packed, **options)
            added = False
        if arguments.wait is not None:
            with _time_of_wait("; it stays registered, and loads when it can"):
                _wait(client, info, added, arguments.wait)
            info = client.adapters.get(info.name, base=info.base)
        _print_one(info)
    return 0


@contextlib.contextmanager
def _time_of_wait(more: str = "") -> Iterator[None]:
    """A deadline that passes is told as the option's."""
    try:
        yield
    except DeadlineExceededError as error:
        raise DeadlineExceededError("wait", f"{error.message}{more}") from None


def _wait(client: Client, info: AdapterInfo, added: bool, timeout_s: float) -> None:
    """Until the adapter serves. Raises DeadlineExceededError."""
    if added:
        client.wait_admitted([info], timeout_s=timeout_s)
    else:
        client.wait_routable(
            [info.name], base=info.base, timeout_s=timeout_s, revision=info.revision
        )


def _list(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        found = client.adapters.list(base=arguments.base)
    if arguments.json:
        print(json.dumps([_to_json(info) for info in found], indent=1))
        return 0
    table = Table()
    for column in ("name", "base", "rank", "bytes", "revision", "where"):
        table.add_column(column, justify="right" if column in ("rank", "bytes") else "left")
    for info in found:
        table.add_row(
            *(info.name, info.base, str(info.max_rank), str(info.size_bytes)),
            *(info.revision[:12], _where(info)),
        )
    Console().print(table)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        info = client.adapters.get(arguments.name, base=arguments.base)
    if arguments.json:
        print(json.dumps(_to_json(info), indent=1))
    else:
        _print_one(info)
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        client.adapters.remove(arguments.name, base=arguments.base)
    print(f"{arguments.name} is removed")
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    with named("source", arguments.source):
        source = read_peft_directory(arguments.source)
    try:
        revision = write_packed(source, arguments.target, base_digest=arguments.base_digest)
    except OSError as error:
        raise wrong("target", arguments.target, error) from None
    print(f"{arguments.target}: {arguments.target.stat().st_size} bytes, revision {revision}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    with named("path", arguments.path):
        facts = describe(load_adapter_source(arguments.path))
    if arguments.json:
        print(json.dumps(facts, indent=1))
        return 0
    modules = facts.pop("modules")
    for field, value in facts.items():
        print(f"{field}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    ranks: dict[tuple[str, int], int] = {}
    for module in modules:
        key = (module["module"], module["rank"])
        ranks[key] = ranks.get(key, 0) + 1
    for (module, rank), layers in ranks.items():
        print(f"{module}: rank {rank} in {layers} layer{'s' if layers > 1 else ''}")
    return 0
