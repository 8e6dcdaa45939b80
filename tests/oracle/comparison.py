"""The one comparison of what the engine answered with the oracle."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from oracle.reference import Reference


class Answer(Protocol):
    """What is compared of a completion."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def logprobs(self) -> Sequence[float]: ...
    @property
    def top_logprobs(self) -> Sequence[Mapping[int, float]] | None: ...
    @property
    def prompt_logprobs(self) -> Sequence[float | None] | None: ...
    @property
    def prompt_top_logprobs(self) -> Sequence[Mapping[int, float] | None] | None: ...


@dataclass(frozen=True)
class Comparison:
    """`worst` is the largest error of a log-probability in nats, infinite where one is missing.

    Of the greedy tokens, `checked` were compared with the oracle's best token, of which `wrong`
    differ; `excluded` were not, because the oracle's two best are closer than the tolerance can
    tell apart.
    """

    worst: float = 0.0
    checked: int = 0
    wrong: int = 0
    excluded: int = 0

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(
            max(self.worst, other.worst),
            self.checked + other.checked,
            self.wrong + other.wrong,
            self.excluded + other.excluded,
        )

    def agrees(self, tolerance: float) -> bool:
        return self.worst <= tolerance and self.wrong == 0


def _error(got: float | None, expected: float) -> float:
    if got is None or not math.isfinite(got):
        return math.inf
    return abs(got - expected)


def _top_error(top: Mapping[int, float], row: torch.Tensor, count: int) -> float:
    """`top` holds the `count` best tokens, and the chosen one besides if it is none of them."""
    if not count <= len(top) <= count + 1:
        return math.inf
    best = row.topk(count).values.tolist()
    listed = sorted(top.values(), reverse=True)[:count]
    errors = [_error(value, row[token].item()) for token, value in top.items()]
    return max(errors + [_error(g, e) for g, e in zip(listed, best, strict=True)])


def compare(
    answer: Answer,
    reference: Reference,
    prompt: Sequence[int],
    adapter: str | None = None,
    *,
    tolerance: float,
    greedy: bool = False,
    top: int = 0,
) -> Comparison:
    """Compares one completion with the oracle reading the very same tokens.

    The oracle is given the engine's own tokens, so one near-tie does not spoil what follows it.
    Those of the prompt are compared where the answer has them; `greedy` says that the tokens were
    chosen greedily; `top` is the number of top log-probabilities that were asked for.
    """
    tokens = list(answer.token_ids)
    rows = reference.log_probs([*prompt, *tokens], adapter)
    worst = 0.0
    if answer.prompt_logprobs is not None:
        if len(answer.prompt_logprobs) != len(prompt) or answer.prompt_logprobs[0] is not None:
            return Comparison(worst=math.inf)
        for i in range(1, len(prompt)):
            error = _error(answer.prompt_logprobs[i], rows[i - 1, prompt[i]].item())
            worst = max(worst, error)
    if answer.prompt_top_logprobs is not None:
        if len(answer.prompt_top_logprobs) != len(prompt) or answer.prompt_top_logprobs[0]:
            return Comparison(worst=math.inf)
        for i, told in enumerate(answer.prompt_top_logprobs[1:]):
            worst = max(worst, _top_error(told or {}, rows[i], top))
    if not tokens or len(answer.logprobs) != len(tokens):
        return Comparison(worst=math.inf)
    if top and (answer.top_logprobs is None or len(answer.top_logprobs) != len(tokens)):
        return Comparison(worst=math.inf)
    checked = wrong = excluded = 0
    for i, token in enumerate(tokens):
        row = rows[len(prompt) + i - 1]
        worst = max(worst, _error(answer.logprobs[i], row[token].item()))
        if top and answer.top_logprobs is not None:
            worst = max(worst, _top_error(answer.top_logprobs[i], row, top))
        if greedy:
            first, second = row.topk(2).values.tolist()
            if first - second <= 2 * tolerance:
                excluded += 1
            else:
                checked += 1
                wrong += token != int(row.argmax())
    return Comparison(worst, checked, wrong, excluded)
