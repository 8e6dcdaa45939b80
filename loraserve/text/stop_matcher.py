"""Finds stop strings in a text that comes in pieces; nothing at or past a match gets out."""

from collections.abc import Sequence
from dataclasses import dataclass

from loraserve.errors import InvalidArgumentError

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256


@dataclass(frozen=True)
class StopResult:
    """Text that is safe to show now, and the stop string if one was completed."""

    emit: str
    matched: str | None


def check_stops(stops: Sequence[str]) -> None:
    """Raises InvalidArgumentError if the stop strings are not within the limits."""
    if isinstance(stops, str) or not isinstance(stops, Sequence):
        raise InvalidArgumentError("stop", "is not a list of strings")
    if len(stops) > MAX_STOPS:
        raise InvalidArgumentError("stop", f"{len(stops)} stop strings, limit {MAX_STOPS}")
    for stop in stops:
        if not isinstance(stop, str):
            raise InvalidArgumentError("stop", "is not a list of strings")
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise InvalidArgumentError(
                "stop", f"a stop string has {len(stop)} characters, from 1 to {MAX_STOP_CHARACTERS}"
            )


def _fallbacks(stop: str) -> list[int]:
    """For each length of a prefix: the length of the longest shorter prefix that ends it."""
    table = [0] * (len(stop) + 1)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = table[length]
        if stop[i] == stop[length]:
            length += 1
        table[i + 1] = length
    return table


class StopMatcher:
    """Matches stop strings in a growing text. One per sequence; not thread-safe.

    The stop string that is completed first wins; of those completed by the same character, the
    longest. So the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        check_stops(stops)
        # Longest first: the first that is complete is the one to report.
        self._stops = sorted(dict.fromkeys(stops), key=len, reverse=True)
        self._tables = [_fallbacks(stop) for stop in self._stops]
        # For each stop string: how much of its beginning the text ends with (Knuth-Morris-Pratt).
        self._lengths = [0] * len(self._stops)
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> StopResult:
        """Adds `text`. After a match nothing more comes out."""
        if self._matched is not None:
            return StopResult("", self._matched)
        for position, char in enumerate(text):
            stop = self._advance(char)
            if stop is not None:
                self._matched = stop
                seen = self._held + text[: position + 1]
                self._held = ""
                return StopResult(seen[: -len(stop)], stop)
        seen = self._held + text
        keep = max(self._lengths, default=0)
        cut = len(seen) - keep
        self._held = seen[cut:]
        return StopResult(seen[:cut], None)

    def finish(self) -> str:
        """The text held back, which did not become a stop string."""
        rest, self._held = self._held, ""
        return rest

    def _advance(self, char: str) -> str | None:
        """Moves every stop string on by one character; the longest that this completes."""
        complete: str | None = None
        for i, (stop, table) in enumerate(zip(self._stops, self._tables, strict=True)):
            length = self._lengths[i]
            while length and stop[length] != char:
                length = table[length]
            if stop[length] == char:
                length += 1
            self._lengths[i] = length
            if length == len(stop) and complete is None:
                complete = stop
        return complete
