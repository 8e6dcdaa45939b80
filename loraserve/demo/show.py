"""`loraserve demo`: a controller and two nodes on this machine, ten adapters of ranks 4 to 128, a
minute of requests, every answer checked."""

import asyncio
import contextlib
import json
import re
import tempfile
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live

from loraserve.client import AsyncClient
from loraserve.client.types import AdapterInfo
from loraserve.demo import MODEL_NAME, adapter_directory, view
from loraserve.demo.cluster import Cluster, threads_per_node
from loraserve.demo.replay import Progress, replay
from loraserve.demo.skills import SKILLS
from loraserve.demo.tally import Tally, tally
from loraserve.demo.workload import arrivals
from loraserve.errors import AlreadyExistsError, InvalidArgumentError

_FRAME_S = 0.5
# Between progress lines, where there is no terminal to redraw.
_LINE_S = 10.0
_PEER_READS = r'^loraserve_peer_reads_total{transport="(\w+)"} (\S+)$'


@dataclass(frozen=True)
class DemoOptions:
    seconds: float = 60.0
    rate_per_s: float = 100.0
    burst: int = 200
    """Requests that come all at once in the middle."""
    nodes: int = 2
    seed: int = 0
    as_json: bool = False
    directory: Path | None = None
    """Where data and logs stay; None: a temporary directory that goes."""


async def _admit(client: AsyncClient, name: str) -> AdapterInfo:
    """Adds a skill's adapter, or makes it what it is now where an earlier demo left its data."""
    path = adapter_directory(name)
    try:
        return await client.adapters.add(name, path, base=MODEL_NAME)
    except AlreadyExistsError:
        return await client.adapters.update(name, path, base=MODEL_NAME)


@contextlib.asynccontextmanager
async def _running(
    options: DemoOptions, console: Console
) -> AsyncIterator[tuple[Cluster, AsyncClient]]:
    """A cluster that serves all skills, each on one node, and a client of it."""
    with contextlib.ExitStack() as stack:
        directory = options.directory or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="loraserve-demo-"))
        )
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidArgumentError("directory", f"{directory}: {error.strerror}") from None
        console.print(f"starting a controller and {options.nodes} nodes; logs in {directory}")
        threads = str(threads_per_node(options.nodes))
        cluster = Cluster(
            directory,
            options.nodes,
            controller_options=["--replicas", "1"],
            node_options=["--threads", threads],
        )
        async with cluster, AsyncClient(cluster.address) as client:
            for daemon in cluster.daemons:
                console.print(
                    f"  {daemon.name} (pid {daemon.process.pid}) on {daemon.address}, "
                    f"metrics on http://{daemon.metrics}/metrics"
                )
            await client.wait_routable(())
            for skill in SKILLS:
                info = await _admit(client, skill.name)
                console.print(
                    f"  adapter {skill.name}: rank {skill.rank}, {info.size_bytes} bytes, "
                    f"{skill.description}"
                )
            await client.wait_routable([skill.name for skill in SKILLS])
            yield cluster, client
        console.print("the daemons have stopped")


async def _watched(
    client: AsyncClient, progress: Progress, options: DemoOptions, console: Console
) -> None:
    """Shows the progress until cancelled."""
    if not console.is_terminal:
        while True:
            await asyncio.sleep(_LINE_S)
            done = progress.outcomes
            console.print(
                f"{progress.elapsed_s:.0f} s: {progress.sent} sent, "
                f"{sum(o.correct for o in done)} of {len(done)} right, "
                f"{progress.in_flight.total()} in flight"
            )
    with Live(console=console, auto_refresh=False) as screen:
        try:
            while True:
                screen.update(
                    view.live(progress, options.seconds, client.routes, console.width), refresh=True
                )
                await asyncio.sleep(_FRAME_S)
        finally:
            screen.update("", refresh=True)


def _peer_reads(cluster: Cluster) -> Counter[str]:
    """By transport, as the nodes' metrics say."""
    found: Counter[str] = Counter()
    for node in cluster.nodes.values():
        with urllib.request.urlopen(f"http://{node.metrics}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        for transport, count in re.findall(_PEER_READS, text, re.MULTILINE):
            found[transport] += round(float(count))
    return found


async def run(options: DemoOptions, console: Console) -> Tally:
    """The whole demo. Raises LoraServeError where the cluster cannot start."""
    due = arrivals(options.seconds, options.rate_per_s, options.burst, seed=options.seed)
    progress = Progress(len(due))
    async with contextlib.AsyncExitStack() as stack:
        cluster, client = await stack.enter_async_context(_running(options, console))
        # Half of what it sends comes to a node that has to read the adapter from another one.
        stranger = await stack.enter_async_context(
            AsyncClient(nodes=[node.address for node in cluster.nodes.values()])
        )
        console.print(
            f"{len(due)} requests in {options.seconds:g} s: Poisson arrivals, power-law popularity "
            f"of adapters, and {options.burst} requests at once in the middle, from a client "
            "without routes"
        )
        watching = asyncio.create_task(_watched(client, progress, options, console))
        try:
            await replay(client, due, progress, burst_client=stranger)
            seconds = progress.elapsed_s
        finally:
            watching.cancel()
            await asyncio.wait({watching})
        holders = view.holders(client.routes)
        peer_reads = await asyncio.to_thread(_peer_reads, cluster)
    result = tally(
        progress.outcomes,
        len(due),
        seconds,
        progress.most_in_flight,
        progress.most_adapters,
        holders,
        peer_reads,
    )
    console.print(view.summary(result, console.width))
    if options.as_json:
        console.file.flush()
        print(json.dumps(result.to_json()), flush=True)
    return result
