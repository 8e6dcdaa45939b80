"""What the Python tests share."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

# A slow or busy machine is no failure of what is tested.
settings.register_profile("loraserve", deadline=None)
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
