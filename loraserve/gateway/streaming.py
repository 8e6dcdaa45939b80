"""What a stream tells about its usage."""

from collections.abc import Mapping
from typing import Any

from loraserve.client import Completion
from loraserve.errors import InvalidArgumentError
from loraserve.gateway.answers import Piece
from loraserve.gateway.usage import usage, usage_of


def stream_options(body: Mapping[str, Any]) -> tuple[bool, bool]:
    """(usage in every event, usage at the end). Raises InvalidArgumentError."""
    options = body.get("stream_options")
    if options is None:
        return False, False
    if not body.get("stream", False):
        raise InvalidArgumentError("stream_options", "goes with stream")
    at_end = options.get("include_usage", False)
    return at_end and options.get("continuous_usage_stats", False), at_end


class UsageCount:
    """Counts what the pieces of a stream bring."""

    def __init__(self, n: int, in_every_event: bool, at_end: bool) -> None:
        """`n`: choices of each prompt."""
        self.in_every_event = in_every_event
        self.at_end = at_end
        self._n = n
        self._tokens: dict[int, int] = {}
        self._done: dict[int, Completion] = {}

    def take(self, piece: Piece) -> dict[str, Any] | None:
        """Usage so far, where every event tells it."""
        if piece.completion is not None:
            self._done[piece.index] = piece.completion
        if not self.in_every_event:
            return None
        tokens = self._tokens.get(piece.index, 0) + len(piece.chunk.token_ids)
        self._tokens[piece.index] = tokens
        return usage(piece.prompt_tokens, tokens, 0)

    def total(self) -> dict[str, Any]:
        """Once every choice has ended."""
        return usage_of((self._done[index] for index in sorted(self._done)), self._n)
