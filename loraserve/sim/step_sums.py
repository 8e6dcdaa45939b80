"""The features of an engine's next step, kept up to date as sequences come and go."""

from collections.abc import Sequence

from loraserve.placement.cost_model import Profile
from loraserve.sim.sequence import BASE_ONLY, AdapterTable, SimSequence

_ENDLESS = 1 << 60


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

    def _held_bytes(self) -> float:
        """Of adapters and contexts in a step without prefill: what may outgrow the cache."""
        held = self._cost.context_bytes * self.context
        if self._padded and self._by_rank:
            return held + len(self._by_adapter) * max(self._by_rank) * self._bytes_per_rank
        return held + self._distinct_bytes

    def decode_run(self) -> tuple[float, int]:
        """By how much each decode step is longer than the one before, and for how many steps that
        is so: to where the contexts outgrow the cache, a number without meaning where they never
        do."""
        c = self._cost
        slope = c.context_token_s * self.decoding
        growth = c.context_bytes * self.decoding
        if not c.spill_byte_s or not growth:
            return slope, _ENDLESS
        room = c.cache_bytes - self._held_bytes()
        if room < 0:
            return slope + c.spill_byte_s * growth, _ENDLESS
        return slope, int(min(room // growth + 1, _ENDLESS))

    def decode_step_s(self) -> float:
        """Seconds of a step without prefill."""
        c = self._cost
        seconds = (
            c.step_s
            + c.decode_token_s * self.decoding
            + c.context_token_s * self.context
            + c.token_rank_s * self._token_ranks
        )
        if c.batch_token_s:
            seconds += c.batch_token_s * max(self.decoding - c.batch_tokens, 0.0)
        if c.spill_byte_s:
            seconds += c.spill_byte_s * max(self._held_bytes() - c.cache_bytes, 0.0)
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
        tokens = prefill + self.decoding
        held = distinct_bytes + c.context_bytes * (self.context + prefill)
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
            + c.batch_token_s * max(tokens - c.batch_tokens, 0.0)
            + c.spill_byte_s * max(held - c.cache_bytes, 0.0)
        )
