"""What an engine is made of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DTypeChoice = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class EngineConfig:
    """An engine's model, device and limits. Sizes in bytes, lengths in tokens."""

    model: str | Path
    """A Hugging Face directory."""
    base_name: str | None = None
    """The model's name as trainers write it into adapters; those that name another are refused.
    None: names are not compared. Base digests, where adapters have them, and shapes always are."""
    device: str = "cpu"
    weight_dtype: DTypeChoice = "auto"
    """auto: bfloat16 if the checkpoint is bfloat16, else float32. cuda keeps bfloat16 alone."""
    adapter_dtype: DTypeChoice = "auto"
    """auto: bfloat16 adapters stay so, others become float32. cuda keeps bfloat16 alone."""
    activation_dtype: DTypeChoice = "auto"
    """What products with base weights read the activations as. auto: float32 on cpu, bfloat16 on
    cuda. bfloat16 on cpu needs bfloat16 weights, rounds as engines that compute in bfloat16 do, and
    is faster where the machine has AVX512-BF16; sums, adapters and the KV cache stay float32."""
    memory_bytes: int | None = None
    """KV cache and adapters together; None: 1 GiB."""
    block_size: int = 16
    """Tokens of a KV block, a multiple of 16."""
    page_bytes: int = 0
    """0: chosen from the model's shape."""
    max_batch_tokens: int = 512
    max_sequences: int = 64
    max_step_adapter_bytes: int = 0
    """Distinct adapter bytes that one step may touch; 0: no limit."""
    prefix_cache: bool = True
    prefetch: bool = True
    """Write adapters into pages when they are loaded, while pages are free."""
    record_steps: bool = False
    """Keep a record of every step, for `Engine.take_step_records`."""
    threads: int = 0
    """0: one for each core this process may use."""
    isa: str = ""
    """CPU: the highest instruction set to use ("x86-64-v3", "x86-64-v4-bf16", ...); empty: no
    limit."""
