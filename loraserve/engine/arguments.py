"""Checks of what callers hand over, so that a value of the wrong kind is an error with a name."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from loraserve.errors import InvalidArgumentError, InvalidCheckpointError
from loraserve.named_files import os_error_text

MAX_SECONDS = 1e9  # longer is for ever, and fits every clock


def text(field: str, value: Any) -> str:
    """A string that UTF-8 can write."""
    try:
        if isinstance(value, str):
            value.encode()
            return value
    except UnicodeEncodeError:
        pass
    raise InvalidArgumentError(field, f"{value!r} is not Unicode text")


def integers(field: str, values: Iterable[Any]) -> list[int]:
    """32-bit integers, whatever holds them."""
    try:
        found = list(values)
    except TypeError:
        raise InvalidArgumentError(field, "is not a list of integers") from None
    if not all(isinstance(i, int) and -(2**31) <= i < 2**31 for i in found):
        raise InvalidArgumentError(field, "must be 32-bit integers")
    return found


def seconds(field: str, value: Any) -> float:
    """A positive number of seconds; None is 0, no limit."""
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InvalidArgumentError(field, f"{value!r} is not a positive number of seconds")
    return float(min(value, MAX_SECONDS))


def directory(field: str, value: Any) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise InvalidArgumentError(field, f"{value!r} is not a path")
    return Path(value)


@contextlib.contextmanager
def reading(field: str) -> Iterator[None]:
    """A file that cannot be read is an error of what names it."""
    try:
        yield
    except OSError as error:
        raise InvalidCheckpointError(field, os_error_text(error)) from None
