"""`loraserve key`: the keys that daemons accept."""

import argparse
from pathlib import Path
from typing import Any

from loraserve.named_files import wrong
from loraserve.security.identity import DEFAULT_TENANT, Role
from loraserve.security.keys import create_key

_ROLES = "user: its tenant's adapters; admin: nodes as well; node: a daemon of the cluster"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("key", help="the keys that daemons accept")
    kinds = parser.add_subparsers(required=True, metavar="ACTION")
    create = kinds.add_parser("create", help="make a key; only its hash goes into the key file")
    create.add_argument("name", help="whose key it is, for the logs")
    create.add_argument(
        "--keys", type=Path, required=True, metavar="FILE", help="key file of the daemons"
    )
    create.add_argument(
        "--role", default="user", choices=[role.value for role in Role], help=_ROLES
    )
    create.add_argument("--tenant", default=DEFAULT_TENANT, help="whose adapters it may see")
    create.set_defaults(run=_create)


def _create(arguments: argparse.Namespace) -> int:
    try:
        key = create_key(arguments.keys, arguments.name, arguments.tenant, Role(arguments.role))
    except OSError as error:
        raise wrong("keys", arguments.keys, error) from None
    print(key)
    return 0
