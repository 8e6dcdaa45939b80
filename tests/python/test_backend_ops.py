"""Every operation of the Backend interface against numpy in float64, on every backend there is."""

import itertools
from typing import Any

import numpy as np
import pytest
from backend_fixtures import (
    BACKENDS,
    BATCH_INVARIANT,
    GEMM_SHAPES,
    Array,
    FloatArray,
    close,
    from_bits,
    kept,
    kind,
    open_backend,
    page_bytes_for,
    precise,
    random,
    to_bits,
)

from loraserve import _testing

pytestmark = pytest.mark.parametrize(("device", "isa"), BACKENDS)
DTYPES = ("float32", "bfloat16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n", "k"), GEMM_SHAPES)
def test_gemm(device: str, isa: str, dtype: str, rows: int, n: int, k: int) -> None:
    backend = open_backend(device, isa)
    rng = np.random.default_rng(rows * n * k)
    x, w = random(rng, rows, k), precise(rng, n, k)
    expected = x.astype(np.float64) @ kept(w, dtype, device).T
    # Products are added in order: the error of long sums grows with their length.
    scale = np.sqrt(k) if k < 512 else k / 4
    close(device, "gemm", backend.gemm(x, [w], dtype=dtype), expected, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_of_stacked_parts_with_bias(device: str, isa: str, dtype: str) -> None:
    """q, k and v are one product; each source dtype is read exactly."""
    backend = open_backend(device, isa)
    rng = np.random.default_rng(1)
    x, k = random(rng, 5, 40), 40
    parts = [random(rng, 24, k), random(rng, 9, k).astype(np.float16), to_bits(random(rng, 9, k))]
    bias = precise(rng, 42)
    stacked = np.concatenate([parts[0], parts[1].astype(np.float32), from_bits(parts[2])])
    expected = x.astype(np.float64) @ kept(stacked, dtype, device).T + bias
    found = backend.gemm(x, parts, bias=list(bias), dtype=dtype)
    close(device, "gemm", found, expected, np.sqrt(k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_adds_to_what_is_there(device: str, isa: str, dtype: str) -> None:
    backend = open_backend(device, isa)
    rng = np.random.default_rng(2)
    x, w, y = random(rng, 9, 56), precise(rng, 40, 56), random(rng, 9, 40)
    expected = y + x.astype(np.float64) @ kept(w, dtype, device).T
    close(device, "gemm", backend.gemm(x, [w], dtype=dtype, y=y), expected, np.sqrt(56))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_rows_do_not_depend_on_their_company(device: str, isa: str, dtype: str) -> None:
    if device not in BATCH_INVARIANT:
        pytest.skip(f"{device} does not promise it")
    rng = np.random.default_rng(5)
    x, w = precise(rng, 37, 1160), precise(rng, 100, 1160)
    together = open_backend(device, isa).gemm(x, [w], dtype=dtype)
    alone = open_backend(device, isa, threads=1)
    for begin, end in [(0, 1), (1, 3), (3, 8), (8, 37), (36, 37)]:
        assert np.array_equal(alone.gemm(x[begin:end], [w], dtype=dtype), together[begin:end])


@pytest.mark.parametrize("option", ["activation_dtype", "adapter_dtype"])
def test_a_dtype_that_the_backend_lacks_is_refused_by_name(
    device: str, isa: str, option: str
) -> None:
    if option == "adapter_dtype" and kind(device) == "cuda":
        pytest.skip("adapters are bfloat16 on cuda, whatever is asked for")
    open_backend(device, isa)
    options: dict[str, Any] = {option: "float16"}
    with pytest.raises(_testing.StatusError) as caught:
        _testing.BackendOps(device, isa, **options)
    assert caught.value.args[1].startswith(f"{option}: float16 on {kind(device)}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed(device: str, isa: str, dtype: str) -> None:
    backend = open_backend(device, isa)
    table = random(np.random.default_rng(3), 37, 50)
    ids = [0, 36, 5, 5, 17]
    assert np.array_equal(backend.embed(table, dtype, ids), table[ids])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("columns", "group"), [(7, 7), (96, 96), (96, 24), (200, 200)])
def test_rms_norm(device: str, isa: str, columns: int, group: int, in_place: bool) -> None:
    """Of whole rows, or of each head apart."""
    backend = open_backend(device, isa)
    rng = np.random.default_rng(columns + group)
    x, weight, eps = 3 * random(rng, 11, columns), precise(rng, group), 1e-2
    heads = x.reshape(11, -1, group).astype(np.float64)
    norm = np.sqrt((heads**2).mean(-1, keepdims=True) + eps)
    found = backend.rms_norm(x, list(weight), group, eps, in_place=in_place)
    close(device, "rms_norm", found, (heads / norm * weight).reshape(x.shape))


@pytest.mark.parametrize("columns", [1, 16, 37, 200])
def test_silu_mul(device: str, isa: str, columns: int) -> None:
    backend = open_backend(device, isa)
    rng = np.random.default_rng(columns)
    x = 4 * random(rng, 6, 2 * columns)
    x[0, :columns] = np.linspace(-100, 100, columns)  # the exponential over- and underflows
    x[0] = from_bits(to_bits(x[0]))
    gate, up = x[:, :columns].astype(np.float64), x[:, columns:]
    close(device, "silu_mul", backend.silu_mul(x), gate / (1 + np.exp(-gate)) * up)


def test_gather_rows(device: str, isa: str) -> None:
    x = random(np.random.default_rng(4), 9, 33)
    rows = [8, 0, 0, 3]
    assert np.array_equal(open_backend(device, isa).gather_rows(x, rows), x[rows])


# Heads, KV heads, head size, block size, page bytes for one float32 tile and for several.
ATTENTION_SHAPES = [
    (4, 4, 16, 16, 4096),
    (8, 1, 24, 16, 2048),
    (6, 3, 64, 32, 65536),
    (4, 2, 128, 16, 16384),
    (5, 1, 80, 48, 65536),
]
LENGTHS = (1, 16, 17, 50, 131)
Steps = list[list[tuple[int, int]]]


def whole(lengths: tuple[int, ...]) -> Steps:
    return [[(sequence, length)] for sequence, length in enumerate(lengths)]


def chunked(lengths: tuple[int, ...], seed: int) -> Steps:
    """All sequences side by side, each in chunks of its own."""
    rng = np.random.default_rng(seed)
    left = list(lengths)
    steps: Steps = []
    while any(left):
        step = []
        for sequence, rest in enumerate(left):
            count = min(rest, int(rng.choice([0, 1, 1, 5, 16, 40])))
            if count:
                step.append((sequence, count))
                left[sequence] -= count
        if step:
            steps.append(step)
    return steps


def rotated(x: Array, frequencies: Array) -> Array:
    """Half-split rotation of [tokens, heads, head_dim], angles in float32 as the models have it."""
    positions = np.arange(len(x), dtype=np.float32)[:, None, None]
    angle = (positions * frequencies.astype(np.float32)).astype(np.float64)
    low, high = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def attention(
    device: str, qkv: Array, shape: tuple[int, ...], frequencies: Array, window: int
) -> Array:
    heads, kv_heads, size = shape[:3]
    split = np.split(qkv.astype(np.float64), [heads * size, (heads + kv_heads) * size], axis=-1)
    q, k, v = (part.reshape(len(qkv), -1, size) for part in split)
    q, k = (kept(rotated(x, frequencies).astype(np.float32), "float32", device) for x in (q, k))
    k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(size)
    i, j = np.indices(scores.shape[1:])
    scores[:, (j > i) | ((window > 0) & (j <= i - window))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hij,jhd->ihd", weights, v).reshape(len(qkv), -1)


def attention_case(
    shape: tuple[int, ...], layers: int, lengths: tuple[int, ...] = LENGTHS
) -> tuple[list[FloatArray], Array]:
    heads, kv_heads, size = shape[:3]
    rng = np.random.default_rng(sum(shape))
    width = (heads + 2 * kv_heads) * size
    qkv = [random(rng, layers, length, width) for length in lengths]
    for one in qkv:
        one[..., : heads * size] *= 2  # sharp, so that a wrong position is seen
    return qkv, 10000.0 ** (-np.arange(0, size, 2, dtype=np.float32) / size)


@pytest.mark.parametrize("window", [0, 1, 21])
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_rope_and_paged_attention(
    device: str, isa: str, shape: tuple[int, ...], window: int
) -> None:
    """Prompts of several sequences in chunks, over pages that lie anywhere and held NaN before."""
    backend = open_backend(device, isa)
    layers = 2
    qkv, frequencies = attention_case(shape, layers)
    kv_shape = _testing.KvShape(layers, *shape[:4], page_bytes_for(device, shape[4]))
    found = backend.attention(kv_shape, list(frequencies), window, qkv, chunked(LENGTHS, 1))
    for one, result in zip(qkv, found, strict=True):
        for layer in range(layers):
            expected = attention(device, one[layer], shape, frequencies, window)
            close(device, "attention", result[layer], expected)


@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_attention_does_not_depend_on_chunks_or_company(
    device: str, isa: str, shape: tuple[int, ...]
) -> None:
    if device not in BATCH_INVARIANT:
        pytest.skip(f"{device} does not promise it")
    qkv, frequencies = attention_case(shape, 1)
    kv_shape = _testing.KvShape(1, *shape)
    arguments = (kv_shape, list(frequencies), 21, qkv)
    alone = open_backend(device, isa, threads=1).attention(*arguments, whole(LENGTHS))
    for seed, threads in ((2, 2), (3, 3)):
        backend = open_backend(device, isa, threads=threads)
        found = backend.attention(*arguments, chunked(LENGTHS, seed))
        assert all(itertools.starmap(np.array_equal, zip(found, alone, strict=True)))


# More query heads of a KV head than a kernel takes at a time; contexts of several spans of it.
WIDE_SHAPE = (72, 1, 16, 16, 4096)
LONG_SHAPE = (6, 2, 48, 32, 65536)


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize(
    ("shape", "lengths"), [(WIDE_SHAPE, (1, 40)), (LONG_SHAPE, (256, 257, 600))]
)
def test_attention_of_many_heads_and_long_contexts(
    device: str, isa: str, shape: tuple[int, ...], lengths: tuple[int, ...], window: int
) -> None:
    """The values, and on one thread the same bits as in other chunks on five, more than there are
    tasks: they divide a context."""
    if device not in BATCH_INVARIANT:
        pytest.skip(f"{device} takes no such shape, or long")
    qkv, frequencies = attention_case(shape, 1, lengths)
    arguments = (_testing.KvShape(1, *shape), list(frequencies), window, qkv)
    alone = open_backend(device, isa, threads=1).attention(*arguments, whole(lengths))
    chunks = open_backend(device, isa, threads=5).attention(*arguments, chunked(lengths, 4))
    for one, result, other in zip(qkv, alone, chunks, strict=True):
        close(device, "attention", result[0], attention(device, one[0], shape, frequencies, window))
        assert np.array_equal(result, other)


RANKS = (1, 3, 8, 16, 17, 64, 100, 512)
COUNTS = (1, 2, 5, 1, 9, 3, 4, 2)
ROWS = sum(COUNTS) + 2
# Three targets that share their input, as q, k and v do: (layer, module, first column), widths.
TARGETS = [(1, 0, 0), (1, 1, 48), (1, 2, 85)]
WIDTHS = (48, 37, 40)
Adapter = list[tuple[int, int, Array, Array, float]]


def lora_case(k: int, storage: str) -> tuple[list[Adapter], list[tuple[int, int, int]]]:
    """Adapters of every rank; some lack a module, all have one in another layer. Segments leave one
    row of the base model among them and one behind."""
    rng = np.random.default_rng(k)

    def stored(*shape: int) -> Array:
        x = precise(rng, *shape)
        return to_bits(x) if storage == "bfloat16" else x.astype(storage)

    adapters: list[Adapter] = []
    for index, rank in enumerate(RANKS):
        modules = [m for m in range(3) if index % 4 != m + 1]
        own = [(1, m, stored(rank, k), stored(rank, WIDTHS[m]), 0.2 + 1 / rank) for m in modules]
        adapters.append([(0, 0, stored(2, k), stored(2, 48), 9.0), *own])
    segments, row = [], 0
    for index, count in enumerate(COUNTS):
        segments.append((row, count, index))
        row += count
        if index == 2:
            segments.append((row, 1, -1))
            row += 1
    return adapters, segments


def as_float(x: Array, dtype: str | None) -> Array:
    values = from_bits(x) if x.dtype == np.uint16 else x.astype(np.float32)
    return kept(values, dtype or "float32")


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("adapter_dtype", [None, *DTYPES])
@pytest.mark.parametrize(("k", "page_bytes"), [(48, 1024), (200, 65536), (1101, 4096)])
def test_mixed_rank_lora(
    device: str, isa: str, storage: str, adapter_dtype: str | None, k: int, page_bytes: int
) -> None:
    """Shrink and expand of all ranks together; modules an adapter lacks and base rows are as is."""
    backend = open_backend(device, isa, adapter_dtype=adapter_dtype)
    if kind(device) == "cuda" and adapter_dtype == "float32":
        pytest.skip("cuda installs every adapter as bfloat16")
    rng = np.random.default_rng(k)
    adapters, segments = lora_case(k, storage)
    x, y = random(rng, ROWS, k), random(rng, ROWS, sum(WIDTHS))
    rounds = "bfloat16" if kind(device) == "cuda" else adapter_dtype
    expected = y.astype(np.float64)
    for begin, count, index in segments:
        for layer, module, a, b, scaling in adapters[index] if index >= 0 else []:
            if layer != 1:
                continue
            h = scaling * (x[begin : begin + count] @ as_float(a, rounds).T)
            first = TARGETS[module][2]
            expected[begin : begin + count, first : first + WIDTHS[module]] += h @ as_float(
                b, rounds
            )
    page_bytes = page_bytes_for(device, page_bytes)
    found = backend.lora(x, y, adapters, segments, TARGETS, page_bytes)
    close(device, "lora", found, expected, 2.0)
    untouched = [8, ROWS - 1]
    assert np.array_equal(found[untouched], y[untouched])
    assert not np.array_equal(found, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [96, 701])  # of 512 k-rows and more a sum has four parts
def test_lora_rows_do_not_depend_on_their_company(
    device: str, isa: str, k: int, dtype: str
) -> None:
    if device not in BATCH_INVARIANT:
        pytest.skip(f"{device} does not promise it")
    rng = np.random.default_rng(11)
    adapters, segments = lora_case(k, "float32")
    x, y = precise(rng, ROWS, k), precise(rng, ROWS, sum(WIDTHS))
    backend = open_backend(device, isa, adapter_dtype=dtype)
    together = backend.lora(x, y, adapters, segments, TARGETS, 4096)
    alone = open_backend(device, isa, threads=1, adapter_dtype=dtype)
    for begin, count, index in segments:
        for row in range(begin, begin + count):
            found = alone.lora(x, y, adapters, [(row, 1, index)], TARGETS, 1024)
            assert np.array_equal(found[row], together[row])


def test_padding_of_an_adapter_is_small(device: str, isa: str) -> None:
    """At rank 8 on the shape of a 1B model a tenth at most; rank 9 pays for 16 at most."""
    backend = open_backend(device, isa)
    hidden, inner, kv, layers = 2048, 5632, 256, 22
    shapes = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]

    def adapter(rank: int) -> Adapter:
        return [
            (layer, m, np.zeros((rank, i), np.uint16), np.zeros((rank, o), np.uint16), 1.0)
            for layer in range(layers)
            for m, (i, o) in enumerate(shapes)
        ]

    for rank, limit in ((8, 1.1), (64, 1.02), (9, 16 / 9)):
        pages, weights = backend.adapter_bytes(adapter(rank), 65536)
        assert weights == 2 * layers * rank * sum(i + o for i, o in shapes)
        assert pages <= limit * weights, f"rank {rank}: {pages / weights:.3f}"
