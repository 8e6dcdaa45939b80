"""PEFT adapters are read as PEFT itself reads them; what changes the answer is refused by name."""

import json
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from loraserve.checkpoint.adapter_source import MODULES, AdapterSource
from loraserve.checkpoint.module_pattern import MatchBudget, ModulePattern
from loraserve.checkpoint.peft_adapter import read_arrays, read_peft_directory
from loraserve.errors import InvalidCheckpointError, UnsupportedError

STEM = "base_model.model.model.layers"
Q_PROJ = f"{STEM}.0.self_attn.q_proj"


def tiny_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=12,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def save_with_peft(
    directory: Path, dtype: torch.dtype = torch.float32, **options: Any
) -> peft.PeftModel:
    """A random adapter saved by PEFT, and the model that PEFT makes of what it saved."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        **{"target_modules": list(MODULES), "task_type": "CAUSAL_LM"} | options
    )
    model = peft.get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(str(directory))
    return peft.PeftModel.from_pretrained(
        tiny_llama(), str(directory), autocast_adapter_dtype=False
    )


def lora_layers(model: peft.PeftModel) -> Iterator[tuple[int, str, Any]]:
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            parts = name.split(".")
            yield int(parts[parts.index("layers") + 1]), parts[-1], layer


def as_torch(array: np.ndarray[Any, Any], dtype: str) -> torch.Tensor:
    copied = torch.from_numpy(array.astype(np.int16) if dtype == "BF16" else array.copy())
    return copied.view(torch.bfloat16) if dtype == "BF16" else copied


def assert_as_peft(source: AdapterSource, model: peft.PeftModel) -> None:
    ours = {(m.layer, m.module): m for m in source.modules}
    theirs = {(layer, module): lora for layer, module, lora in lora_layers(model)}
    assert ours.keys() == theirs.keys()
    assert ours
    for key, lora in theirs.items():
        module = ours[key]
        assert module.rank == lora.r["default"]
        assert module.scaling == lora.scaling["default"]  # bitwise: the same float64
        assert torch.equal(as_torch(module.a, module.dtype), lora.lora_A["default"].weight)
        assert torch.equal(as_torch(module.b, module.dtype), lora.lora_B["default"].weight)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 8, "lora_alpha": 16},
        {"r": 3, "lora_alpha": 7, "use_rslora": True},
        {"r": 1, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 9}},
        {
            "r": 4,
            "rank_pattern": {r"model\.layers\.(1|1[01])\.self_attn\.[kv]_proj": 7, "k_proj": 3},
            "alpha_pattern": {r"layers\.[0-9]\.mlp\..*": 5, "^model.layers.10.mlp.up_proj": 11},
        },
        # A suffix: "_proj" alone matches nothing, "1.mlp.up_proj" not layer 11, first match wins.
        {"rank_pattern": {"_proj": 5, "1.mlp.up_proj": 6, ".*_proj": 7, "q_proj": 8}},
        {"alpha_pattern": {"[qk]_proj|up_proj": 3.5, r"\w+_proj": 1}, "use_rslora": True},
        {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(v|up)_proj"},
        {
            "target_modules": "all-linear",
            "exclude_modules": ["k_proj", "model.layers.3.mlp.up_proj"],
        },
        {"exclude_modules": r".*\.mlp\..*"},
        {"layers_to_transform": [1, 11], "layers_pattern": "layers"},
        {"layers_to_transform": 2, "target_modules": ["v_proj", "model.layers.0.self_attn.q_proj"]},
        {"init_lora_weights": "orthogonal", "r": 4},
        {"r": 4, "lora_dropout": 0.5, "init_lora_weights": "gaussian"},
    ],
    ids=lambda options: ",".join(options),
)
def test_ranks_scaling_and_weights_are_those_of_peft(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model = save_with_peft(tmp_path, **options)
    assert_as_peft(read_peft_directory(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_source_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    model = save_with_peft(tmp_path, dtype, r=5)
    source = read_peft_directory(tmp_path)
    expected = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert {m.dtype for m in source.modules} == {expected}
    assert_as_peft(source, model)
    # The same tensors handed over in memory, in both spellings.
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert_as_peft(read_arrays(tensors, config), model)
    spelled = {re.sub("(lora_.)", r"\1.default", name): t for name, t in tensors.items()}
    assert_as_peft(read_arrays(spelled, model.peft_config["default"].to_dict()), model)


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


def test_every_field_of_the_installed_peft_is_known() -> None:
    defaults = peft.LoraConfig(r=2).to_dict()
    assert read_arrays(pair(), defaults).modules[0].scaling == 4.0
    for field in defaults:
        value = object()  # truthy and of no known type: must never be passed over in silence ...
        try:
            read_arrays(pair(), defaults | {field: value})
        except (InvalidCheckpointError, UnsupportedError) as error:
            assert error.field == field
        else:  # ... but where it cannot matter
            from loraserve.checkpoint.peft_config import _WITHOUT_EFFECT

            assert field in _WITHOUT_EFFECT


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
    "pattern", ["(a+)+b", "((.*)*)*x", "(.|.|.)*(.|.)*(.?){99}z", "(.*.*.*)*y"]
)
def test_catastrophic_patterns_cost_little(pattern: str) -> None:
    arrays = {}
    for layer in range(40):
        arrays |= pair(stem=f"{STEM}.{layer}.mlp.up_proj")
    start = time.monotonic()
    # Whether it is answered or given up, it is soon; re.match would outlive us.
    try:
        assert len(read_arrays(arrays, {"r": 2, "rank_pattern": {pattern: 3}}).modules) == 40
    except UnsupportedError as error:
        assert "too long" in str(error)
    assert time.monotonic() - start < 10


def test_a_hostile_pattern_is_stopped_by_the_budget() -> None:
    pattern = ModulePattern("rank_pattern", "(((((((.?){255}){255}){255}){255}){255}){255}x){255}z")
    budget = MatchBudget("rank_pattern", 20_000)
    with pytest.raises(UnsupportedError, match="^rank_pattern: .*too long"):
        for _ in range(10_000):
            pattern.matches_suffix("model.layers.0.mlp.up_proj", budget)


ATOMS = st.sampled_from(
    [*"abq_", ".", r"\.", r"\d", r"\w", r"\W", "[ab]", "[^q]", "[a-q_]", r"[\d.]", "1", "^", "$"]
)
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,}", "{0,2}", "*?"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(PATTERNS, st.text("abq_.1", max_size=7))
def test_patterns_match_exactly_what_re_matches(pattern: str, name: str) -> None:
    budget = MatchBudget("pattern")
    ours = ModulePattern("pattern", pattern)
    expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
    assert ours.matches_suffix(name, budget) is expected
    assert ours.matches_whole(name, budget) is (re.fullmatch(pattern, name) is not None)


@settings(max_examples=300, deadline=None)
@given(st.text(r"ab(|)[]^-$*+?{},1\d.", max_size=12))
def test_any_pattern_text_is_answered_as_re_does_or_refused(pattern: str) -> None:
    try:
        ours = ModulePattern("pattern", pattern)
    except (InvalidCheckpointError, UnsupportedError) as error:
        assert error.field == "pattern"
        return
    for name in ("ab", "a.b", "1a.ab", ""):
        expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
        assert ours.matches_suffix(name, MatchBudget("pattern")) is expected


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_is_found_in_every_dtype(dtype: torch.dtype, value: float) -> None:
    arrays = {name: torch.from_numpy(a).to(dtype) for name, a in pair().items()}
    arrays[f"{Q_PROJ}.lora_B.weight"][3, 1] = torch.finfo(dtype).max
    assert read_arrays(arrays, {"r": 2}).modules
    arrays[f"{Q_PROJ}.lora_B.weight"][3, 1] = value
    refused(InvalidCheckpointError, "lora_B.*element 7 is NaN or infinite", arrays, {"r": 2})


class OnAnotherDevice:
    """A GPU array: exports to the CPU only where its library is new enough."""

    def __init__(self, tensor: torch.Tensor, copies: bool) -> None:
        self._tensor, self._copies = tensor, copies

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, *, dl_device: tuple[int, int]) -> Any:
        if not self._copies:
            raise BufferError("cannot copy to the CPU")
        assert dl_device == (1, 0)
        return self._tensor.__dlpack__()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arrays_of_another_device_are_copied_or_refused(dtype: torch.dtype) -> None:
    arrays = {name: torch.from_numpy(a).to(dtype) for name, a in pair().items()}
    moved = {name: OnAnotherDevice(t, True) for name, t in arrays.items()}
    ours, same = read_arrays(moved, {"r": 2}), read_arrays(arrays, {"r": 2})
    assert np.array_equal(ours.modules[0].a, same.modules[0].a)
    stuck = {name: OnAnotherDevice(t, False) for name, t in arrays.items()}
    refused(UnsupportedError, "cannot copy to the CPU", stuck, {"r": 2})


def test_strided_and_bfloat16_tensors_are_read_exactly() -> None:
    a = torch.randn(6, 2).to(torch.bfloat16).T
    b = torch.randn(8, 2).to(torch.bfloat16)[::2]
    arrays = {f"{Q_PROJ}.lora_A.weight": a, f"{Q_PROJ}.lora_B.weight": b}
    module = read_arrays(arrays, {"r": 2}).modules[0]
    assert module.dtype == "BF16"
    assert module.a.flags.c_contiguous
    assert module.b.flags.c_contiguous
    assert torch.equal(as_torch(module.a, "BF16"), a)
    assert torch.equal(as_torch(module.b, "BF16"), b)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones((2, 6)), "dtype float64"),
        (np.ones((2, 6), np.uint16), "dtype uint16"),
        (np.ones((2, 6), ">f4"), "dtype >f4"),
        (torch.ones(2, 6, dtype=torch.int16), "dtype int16"),
        (torch.ones(2, 6, requires_grad=True), "no CPU array through DLPack"),
        ([[1.0] * 6] * 2, "list is no array"),
        (None, "NoneType is no array"),
    ],
    ids=lambda value: str(value)[:18],
)
def test_what_is_no_float_array_is_refused_by_name(array: Any, words: str) -> None:
    name = f"{Q_PROJ}.lora_A.weight"
    refused(UnsupportedError, f"{re.escape(name)}': {words}", pair() | {name: array}, {"r": 2})


def test_mixed_dtypes_in_a_pair_are_refused() -> None:
    arrays = pair() | {f"{Q_PROJ}.lora_B.weight": np.ones((4, 2), np.float16)}
    refused(UnsupportedError, "lora_B.*F16, but its lora_A is F32", arrays, {"r": 2})


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_file(
        {n: torch.from_numpy(a) for n, a in pair().items()}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "base_model_name_or_path": "org/base"}')
    return tmp_path


def test_a_directory_is_read(directory: Path) -> None:
    source = read_peft_directory(directory)
    assert (source.base_name, len(source.modules)) == ("org/base", 1)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"r": 2, "r": 2}', '{"r": NaN}', "\xff", "[" * 99]
)
def test_broken_config_files_are_refused(directory: Path, text: str) -> None:
    (directory / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidCheckpointError, match="^adapter_config.json: "):
        read_peft_directory(directory)


def test_a_huge_config_file_is_refused(directory: Path) -> None:
    (directory / "adapter_config.json").write_text('{"r": 2}' + " " * (1 << 20))
    with pytest.raises(InvalidCheckpointError, match="the limit is 1048576"):
        read_peft_directory(directory)


def test_missing_files_and_pickles_are_refused(directory: Path) -> None:
    weights = directory / "adapter_model.safetensors"
    weights.rename(directory / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match="^adapter_model.bin: is a pickle"):
        read_peft_directory(directory)
    (directory / "adapter_model.bin").unlink()
    with pytest.raises(InvalidCheckpointError, match="^adapter_model.safetensors: is missing"):
        read_peft_directory(directory)
    (directory / "adapter_config.json").unlink()
    with pytest.raises(InvalidCheckpointError, match="^adapter_config.json: is missing"):
        read_peft_directory(directory)


def test_an_empty_or_truncated_weights_file_is_refused(directory: Path) -> None:
    weights = directory / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(InvalidCheckpointError, match="adapter_model.safetensors"):
        read_peft_directory(directory)
    weights.write_bytes(b"\x02" + bytes(7) + b"{}")
    with pytest.raises(InvalidCheckpointError, match="holds no tensors"):
        read_peft_directory(directory)
