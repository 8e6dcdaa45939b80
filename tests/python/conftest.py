"""What the Python tests share."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from loraserve import wire
from loraserve.node import fetch, server
from loraserve.node.peers import source as peer_source

# A slow or busy machine is no failure of what is tested, and chance decides nothing: the same
# examples each time, others only where more of them are asked for (`make fuzz`).
settings.register_profile(
    "loraserve",
    deadline=None,
    derandomize="LORASERVE_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("loraserve")

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/, the home of `oracle`

if TYPE_CHECKING:
    from oracle.store import OracleStore


def pytest_configure(config: pytest.Config) -> None:
    # PEFT still reads the old name of a transformers property; nothing of ours can cure it.
    config.addinivalue_line(
        "filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    )


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> "OracleStore":
    """Random checkpoints, their adapters and references."""
    from oracle.store import OracleStore  # imports torch: only for the tests that need it

    return OracleStore(tmp_path_factory.mktemp("oracle"))


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """Times after which one side gives the other up, for tests that have both in one process: where
    the machine stands still for a moment, neither is lost. Tests of such a time set their own."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (fetch, server):
            patch.setattr(module, "FETCH_GRACE_S", 60.0)
        patch.setattr(peer_source, "_CALL_TIMEOUT_S", 60.0)
        patch.setattr(wire.channel_options, "__defaults__", (wire.KEEPALIVE_TIME_MS, 60_000))
        yield
