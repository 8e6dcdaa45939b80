"""`loraserve`: the command for people. The daemons have commands of their own: loraserve-node,
loraserve-controller and loraserve-gateway."""

import logging
import sys
from collections.abc import Sequence

from loraserve.command_line import FAILED, Parser, exit_code, told
from loraserve.commands import adapter, bench, demo, generate, key, node, serve, simulate
from loraserve.errors import LoraServeError


def make_parser() -> Parser:
    """Of all commands."""
    parser = Parser(
        prog="loraserve",
        description="Multi-LoRA inference: commands for a cluster and its adapters.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (serve, demo, generate, adapter, node, key, bench, simulate):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0; 1 where the command failed; 2 for wrong words, and for files that they name and
    that are no use. One line on stderr says why."""
    parser = make_parser()
    # Errors come as one line; the library's own log would say them twice.
    logging.getLogger("loraserve").addHandler(logging.NullHandler())
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:  # told by the command that was named, which argparse leaves to the first parser
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print("loraserve: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        sys.stderr.close()
        return FAILED
    except (LoraServeError, OSError) as error:
        used = arguments.parser
        print(f"{used.prog}: error: {told(used, error)}", file=sys.stderr)
        return exit_code(error)
    return code


if __name__ == "__main__":
    sys.exit(main())
