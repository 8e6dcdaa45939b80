"""The prompt as the beginning of an answer of /v1/completions, with its log-probabilities."""

from typing import Any

from loraserve.client import Prompt
from loraserve.errors import InvalidArgumentError
from loraserve.gateway.logprobs import CompletionLogprobs
from loraserve.text.tokenizer import Tokenizer


class Echo:
    """Of one prompt."""

    ids: list[int]

    def __init__(self, prompt: Prompt, ids: Prompt, tokenizer: Tokenizer | None) -> None:
        """`ids`: what is sent to nodes in its stead. Raises InvalidArgumentError."""
        if tokenizer is None:
            raise InvalidArgumentError("echo", "this gateway has no tokenizer (--tokenizer)")
        if isinstance(prompt, str):
            self.text = prompt
        else:
            self.text = tokenizer.decode(list(prompt))
        self.ids = [int(token) for token in ids]

    def logprobs(
        self,
        write: CompletionLogprobs,
        values: list[float | None] | None,
        tops: list[dict[int, float] | None] | None,
    ) -> dict[str, Any]:
        """Raises no error where nodes gave none: they are null then."""
        none: list[Any] = [None] * len(self.ids)
        if values is None:
            return write(self.ids, none, none)
        return write(self.ids, values, tops or [{}] * len(self.ids))


def joined(first: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """Two pieces of log-probabilities as one."""
    return {name: first[name] + then[name] for name in first}
