"""How long prompts and answers are, by the name of a distribution."""

from functools import lru_cache

import numpy as np

from loraserve.errors import InvalidArgumentError
from loraserve.sim.traces import AZURE_CODE, AZURE_CONV, Trace, read_azure
from loraserve.sim.workload import Ints

LENGTHS = ("azure_conv", "azure_code", "uniform", "short")
_FILES = {"azure_conv": AZURE_CONV, "azure_code": AZURE_CODE}


@lru_cache(maxsize=2)
def _azure(name: str) -> Trace:
    return read_azure(_FILES[name])


def sample_lengths(name: str, rng: np.random.Generator, size: int) -> tuple[Ints, Ints]:
    """Prompt and output tokens. `azure_*`: rows of the Azure LLM inference traces 2023; `uniform`:
    S-LoRA's 8 to 511 for both; `short`: 128 and 32 on average. Raises InvalidArgumentError."""
    if name in _FILES:
        trace = _azure(name)
        rows = rng.integers(0, len(trace.time_s), size)
        return trace.prompt_tokens[rows], trace.output_tokens[rows]
    if name == "uniform":
        return rng.integers(8, 512, size), rng.integers(8, 512, size)
    if name == "short":
        return 1 + rng.poisson(127, size), rng.geometric(1 / 32, size)
    raise InvalidArgumentError("lengths", f"{name!r}: one of {', '.join(LENGTHS)}")


def mean_lengths(name: str) -> tuple[float, float]:
    """Of a large sample."""
    prompt, output = sample_lengths(name, np.random.default_rng(0), 20_000)
    return float(prompt.mean()), float(output.mean())
