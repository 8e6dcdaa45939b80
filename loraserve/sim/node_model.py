"""One engine in simulated time: what csrc/engine/scheduler.cc does, at the times of a cost model.

Each step takes the decodes first, then running prefills and newcomers in order of arrival within
the token budget. Between two events nothing but context lengths changes, so k decode steps in a
row are one event: the time of a step is linear in the context, the time of k steps quadratic in k.
An event ends where the contexts outgrow the cache, as steps get longer at another pace from there.

Adapters are installed beside the steps, one after another; who waits for one joins the first step
that begins when it is there.

Left out of the engine's scheduler: priorities, the prefix cache, blocks (the KV cache is counted in
tokens), prefetching, turns among adapters that do not fit, and what an install costs the steps
beside it.
"""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass

from loraserve.errors import InvalidArgumentError
from loraserve.placement.cost_model import Profile, Slo
from loraserve.sim.device_memory import DeviceMemory
from loraserve.sim.engine_queue import EngineQueue
from loraserve.sim.gaps import GapHistogram
from loraserve.sim.sequence import BASE_ONLY, AdapterTable, SimSequence
from loraserve.sim.step_sums import StepSums


@dataclass(frozen=True)
class EngineSettings:
    """`max_install_bytes`: packed bytes on their way from host memory into the engine's pages, the
    largest adapter left out. `max_jump`: steps that one event may stand for."""

    max_install_bytes: int = 64 << 20
    max_step_adapter_bytes: int = 0
    max_jump: int = 1 << 30


