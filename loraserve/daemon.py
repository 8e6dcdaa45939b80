"""What the command lines of the daemons share."""

import argparse
import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Protocol

from loraserve.command_line import WRONG, Parser, told
from loraserve.errors import InvalidArgumentError, LoraServeError, UnavailableError
from loraserve.logs import set_up_logs
from loraserve.named_files import wrong
from loraserve.option_sources import OptionSources

CANNOT_START = WRONG
_PR_SET_PDEATHSIG = 1


class DaemonParser(Parser):
    """Options come from the environment and a file as well; see loraserve.option_sources."""

    def __init__(
        self,
        *,
        section: str,
        shared: Mapping[str, str],
        rivals: frozenset[str] = frozenset(),
        **settings: Any,
    ) -> None:
        """See OptionSources."""
        super().__init__(allow_abbrev=False, **settings)
        self._sources = OptionSources(self, section, shared, rivals)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        argv = sys.argv[1:] if args is None else list(args)
        try:
            words = self._sources.words(argv)
        except InvalidArgumentError as error:
            self.error(told(self, error))
        return super().parse_known_args([*words, *argv], namespace)


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
            raise wrong(field, path.parent, "is no directory to write to")

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
            raise wrong(self._field, self._path, error) from None
        self._written = True

    def remove(self) -> None:
        """Unless it was not written: then it may be that of a daemon which runs."""
        if self._path is not None and self._written:
            with contextlib.suppress(OSError):
                self._path.unlink()


class DaemonServer(Protocol):
    """`start` raises LoraServeError; `stop` is called after it in any case."""

    address: str
    metrics_address: str

    async def start(self) -> None: ...
    async def stop(self) -> None: ...


async def _serve(server: DaemonServer, arguments: argparse.Namespace, log: logging.Logger) -> None:
    port_file = PortFile("port-file", arguments.port_file)
    metrics_port_file = PortFile("metrics-port-file", arguments.metrics_port_file)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    starting = asyncio.create_task(server.start())
    waiting = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            log.info("stopped while starting")
            # A thread that loads cannot be interrupted, and nothing is there yet to be saved.
            os._exit(0)
        starting.result()
        port_file.write(server.address)
        metrics_port_file.write(server.metrics_address)
        if server.metrics_address:
            log.info("metrics on http://%s/metrics", server.metrics_address)
        await waiting
        log.info("stopping")
    finally:
        waiting.cancel()
        port_file.remove()
        metrics_port_file.remove()
        await server.stop()
        await other_tasks_end()
    log.info("stopped")


def run_daemon(
    prog: str,
    arguments: argparse.Namespace,
    log: logging.Logger,
    make_server: Callable[[], DaemonServer],
    run_loop: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run,
) -> int:
    """Serves until SIGTERM or SIGINT, on the event loop of `run_loop`. Exit code: 0 after a signal,
    CANNOT_START where one line on stderr says why."""
    set_up_logs(prog, arguments.log_level, arguments.log_format)

    # Texts are tokenized one at a time; threads that share in one would only be in the way.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    async def run() -> None:
        await _serve(make_server(), arguments, log)

    try:
        end_with_parent(arguments.end_with)
        run_loop(run())
    except (LoraServeError, OSError) as error:
        line = told(getattr(arguments, "parser", None), error)
        if arguments.log_format == "json":
            log.error("%s", line)
        else:
            print(f"{prog}: error: {line}", file=sys.stderr)
        return CANNOT_START
    return 0
