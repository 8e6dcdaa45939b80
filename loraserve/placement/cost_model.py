"""What one engine step costs: linear in a few features of the step, with two hinges. Pure.

The terms follow from what a step does: products over tokens, attention over contexts, adapters
whose weights are read once each. `token_max_rank_s` is for engines that pad a batch to its
largest rank; an engine whose cost follows each adapter's own rank has 0 there. The hinges: with
more than `batch_tokens` in a step its products stop being bound by reading the weights, so that
every further token costs more; and where adapters and KV cache outgrow the processor's own cache
(`cache_bytes`), the bytes beyond come from memory. A model without them has 0 there.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class StepLoad:
    """One step's work. Counts are of tokens unless they say otherwise."""

    prefill_tokens: float = 0.0
    decode_tokens: float = 0.0
    """One for each sequence that decodes."""
    context_tokens: float = 0.0
    """Sum over decoding sequences of their context lengths."""
    chunk_context: float = 0.0
    """Sum over prefill chunks of chunk tokens times mean context length while they are computed."""
    token_ranks: float = 0.0
    """Sum over tokens of their adapter's rank; a base-only token adds 0."""
    token_max_rank: float = 0.0
    """Tokens with an adapter, times the largest rank that the engine pads them to."""
    adapters: float = 0.0
    """Distinct adapters."""
    adapter_bytes: float = 0.0
    """Of the distinct adapters, as the engine reads them in one step."""


@dataclass(frozen=True)
class CostModel:
    """Seconds per unit of each feature of StepLoad; `step_s` for a step at all. `batch_token_s`:
    more for each token over `batch_tokens`. `spill_byte_s`: more for each byte over `cache_bytes`
    of adapters and KV cache, where a token of context or prefill takes `context_bytes`."""

    step_s: float
    prefill_token_s: float
    decode_token_s: float
    context_token_s: float = 0.0
    chunk_context_s: float = 0.0
    token_rank_s: float = 0.0
    token_max_rank_s: float = 0.0
    adapter_s: float = 0.0
    adapter_byte_s: float = 0.0
    batch_token_s: float = 0.0
    batch_tokens: float = 0.0
    spill_byte_s: float = 0.0
    cache_bytes: float = 0.0
    context_bytes: float = 0.0

    def seconds(self, load: StepLoad) -> float:
        """Of one step. A step without tokens costs nothing."""
        tokens = load.prefill_tokens + load.decode_tokens
        if tokens <= 0:
            return 0.0
        held = load.adapter_bytes + self.context_bytes * (load.context_tokens + load.prefill_tokens)
        return (
            self.step_s
            + self.prefill_token_s * load.prefill_tokens
            + self.decode_token_s * load.decode_tokens
            + self.context_token_s * load.context_tokens
            + self.chunk_context_s * load.chunk_context
            + self.token_rank_s * load.token_ranks
            + self.token_max_rank_s * load.token_max_rank
            + self.adapter_s * load.adapters
            + self.adapter_byte_s * load.adapter_bytes
            + self.batch_token_s * max(tokens - self.batch_tokens, 0.0)
            + self.spill_byte_s * max(held - self.cache_bytes, 0.0)
        )

    def loaded(self) -> "CostModel":
        """Without hinges, every token and byte at its price beyond them: what placement adds up.
        Never below `seconds`, and at most `batch_token_s * batch_tokens + spill_byte_s *
        cache_bytes` above it."""
        context_s = self.spill_byte_s * self.context_bytes
        return replace(
            self,
            prefill_token_s=self.prefill_token_s + self.batch_token_s + context_s,
            decode_token_s=self.decode_token_s + self.batch_token_s,
            context_token_s=self.context_token_s + context_s,
            adapter_byte_s=self.adapter_byte_s + self.spill_byte_s,
            batch_token_s=0.0,
            spill_byte_s=0.0,
        )

    def per_rank(self) -> tuple[float, float]:
        """What a unit of rank costs a decoding sequence beside the sequence itself: of its own
        rank, and of the largest in its batch."""
        token_s = max(self.decode_token_s, 1e-12)
        return self.token_rank_s / token_s, self.token_max_rank_s / token_s


@dataclass(frozen=True)
class Slo:
    """Of the 95th percentiles, seconds."""

    ttft_p95_s: float = 5.0
    tbt_p95_s: float = 0.150


@dataclass(frozen=True)
class Profile:
    """An engine on a device with a base model, as measured (`loraserve bench profile`) or derived
    from published tables. Stored as JSON."""

    name: str
    base: str
    device: str
    cost: CostModel
    max_batch_tokens: int
    max_sequences: int
    bytes_per_rank: int
    """Of an adapter on all seven modules: its size is this times its rank."""
    kv_tokens: int = 0
    """Tokens that the KV cache holds beside no adapters; 0: not limited."""
    kv_token_bytes: int = 0
    """Of a token in the KV cache: the adapters of running requests share its memory. 0: they take
    nothing from it."""
    install_byte_s: float = 0.0
    """Of an adapter's bytes from host memory to the device, in the step that first needs them."""
    padded: bool = False
    """Whether the engine pads a batch's adapters to one rank."""
    source: str = ""
    """Where the numbers come from, coefficient by coefficient."""
