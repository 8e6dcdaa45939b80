"""The words that `loraserve serve` hands to its daemons, checked by the daemons' own parsers before
any of them starts: that of the gateway, which starts last, would else come to nothing late."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from loraserve.errors import InvalidArgumentError
from loraserve.serve.processes import own_variables

# What each kind of daemon cannot do without.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "controller": ("--data-dir", "."),
    "node": ("--model", ".", "--controller", "127.0.0.1:1"),
    "gateway": ("--controller", "127.0.0.1:1"),
}
_LISTEN = ("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0")


def check_words(extra: Mapping[str, Sequence[str]]) -> None:
    """`extra`: by kind of daemon. Raises InvalidArgumentError that names kind and option."""
    for kind, words in extra.items():
        if words:
            _check(kind, [*_LISTEN, *words, *_NEEDED[kind]])


def _parser_of(kind: str) -> Callable[[Sequence[str]], Any]:
    # Late: no other command needs the code of all daemons.
    if kind == "controller":
        from loraserve.controller.main import parse_arguments
    elif kind == "node":
        from loraserve.node.main import parse_arguments
    else:
        from loraserve.gateway.main import parse_arguments
    return parse_arguments


def _check(kind: str, words: Sequence[str]) -> None:
    parse = _parser_of(kind)
    said = io.StringIO()
    try:
        with _as_a_child(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parse(words)
    except SystemExit:
        text = said.getvalue().strip().removeprefix(f"loraserve-{kind}: error: ")
        lines = text.removesuffix(" (--help lists the options)").splitlines()
        raise InvalidArgumentError(kind, lines[0] if lines else "cannot start so") from None


@contextlib.contextmanager
def _as_a_child() -> Iterator[None]:
    """Without the variables that a daemon would not get."""
    hidden = {name: os.environ.pop(name) for name in own_variables()}
    try:
        yield
    finally:
        os.environ.update(hidden)
