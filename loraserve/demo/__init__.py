"""The shipped demo: a small model, one adapter per skill, and what each must answer.

`model/` is a Hugging Face directory and `adapters/<skill>/` are PEFT directories; both are written
by `tools/train_demo.py`. Nothing here needs torch.
"""

from pathlib import Path

MODEL_NAME = "loraserve-demo"
MODEL_DIRECTORY = Path(__file__).parent / "model"
ADAPTERS_DIRECTORY = Path(__file__).parent / "adapters"


def adapter_directory(skill_name: str) -> Path:
    """The PEFT directory of the adapter that teaches this skill."""
    return ADAPTERS_DIRECTORY / skill_name
