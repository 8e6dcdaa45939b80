"""What every command line of LoRAServe shares: how help is told, and how an error is."""

import argparse
from typing import Any, NoReturn

from loraserve.errors import InvalidArgumentError, LoraServeError
from loraserve.named_files import os_error_text

FAILED = 1
WRONG = 2
"""Exit codes: the command could not do it; it was asked in a way that cannot work."""


class HelpFormatter(argparse.HelpFormatter):
    """Tells the default of every option that takes a value, where its help does not."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.nargs == 0 or action.required or "default" in text:
            return text
        if action.default in (None, "", [], argparse.SUPPRESS):
            return f"{text} (default: none)".strip() if action.option_strings else text
        return f"{text} (default: %(default)s)".strip()


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; so do its subparsers. What was parsed has the parser that
    did it as `parser`, which `told` wants."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", HelpFormatter)
        super().__init__(**settings)
        self.set_defaults(parser=self)

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"{self.prog}: error: {message} (--help lists the options)\n")


def number(add: Any, name: str, default: float, unit: str, text: str) -> None:
    """An option by `add`, which is a parser's add_argument: of the type of its default, with its
    unit in capitals where the help has its value."""
    add(name, type=type(default), default=default, metavar=unit, help=text)


def told(parser: argparse.ArgumentParser | None, error: LoraServeError | OSError) -> str:
    """The error in one line, by the option of `parser` that it is about where there is one."""
    if isinstance(error, OSError):
        text = os_error_text(error)
    else:
        option = "--" + error.field.replace("_", "-")
        actions = parser._actions if parser is not None else ()
        ours = any(option in action.option_strings for action in actions)
        text = f"{option}: {error.message}" if ours else str(error)
    return " ".join(line.strip() for line in text.splitlines())


def exit_code(error: LoraServeError | OSError) -> int:
    """WRONG where the words, or a file that they name, were at fault."""
    if isinstance(error, OSError):
        return WRONG if error.filename is not None else FAILED
    return WRONG if isinstance(error, InvalidArgumentError) else FAILED
