"""What the integration tests share."""

from collections.abc import Iterator

import pytest
from served_cluster import running

from loraserve import Client
from loraserve.demo.cluster import Cluster
from loraserve.demo.skills import SKILLS


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Client]]:
    """Two nodes and all skills; for tests that leave it as it was."""
    directory = tmp_path_factory.mktemp("cluster")
    with running(directory, skills=[skill.name for skill in SKILLS]) as found:
        yield found
