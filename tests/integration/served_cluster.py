"""A cluster of real daemons for a test."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from loraserve import Client
from loraserve.demo import MODEL_NAME, adapter_directory
from loraserve.demo.cluster import Cluster


@contextlib.contextmanager
def running(
    directory: Path, nodes: int = 2, skills: Sequence[str] = (), **options: Sequence[str]
) -> Iterator[tuple[Cluster, Client]]:
    """A cluster that serves these skills, and a client of it."""
    node_options = ["--threads", "1", *options.pop("node_options", [])]
    cluster = Cluster(directory, nodes, node_options=node_options, **options)
    asyncio.run(cluster.__aenter__())
    try:
        with Client(cluster.address) as client:
            client.wait_routable((), timeout_s=120)
            for name in skills:
                client.adapters.add(name, adapter_directory(name), base=MODEL_NAME)
            client.wait_routable(skills, timeout_s=120)
            yield cluster, client
    finally:
        codes = asyncio.run(cluster.stop())
    # A daemon that a test killed ends with the signal's negative number.
    assert all(code in (0, -9) for code in codes.values()), codes
