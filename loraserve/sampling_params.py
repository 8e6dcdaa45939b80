"""How to choose the next token: the same fields in the SDK, on the wire and in the engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SamplingParams:
    """Everything about one request's sampling. Ranges are checked by the engine.

    Order: logit bias, penalties, then temperature, top-k, top-p, min-p, and one draw that depends
    on `seed` and the token's position alone.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    """No end or stop token is drawn before this many tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Relative to the likeliest token's probability."""
    repetition_penalty: float = 1.0
    """Over prompt and output; 1: off."""
    presence_penalty: float = 0.0
    """Over the output."""
    frequency_penalty: float = 0.0
    """Over the output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int | None = None
    """None: drawn at random for each request."""
    stop: Sequence[str] = ()
    """Text that ends the answer; it and what follows is not given out."""
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """n: natural-log probabilities of the chosen token and of the n likeliest (0: chosen only),
    under the model's own distribution, before temperature and filters."""
    prompt_logprobs: bool = False
    """Also of each prompt token given those before it, and of the `logprobs` likeliest there."""
