"""A request while it is simulated, and what is known of the adapters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from loraserve.client.retry import RetryState

# The adapter of a request for the base model alone.
BASE_ONLY = -1


class Request(NamedTuple):
    """`adapter` is an index into the workload's adapters, or BASE_ONLY."""

    time_s: float
    adapter: int
    prompt_tokens: int
    output_tokens: int


class SimSequence:
    """One request on its way. `tokens` is what must be in the KV cache before the next token comes:
    the prompt, and after a preemption or a lost node also what was generated before."""

    __slots__ = (
        "adapter",
        "arrival_s",
        "avoid",
        "computed",
        "finish_s",
        "finish_step",
        "first_token_s",
        "gaps",
        "generated",
        "last_token_s",
        "late_gaps",
        "order",
        "output_tokens",
        "prompt_tokens",
        "reported",
        "retry",
        "router",
        "running",
        "sent_generated",
        "start_late",
        "start_step",
        "ticket",
        "tokens",
    )

    def __init__(self, order: int, request: Request) -> None:
        self.order = order
        self.arrival_s = request.time_s
        self.adapter = request.adapter
        self.prompt_tokens = request.prompt_tokens
        self.output_tokens = request.output_tokens
        self.tokens = request.prompt_tokens
        self.computed = 0
        self.generated = 0
        self.running = False
        # While it decodes: the node's step count at its end, and both counters at its start.
        self.finish_step = -1
        self.start_step = 0
        self.start_late = 0
        self.reported = 0
        # Results; times as the node sees them.
        self.first_token_s = -1.0
        self.last_token_s = -1.0
        self.finish_s = -1.0
        self.gaps = 0
        self.late_gaps = 0
        # The client's side.
        self.retry: RetryState | None = None
        self.sent_generated = 0
        self.avoid: frozenset[str] = frozenset()
        self.router = 0
        self.ticket = 0

    def restart(self) -> None:
        """Its KV cache is gone: everything so far must be computed again."""
        self.tokens = self.prompt_tokens + self.generated
        self.computed = 0
        self.running = False
        self.finish_step = -1


@dataclass(frozen=True)
class AdapterTable:
    """Ranks and sizes by adapter index. `room` is what an installed adapter takes from the KV
    cache, in tokens."""

    ranks: Sequence[int]
    sizes: Sequence[int]
    room: Sequence[int]

    @classmethod
    def of(
        cls, ranks: Sequence[int], bytes_per_rank: int, kv_token_bytes: int = 0
    ) -> "AdapterTable":
        sizes = [rank * bytes_per_rank for rank in ranks]
        room = [-(-size // kv_token_bytes) if kv_token_bytes else 0 for size in sizes]
        return cls(list(ranks), sizes, room)
