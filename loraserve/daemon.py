"""What the command lines of the daemons share."""

import argparse
import asyncio
import contextlib
import ctypes
import os
import signal
from pathlib import Path
from typing import NoReturn

from loraserve.errors import InvalidArgumentError, UnavailableError

CANNOT_START = 2
_PR_SET_PDEATHSIG = 1


class DaemonParser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other refusal to start does."""

    def error(self, message: str) -> NoReturn:
        self.exit(CANNOT_START, f"{self.prog}: {message} (--help lists the options)\n")


def end_with_parent(parent_pid: int | None) -> None:
    """From now on this process gets SIGTERM when its parent is gone, however that ended. Linux.

    Raises UnavailableError where `parent_pid` is not the parent, as when it has gone already.
    """
    if parent_pid is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:
        raise UnavailableError("end-with", f"process {parent_pid} is not the parent of this one")


async def other_tasks_end(timeout_s: float = 1.0) -> None:
    """To be awaited last. The tasks of calls that a server cancelled end a moment after it; cut off
    by the end of the loop, gRPC would log each with a traceback."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=timeout_s)


class PortFile:
    """A file that gets a bound address, for scripts that wait for it."""

    def __init__(self, field: str, path: Path | None) -> None:
        """Raises InvalidArgumentError, naming the option `field`, where it cannot be written."""
        self._field = field
        self._path = path
        self._written = False
        if path is not None and not os.access(path.parent, os.W_OK | os.X_OK):
            raise InvalidArgumentError(field, f"{path.parent} is no directory to write to")

    def write(self, address: str) -> None:
        """Whole or not at all, so that nobody ever reads half of it."""
        if self._path is None:
            return
        staged = self._path.with_name(f"{self._path.name}.{os.getpid()}.part")
        try:
            staged.write_text(address + "\n")
            os.replace(staged, self._path)
        except OSError as error:
            staged.unlink(missing_ok=True)
            raise InvalidArgumentError(self._field, f"{self._path}: {error.strerror}") from None
        self._written = True

    def remove(self) -> None:
        """Unless it was not written: then it may be that of a daemon which runs."""
        if self._path is not None and self._written:
            with contextlib.suppress(OSError):
                self._path.unlink()
