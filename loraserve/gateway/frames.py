"""Server-sent events of the two APIs. What stays the same over an answer is written once."""

import json
from collections.abc import Callable
from json.encoder import encode_basestring_ascii
from typing import Any

DONE = b"data: [DONE]\n\n"

# Escapes all but ASCII: some clients end a line at U+2028 or U+0085.
_quoted: Callable[[str], str] = encode_basestring_ascii


class Frames:
    """The events of one HTTP request; `id`, `object`, `created` and `model` are in each."""

    def __init__(self, head: dict[str, Any], chat: bool) -> None:
        self._head = head
        self._chat = chat
        # {"id": ..., "model": ..., "choices": [{"index":
        self._open = "data: " + json.dumps(head)[:-1] + ', "choices": [{"index": '
        self._text = ', "delta": {"content": ' if chat else ', "text": '
        self._close = (
            '}, "logprobs": null, "finish_reason": null}]}\n\n'
            if chat
            else ', "logprobs": null, "finish_reason": null, "stop_reason": null}]}\n\n'
        )

    def text(self, index: int, text: str) -> bytes:
        """A piece of text and nothing else, which most events are."""
        return f"{self._open}{index}{self._text}{_quoted(text)}{self._close}".encode("ascii")

    def choice(self, index: int, fields: dict[str, Any], usage: dict[str, Any] | None) -> bytes:
        """Any event about a choice. `fields`: of the choice, besides its index."""
        event = self._head | {"choices": [{"index": index} | fields]}
        if usage is not None:
            event["usage"] = usage
        return event_of(event)

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The last event but [DONE], where usage is asked for."""
        return event_of(self._head | {"choices": [], "usage": usage})


def event_of(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"
