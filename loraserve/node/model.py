"""The real engine behind a node, and what the node reports of its machine."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loraserve.checkpoint.model_shape import shape_of
from loraserve.checkpoint.packed_adapter import PackedAdapter, load_adapter_source
from loraserve.errors import InvalidArgumentError
from loraserve.named_files import named, wrong
from loraserve.node.engine_api import LoadedModel, ModelFacts
from loraserve.v1 import common_pb2


@dataclass(frozen=True)
class ModelOptions:
    """What the engine is made of; 0 is the engine's own choice. Sizes in bytes."""

    path: Path
    base: str = ""
    """The name of the base model; empty: the directory's."""
    device: str = "cpu"
    weight_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    activation_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    memory_bytes: int = 0
    max_sequences: int = 64
    max_batch_tokens: int = 512
    threads: int = 0
    failure_domain: str | None = None
    """None: the host's name."""

    @property
    def base_name(self) -> str:
        return self.base or self.path.resolve().name


def open_model(options: ModelOptions) -> LoadedModel:
    """Loads the model; takes as long as that takes. Raises LoraServeError."""
    if not options.path.is_dir():
        raise wrong("model", options.path, "is no directory")
    try:
        # Late: the engine is a compiled extension, and the rest of the node is tested without it.
        from loraserve.engine import Engine, EngineConfig
    except ImportError as error:
        raise InvalidArgumentError("engine", f"is not built for this Python: {error}") from None
    config = EngineConfig(
        model=options.path,
        base_name=options.base or None,
        device=options.device,
        weight_dtype=options.weight_dtype,
        activation_dtype=options.activation_dtype,
        memory_bytes=options.memory_bytes or None,
        max_sequences=options.max_sequences,
        max_batch_tokens=options.max_batch_tokens,
        threads=options.threads,
    )
    with named("model", options.path):
        engine = Engine(config)
    model = engine.model_config
    facts = ModelFacts(
        options.base_name,
        engine.base_digest or "",
        model.max_position,
        model.vocab_size,
        shape_of(model),
    )
    return LoadedModel(engine, facts)


def read_adapter(path: Path) -> PackedAdapter:
    """A PEFT directory or a packed file, checked. Blocks. Raises LoraServeError."""
    return load_adapter_source(path)


def cpu_name() -> str:
    """As the system names the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Main memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_of(options: ModelOptions) -> common_pb2.Device:
    domain = options.failure_domain
    return common_pb2.Device(
        kind=common_pb2.DEVICE_KIND_CPU if options.device == "cpu" else common_pb2.DEVICE_KIND_CUDA,
        name=cpu_name() if options.device == "cpu" else options.device,
        memory_bytes=memory_bytes() if options.device == "cpu" else 0,
        failure_domain=(platform.node() if domain is None else domain)[:64],
    )
