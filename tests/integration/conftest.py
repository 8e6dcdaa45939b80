"""What the integration tests share."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from served_cluster import running
from served_http import ServedHttp, serving

from loraserve import Client
from loraserve.demo import ADAPTERS_DIRECTORY
from loraserve.demo.cluster import Cluster
from loraserve.demo.skills import SKILLS

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/, the home of `oracle`


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Client]]:
    """Two nodes and all skills; for tests that leave it as it was."""
    directory = tmp_path_factory.mktemp("cluster")
    with running(directory, skills=[skill.name for skill in SKILLS]) as found:
        yield found


@pytest.fixture(scope="session")
def front() -> Iterator[ServedHttp]:
    """`loraserve serve --demo` with two nodes, and with the demo's adapters to load under other
    names; for tests that leave it as it was."""
    options = ("--nodes", "2", "--threads", "1", "--adapter-root", str(ADAPTERS_DIRECTORY))
    with serving("--demo", *options) as served:
        yield served
