"""What tools/train_demo.py writes beside the weights is what is shipped, byte for byte."""

import sys
from pathlib import Path

from loraserve import demo

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import demo_data


def test_the_tokenizer_and_the_chat_template_are_those_shipped(tmp_path: Path) -> None:
    demo_data.save_tokenizer(tmp_path, 256)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(written) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name, content in written.items():
        assert content == (demo.MODEL_DIRECTORY / name).read_bytes(), name
