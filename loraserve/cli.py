"""`loraserve`: the command for people. The daemons have commands of their own: loraserve-node,
loraserve-controller and loraserve-gateway."""

import argparse
import logging
import sys
from collections.abc import Sequence

from loraserve.commands import adapter, bench, demo, generate, key, node, serve, simulate
from loraserve.errors import LoraServeError

FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 where the command failed (one line on stderr says why), 2 for wrong words."""
    parser = argparse.ArgumentParser(
        prog="loraserve",
        description="Multi-LoRA inference: commands for a cluster and its adapters.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (serve, demo, generate, adapter, node, key, bench, simulate):
        command.add_parser(commands)
    # Errors come as one line; the library's own log would say them twice.
    logging.getLogger("loraserve").addHandler(logging.NullHandler())
    try:
        arguments = parser.parse_args(argv)
        code: int = arguments.run(arguments)
    except LoraServeError as error:
        print(f"loraserve: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("loraserve: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        sys.stderr.close()
        return FAILED
    return code


if __name__ == "__main__":
    sys.exit(main())
