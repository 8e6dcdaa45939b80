"""Adapters in host memory that a GPU knows: the same tokens, one copy less; and what goes wrong."""

import asyncio
import gc
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from backend_fixtures import Array, open_backend, random, to_bits
from fake_node import FakeEngine, serving
from oracle.checkpoints import SPECS
from oracle.store import OracleStore

from loraserve import Engine, EngineConfig, SamplingParams, _testing
from loraserve.checkpoint.packed_adapter import PackedAdapter, load_adapter_source, parse_packed
from loraserve.errors import AlreadyExistsError, ResourceExhaustedError
from loraserve.node.pool.arena import HostArena

DEVICES = ["cuda-emulated", "cuda"]
NAME = "llama"
PROMPT = [7 * i % SPECS[NAME].vocab for i in range(20)]
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=0)


def in_memory(memory: mmap.mmap) -> Callable[[Array], Array]:
    """Puts arrays into `memory` one after the other, at odd distances."""
    free = 0

    def place(array: Array) -> Array:
        nonlocal free
        free += -free % array.itemsize + 2 * array.itemsize
        view = np.frombuffer(memory, array.dtype, array.size, free).reshape(array.shape)
        view[:] = array
        free += array.nbytes
        return view

    return place


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ranks", [(1, 17), (8, 16), (33, 100)])
def test_from_registered_memory_the_same_bits_without_staging(
    device: str, ranks: tuple[int, ...]
) -> None:
    """Also where rows do not fill 16 bytes, so that strips lie apart on the device."""
    rng = np.random.default_rng(sum(ranks))
    k, widths = 37, [45, 64]
    modules = [
        (0, m, to_bits(random(rng, rank, k)), to_bits(random(rng, rank, widths[m])), 0.5)
        for m, rank in enumerate(ranks)
    ]
    x, y = random(rng, 3, k), random(rng, 3, sum(widths))
    rest = [(0, 3, 0)], [(0, 0, 0), (0, 1, widths[0])], 4096
    backend = open_backend(device)
    staged = backend.lora(x, y, [modules], *rest)
    total = sum(a.nbytes + b.nbytes for _, _, a, b, _ in modules)
    assert backend.install_reads() == (0, total)

    memory = mmap.mmap(-1, 1 << 16)
    assert backend.register_host_memory(memory)
    place = in_memory(memory)
    placed = [(layer, m, place(a), place(b), scaling) for layer, m, a, b, scaling in modules]
    assert np.array_equal(backend.lora(x, y, [placed], *rest), staged)
    assert backend.install_reads() == (total, total)
    # No longer known: staged again. The same range can then be registered once more.
    backend.unregister_host_memory()
    assert np.array_equal(backend.lora(x, y, [placed], *rest), staged)
    assert backend.install_reads() == (total, 2 * total)
    assert backend.register_host_memory(memory)


@pytest.mark.parametrize("device", DEVICES)
def test_ranges_are_apart(device: str) -> None:
    backend = open_backend(device)
    memory = memoryview(mmap.mmap(-1, 1 << 16))
    assert backend.register_host_memory(memory[4096:8192])
    for begin, end in ((0, 4097), (4096, 8192), (5000, 6000), (8191, 9000), (0, 1 << 16)):
        with pytest.raises(_testing.StatusError, match="part of it is registered"):
            backend.register_host_memory(memory[begin:end])
    with pytest.raises(_testing.StatusError, match="0 bytes"):
        backend.register_host_memory(memory[:0])
    assert backend.register_host_memory(memory[8192:])


def test_an_array_that_leaves_the_range_is_staged() -> None:
    backend = open_backend("cuda-emulated")
    memory = mmap.mmap(-1, 1 << 16)
    backend.register_host_memory(memoryview(memory)[:4096])
    a = np.frombuffer(memory, np.uint16, 16 * 64, 4096 - 64).reshape(16, 64)  # over its end
    b = np.frombuffer(memory, np.uint16, 16 * 64, 0).reshape(16, 64)
    x, y = np.ones((1, 64), np.float32), np.zeros((1, 64), np.float32)
    backend.lora(x, y, [[(0, 0, a, b, 1.0)]], [(0, 1, 0)], [(0, 0, 0)], 4096)
    assert backend.install_reads() == (b.nbytes, a.nbytes)


@pytest.mark.parametrize("device", DEVICES)
def test_an_engine_reads_the_pool_itself(store: OracleStore, device: str) -> None:
    open_backend(device)
    packed = bytes(load_adapter_source(store.adapters(NAME)["r17"]).blob)
    arena = HostArena(1 << 20)
    arena.view(4096, len(packed))[:] = packed
    config = EngineConfig(model=store.checkpoint(NAME), device=device, max_batch_tokens=64)

    def answer(register: bool, source: PackedAdapter) -> tuple[Any, int, int]:
        with Engine(config) as engine:
            if register:
                assert engine.register_host_memory(arena.view(0, arena.capacity_bytes))
                with pytest.raises(AlreadyExistsError, match="host memory"):
                    engine.register_host_memory(arena.view(0, 4096))
            engine.load_adapter("a", source)
            done = engine.submit(PROMPT, GREEDY, "a").result(60.0)
            stats = engine.stats()
        return (
            (list(done.token_ids), list(done.logprobs)),
            stats.adapter_direct_bytes,
            stats.adapter_staged_bytes,
        )

    plain, none, staged = answer(False, parse_packed(packed))
    assert none == 0
    assert staged > 0
    assert answer(True, parse_packed(arena.view(4096, len(packed)))) == (plain, staged, 0)


def test_memory_outlives_its_registration(store: OracleStore) -> None:
    """The mapping cannot go before the engine that has it registered."""
    open_backend("cuda-emulated")
    memory = mmap.mmap(-1, 1 << 16)
    config = EngineConfig(model=store.checkpoint(NAME), device="cuda-emulated")
    engine = Engine(config)
    assert engine.register_host_memory(memoryview(memory))
    engine.close()
    gc.collect()
    with pytest.raises(BufferError):
        memory.close()
    del engine
    gc.collect()
    memory.close()


def test_the_cpu_has_no_use_for_it(store: OracleStore) -> None:
    with Engine(EngineConfig(model=store.checkpoint(NAME))) as engine:
        memory = mmap.mmap(-1, 4096)
        assert not engine.register_host_memory(memoryview(memory))
        memory.close()
        assert engine.stats().adapter_direct_bytes == engine.stats().adapter_staged_bytes == 0


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_node_registers_its_whole_pool(has_gpu: bool) -> None:
    async def go() -> None:
        engine = FakeEngine()
        engine.has_gpu = has_gpu
        async with serving(engine) as (server, _):
            (memory,) = engine.registered
            arena = server._arena
            assert arena is not None
            assert memory.nbytes == arena.capacity_bytes
            assert not memory.readonly
            assert arena.page_locked == has_gpu

    asyncio.run(go())


def test_a_node_whose_pool_cannot_be_locked_says_so_and_serves(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def go() -> None:
        engine = FakeEngine()
        engine.register_error = ResourceExhaustedError("host memory", "65536 bytes: no")
        async with serving(engine) as (server, _):
            assert server.node.engine is engine
            assert server._arena is not None
            assert not server._arena.page_locked

    asyncio.run(go())
    assert "not page-locked" in caplog.text
    assert "65536 bytes: no" in caplog.text
