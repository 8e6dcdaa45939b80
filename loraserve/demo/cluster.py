"""A controller and nodes as processes of their own, on free loopback ports, for as long as the
demo or a test wants them."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from loraserve.demo import MODEL_DIRECTORY, MODEL_NAME
from loraserve.errors import DeadlineExceededError, UnavailableError

# Of a log, where a daemon has died.
_LAST_LINES = 12
# Of each node; the demo's adapters take an eighth of it.
_HOST_POOL_BYTES = 64 << 20


@dataclass
class Daemon:
    """`address` and `metrics` are host:port, once it is ready."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    port_file: Path
    metrics_port_file: Path
    address: str = ""
    metrics: str = ""

    def last_words(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_LAST_LINES:])


class Cluster:
    """An async context manager. Needs Linux; everything lies in `directory`."""

    READY_TIMEOUT_S = 60.0
    STOP_TIMEOUT_S = 20.0

    def __init__(
        self,
        directory: Path,
        nodes: int = 2,
        *,
        model: Path = MODEL_DIRECTORY,
        base: str = MODEL_NAME,
        controller_options: Sequence[str] = (),
        node_options: Sequence[str] = (),
        gateway_options: Sequence[str] | None = None,
    ) -> None:
        """`gateway_options`: None for a cluster without a gateway."""
        self._directory = directory
        self._model = model
        self._base = base
        self._count = nodes
        self._controller_options = tuple(controller_options)
        self._node_options = tuple(node_options)
        self._gateway_options = gateway_options
        self.controller: Daemon | None = None
        self.gateway: Daemon | None = None
        self.nodes: dict[str, Daemon] = {}

    @property
    def daemons(self) -> list[Daemon]:
        every = (self.controller, *self.nodes.values(), self.gateway)
        return [d for d in every if d is not None]

    @property
    def address(self) -> str:
        """Of the controller."""
        if self.controller is None:
            raise UnavailableError("cluster", "has not started")
        return self.controller.address

    def _spawn(self, name: str, module: str, arguments: Sequence[str]) -> Daemon:
        directory = self._directory
        log = directory / f"{name}.log"
        port_file, metrics_port_file = directory / f"{name}.port", directory / f"{name}.metrics"
        for stale in (port_file, metrics_port_file):
            stale.unlink(missing_ok=True)
        command = [
            *(sys.executable, "-m", module),
            *("--listen", "127.0.0.1:0", "--port-file", str(port_file)),
            *("--metrics-listen", "127.0.0.1:0", "--metrics-port-file", str(metrics_port_file)),
            *("--end-with", str(os.getpid())),
            *arguments,
        ]
        with log.open("ab") as out:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                # A Ctrl-C in the terminal is the parent's to handle: it stops them in order.
                start_new_session=True,
            )
        return Daemon(name, process, log, port_file, metrics_port_file)

    async def _ready(self, daemon: Daemon) -> None:
        """Raises UnavailableError with the daemon's last words where it ended."""
        end = asyncio.get_running_loop().time() + self.READY_TIMEOUT_S
        while not daemon.metrics_port_file.exists():
            if daemon.process.poll() is not None:
                raise UnavailableError(
                    daemon.name,
                    f"ended with code {daemon.process.returncode}:\n{daemon.last_words()}",
                )
            if asyncio.get_running_loop().time() > end:
                raise DeadlineExceededError(
                    daemon.name, f"is not ready after {self.READY_TIMEOUT_S:g} s"
                )
            await asyncio.sleep(0.02)
        daemon.address = daemon.port_file.read_text().strip()
        daemon.metrics = daemon.metrics_port_file.read_text().strip()

    async def start_controller(self) -> Daemon:
        """Also after it was killed: on the same data, at the same address."""
        listen = ("--listen", self.controller.address) if self.controller else ()
        self.controller = self._spawn(
            "controller",
            "loraserve.controller.main",
            ["--data-dir", str(self._directory / "data"), *listen, *self._controller_options],
        )
        await self._ready(self.controller)
        return self.controller

    def spawn_node(self, name: str, options: Sequence[str] = ()) -> Daemon:
        """Starts a node without waiting for it; `ready` does. `options` come last."""
        self.nodes[name] = self._spawn(
            name,
            "loraserve.node.main",
            [
                *("--model", str(self._model), "--base", self._base, "--node-id", name),
                *("--controller", self.address, "--store", str(self._directory / "data/adapters")),
                *("--host-pool-bytes", str(_HOST_POOL_BYTES), *self._node_options, *options),
            ],
        )
        return self.nodes[name]

    async def start_gateway(self, options: Sequence[str] = ()) -> Daemon:
        """Later options win."""
        self.gateway = self._spawn(
            "gateway",
            "loraserve.gateway.main",
            [
                *("--controller", self.address, "--base", self._base),
                *("--tokenizer", str(self._model), *options),
            ],
        )
        await self._ready(self.gateway)
        return self.gateway

    async def ready(self, *daemons: Daemon) -> None:
        await asyncio.gather(*map(self._ready, daemons))

    async def __aenter__(self) -> "Cluster":
        try:
            await self.start_controller()
            await self.ready(*[self.spawn_node(f"node-{i}") for i in range(1, self._count + 1)])
            if self._gateway_options is not None:
                await self.start_gateway(self._gateway_options)
        except BaseException:
            await self.stop()
            raise
        return self

    async def stop(self) -> dict[str, int]:
        """The gateway first, which lets its requests end, then nodes, so that the controller hears
        them go; exit codes by name. Kills what does not end in time."""
        codes = {}
        front = [self.gateway] if self.gateway else []
        lead = [self.controller] if self.controller else []
        for group in (front, list(self.nodes.values()), lead):
            for daemon in group:
                daemon.process.terminate()
            for daemon in group:
                codes[daemon.name] = await asyncio.to_thread(self._reap, daemon.process)
        return codes

    def _reap(self, process: subprocess.Popen[bytes]) -> int:
        try:
            return process.wait(self.STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()


def threads_per_node(nodes: int) -> int:
    """Engine threads such that nodes share this machine's cores."""
    return max(1, len(os.sched_getaffinity(0)) // nodes)
