"""JSON from untrusted files: bounded size and depth, duplicate keys refused."""

import json
from typing import Any

from loraserve.errors import InvalidCheckpointError

# A checkpoint header or config nests three or four levels; the limit stops recursion bombs.
MAX_DEPTH = 16


def _unique(field: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InvalidCheckpointError(field, f"key {key!r} occurs twice")
        found[key] = value
    return found


def _check_depth(field: str, text: str) -> None:
    depth = 0
    in_string = escaped = False
    for char in text:
        if in_string:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                in_string = False
        elif char == '"':
            in_string = True
        elif char in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise InvalidCheckpointError(field, f"nested deeper than {MAX_DEPTH}")
        elif char in "]}":
            depth -= 1


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def parse_object(field: str, data: bytes, max_bytes: int) -> dict[str, Any]:
    """`data` as one JSON object; `field` names the source in errors.

    Raises InvalidCheckpointError for anything else, NaN and Infinity included.
    """
    if len(data) > max_bytes:
        raise InvalidCheckpointError(field, f"{len(data)} bytes, the limit is {max_bytes}")
    try:
        text = data.decode("utf-8")
        _check_depth(field, text)
        value = json.loads(
            text,
            object_pairs_hook=lambda pairs: _unique(field, pairs),
            parse_constant=_refuse_constant,
        )
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise InvalidCheckpointError(field, f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidCheckpointError(field, "not a JSON object")
    return value
