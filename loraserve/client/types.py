"""What the SDK gives out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

Prompt = str | Sequence[int]
"""Text, or token ids."""


@dataclass(slots=True)
class Chunk:
    """A piece of an answer."""

    first_index: int
    """Index in the answer of `token_ids[0]`; chunks join without gap or overlap."""
    token_ids: list[int]
    text: str
    """Text that became certain; it may lag behind the tokens."""
    logprobs: list[float] = field(default_factory=list)
    """One per token, where asked for."""
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: str | None = None
    """None while there is more; "stop", "length" or "cancelled"."""
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the answer."""
    node_id: str = ""
    attempt: int = 0
    """0, or one more for every time the request was sent again."""
    queue_time_s: float = 0.0
    prefill_time_s: float = 0.0
    """Both in the first chunk of an attempt: at the node, from the request's arrival to its first
    step, and from there to its first token."""
    prompt_logprobs: list[float | None] | None = None
    """With the first token, where asked for: of each prompt token, None of the first."""
    prompt_top_logprobs: list[dict[int, float] | None] | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    token_ids: list[int]
    text: str
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    finish_reason: str
    stop_reason: str | int | None
    prompt_tokens: int
    cached_prompt_tokens: int
    """Prompt tokens whose KV cache was there already."""
    revision: str | None
    """Of the adapter that answered; None for the base model."""
    seed: int
    """What drew the tokens."""
    node_id: str
    """That which ended the answer."""
    attempts: int
    """How often the request was sent; 1 where nothing went wrong."""
    queue_time_s: float
    """From its last arrival at a node to its first step there."""
    prompt_logprobs: list[float | None] | None = None
    """Where asked for: of each prompt token, None of the first."""
    prompt_top_logprobs: list[dict[int, float] | None] | None = None


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter of the cluster."""

    name: str
    base: str
    tenant: str
    revision: str
    size_bytes: int
    """Of the packed adapter."""
    max_rank: int
    created: datetime
    updated: datetime
    """Both in UTC."""
    holders: tuple[tuple[str, str], ...]
    """Node ids and the copy's residency there, such as ("node-1", "device")."""
    unrouted_reason: str
    """Why no node serves it; empty where one does."""
