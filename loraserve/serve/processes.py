"""Daemons as child processes: started, waited for until they serve, stopped."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraserve.errors import DeadlineExceededError, UnavailableError
from loraserve.option_sources import OTHER_VARIABLES, PREFIX

# Between two looks whether a daemon is ready.
_LOOK_S = 0.02
_STILL_S = 10.0


@dataclass
class Daemon:
    """`address` and `metrics` are host:port, once it is ready."""

    name: str
    process: subprocess.Popen[bytes]
    port_file: Path
    metrics_port_file: Path
    address: str = ""
    metrics: str = ""


def own_variables() -> set[str]:
    """Those of the environment that hold our options. They have been read and are in the daemons'
    arguments; keys are no child's to see."""
    return {n for n in os.environ if n.startswith(PREFIX) and n not in OTHER_VARIABLES}


def spawn(name: str, module: str, directory: Path, arguments: Sequence[str]) -> Daemon:
    """Starts it; it ends when this process does, however that ends. Its log goes to our stderr.

    It listens where `arguments` say, by default on a free loopback port.
    """
    port_file, metrics_port_file = directory / f"{name}.port", directory / f"{name}.metrics"
    for stale in (port_file, metrics_port_file):
        stale.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", module),
        *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"),
        *arguments,
        *("--port-file", str(port_file), "--metrics-port-file", str(metrics_port_file)),
        *("--end-with", str(os.getpid())),
    ]
    environment = {name: os.environ[name] for name in os.environ.keys() - own_variables()}
    # A Ctrl-C in the terminal is the parent's to handle: it stops them in order.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        env=environment,
        start_new_session=True,
    )
    return Daemon(name, process, port_file, metrics_port_file)


async def ready(daemon: Daemon, timeout_s: float, say: Callable[[str], None]) -> None:
    """Returns when it serves. Raises UnavailableError where it ended, DeadlineExceededError."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    next_word_s = _STILL_S
    while not daemon.metrics_port_file.exists():
        code = daemon.process.poll()
        if code is not None:
            raise UnavailableError(daemon.name, f"ended with code {code} while it started")
        waited = loop.time() - start
        if waited > timeout_s:
            raise DeadlineExceededError(daemon.name, f"does not serve after {timeout_s:g} s")
        if waited > next_word_s:
            say(f"{daemon.name} is still starting, {waited:.0f} s")
            next_word_s += _STILL_S
        await asyncio.sleep(_LOOK_S)
    daemon.address = daemon.port_file.read_text().strip()
    daemon.metrics = daemon.metrics_port_file.read_text().strip()


async def ended(daemons: Sequence[Daemon]) -> Daemon:
    """The first that has ended."""
    while True:
        for daemon in daemons:
            if daemon.process.poll() is not None:
                return daemon
        await asyncio.sleep(0.1)


async def stop(daemons: Sequence[Daemon], timeout_s: float) -> dict[str, int]:
    """Asks all to end and waits; kills what has not within the time. Exit codes by name."""
    for daemon in daemons:
        daemon.process.terminate()
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout_s
    codes: dict[str, int] = {}
    for daemon in daemons:
        while (code := daemon.process.poll()) is None and loop.time() < end:
            await asyncio.sleep(_LOOK_S)
        if code is None:
            daemon.process.kill()
            code = await asyncio.to_thread(daemon.process.wait)
        codes[daemon.name] = code
    return codes