class NodeEngine:
    """Times are given and never go back. The owner calls `complete` at `end_s`, where that is not
    None; `submit` and `complete` change it."""

    def __init__(
        self,
        profile: Profile,
        adapters: AdapterTable,
        settings: EngineSettings,
        slo: Slo,
        gaps: GapHistogram,
        on_first_token: Callable[[SimSequence], None],
        on_finish: Callable[[SimSequence], None],
    ) -> None:
        if not 0 < profile.max_sequences <= profile.max_batch_tokens:
            raise InvalidArgumentError(
                "max_sequences",
                f"{profile.max_sequences} is not within 1 and max_batch_tokens "
                f"({profile.max_batch_tokens})",
            )
        self._profile = profile
        self._adapters = adapters
        self._settings = settings
        self._late_s = slo.tbt_p95_s
        self._gaps = gaps
        self._on_first_token = on_first_token
        self._on_finish = on_finish
        self._reset()
        # Counters, which outlive a crash.
        self.steps = 0
        self.late_steps = 0
        self.busy_s = 0.0
        self.preemptions = 0
        self.installs = 0
        self.installed_bytes = 0
        self.prefilled_tokens = 0

    def _reset(self) -> None:
        self.queue = EngineQueue()
        self.memory = DeviceMemory(self._profile.kv_tokens, self._adapters)
        self._sums = StepSums(self._profile, self._adapters)
        # Running sequences: prefilling ones by arrival, decoding ones by the step of their end.
        # An entry of `_finishing` is stale unless the sequence still ends there.
        self._prefilling: list[SimSequence] = []
        self._finishing: list[tuple[int, int, SimSequence]] = []
        # The steps under way, from `_start_s` to `end_s`.
        self.end_s: float | None = None
        self._start_s = 0.0
        self._steps = 0
        self._first_s = 0.0
        self._slope_s = 0.0
        self._chunks: list[tuple[SimSequence, int]] = []
        # No newcomer can get in before something ends.
        self._full = False
        # When adapters that are being installed will be there.
        self._installing: dict[int, float] = {}

    # What the owner sees

    @property
    def running(self) -> int:
        return self._sums.decoding + len(self._prefilling)

    @property
    def pending_prefill_tokens(self) -> int:
        """Of queued and running sequences, still to be computed."""
        running = sum(s.tokens - s.computed for s in self._prefilling)
        return self.queue.tokens + running

    def decoding_sequences(self) -> list[SimSequence]:
        return [s for step, _, s in self._finishing if s.finish_step == step]

    def sequences(self) -> list[SimSequence]:
        """Every unfinished one, by order of arrival."""
        found = [*self.decoding_sequences(), *self._prefilling, *self.queue]
        return sorted(found, key=lambda s: s.order)

    def generated(self, sequence: SimSequence) -> int:
        """Tokens of a sequence up to the end of the last event."""
        if sequence.finish_step < 0:
            return sequence.generated
        return sequence.generated + self.steps - sequence.start_step

    # Events

    def submit(self, now_s: float, sequence: SimSequence) -> None:
        """A sequence whose adapter is in the host's memory. Raises InvalidArgumentError where it
        could not run even alone."""
        room = 0 if sequence.adapter == BASE_ONLY else self._adapters.room[sequence.adapter]
        needed = sequence.prompt_tokens + sequence.output_tokens + room
        if self.memory.capacity and needed > self.memory.capacity:
            raise InvalidArgumentError(
                "prompt_tokens",
                f"{needed} tokens with output and adapter: the KV cache has {self.memory.capacity}",
            )
        self.queue.add(sequence)
        if self.end_s is None or not self._steps:
            self._begin(now_s)
        elif self._steps > 1 and not self._full and self.running < self._profile.max_sequences:
            self._cut(now_s)

    def complete(self, now_s: float) -> None:
        """The steps under way are done, or an install is that all waited for: `now_s` is
        `end_s`."""
        self._take_steps(now_s, self._steps)
        for sequence, count in self._chunks:
            sequence.computed += count
            self.prefilled_tokens += count
            if sequence.computed == sequence.tokens:
                self._prefilling.remove(sequence)
                self._start_decoding(now_s, sequence)
        finishing = self._finishing
        while finishing and finishing[0][0] <= self.steps:
            step, _, sequence = heapq.heappop(finishing)
            if sequence.finish_step == step:
                self._stop_decoding(now_s, sequence)
                self._leave(sequence)
                sequence.finish_s = now_s
                self._on_finish(sequence)
        self.end_s = None
        self._begin(now_s)

    def crash(self, now_s: float) -> list[SimSequence]:
        """Everything is lost; the unfinished sequences, with the tokens that got out."""
        if self.end_s is not None:
            done, last_s = 0, self._start_s
            if not self._chunks:
                while done < self._steps and self._start_s + self._span(done + 1) <= now_s:
                    done += 1
                last_s += self._span(done)
            self._take_steps(last_s, done)
            for sequence in self.decoding_sequences():
                self._stop_decoding(last_s, sequence)
                sequence.running = True
                self._prefilling.append(sequence)
        sequences = self.sequences()
        for sequence in sequences:
            sequence.restart()
        self._reset()
        return sequences

    # Steps

    def _take_steps(self, end_s: float, steps: int) -> None:
        self.busy_s += end_s - self._start_s
        self.steps += steps
        decoding = self._sums.decoding
        if decoding:
            self._sums.advance(steps)
            self.memory.kv_used += steps * decoding
            self._gaps.add_run(self._first_s, self._slope_s, steps, decoding)
        if self._first_s > self._late_s:
            self.late_steps += steps
        elif self._slope_s > 0:
            in_time = 1 + int((self._late_s - self._first_s) / self._slope_s)
            self.late_steps += max(0, steps - in_time)

    def _begin(self, now_s: float) -> None:
        """Plans the next step or steps, if there is anything to run."""
        self._chunks = []
        self._full = False
        self.end_s = None
        preempted = self._make_decode_room(now_s)
        budget = self._profile.max_batch_tokens - self._sums.decoding
        for sequence in self._prefilling:
            if budget <= 0:
                break
            count = min(sequence.tokens - sequence.computed, budget)
            self._chunks.append((sequence, count))
            budget -= count
        for adapter in [a for a, ready_s in self._installing.items() if ready_s <= now_s]:
            del self._installing[adapter]
            self.memory.unpin(adapter)
        if self.queue.heads and not preempted:
            self._admit(now_s, budget)
        decoding = self._sums.decoding
        next_s = min(self._installing.values(), default=math.inf)
        if not decoding and not self._chunks:
            self._steps = 0
            if self._installing:
                self.end_s = self._start_s = next_s
            return
        self._start_s = now_s
        self._steps = 1
        if self._chunks:
            self._slope_s = 0.0
            self._first_s = self._sums.mixed_step_s(self._chunks)
            self.end_s = now_s + self._first_s
            return
        self._slope_s, in_a_row = self._sums.decode_run()
        # After a preemption, newcomers get in with the next step at the earliest.
        steps = 1 if preempted else min(self._next_finish() - self.steps, in_a_row)
        if self.memory.capacity:
            steps = min(steps, self.memory.free // decoding)
        self._steps = max(1, min(steps, self._settings.max_jump))
        self._first_s = self._sums.decode_step_s()
        self.end_s = now_s + self._span(self._steps)
        if self.end_s > next_s:
            self._cut(next_s)

    def _next_finish(self) -> int:
        """The step in which the next decoding sequence ends."""
        finishing = self._finishing
        while finishing[0][2].finish_step != finishing[0][0]:
            heapq.heappop(finishing)
        return finishing[0][0]

    def _span(self, steps: int) -> float:
        """Seconds of the first so many steps of those under way."""
        return steps * self._first_s + self._slope_s * (steps * (steps - 1) // 2)

    def _cut(self, now_s: float) -> None:
        """Lets the steps under way end at the first step boundary that is not before `now_s`."""
        elapsed = now_s - self._start_s
        first, slope = self._first_s, self._slope_s
        if slope > 0:
            half = first - slope / 2
            guess = (math.sqrt(half * half + 2 * slope * elapsed) - half) / slope
        else:
            guess = elapsed / first if first > 0 else 1.0
        steps = min(self._steps, max(1, int(guess)))
        while steps > 1 and self._start_s + self._span(steps - 1) >= now_s:
            steps -= 1
        while steps < self._steps and self._start_s + self._span(steps) < now_s:
            steps += 1
        self._steps = steps
        self.end_s = self._start_s + self._span(steps)

    # Admission and memory

    def _admit(self, now_s: float, budget: int) -> None:
        """Newcomers for the step; begins installs for those whose adapters are not there."""
        queue, memory = self.queue, self.memory
        while queue.heads and budget > 0 and self.running < self._profile.max_sequences:
            sequence = queue.first()
            adapter = sequence.adapter
            if adapter != BASE_ONLY and not (
                self._ready(now_s, adapter) and self._fits_step(adapter)
            ):
                queue.set_aside()
                continue
            memory.pin(adapter)
            if not memory.make_room(sequence.tokens):
                memory.unpin(adapter)
                self._full = True
                break
            queue.take()
            memory.kv_used += sequence.tokens
            sequence.running = True
            self._prefilling.append(sequence)
            if len(self._prefilling) > 1:  # a preempted one goes before younger ones
                self._prefilling.sort(key=lambda s: s.order)
            count = min(sequence.tokens, budget)
            self._chunks.append((sequence, count))
            budget -= count
        queue.bring_back()

    def _ready(self, now_s: float, adapter: int) -> bool:
        """Whether the adapter is there; if not, its install begins where that is possible."""
        if adapter in self._installing:
            return False
        if self.memory.holds(adapter):
            return True
        sizes = self._adapters.sizes
        under_way = [sizes[a] for a in (adapter, *self._installing)]
        if sum(under_way) - max(under_way) > self._settings.max_install_bytes:
            return False
        if not self.memory.install(adapter):
            return False
        size = sizes[adapter]
        self.installs += 1
        self.installed_bytes += size
        begin_s = max(now_s, max(self._installing.values(), default=0.0))
        ready_s = begin_s + size * self._profile.install_byte_s
        if ready_s <= now_s:
            return True
        self._installing[adapter] = ready_s
        self.memory.pin(adapter)
        return False

    def _fits_step(self, adapter: int) -> bool:
        """Within the limit of distinct adapter bytes that a step touches."""
        limit, pinned = self._settings.max_step_adapter_bytes, self.memory.pinned
        if not limit or not pinned or adapter in pinned:
            return True
        sizes = self._adapters.sizes
        return sum(sizes[a] for a in pinned) + sizes[adapter] <= limit

    def _make_decode_room(self, now_s: float) -> bool:
        """One more token for every decoding sequence; whether that took a preemption."""
        preempted = False
        while self._sums.decoding and not self.memory.make_room(self._sums.decoding):
            running = (*self._prefilling, *self.decoding_sequences())
            self._preempt(now_s, max(running, key=lambda s: s.order))
            preempted = True
        return preempted

    def _preempt(self, now_s: float, sequence: SimSequence) -> None:
        self.preemptions += 1
        if sequence.finish_step >= 0:
            self._stop_decoding(now_s, sequence)
        else:
            self._prefilling.remove(sequence)
        self._leave(sequence)
        sequence.restart()
        self.queue.add(sequence)

    # Sequences

    def _start_decoding(self, now_s: float, sequence: SimSequence) -> None:
        """Its prefill is done, which gives a token."""
        sequence.generated += 1
        if sequence.generated == 1:
            sequence.first_token_s = now_s
        else:  # computed again: its client waited all the while for this token
            gap = now_s - sequence.last_token_s
            self._gaps.add(gap, 1)
            sequence.gaps += 1
            sequence.late_gaps += gap > self._late_s
        sequence.last_token_s = now_s
        if sequence.generated == 1:
            self._on_first_token(sequence)
        left = sequence.output_tokens - sequence.generated
        if left == 0:
            self._leave(sequence)
            sequence.finish_s = now_s
            self._on_finish(sequence)
            return
        sequence.start_step, sequence.start_late = self.steps, self.late_steps
        sequence.finish_step = self.steps + left
        heapq.heappush(self._finishing, (sequence.finish_step, sequence.order, sequence))
        self._sums.add(sequence.adapter, sequence.tokens + 1)

    def _stop_decoding(self, last_s: float, sequence: SimSequence) -> None:
        """`last_s`: when the last step ended."""
        tokens = self.steps - sequence.start_step
        sequence.generated += tokens
        sequence.gaps += tokens
        sequence.late_gaps += self.late_steps - sequence.start_late
        if tokens:
            sequence.last_token_s = last_s
        sequence.finish_step = -1
        self._sums.remove(sequence.adapter, sequence.tokens + 1 + tokens)
        self.memory.kv_used -= tokens

    def _leave(self, sequence: SimSequence) -> None:
        """Gives back the room of its prefill, and its pin."""
        self.memory.kv_used -= sequence.tokens
        self.memory.unpin(sequence.adapter)
        sequence.running = False
