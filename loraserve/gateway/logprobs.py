"""Log-probabilities as OpenAI's two APIs write them."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from loraserve.text.tokenizer import Tokenizer

_T = TypeVar("_T")
_INLINE_TOKENS = 256


async def beside(make: Callable[[], _T], tokens: int) -> _T:
    """What `make` makes of so many tokens' log-probabilities; in a thread where they are many, so
    that the streams of others go on."""
    return make() if tokens <= _INLINE_TOKENS else await asyncio.to_thread(make)


class TokenNames:
    """What a token is called. Two tokens may have one name: those of a part of a character."""

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool) -> None:
        """Without a tokenizer, or `as_ids`: "token_id:N"."""
        self._tokenizer = None if as_ids else tokenizer
        self._names: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        name = self._names.get(token)
        if name is None:
            name = self._names[token] = self._name(token)
        return name

    def _name(self, token: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token}"
        return self._tokenizer.decode([token], skip_special_tokens=False)


class CompletionLogprobs:
    """Of one choice of /v1/completions; `text_offset` goes on from piece to piece."""

    def __init__(self, names: TokenNames, offset: int = 0) -> None:
        self._names = names
        self._offset = offset

    def __call__(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float | None],
        tops: Sequence[Mapping[int, float] | None],
    ) -> dict[str, Any]:
        """`tops` has, for each token, the likeliest ones."""
        names = [self._names(token) for token in token_ids]
        offsets = []
        for name in names:
            offsets.append(self._offset)
            self._offset += len(name)
        ranked = [
            self._top(token, logprob, top)
            for token, logprob, top in zip(token_ids, logprobs, tops, strict=True)
        ]
        return {
            "tokens": names,
            "token_logprobs": list(logprobs),
            "top_logprobs": ranked,
            "text_offset": offsets,
        }

    def _top(
        self, token: int, logprob: float | None, top: Mapping[int, float] | None
    ) -> dict[str, float] | None:
        """The likeliest tokens, and the one that is there. Of one name the likelier counts."""
        if logprob is None or top is None:
            return None
        found: dict[str, float] = {}
        for other, value in (*top.items(), (token, logprob)):
            name = self._names(other)
            found[name] = max(value, found.get(name, value))
        return found


class ChatLogprobs:
    """Of one choice of /v1/chat/completions."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names

    def __call__(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        tops: Sequence[Mapping[int, float]],
    ) -> dict[str, Any]:
        content = []
        for token, logprob, top in zip(token_ids, logprobs, tops, strict=True):
            entry = self._entry(token, logprob)
            entry["top_logprobs"] = [self._entry(*item) for item in top.items()]
            content.append(entry)
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        name = self._names(token)
        return {"token": name, "logprob": logprob, "bytes": list(name.encode("utf-8", "replace"))}
