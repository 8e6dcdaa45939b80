"""Hostile but well-formed files: every reader ends in a value that holds together or a typed error.

Random bytes seldom get past a JSON parser; here valid files are changed in their structure. The
packed format has its own such test, and config.json one beside its reader.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from fuzz_budget import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_makers import MAKERS

from loraserve.checkpoint.peft_adapter import read_arrays, read_peft_directory
from loraserve.checkpoint.safetensors_file import open_safetensors
from loraserve.errors import InvalidArgumentError, LoraServeError
from loraserve.text.tokenizer import Tokenizer

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**40])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def outcome(read: Callable[[], Any]) -> Any:
    """What `read` returns; None where it raises a typed error that names a field."""
    try:
        return read()
    except LoraServeError as error:
        if not error.field:
            raise AssertionError(f"names no field: {error}") from error
        return None


def write_safetensors(path: Path, header: Any, data: bytes) -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


SIZES = st.integers(0, 6) | st.sampled_from([-1, 2**31, 2**32, 2**62, 2**63, 2**64])
OFFSETS = st.integers(0, 64) | SIZES
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "", 3]),
        "shape": st.lists(SIZES, max_size=3) | JSON,
        "data_offsets": st.tuples(OFFSETS, OFFSETS).map(list) | JSON,
    },
    optional={"extra": JSON},
)


@settings(max_examples=examples(400), deadline=None)
@example(header={"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}, size=0)
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), ENTRY | JSON) | JSON,
    size=st.integers(0, 64),
)
def test_safetensors_headers(scratch: Path, header: Any, size: int) -> None:
    path = write_safetensors(scratch / "x.safetensors", header, bytes(size))
    views = outcome(lambda: open_safetensors(path))
    if views is None:
        return
    assert sum(view.data.nbytes for view in views.values()) == size


@settings(max_examples=examples(400), deadline=None)
@given(data=st.data(), shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4))
def test_safetensors_offsets(scratch: Path, data: st.DataObject, shapes: list[list[int]]) -> None:
    """Valid files with one offset moved: an overlap, a gap or bytes out of the file are refused."""
    header, end = {}, 0
    for index, shape in enumerate(shapes):
        begin, end = end, end + 4 * math.prod(shape)
        header[f"t{index}"] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    values = np.arange(end // 4, dtype=np.float32)
    path = write_safetensors(scratch / "x.safetensors", header, values.tobytes())
    found = [view.data.ravel() for view in open_safetensors(path).values()]
    assert np.array_equal(np.concatenate([*found, np.float32([])]), values)
    if not header:
        return
    moved = header[data.draw(st.sampled_from(sorted(header)))]["data_offsets"]
    which, by = data.draw(st.integers(0, 1)), data.draw(st.sampled_from([-8, -4, -1, 1, 4, 8]))
    moved[which] += by
    if data.draw(st.booleans()):
        moved[1 - which] += by
    write_safetensors(path, header, values.tobytes())
    views = outcome(lambda: open_safetensors(path))
    if views is None:
        return
    # Only where empty tensors leave another order possible.
    spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    assert all(one[1] == other[0] for one, other in pairwise(spans))
    assert sum(view.data.nbytes for view in views.values()) == end


FIELDS = [
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "bias", "init_lora_weights"),
    *("peft_type", "task_type", "base_model_name_or_path", "use_dora", "modules_to_save"),
    *("lora_dropout", "megatron_config", "new_field"),
]
PLAUSIBLE = st.sampled_from(
    [
        {"q_proj": 2},
        {"layers.0": 512, "q_proj": 513},
        {".*": 0},
        {"(a|b": 1},
        "all-linear",
        ".*_proj",
        ["q_proj"],
        [0, 1],
        1e300,
        -1,
        "LORA",
        "CAUSAL_LM",
        "none",
    ]
)


def matrices(rank: int) -> dict[str, Any]:
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    return {
        f"{stem}.lora_A.weight": np.ones((rank, 6), np.float32),
        f"{stem}.lora_B.weight": np.ones((4, rank), np.float32),
    }


@settings(max_examples=examples(500), deadline=None)
@given(
    rank=st.integers(1, 9),
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON | PLAUSIBLE, max_size=4),
)
def test_peft_configs(rank: int, changes: dict[str, Any]) -> None:
    source = outcome(lambda: read_arrays(matrices(rank), {"r": rank, **changes}))
    if source is None:
        return
    (module,) = source.modules
    assert (module.rank, module.a.shape, module.b.shape) == (rank, (rank, 6), (4, rank))
    assert math.isfinite(module.scaling)


@settings(max_examples=examples(200), deadline=None)
@example(config={"": True}, tail="")
@given(config=JSON, tail=st.sampled_from(["", "}", "\x00", " {}"]))
def test_peft_config_files(scratch: Path, config: Any, tail: str) -> None:
    directory = scratch / "adapter"
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config) + tail)
    tensors = matrices(8)
    header, data = {}, b""
    for name, value in tensors.items():
        raw = value.tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": offsets}
        data += raw
    write_safetensors(directory / "adapter_model.safetensors", header, data)
    source = outcome(lambda: read_peft_directory(directory))
    if source is None:
        return
    assert [module.rank for module in source.modules] == [8]


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every node below the root; of long lists and tables the first few."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items)[:12]:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def change(tree: Any, path: tuple[Any, ...], how: str, value: Any) -> Any:
    tree = copy.deepcopy(tree)
    node = tree
    for key in path[:-1]:
        node = node[key]
    if how == "remove":
        del node[path[-1]]
    elif how == "wrap":
        node[path[-1]] = [node[path[-1]]]
    else:
        node[path[-1]] = value
    return tree


@pytest.fixture(scope="module")
def valid(scratch: Path) -> list[tuple[Any, Any]]:
    """(tokenizer.json, tokenizer_config.json) of each kind."""
    found = []
    for name, make in MAKERS.items():
        directory = make(scratch / name)
        names = ("tokenizer.json", "tokenizer_config.json")
        found.append(tuple(json.loads((directory / n).read_text()) for n in names))
    return found


@settings(max_examples=examples(400), deadline=None)
@given(data=st.data())
def test_tokenizer_files(scratch: Path, valid: list[tuple[Any, Any]], data: st.DataObject) -> None:
    """One to three places of the files are changed; what still loads reads and writes text."""
    files = list(data.draw(st.sampled_from(valid)))
    for _ in range(data.draw(st.integers(1, 3))):
        which = data.draw(st.sampled_from([0, 0, 1]))
        path = data.draw(st.sampled_from(list(places(files[which]))))
        how = data.draw(st.sampled_from(["replace", "remove", "wrap"]))
        files[which] = change(files[which], path, how, data.draw(JSON))
    directory = scratch / "tokenizer"
    directory.mkdir(exist_ok=True)
    for name, tree in zip(("tokenizer.json", "tokenizer_config.json"), files, strict=True):
        (directory / name).write_text(json.dumps(tree))
    tokenizer = outcome(lambda: Tokenizer.from_directory(directory))
    if tokenizer is None:
        return
    ids = outcome(lambda: tokenizer.encode("Hello, world é 日本"))
    assert ids is None or isinstance(tokenizer.decode(ids), str)


def test_a_tokenizer_that_lacks_a_character_says_so(valid: list[tuple[Any, Any]]) -> None:
    """Without an unknown token the library raises a bare Exception; a request, a typed error."""
    tree = valid[list(MAKERS).index("char_level")][0]
    tree = change(tree, ("model", "vocab", "<unk>"), "remove", None)
    tree["added_tokens"] = []
    backend = tokenizers.Tokenizer.from_str(json.dumps(tree))
    tokenizer = Tokenizer(backend, {}, {})
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    assert tokenizer.replacement_ids == ()
    with pytest.raises(InvalidArgumentError) as caught:
        tokenizer.encode("\u4e00")
    assert caught.value.field == "text"
