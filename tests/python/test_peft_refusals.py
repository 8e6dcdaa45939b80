"""What would change an adapter's answer, or is broken, is refused by the name of its field."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import peft
import pytest

from loraserve.checkpoint.peft_adapter import read_arrays
from loraserve.checkpoint.peft_config import _WITHOUT_EFFECT
from loraserve.errors import InvalidCheckpointError, UnsupportedError

STEM = "base_model.model.model.layers"
Q_PROJ = f"{STEM}.0.self_attn.q_proj"


def pair(rank: int = 2, stem: str = Q_PROJ, dtype: Any = np.float32) -> dict[str, Any]:
    return {
        f"{stem}.lora_A.weight": np.ones((rank, 6), dtype),
        f"{stem}.lora_B.weight": np.ones((4, rank), dtype),
    }


def refused(
    kind: type[Exception], words: str, arrays: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    with pytest.raises(kind, match=words):
        read_arrays(arrays, config)


LACKING = {
    "peft_type": "ADALORA",
    "task_type": "SEQ_CLS",
    "use_dora": True,
    "bias": "lora_only",
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "fan_in_fan_out": True,
    "layer_replication": [[0, 2]],
    "megatron_config": {"a": 1},
    "trainable_token_indices": [1],
    "alora_invocation_tokens": [],
    "use_qalora": True,
    "target_parameters": ["experts"],
    "use_bdlora": {},  # PEFT: on, with its defaults
    "arrow_config": {},
    "kasa_config": {},
    "velora_config": {},
    "monteclora_config": {},
    "some_new_method": 1,
    "another": np.ones(3),
}


@pytest.mark.parametrize("field", LACKING)
def test_what_changes_the_answer_is_refused_by_name(field: str) -> None:
    refused(UnsupportedError, f"^{field}: ", pair(), {"r": 2, field: LACKING[field]})


def refusing_field(arrays: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    try:
        read_arrays(arrays, config)
    except (InvalidCheckpointError, UnsupportedError) as error:
        return error.field
    return None


def test_every_field_of_the_installed_peft_is_known() -> None:
    defaults = peft.LoraConfig(r=2).to_dict()
    assert read_arrays(pair(), defaults).modules[0].scaling == 4.0
    # A truthy value of no known type is never passed over in silence, but where it cannot matter.
    for field in defaults:
        found = refusing_field(pair(), defaults | {field: object()})
        assert found == (None if field in _WITHOUT_EFFECT else field)


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", 3]
)
def test_initialisations_that_change_the_base_are_refused(init: Any) -> None:
    refused(UnsupportedError, "^init_lora_weights: ", pair(), {"r": 2, "init_lora_weights": init})


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_keep_the_base_are_read(init: Any) -> None:
    assert read_arrays(pair(), {"r": 2, "init_lora_weights": init}).modules


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", 513),
        ("r", True),
        ("r", 2.0),
        ("r", "2"),
        ("lora_alpha", None),
        ("lora_alpha", float("inf")),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 10**400),
        ("lora_alpha", False),
        ("use_rslora", "yes"),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": 600}),
        ("rank_pattern", {"*q_proj": 2}),
        ("rank_pattern", {"(q_proj": 2}),
        ("rank_pattern", {"[q": 2}),
        ("alpha_pattern", {"q_proj": "2"}),
        ("alpha_pattern", {1: 2}),
        ("target_modules", 5),
        ("target_modules", ["q_proj", 5]),
        ("layers_to_transform", ["1"]),
        ("layers_to_transform", True),
        ("base_model_name_or_path", 7),
    ],
    ids=str,
)
def test_broken_configs_are_refused_by_name(field: str, value: Any) -> None:
    refused(InvalidCheckpointError, f"^{field}", pair(), {"r": 2} | {field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank_pattern", {"(?i)q_proj": 2}),
        ("rank_pattern", {r"(q)\1": 2}),
        ("rank_pattern", {"(?=q).*": 2}),
        ("rank_pattern", {"a" * 600: 2}),
        ("rank_pattern", {f"m{i}": 2 for i in range(1025)}),
        ("alpha_pattern", {"(" * 20 + "q" + ")" * 20: 2}),
        ("layers_pattern", ["h.*"]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_patterns_beyond_the_subset_are_refused_by_name(field: str, value: Any) -> None:
    refused(UnsupportedError, f"^{field}: ", pair(), {"r": 2} | {field: value})


@pytest.mark.parametrize(
    "name",
    [
        f"{Q_PROJ}.lora_magnitude_vector",
        f"{Q_PROJ}.lora_B.bias",
        f"{Q_PROJ}.lora_A.other.weight",
        f"{Q_PROJ}.lora_C.weight",
        "base_model.model.lm_head.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        f"{STEM}.0.mlp.q_proj.lora_A.weight",
        f"{STEM}.0.self_attn.up_proj.lora_A.weight",
        f"{STEM}.0.mlp.router_proj.lora_A.weight",
        f"{STEM}.01.self_attn.q_proj.lora_A.weight",
        f"{STEM}.-1.self_attn.q_proj.lora_A.weight",
        f"{STEM}.1024.self_attn.q_proj.lora_A.weight",
        f"{STEM}.٣.self_attn.q_proj.lora_A.weight",
        f"{Q_PROJ}.lora_A.weight\n",
        "",
    ],
)
def test_unexpected_tensors_are_refused_by_name(name: str) -> None:
    words = re.escape(f"tensor {name!r}: ")
    refused(UnsupportedError, words, pair() | {name: np.ones((2, 6), np.float32)}, {"r": 2})


def test_one_tensor_in_two_spellings_is_refused() -> None:
    twice = pair() | {f"{Q_PROJ}.lora_A.default.weight": np.ones((2, 6), np.float32)}
    refused(InvalidCheckpointError, "lora_A.default.weight': is .* again", twice, {"r": 2})


@pytest.mark.parametrize("side", ["A", "B"])
def test_half_a_pair_is_refused(side: str) -> None:
    arrays = pair()
    del arrays[f"{Q_PROJ}.lora_{side}.weight"]
    refused(InvalidCheckpointError, f"has no lora_{side} beside it", arrays, {"r": 2})


def test_a_tensor_that_peft_would_drop_is_refused() -> None:
    for config in (
        {"target_modules": ["v_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*\.v_proj"},
    ):
        words = "does not put LoRA on this module"
        refused(InvalidCheckpointError, words, pair(), {"r": 2} | config)


@pytest.mark.parametrize(
    ("side", "array", "words"),
    [
        ("A", np.ones((3, 6), np.float32), "rank 3, but the configuration says r = 2"),
        ("B", np.ones((4, 3), np.float32), "rank 3, but the configuration says r = 2"),
        ("A", np.ones((513, 6), np.float32), "rank 513, the limit is 512"),
        ("A", np.ones(6, np.float32), "1 dimensions, expected 2"),
        ("B", np.ones((4, 2, 1), np.float32), "3 dimensions, expected 2"),
        ("A", np.ones((2, 0), np.float32), "0 features"),
        ("B", np.full((4, 2), np.nan, np.float32), "element 0 is NaN or infinite"),
        ("B", np.array([[0, 1], [2, -np.inf]], np.float32), "element 3 is NaN or infinite"),
    ],
)
def test_broken_matrices_are_refused_by_name(side: str, array: Any, words: str) -> None:
    name = f"{Q_PROJ}.lora_{side}.weight"
    refused(
        InvalidCheckpointError, f"{re.escape(name)}': {words}", pair() | {name: array}, {"r": 2}
    )


def test_mixed_dtypes_in_a_pair_are_refused() -> None:
    arrays = pair() | {f"{Q_PROJ}.lora_B.weight": np.ones((4, 2), np.float16)}
    refused(UnsupportedError, "lora_B.*F16, but its lora_A is F32", arrays, {"r": 2})
