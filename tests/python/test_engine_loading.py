"""What keeps an engine from starting is a typed error that names the option, file or tensor."""

import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from oracle.comparison import compare
from oracle.store import OracleStore
from safetensors.torch import load_file, save_file

from loraserve import Engine, EngineConfig, SamplingParams
from loraserve.errors import InvalidCheckpointError, LoraServeError

NAME = "llama"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("device", "tpu"),
        ("isa", "x86-64-v9"),
        ("weight_dtype", "int3"),
        ("adapter_dtype", "float64"),
        ("activation_dtype", "float16"),
        ("activation_dtype", "bfloat16"),  # the weights of this one are float32
        ("memory_bytes", 1),
        ("memory_bytes", -1),
        ("block_size", 0),
        ("max_batch_tokens", 0),
        ("max_sequences", 0),
        ("threads", -1),
        ("max_step_adapter_bytes", -1),
        ("memory_bytes", 1 << 45),
        ("memory_bytes", 1 << 63),
        ("memory_bytes", 1 << 64),
        ("memory_bytes", 1.5),
        ("block_size", 24),
        ("block_size", 512),
        ("page_bytes", 17),
        ("page_bytes", 64),
        ("page_bytes", 1 << 62),
        ("max_batch_tokens", 1 << 20),
        ("max_batch_tokens", 1 << 40),
        ("max_sequences", 1 << 20),
        ("threads", 100_000),
        ("threads", "many"),
    ],
)
def test_a_bad_engine_option(store: OracleStore, option: str, value: Any) -> None:
    with pytest.raises(LoraServeError) as caught:
        Engine(EngineConfig(model=store.checkpoint(NAME), **{option: value}))
    assert option in caught.value.field


LOAD_UNDER_LIMIT = """
import resource, sys
from loraserve import Engine, EngineConfig
from loraserve.errors import ResourceExhaustedError
import loraserve.engine
path, memory, room = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with open("/proc/self/statm") as file:
    taken = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + room, taken + room))
try:
    Engine(EngineConfig(model=path, memory_bytes=memory, threads=1, max_batch_tokens=60000))
except ResourceExhaustedError as error:
    print(error.field)
"""


@pytest.mark.parametrize(
    ("memory", "room", "field"),
    [
        (1 << 30, 1 << 29, "memory_bytes"),  # of the pages
        (1 << 20, 40 << 20, "memory"),  # of the activations
    ],
)
def test_no_memory_left_while_loading(
    store: OracleStore, memory: int, room: int, field: str
) -> None:
    """Where the system refuses memory, loading ends in a typed error and not in a crash."""
    model = str(store.checkpoint("qwen3"))
    command = [sys.executable, "-c", LOAD_UNDER_LIMIT, model, str(memory), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [field]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_checkpoint_with_nan_is_refused(store: OracleStore, tmp_path: Path, value: float) -> None:
    mutant = tmp_path / "model"
    shutil.copytree(store.checkpoint("mistral"), mutant)
    path = mutant / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, path)
    with pytest.raises(InvalidCheckpointError) as caught:
        Engine(EngineConfig(model=mutant))
    assert "model.layers.1.mlp.up_proj.weight" in caught.value.field


def test_unaligned_tensors_are_read(store: OracleStore, tmp_path: Path) -> None:
    """The format does not ask for alignment; C++ does."""
    mutant = tmp_path / "model"
    shutil.copytree(store.checkpoint("mistral"), mutant)
    path = mutant / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes(
        (length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :]
    )
    params = SamplingParams(max_tokens=2, temperature=0.0, logprobs=0, prompt_logprobs=True)
    with Engine(EngineConfig(model=mutant)) as engine:
        answer = engine.submit([3, 1, 4], params).result(timeout_s=120.0)
    one = compare(answer, store.reference("mistral"), [3, 1, 4], tolerance=1e-4, greedy=True)
    assert one.agrees(1e-4), one


def test_a_model_that_is_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(LoraServeError) as caught:
            Engine(EngineConfig(model=path))
        assert caught.value.field
