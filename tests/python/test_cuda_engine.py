"""The engine on the CUDA backend: against transformers + PEFT, and graphs against no graphs."""

import ctypes
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backend_fixtures import open_backend
from oracle.adapters import ADAPTERS
from oracle.checkpoints import SPECS
from oracle.comparison import Comparison, compare
from oracle.store import OracleStore

from loraserve import Engine, EngineConfig, SamplingParams, _engine
from loraserve.errors import InvalidArgumentError, ResourceExhaustedError

DEVICES = ["cuda-emulated", "cuda"]
pytestmark = pytest.mark.parametrize("device", DEVICES)
# Activations, KV and adapters are bfloat16 and the oracle's are float32: of the checkpoints here,
# whose logits spread over tens of nats, the worst of thousands of log-probabilities.
TOLERANCE = 0.35


def load(store: OracleStore, name: str, engine: Engine, adapters: list[str]) -> None:
    for adapter in adapters:
        engine.load_adapter(adapter, store.adapters(name)[adapter])


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_log_probabilities_and_greedy_tokens(store: OracleStore, name: str, device: str) -> None:
    open_backend(device)
    rng = random.Random(1)
    wanted = [(n, None) for n in (1, 17)] + [(9, adapter) for adapter in ADAPTERS]
    prompts = [[rng.randrange(SPECS[name].vocab) for _ in range(n)] for n, _ in wanted]
    params = SamplingParams(
        max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=3, prompt_logprobs=True
    )
    config = EngineConfig(model=store.checkpoint(name), device=device, max_batch_tokens=64)
    with Engine(config) as engine:
        load(store, name, engine, list(ADAPTERS))
        done = engine.generate(prompts, params, adapters=[adapter for _, adapter in wanted])
    reference = store.reference(name, "bfloat16")
    total = Comparison()
    for answer, prompt, (_, adapter) in zip(done, prompts, wanted, strict=True):
        total += compare(
            answer, reference, prompt, adapter, tolerance=TOLERANCE, greedy=True, top=3
        )
    assert total.agrees(TOLERANCE), total
    assert total.checked > 0


def answers(
    checkpoint: Path, store: OracleStore, device: str
) -> list[tuple[list[int], list[float]]]:
    """Requests of changing adapters and numbers, so that one graph meets many mixes."""
    rng = random.Random(2)
    names = ["r1", "r17", "r100"]
    out = []
    config = EngineConfig(model=checkpoint, device=device, max_batch_tokens=64)
    params = SamplingParams(max_tokens=6, temperature=0.8, seed=5, ignore_eos=True, logprobs=0)
    with Engine(config) as engine:
        load(store, "llama", engine, names)
        for count in (1, 3, 3, 4, 6):
            prompts = [[rng.randrange(200) for _ in range(3 + i)] for i in range(count)]
            chosen = [rng.choice([*names, None]) for _ in range(count)]
            for done in engine.generate(prompts, params, adapters=chosen):
                out.append((list(done.token_ids), list(done.logprobs)))
    return out


def test_graphs_change_no_bit(
    store: OracleStore, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_backend(device)
    checkpoint = store.checkpoint("llama")
    with_graphs = answers(checkpoint, store, device)
    monkeypatch.setenv("LORASERVE_CUDA_GRAPHS", "0")
    assert answers(checkpoint, store, device) == with_graphs


def test_what_the_kernels_lack_is_refused_by_name(store: OracleStore, device: str) -> None:
    open_backend(device)
    with pytest.raises(InvalidArgumentError, match=r"head_dim: 28 on cuda"):
        Engine(EngineConfig(model=store.checkpoint("qwen2"), device=device))
    with pytest.raises(InvalidArgumentError, match=r"page_bytes: 2048"):
        Engine(EngineConfig(model=store.checkpoint("llama"), device=device, page_bytes=2048))
    with pytest.raises(InvalidArgumentError, match=r"activation_dtype: float32 on cuda.*bfloat16"):
        Engine(
            EngineConfig(model=store.checkpoint("llama"), device=device, activation_dtype="float32")
        )


@pytest.fixture
def memory_full(device: str) -> Iterator[Callable[[bool], None]]:
    """Says whether the memory of the emulated device is full: that of the extension under test, as
    each one that the emulation is linked into has its own."""
    if device != "cuda-emulated":
        pytest.skip("a real device's memory is not filled for this")
    open_backend(device)
    assert _engine.__file__ is not None
    say: Callable[[bool], None] = ctypes.CDLL(_engine.__file__).SetEmulatedMemoryFull
    yield say
    say(False)


def test_an_adapter_that_finds_no_device_memory_fails_its_requests_alone(
    store: OracleStore, device: str, memory_full: Callable[[bool], None]
) -> None:
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    with Engine(EngineConfig(model=store.checkpoint("llama"), device=device)) as engine:
        (before,) = engine.generate([[1, 2, 3]], params)
        memory_full(True)
        load(store, "llama", engine, ["r1"])
        for _ in range(2):
            with pytest.raises(ResourceExhaustedError, match="no device memory"):
                engine.generate([[1, 2, 3]], params, adapters=["r1"])
        (after,) = engine.generate([[1, 2, 3]], params)
        assert after.token_ids == before.token_ids
        memory_full(False)
        (done,) = engine.generate([[1, 2, 3]], params, adapters=["r1"])
        assert len(done.token_ids) == 2
