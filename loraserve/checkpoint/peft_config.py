"""What a PEFT LoRA configuration means for each module, by PEFT's own rules.

Everything that would change the answer and that LoRAServe lacks is refused by field name. Fields
PEFT does not know are refused where they are truthy: a newer PEFT may mean something by them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from loraserve.checkpoint.adapter_source import MAX_RANK
from loraserve.checkpoint.module_pattern import MatchBudget, ModulePattern
from loraserve.errors import InvalidCheckpointError, UnsupportedError

MAX_PATTERNS = 1024  # PEFT's EVA writes one per module
MAX_SHOWN = 80  # characters of an unknown field's name in its error
MAX_ALPHA = 1e30  # keeps every scaling a finite float32

# Absent, null or false means off. An empty object does not: PEFT reads it as "on, with defaults".
_LACKING = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "layer_replication",
    "megatron_config",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "target_parameters",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)

# About training, bookkeeping, or only read together with a field that is refused above.
_WITHOUT_EFFECT = frozenset(
    (
        *("auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout"),
        *("megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("qalora_group_size", "runtime_config", "ensure_weight_tying"),
    )
)
_UNDERSTOOD = frozenset(
    (
        *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora"),
        *("rank_pattern", "alpha_pattern", "bias", "init_lora_weights", "target_modules"),
        *("exclude_modules", "layers_to_transform", "layers_pattern"),
    )
)

# Initialisations that leave the base weights as they are, so the stored matrices mean plain LoRA.
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _flag(config: Mapping[str, Any], field: str) -> bool:
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise InvalidCheckpointError(field, "is neither true nor false")
    return bool(value)


def _rank(field: str, value: Any) -> int:
    if not _integer(value) or not 1 <= value <= MAX_RANK:
        raise InvalidCheckpointError(field, f"is not an integer within 1 and {MAX_RANK}")
    return int(value)


def _alpha(field: str, value: Any) -> float:
    if not (_integer(value) or isinstance(value, float)) or not abs(value) <= MAX_ALPHA:
        raise InvalidCheckpointError(field, f"is not a number of at most {MAX_ALPHA:g}")
    return value  # type: ignore[no-any-return]  # an int stays one: PEFT divides it as such


def _refuse_lacking(config: Mapping[str, Any]) -> None:
    for field in config:
        if not isinstance(field, str):
            raise InvalidCheckpointError("config", "has a key that is not a string")
    peft_type = config.get("peft_type", "LORA")
    if peft_type != "LORA":
        raise UnsupportedError("peft_type", f"{peft_type!r}, supported: LORA")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UnsupportedError("task_type", f"{config['task_type']!r}, supported: CAUSAL_LM")
    if config.get("bias", "none") != "none":
        raise UnsupportedError("bias", f"{config['bias']!r}, supported: 'none'")
    for field in _LACKING:
        value = config.get(field)
        if value is not None and value is not False and value != []:
            raise UnsupportedError(field, "is set, and LoRAServe lacks it")
    if config.get("alora_invocation_tokens") is not None:
        raise UnsupportedError("alora_invocation_tokens", "is set, and LoRAServe lacks it")
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool) and init is not None and init not in _HARMLESS_INITS:
        raise UnsupportedError(
            "init_lora_weights",
            f"{init!r} may have changed the base weights in training; convert the adapter when "
            "saving (path_initial_model_for_weight_conversion)",
        )
    for field, value in config.items():
        if field not in _UNDERSTOOD and field not in _WITHOUT_EFFECT and field not in _LACKING:
            try:
                harmless = not value
            except (TypeError, ValueError):  # an array, say
                harmless = False
            if not harmless:
                raise UnsupportedError(
                    field[:MAX_SHOWN] or "''", "is set, and its meaning is not known"
                )


class _PatternTable:
    """`rank_pattern` or `alpha_pattern`: the first pattern that matches wins."""

    def __init__(
        self, field: str, value: Any, check: Callable[[str, Any], Any], budget: MatchBudget
    ) -> None:
        if value is None:
            value = {}
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise InvalidCheckpointError(field, "is not an object")
        if len(value) > MAX_PATTERNS:
            raise UnsupportedError(field, f"{len(value)} patterns, the limit is {MAX_PATTERNS}")
        self._budget = budget
        self._rows = [
            (ModulePattern(field, text), check(f"{field}[{text!r}]", entry))
            for text, entry in value.items()
        ]

    def get(self, name: str, default: Any) -> Any:
        for pattern, value in self._rows:
            if pattern.matches_suffix(name, self._budget):
                return value
        return default


class _NameSelection:
    """`target_modules` or `exclude_modules`: a regular expression, or names matched as suffixes."""

    def __init__(self, field: str, value: Any, budget: MatchBudget) -> None:
        self._budget = budget
        self._pattern: ModulePattern | None = None
        self.names: frozenset[str] = frozenset()
        self.everything = False
        if isinstance(value, str):
            # PEFT resolves the wildcard when it injects; the stored tensors are the result.
            self.everything = field == "target_modules" and value.lower() == "all-linear"
            self._pattern = ModulePattern(field, "" if self.everything else value)
        elif isinstance(value, list | tuple | set | frozenset):
            if not all(isinstance(item, str) for item in value):
                raise InvalidCheckpointError(field, "has an entry that is not a string")
            self.names = frozenset(value)
        else:
            raise InvalidCheckpointError(field, "is neither a string nor a list of strings")

    @property
    def by_pattern(self) -> bool:
        return self._pattern is not None

    def __contains__(self, name: str) -> bool:
        if self.everything:
            return True
        if self._pattern is not None:
            return self._pattern.matches_whole(name, self._budget)
        parts = name.split(".")
        return any(".".join(parts[i:]) in self.names for i in range(len(parts)))


class LoraConfigRules:
    """A checked configuration. Module names are as in the model: model.layers.0.mlp.up_proj."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Absent fields have PEFT's defaults. Raises InvalidCheckpointError or UnsupportedError."""
        _refuse_lacking(config)
        name = config.get("base_model_name_or_path")
        if name is not None and not isinstance(name, str):
            raise InvalidCheckpointError("base_model_name_or_path", "is not a string")
        self.base_name: str | None = name or None
        self._rank = _rank("r", config.get("r", 8))
        self._alpha = _alpha("lora_alpha", config.get("lora_alpha", 8))
        self._rslora = _flag(config, "use_rslora")
        budget = MatchBudget("rank_pattern and alpha_pattern")
        self._ranks = _PatternTable("rank_pattern", config.get("rank_pattern"), _rank, budget)
        self._alphas = _PatternTable("alpha_pattern", config.get("alpha_pattern"), _alpha, budget)
        self._read_targets(config)

    def _read_targets(self, config: Mapping[str, Any]) -> None:
        budget = MatchBudget("target_modules and exclude_modules")
        targets, excluded = config.get("target_modules"), config.get("exclude_modules")
        self._targets = _NameSelection("target_modules", targets, budget) if targets else None
        self._excluded = _NameSelection("exclude_modules", excluded, budget) if excluded else None

        layers = config.get("layers_to_transform")
        layers = [layers] if _integer(layers) else layers
        if layers is not None and not (
            isinstance(layers, list | tuple | set) and all(map(_integer, layers))
        ):
            raise InvalidCheckpointError("layers_to_transform", "is not a list of integers")
        self._layers = frozenset(layers or ())
        pattern = config.get("layers_pattern")
        pattern = [pattern] if isinstance(pattern, str) and pattern else pattern
        if pattern and pattern not in (["layers"], ["model.layers"]):
            raise UnsupportedError("layers_pattern", f"{pattern!r}, supported: 'layers'")

    def targets(self, layer: int, name: str) -> bool:
        """Whether PEFT would put LoRA on this module; without target_modules, the tensors say."""
        if self._excluded is not None and name in self._excluded:
            return False
        if self._targets is None:
            return not self._layers or layer in self._layers
        if name not in self._targets:
            return False
        if self._targets.by_pattern or name in self._targets.names or not self._layers:
            return True
        return layer in self._layers

    def rank_and_scaling(self, name: str) -> tuple[int, float]:
        """What PEFT computes for this module: alpha/r, or alpha/sqrt(r) with rsLoRA."""
        rank: int = self._ranks.get(name, self._rank)
        alpha = self._alphas.get(name, self._alpha)
        return rank, float(alpha / (math.sqrt(rank) if self._rslora else rank))
