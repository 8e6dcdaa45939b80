"""Packed adapters: exact, canonical, and refused where broken."""

import hashlib
import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from loraserve.checkpoint.adapter_source import AdapterModule, AdapterSource
from loraserve.checkpoint.packed_adapter import (
    PackedAdapter,
    describe,
    load_adapter_source,
    open_packed,
    pack,
    parse_packed,
    write_packed,
)
from loraserve.checkpoint.packed_header import (
    CHUNK_BYTES,
    HEADER_SIZE_BYTES,
    header_bytes_of,
    parse_header,
)
from loraserve.checkpoint.safetensors_file import DTYPES
from loraserve.errors import InvalidCheckpointError, LoraServeError, UnsupportedError

DIGEST = "ab" * 32
SPECIFICATION = Path(__file__).parents[2] / "docs" / "packed-adapter.md"


def matrix(dtype: str, rows: int, columns: int, seed: int = 0) -> np.ndarray[Any, Any]:
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype("<f4")
    if dtype == "BF16":
        return (values.view("<u4") >> 16).astype("<u2")
    return values.astype(DTYPES[dtype])


def module(
    layer: int = 0,
    name: str = "q_proj",
    rank: int = 3,
    dtype: str = "F32",
    inputs: int = 6,
    outputs: int = 10,
    scaling: float = 2.0,
) -> AdapterModule:
    a, b = matrix(dtype, rank, inputs, layer), matrix(dtype, outputs, rank, layer + 99)
    return AdapterModule(layer, name, rank, scaling, dtype, a, b)


def mixed_source() -> AdapterSource:
    return AdapterSource(
        "org/base",
        (
            module(1, "down_proj", 17, "BF16", scaling=1 / 3),
            module(1, "q_proj", 1, "F32"),
            module(0, "v_proj", 4, "F16"),
            module(0, "o_proj", 512, "F32", scaling=-0.5),
        ),
    )


def large_source() -> AdapterSource:
    """A little over two chunks of data."""
    return AdapterSource(None, (module(0, "up_proj", 64, "F32", inputs=4000, outputs=4200),))


def assert_same(packed: PackedAdapter, source: AdapterSource) -> None:
    by_key = {(m.layer, m.module): m for m in source.modules}
    assert len(packed.modules) == len(by_key)
    for ours in packed.modules:
        theirs = by_key[ours.layer, ours.module]
        assert (ours.rank, ours.scaling, ours.dtype) == (theirs.rank, theirs.scaling, theirs.dtype)
        assert (ours.in_features, ours.out_features) == (theirs.a.shape[1], theirs.b.shape[0])
        assert ours.a.dtype == ours.b_transposed.dtype == DTYPES[ours.dtype]
        assert np.array_equal(ours.a, theirs.a)
        assert np.array_equal(ours.b_transposed, theirs.b.T)
        assert ours.a.flags.c_contiguous
        assert ours.b_transposed.flags.c_contiguous
        assert ours.a.flags.aligned
        assert not ours.a.flags.writeable


@pytest.mark.parametrize("verify", ["xxh3", "sha256", "none"])
@pytest.mark.parametrize("make", [mixed_source, large_source])
def test_packing_keeps_every_bit(make: Any, verify: Any) -> None:
    blob = pack(make(), base_digest=DIGEST)
    packed = parse_packed(blob, verify=verify)
    assert_same(packed, make())
    assert packed.base_name == (make().base_name or "")
    assert packed.base_digest == DIGEST
    assert packed.size_bytes == len(blob) == len(packed.blob)
    assert packed.revision == hashlib.sha256(blob[: packed.header.header_bytes]).hexdigest()
    assert packed.header.header_bytes % 64 == 0
    assert packed.max_rank == max(m.rank for m in make().modules)


def test_order_is_canonical_and_data_without_gaps() -> None:
    source = mixed_source()
    packed = parse_packed(pack(source))
    keys = [(m.layer, m.module) for m in packed.modules]
    assert keys == [(0, "v_proj"), (0, "o_proj"), (1, "q_proj"), (1, "down_proj")]
    data = b"".join(m.a.tobytes() + m.b_transposed.tobytes() for m in packed.modules)
    assert bytes(packed.blob[packed.header.header_bytes :]) == data
    shuffled = AdapterSource(source.base_name, source.modules[::-1])
    assert pack(shuffled) == pack(source)
    assert packed.ranks() == (1, 4, 17, 512)


