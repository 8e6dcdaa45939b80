"""How the CUDA backend does a product is chosen when a model is loaded, never within a step."""

import ctypes
import random

import numpy as np
from backend_fixtures import open_backend
from oracle.checkpoints import SPECS
from oracle.store import OracleStore

from loraserve import Engine, EngineConfig, SamplingParams, _engine, _testing

# Row counts of steps of up to 50 rows, and of up to 64 rows of logits.
STEPS = (1, 2, 4, 8, 16, 24, 32, 40, 48, 50)
LOGITS = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)


class Plans:
    """What the emulation counts in an extension: each has its own."""

    def __init__(self, extension: str | None) -> None:
        assert extension is not None
        library = ctypes.CDLL(extension)
        self._ahead = library.EmulatedGemmPlans
        self._late = library.EmulatedLateGemmPlans
        self._ahead.restype = self._late.restype = ctypes.c_uint64
        self._before = (self._ahead(), self._late())

    def new(self) -> tuple[int, int]:
        """Made since this was made: ahead of the first product of the shape, and with it."""
        return self._ahead() - self._before[0], self._late() - self._before[1]


def test_no_step_finds_a_product_unplanned(store: OracleStore) -> None:
    open_backend("cuda-emulated")
    plans = Plans(_engine.__file__)
    rng = random.Random(4)
    config = EngineConfig(
        model=store.checkpoint("llama"), device="cuda-emulated", max_batch_tokens=STEPS[-1]
    )
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, prompt_logprobs=True)
    with Engine(config) as engine:
        engine.load_adapter("r17", store.adapters("llama")["r17"])
        # qkv, o, gate and up, down: of other shapes each. And the head.
        assert plans.new() == (4 * len(STEPS) + len(LOGITS), 0)
        for lengths in ([1], [2], [7], [23], [49], [50], [51], [70], [1] * 5, [13] * 4, [3] * 20):
            prompts = [[rng.randrange(SPECS["llama"].vocab) for _ in range(n)] for n in lengths]
            chosen = [rng.choice(["r17", None]) for _ in lengths]
            engine.generate(prompts, params, adapters=chosen)
    assert plans.new() == (4 * len(STEPS) + len(LOGITS), 0)


def test_a_product_that_nobody_foretold_plans_itself_once() -> None:
    backend = open_backend("cuda-emulated")
    plans = Plans(_testing.__file__)
    w = np.ones((8, 16), np.float32)
    for rows, late in ((3, 1), (3, 1), (5, 2)):
        backend.gemm(np.ones((rows, 16), np.float32), [w])
        assert plans.new() == (0, late)
