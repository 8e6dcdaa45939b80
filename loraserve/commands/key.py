"""`loraserve key`: the keys that daemons accept."""

import argparse
from pathlib import Path
from typing import Any

from loraserve.errors import InvalidArgumentError
from loraserve.security.identity import DEFAULT_TENANT, Role
from loraserve.security.keys import create_key


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("key", help="the keys that daemons accept")
    kinds = parser.add_subparsers(required=True, metavar="ACTION")
    create = kinds.add_parser("create", help="make a key; only its hash goes into the key file")
    create.add_argument("name", help="whose key it is, for the logs")
    create.add_argument("--keys", type=Path, required=True, help="key file of the daemons")
    create.add_argument("--role", default="user", choices=[role.value for role in Role])
    create.add_argument("--tenant", default=DEFAULT_TENANT, help=f"default: {DEFAULT_TENANT}")
    create.set_defaults(run=_create)


def _create(arguments: argparse.Namespace) -> int:
    try:
        key = create_key(arguments.keys, arguments.name, arguments.tenant, Role(arguments.role))
    except OSError as error:
        raise InvalidArgumentError("keys", f"{arguments.keys}: {error}") from None
    print(key)
    return 0
