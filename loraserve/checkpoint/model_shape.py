"""What an adapter must fit: the layers of a base model and the widths of its linear modules."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from loraserve.checkpoint.adapter_source import ATTENTION_MODULES
from loraserve.checkpoint.model_config import ModelConfig
from loraserve.errors import FailedPreconditionError


class AdaptedModule(Protocol):
    """One module of an adapter, as its source or its packed header tells it."""

    @property
    def layer(self) -> int: ...
    @property
    def module(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...


@dataclass(frozen=True)
class ModelShape:
    """Sizes in elements. `q_size` and `kv_size` are those of all heads together."""

    num_layers: int
    hidden_size: int
    q_size: int
    kv_size: int
    intermediate_size: int

    def features(self, module: str) -> tuple[int, int]:
        """(in, out) of one of MODULES."""
        return {
            "q_proj": (self.hidden_size, self.q_size),
            "k_proj": (self.hidden_size, self.kv_size),
            "v_proj": (self.hidden_size, self.kv_size),
            "o_proj": (self.q_size, self.hidden_size),
            "gate_proj": (self.hidden_size, self.intermediate_size),
            "up_proj": (self.hidden_size, self.intermediate_size),
            "down_proj": (self.intermediate_size, self.hidden_size),
        }[module]


def shape_of(config: ModelConfig) -> ModelShape:
    return ModelShape(
        config.num_layers,
        config.hidden_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
        config.intermediate_size,
    )


def check_shapes(modules: Iterable[AdaptedModule], shape: ModelShape, base: str) -> None:
    """Raises FailedPreconditionError that names the first tensor which the model `base` has no
    place for, as PEFT would call it."""
    for m in modules:
        block = "self_attn" if m.module in ATTENTION_MODULES else "mlp"
        name = f"model.layers.{m.layer}.{block}.{m.module}"
        if m.layer >= shape.num_layers:
            raise FailedPreconditionError(
                name, f"the adapter changes layer {m.layer}, {base!r} has {shape.num_layers}"
            )
        wanted = shape.features(m.module)
        if m.in_features != wanted[0]:
            raise FailedPreconditionError(
                f"{name}.lora_A.weight",
                f"shape {[m.rank, m.in_features]}, {base!r} takes {[m.rank, wanted[0]]}",
            )
        if m.out_features != wanted[1]:
            raise FailedPreconditionError(
                f"{name}.lora_B.weight",
                f"shape {[m.out_features, m.rank]}, {base!r} takes {[wanted[1], m.rank]}",
            )
