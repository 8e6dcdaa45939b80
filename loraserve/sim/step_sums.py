"""The features of an engine's next step, kept up to date as sequences come and go."""

from collections.abc import Sequence

from loraserve.placement.cost_model import Profile
from loraserve.sim.sequence import BASE_ONLY, AdapterTable, SimSequence


class StepSums:
    """Sums over the decoding sequences, and what a step with them costs. The two `_s` methods are
    CostModel.seconds written out, because they are the inner loop of the simulator; the tests hold
    them to it."""

    def __init__(self, profile: Profile, adapters: AdapterTable) -> None:
        self._cost = profile.cost
        self._padded = profile.padded
        self._bytes_per_rank = profile.bytes_per_rank
        self._ranks = adapters.ranks
        self._sizes = adapters.sizes
        self.decoding = 0
        self.context = 0
        self._by_adapter: dict[int, int] = {}
        self._by_rank: dict[int, int] = {}  # distinct adapters of each rank
        self._token_ranks = 0
        self._lora_tokens = 0
        self._distinct_bytes = 0

    def add(self, adapter: int, context: int) -> None:
        """A sequence begins to decode with so much context."""
        self.decoding += 1
        self.context += context
        if adapter == BASE_ONLY:
            return
        rank = self._ranks[adapter]
        self._lora_tokens += 1
        self._token_ranks += rank
        count = self._by_adapter.get(adapter, 0)
        self._by_adapter[adapter] = count + 1
        if not count:
            self._distinct_bytes += self._sizes[adapter]
            self._by_rank[rank] = self._by_rank.get(rank, 0) + 1

    def remove(self, adapter: int, context: int) -> None:
        """The other way, with the context that it has now."""
        self.decoding -= 1
        self.context -= context
        if adapter == BASE_ONLY:
            return
        rank = self._ranks[adapter]
        self._lora_tokens -= 1
        self._token_ranks -= rank
        count = self._by_adapter[adapter] - 1
        if count:
            self._by_adapter[adapter] = count
            return
        del self._by_adapter[adapter]
        self._distinct_bytes -= self._sizes[adapter]
        if self._by_rank[rank] == 1:
            del self._by_rank[rank]
        else:
            self._by_rank[rank] -= 1

    def advance(self, steps: int) -> None:
        """Every context grew by so many tokens."""
        self.context += steps * self.decoding

    @property
    def slope_s(self) -> float:
        """By how much each decode step is longer than the one before."""
        return self._cost.context_token_s * self.decoding

    def decode_step_s(self) -> float:
        """Seconds of a step without prefill."""
        c = self._cost
        seconds = (
            c.step_s
            + c.decode_token_s * self.decoding
            + c.context_token_s * self.context
            + c.token_rank_s * self._token_ranks
        )
        distinct = len(self._by_adapter)
        if not distinct:
            return seconds
        seconds += c.adapter_s * distinct
        if not self._padded:
            return seconds + c.adapter_byte_s * self._distinct_bytes
        rank = max(self._by_rank)
        seconds += c.token_max_rank_s * self._lora_tokens * rank
        return seconds + c.adapter_byte_s * distinct * rank * self._bytes_per_rank

    def mixed_step_s(self, chunks: Sequence[tuple[SimSequence, int]]) -> float:
        """Seconds of a step that also computes these chunks (sequence, tokens)."""
        c = self._cost
        prefill = 0
        chunk_context = 0.0
        token_ranks, lora_tokens = self._token_ranks, self._lora_tokens
        distinct, distinct_bytes = len(self._by_adapter), self._distinct_bytes
        top = max(self._by_rank, default=0) if self._padded else 0
        seen: set[int] = set()
        for sequence, count in chunks:
            prefill += count
            chunk_context += count * (sequence.computed + (count + 1) / 2)
            adapter = sequence.adapter
            if adapter == BASE_ONLY:
                continue
            rank = self._ranks[adapter]
            token_ranks += count * rank
            lora_tokens += count
            if adapter not in self._by_adapter and adapter not in seen:
                seen.add(adapter)
                distinct += 1
                distinct_bytes += self._sizes[adapter]
                top = max(top, rank)
        if self._padded:
            distinct_bytes = distinct * top * self._bytes_per_rank
        return (
            c.step_s
            + c.prefill_token_s * prefill
            + c.decode_token_s * self.decoding
            + c.context_token_s * self.context
            + c.chunk_context_s * chunk_context
            + c.token_rank_s * token_ranks
            + c.token_max_rank_s * lora_tokens * top
            + c.adapter_s * distinct
            + c.adapter_byte_s * distinct_bytes
        )
