"""The process tree of `loraserve serve`: what starts after what, and how it ends."""

import asyncio
import contextlib
import secrets
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraserve.checkpoint.base_names import names_served_model
from loraserve.checkpoint.packed_adapter import load_adapter_source
from loraserve.client import AdapterInfo, AsyncClient
from loraserve.errors import AlreadyExistsError, UnavailableError
from loraserve.named_files import named
from loraserve.security import Role, create_key
from loraserve.security.keys import KeyRing
from loraserve.serve import processes
from loraserve.serve.options import ServeOptions
from loraserve.serve.processes import Daemon

# Over the drain timeout, for what comes after it.
_STOP_GRACE_S = 10.0


class ServingTree:
    """`start`, then `stop`; both once."""

    def __init__(self, options: ServeOptions, say: Callable[[str], None]) -> None:
        """`say` gets a line for everything that happens."""
        self._options = options
        self._say = say
        self._directory = Path()
        self._node_key: Path | None = None
        self._admin_key: str | None = None
        self._keys: Path | None = options.keys
        self._controller: Daemon | None = None
        self._nodes: list[Daemon] = []
        self._gateway: Daemon | None = None
        self._adapters = 0

    @property
    def url(self) -> str:
        """Of the gateway."""
        return f"http://{self._gateway.address}" if self._gateway else ""

    @property
    def daemons(self) -> list[Daemon]:
        every = (self._controller, *self._nodes, self._gateway)
        return [daemon for daemon in every if daemon is not None]

    async def start(self) -> None:
        """When it returns every adapter is routable and the gateway answers. Raises LoraServeError;
        `stop` is to be called in any case."""
        self._directory = Path(tempfile.mkdtemp(prefix="loraserve-serve-"))  # for us alone
        self._make_keys()
        lead = await self._start_controller()
        await self._start_nodes(lead.address)
        await self._admit(lead.address)
        await self._start_gateway(lead.address)

    def _make_keys(self) -> None:
        """What the parts call each other with, where the cluster has keys."""
        options = self._options
        if options.keys is None and options.api_key is None:
            return
        # The file that daemons read: the given one's keys, and two of this tree alone.
        self._keys = self._directory / "keys"
        if options.keys is not None:
            KeyRing.load(options.keys)  # raises what is wrong with it
            shutil.copyfile(options.keys, self._keys)
        if options.api_key is not None:
            create_key(self._keys, "api-key", "default", Role.ADMIN, options.api_key)
        tag = secrets.token_hex(4)
        self._node_key = self._directory / "node.key"
        self._node_key.touch(0o600)
        self._node_key.write_text(create_key(self._keys, f"serve-node-{tag}", "default", Role.NODE))
        self._admin_key = create_key(self._keys, f"serve-admin-{tag}", "default", Role.ADMIN)

    def _spawn(self, name: str, *arguments: str) -> Daemon:
        kind = name.partition("-")[0]
        secured = ("--keys", str(self._keys)) if self._keys else ()
        extra = self._options.extra.get(kind, ())  # what holds the tree together wins
        return processes.spawn(
            name, f"loraserve.{kind}.main", self._directory, (*secured, *extra, *arguments)
        )

    async def _ready(self, *daemons: Daemon) -> None:
        timeout_s = self._options.start_timeout_s
        await asyncio.gather(*(processes.ready(d, timeout_s, self._say) for d in daemons))

    @property
    def _data(self) -> Path:
        return self._options.data_dir or self._directory / "data"

    async def _start_controller(self) -> Daemon:
        self._say("starting the controller")
        self._controller = self._spawn("controller", "--data-dir", str(self._data))
        await self._ready(self._controller)
        self._say(f"controller serves on {self._controller.address}")
        return self._controller

    async def _start_nodes(self, controller: str) -> None:
        options = self._options
        store = ("--store", str(self._data / "adapters"))
        key = ("--controller-key", str(self._node_key)) if self._node_key else ()
        for index in range(1, options.nodes + 1):
            node = self._spawn(
                f"node-{index}",
                *("--model", str(options.model), "--base", options.base),
                *("--node-id", f"node-{index}", "--controller", controller, *store, *key),
                *("--device", options.device, "--threads", str(options.node_threads)),
                *("--drain-timeout-s", f"{options.drain_timeout_s:g}"),
            )
            self._nodes.append(node)
            self._say(f"{node.name} (pid {node.process.pid}) loads {options.model}")
        await self._ready(*self._nodes)
        for node in self._nodes:
            self._say(f"{node.name} serves on {node.address}")

    async def _admit(self, controller: str) -> None:
        options = self._options
        added: list[AdapterInfo] = []
        async with AsyncClient(controller, api_key=self._admin_key) as client:
            await client.wait_routable((), timeout_s=options.start_timeout_s)
            admitted: dict[str, str] = {}
            for number, (name, path) in enumerate(options.adapters.items(), 1):
                with named("adapter", path):
                    packed = await asyncio.to_thread(load_adapter_source, path)
                    allow = options.allow_base_mismatch or names_served_model(packed, options.model)
                    about: Any = {"base": options.base, "allow_base_mismatch": allow}
                    try:
                        info = await client.adapters.add(name, packed, **about)
                        added.append(info)
                    except AlreadyExistsError:  # of an earlier run on the same data
                        info = await client.adapters.update(name, packed, **about)
                    del packed
                admitted[name] = info.revision
                self._say(
                    f"adapter {name} ({number} of {len(options.adapters)}): rank {info.max_rank}, "
                    f"{info.size_bytes} bytes"
                )
            await client.wait_admitted(added, timeout_s=options.start_timeout_s)
            for name, revision in admitted.items():
                await client.wait_routable(
                    [name],
                    base=options.base,
                    timeout_s=options.start_timeout_s,
                    revision=revision,
                )
            # Also those of an earlier run on the same data.
            self._adapters = len(await client.adapters.list(base=options.base))

    async def _start_gateway(self, controller: str) -> None:
        options = self._options
        self._say("starting the gateway")
        arguments = [
            *("--listen", options.listen, "--controller", controller, "--base", options.base),
            *("--tokenizer", str(options.model)),
            *("--drain-timeout-s", f"{options.drain_timeout_s:g}"),
        ]
        if self._node_key:
            arguments += ["--key-file", str(self._node_key)]
        if options.chat_template:
            arguments += ["--chat-template", str(options.chat_template)]
        for alias in options.aliases:
            arguments += ["--served-model-name", alias]
        for root in options.adapter_roots:
            arguments += ["--adapter-root", str(root)]
        if options.allow_base_mismatch:
            arguments.append("--allow-base-mismatch")
        self._gateway = self._spawn("gateway", *arguments)
        await self._ready(self._gateway)
        self._say(f"ready: {self.url}/v1 (model {options.base}, {self._adapters} adapters)")

    async def died(self) -> str:
        """Returns when a daemon has ended by itself: what there is to say of it."""
        daemon = await processes.ended(self.daemons)
        return f"{daemon.name} has ended with code {daemon.process.returncode}"

    async def stop(self) -> None:
        """The gateway first, which lets its requests end; then nodes, so that the controller hears
        them go. No process and no temporary file is there when it returns."""
        timeout_s = self._options.drain_timeout_s + _STOP_GRACE_S
        front = [self._gateway] if self._gateway else []
        lead = [self._controller] if self._controller else []
        codes: dict[str, int] = {}
        try:
            for group in (front, self._nodes, lead):
                codes |= await processes.stop(group, timeout_s)
        finally:
            for daemon in self.daemons:
                with contextlib.suppress(ProcessLookupError):
                    daemon.process.kill()
            if self._directory != Path():
                shutil.rmtree(self._directory, ignore_errors=True)
        # One that was not yet up ends by the signal itself.
        failed = {n: code for n, code in codes.items() if code not in (0, -signal.SIGTERM)}
        self._say(f"stopped; exit codes: {failed}" if failed else "stopped")


async def serve(options: ServeOptions, stopping: asyncio.Event, say: Callable[[str], None]) -> None:
    """Serves until `stopping`. Raises LoraServeError where a part cannot start, UnavailableError
    where one ended by itself."""
    tree = ServingTree(options, say)
    waiting = asyncio.create_task(stopping.wait())
    starting = asyncio.create_task(tree.start())
    dying: asyncio.Task[str] | None = None
    try:
        await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            dying = asyncio.create_task(tree.died())
            await asyncio.wait({dying, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if dying.done():
                raise UnavailableError("serve", dying.result())
        say("stopping: requests that run may end")
    finally:
        tasks = [task for task in (starting, waiting, dying) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await tree.stop()