def test_everything_the_header_says_changes_the_revision() -> None:
    def revision(changed: AdapterModule | None = None, name: str = "b", digest: Any = None) -> str:
        source = AdapterSource(name, (changed or module(),))
        return parse_packed(pack(source, base_digest=digest)).revision

    changed_weights = module()
    changed_weights.b[0, 0] += 1
    revisions = {
        revision(),
        revision(changed_weights),
        revision(module(scaling=np.nextafter(2.0, 3))),
        revision(module(1)),
        revision(module(name="k_proj")),
        revision(module(dtype="F16")),
        revision(name="c"),
        revision(digest=DIGEST),
    }
    assert len(revisions) == 8
    assert revision() in revisions


def test_a_large_file_is_streamed_and_equals_the_packed_bytes(tmp_path: Path) -> None:
    path = tmp_path / "adapter.lora"
    revision = write_packed(large_source(), path, base_digest=DIGEST)
    assert path.read_bytes() == pack(large_source(), base_digest=DIGEST)
    packed = open_packed(path, verify="sha256", revision=revision)
    assert packed.revision == revision
    assert_same(packed, large_source())
    assert os.listdir(tmp_path) == ["adapter.lora"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "adapter.lora"
    write_packed(mixed_source(), path)
    before = path.read_bytes()
    mapped = open_packed(path)
    broken = module(5, "v_proj")
    broken.b[3, 1] = np.nan
    with pytest.raises(InvalidCheckpointError, match=r"v_proj of layer 5: .*NaN"):
        write_packed(AdapterSource(None, (module(), broken)), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["adapter.lora"]
    write_packed(large_source(), path)  # replaced, not rewritten in place
    assert_same(mapped, mixed_source())


def test_a_receiver_checks_each_chunk_as_it_arrives() -> None:
    blob = pack(large_source())
    header = parse_header(blob[: header_bytes_of(blob[:HEADER_SIZE_BYTES])])
    assert header.size_bytes == len(blob)
    assert header.chunk_count == 3
    end = header.header_bytes
    for index in range(header.chunk_count):
        start, length = header.chunk_range(index)
        assert start == end
        end = start + length
        chunk = bytearray(blob[start:end])
        header.verify_chunk(index, chunk)
        header.verify_chunk(index, memoryview(chunk), "sha256")
        with pytest.raises(InvalidCheckpointError, match=f"^chunk {index}: .*expected {length}"):
            header.verify_chunk(index, chunk[:-1])
        chunk[length // 2] ^= 1
        for algorithm in ("xxh3", "sha256"):
            with pytest.raises(InvalidCheckpointError, match=f"^chunk {index}: .*{algorithm}"):
                header.verify_chunk(index, chunk, algorithm)  # type: ignore[arg-type]
    assert end == len(blob)
    for index in (-1, 3):
        with pytest.raises(InvalidCheckpointError, match=f"^chunk {index}: there are 3"):
            header.verify_chunk(index, b"")


def repack_header(blob: bytes, edit: Any) -> bytes:
    changed = bytearray(blob)
    edit(changed)
    return bytes(changed)


def put(at: int, code: str, value: Any) -> Any:
    return lambda blob: struct.pack_into("<" + code, blob, at, value)


NAME_AT = 80  # "org/base" takes exactly 8 bytes
MODULE_AT = 88
CHUNKS_AT = MODULE_AT + 4 * 40


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (put(0, "B", 0), "^magic: "),
        (put(12, "I", 0), "^header_bytes: 0 is not within 80 and 4194304"),
        (put(12, "I", 1 << 30), "^header_bytes: 1073741824 is not within"),
        (put(12, "I", 384), "^header_bytes: 384 does not fit"),
        (put(16, "Q", 1), "^data_bytes: 1, but the modules take"),
        (put(24, "I", 4096), "^header: is not canonical"),
        (put(28, "I", 2), "^header: is not canonical"),
        (put(32, "I", 0), "^module_count: 0"),
        (put(32, "I", 0xFFFFFFFF), "^module_count: 4294967295 is not within 1 and 7168"),
        (put(36, "I", 1025), "^base_name: 1025 bytes, the limit is 1024"),
        (put(40, "I", 2), "^header: is not canonical"),
        (put(44, "I", 1), "^header: is not canonical"),
        (put(48, "B", 1), "^header: is not canonical"),
        (put(NAME_AT, "B", 0xFF), "^base_name: is not UTF-8"),
        (put(NAME_AT, "B", 0x0A), "^base_name: has control characters"),
        (put(MODULE_AT, "I", 1024), r"^modules\[0\]\.layer: 1024"),
        (put(MODULE_AT, "I", 1), r"^modules\[1\]: is not in the order"),
        (put(MODULE_AT + 4, "B", 7), r"^modules\[0\]\.module: 7"),
        (put(MODULE_AT + 4, "B", 3), r"^modules\[1\]: is not in the order"),
        (put(MODULE_AT + 5, "B", 3), r"^modules\[0\]\.dtype: 3"),
        (put(MODULE_AT + 6, "H", 0), r"^modules\[0\]\.rank: 0"),
        (put(MODULE_AT + 6, "H", 513), r"^modules\[0\]\.rank: 513 is not within 1 and 512"),
        (put(MODULE_AT + 8, "I", 0), r"^modules\[0\]\.in_features: 0"),
        (put(MODULE_AT + 12, "I", (1 << 20) + 1), r"^modules\[0\]\.out_features: 1048577"),
        (put(MODULE_AT + 8, "I", 7), r"^data_bytes: "),
        (put(MODULE_AT + 16, "d", float("nan")), r"^modules\[0\]\.scaling: "),
        (put(MODULE_AT + 16, "d", float("inf")), r"^modules\[0\]\.scaling: "),
        (put(MODULE_AT + 16, "d", 1e39), r"^modules\[0\]\.scaling: "),
        (put(MODULE_AT + 24, "Q", 2), "^header: is not canonical"),
        (put(MODULE_AT + 32, "Q", 0), "^header: is not canonical"),
        (put(CHUNKS_AT, "B", 0), "^chunk 0: does not have its sha256 sum"),
        (put(CHUNKS_AT + 40, "B", 0), "^chunk 0: does not have its xxh3 sum"),
        (put(CHUNKS_AT + 48, "B", 1), "^header: is not canonical"),
    ],
)
def test_each_broken_field_is_refused_by_name(edit: Any, words: str) -> None:
    blob = pack(mixed_source())
    assert parse_header(blob).header_bytes == 320
    changed = repack_header(blob, edit)
    revision = parse_packed(blob).revision
    with pytest.raises(InvalidCheckpointError, match=words):
        [parse_packed(changed, verify="xxh3"), parse_packed(changed, verify="sha256")]
    # Whatever it is, it is not the revision that was asked for.
    with pytest.raises(LoraServeError):
        parse_header(changed, revision=revision)


def test_a_changed_header_that_is_valid_has_another_revision() -> None:
    blob = pack(mixed_source())
    revision = parse_packed(blob).revision
    changed = repack_header(blob, put(MODULE_AT + 16, "d", 3.0))
    assert parse_packed(changed).modules[0].scaling == 3.0
    assert parse_packed(changed).revision != revision
    for check in (parse_header, parse_packed):
        with pytest.raises(InvalidCheckpointError, match=r"^revision: "):
            check(changed, revision=revision)


def test_another_version_is_unsupported_by_name() -> None:
    blob = repack_header(pack(mixed_source()), put(8, "I", 2))
    with pytest.raises(UnsupportedError, match=r"^format_version: 2, supported: 1"):
        parse_packed(blob)


def test_a_header_over_its_limit_is_refused() -> None:
    blob = repack_header(pack(mixed_source()), put(16, "Q", 1 << 50))
    with pytest.raises(UnsupportedError, match=r"^header: .*the limit is 4194304"):
        parse_packed(blob)


@pytest.mark.parametrize("size", [0, 1, 15, 16, 79, 80, 319, 320, -1])
def test_truncation_and_extra_bytes_are_refused(size: int, tmp_path: Path) -> None:
    blob = pack(mixed_source())
    for broken in (blob[:size], blob + b"\0"):
        path = tmp_path / "adapter.lora"
        path.write_bytes(broken)
        with pytest.raises(InvalidCheckpointError):
            parse_packed(broken, verify="none")
        with pytest.raises(InvalidCheckpointError):
            open_packed(path, verify="none")


def test_nan_in_a_packed_adapter_with_right_sums_is_refused() -> None:
    packed = bytearray(pack(AdapterSource("org/base", (module(),))))
    header = parse_header(packed)
    data = packed[header.header_bytes :]
    data[-4:] = np.float32(np.inf).tobytes()
    packed[header.header_bytes :] = data
    sums = hashlib.sha256(data).digest() + xxhash.xxh3_128(data).digest()
    packed[MODULE_AT + 40 : MODULE_AT + 88] = sums
    with pytest.raises(InvalidCheckpointError, match=r"q_proj of layer 0: .*NaN or infinite"):
        parse_packed(packed)
    assert parse_packed(packed, verify="none").modules


def test_a_wrong_byte_is_found_in_any_chunk(tmp_path: Path) -> None:
    blob = pack(large_source())
    for at in (len(blob) - 1, len(blob) - CHUNK_BYTES - 1, len(blob) - 2 * CHUNK_BYTES):
        path = tmp_path / "adapter.lora"
        path.write_bytes(repack_header(blob, put(at, "B", blob[at] ^ 4)))
        for verify in ("xxh3", "sha256"):
            with pytest.raises(InvalidCheckpointError, match=r"^chunk "):
                open_packed(path, verify=verify)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "digest", "words"),
    [
        (AdapterSource(None, ()), None, "^modules: there are none"),
        (AdapterSource(None, (module(), module())), None, "q_proj of layer 0: occurs twice"),
        (AdapterSource(None, (module(name="lm_head"),)), None, "^module: 'lm_head'"),
        (AdapterSource(None, (module(layer=1024),)), None, r"layer: 1024"),
        (AdapterSource(None, (module(rank=513),)), None, r"rank: 513"),
        (AdapterSource(None, (module(scaling=1e39),)), None, r"scaling: "),
        (AdapterSource("a\nb", (module(),)), None, "^base_name: has control"),
        (AdapterSource("\ud800", (module(),)), None, "^base_name: is not Unicode"),
        (AdapterSource("é" * 513, (module(),)), None, "^base_name: 1026 bytes"),
        (AdapterSource(None, (module(),)), "AB" * 32, "^base_digest: "),
        (AdapterSource(None, (module(),)), "ab" * 31, "^base_digest: "),
        (
            # 3 * (5 + 10) 16-bit numbers leave float32 data unaligned
            AdapterSource(None, (module(dtype="F16", inputs=5), module(1))),
            None,
            r"modules\[1\]\.dtype: F32 data would begin at byte 90, unaligned",
        ),
        (
            AdapterSource(None, (replace(module(), rank=4),)),
            None,
            r"q_proj of layer 0: shape \[3, 6\], expected \[4, 6\]",
        ),
        (
            AdapterSource(None, (replace(module(), dtype="BF16"),)),
            None,
            r"q_proj of layer 0: holds float32, which is not dtype BF16",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(
    source: AdapterSource, digest: str | None, words: str
) -> None:
    with pytest.raises((InvalidCheckpointError, UnsupportedError), match=words):
        pack(source, base_digest=digest)


def test_a_directory_gives_the_same_revision_anywhere(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{stem}A.weight": matrix("F32", 2, 6), f"{stem}B.weight": matrix("F32", 4, 2)}
    revisions = set()
    for place in ("one", "two"):
        directory = tmp_path / place
        directory.mkdir()
        save_file(tensors, directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 3}))
        packed = load_adapter_source(directory)
        revisions.add(packed.revision)
    assert len(revisions) == 1
    # The same, packed to a file and opened without being told what it is.
    path = tmp_path / "any.name"
    path.write_bytes(packed.blob)
    assert load_adapter_source(path).revision in revisions
    with pytest.raises(InvalidCheckpointError, match=r"^magic: not a packed adapter"):
        load_adapter_source(tmp_path / "one" / "adapter_model.safetensors")
    with pytest.raises(InvalidCheckpointError, match=r"neither a PEFT directory nor a packed file"):
        load_adapter_source(tmp_path / "nothing")


def test_description_is_plain_json() -> None:
    packed = parse_packed(pack(mixed_source(), base_digest=DIGEST))
    facts = json.loads(json.dumps(describe(packed)))
    assert facts["revision"] == packed.revision
    assert (facts["base_name"], facts["base_digest"]) == ("org/base", DIGEST)
    assert facts["header_bytes"] + facts["data_bytes"] == facts["size_bytes"]
    assert facts["parameters"] == (17 + 1 + 4 + 512) * 16
    assert facts["ranks"] == [1, 4, 17, 512]
    assert (facts["layers"], facts["dtypes"]) == (2, ["BF16", "F16", "F32"])
    assert facts["modules"][3]["scaling"] == 1 / 3


def specification_example() -> AdapterSource:
    a = np.array([[1, 2, 3], [4, 5, 6]], "<f2")
    b = np.array([[0.5, -1], [0.25, 0]], "<f2")
    return AdapterSource("base", (AdapterModule(0, "q_proj", 2, 0.5, "F16", a, b),))


def test_the_example_of_the_specification_is_true() -> None:
    blob = pack(specification_example())
    lines = [f"{at:04x}  {blob[at : at + 16].hex(' ')}" for at in range(0, len(blob), 16)]
    text = SPECIFICATION.read_text()
    assert "\n".join(lines) in text
    assert parse_packed(blob).revision in text
