"""Checks values by JSON Schema: the same objects that the OpenAPI document shows. A subset of its
words, and nothing here is done about a word that is not in `WORDS`."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from loraserve.errors import InvalidArgumentError

Schema = Mapping[str, Any]

WORDS = frozenset(
    {
        *("type", "enum", "anyOf", "items", "properties", "required", "additionalProperties"),
        *("minimum", "maximum", "exclusiveMinimum", "minLength", "maxLength", "pattern"),
        *("minItems", "maxItems", "maxProperties", "propertyNames"),
        *("description", "default"),
    }
)
MAX_DEPTH = 64
_SHOWN = 60


def _kind(value: Any) -> str:
    """The name of its type in JSON Schema, the narrowest."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def _shown(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _name(name: str) -> str:
    """Of a field, as errors show it."""
    return name[:_SHOWN] or '""'


def _is(value: Any, wanted: str) -> bool:
    kind = _kind(value)
    return kind == wanted or (wanted == "number" and kind == "integer")


def _among(value: Any, options: list[Any]) -> bool:
    # Python has True equal to 1, JSON has not.
    is_bool = isinstance(value, bool)
    return any(value == one and isinstance(one, bool) == is_bool for one in options)


def check(field: str, value: Any, schema: Schema) -> Any:
    """`value`, with 2.0 as 2 where an integer is wanted, and without the null fields of objects.

    Raises InvalidArgumentError that names the part which is wrong, such as `messages[1].content`.
    """
    if "anyOf" in schema:
        return _check_any(field, value, schema["anyOf"])
    wanted = schema.get("type")
    if wanted is not None and not _is(value, wanted):
        raise InvalidArgumentError(field, f"{_shown(value)} is not of type {wanted}")
    if "enum" in schema and not _among(value, schema["enum"]):
        names = ", ".join(_shown(one) for one in schema["enum"])
        raise InvalidArgumentError(field, f"{_shown(value)} is not supported, only {names}")
    match wanted:
        case "integer" | "number":
            return _check_number(field, int(value) if wanted == "integer" else value, schema)
        case "string":
            return _check_string(field, value, schema)
        case "array":
            return _check_array(field, value, schema)
        case "object":
            return _check_object(field, value, schema)
    return value


def _check_any(field: str, value: Any, schemas: list[Schema]) -> Any:
    """Of the schemas that want its type, the error of the one that went furthest."""
    fitting = [schema for schema in schemas if _is(value, schema["type"])]
    if not fitting:
        names = sorted({schema["type"] for schema in schemas})
        raise InvalidArgumentError(field, f"{_shown(value)} is not of type {' or '.join(names)}")
    errors = []
    for schema in fitting:
        try:
            return check(field, value, schema)
        except InvalidArgumentError as error:
            errors.append(error)
    raise max(errors, key=lambda error: _depth(value, error, field))


def _depth(value: Any, error: InvalidArgumentError, field: str) -> tuple[bool, int]:
    # "[12].x is wrong" tells more than "[0] is wrong": the schema took twelve items.
    index = re.match(r"\[(\d+)\]", error.field[len(field) :])
    return ("is not of type" not in error.message, int(index[1]) if index else 0)


def _check_number(field: str, value: Any, schema: Schema) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidArgumentError(field, f"{value} is not a finite number")
    low, over, high = (schema.get(w) for w in ("minimum", "exclusiveMinimum", "maximum"))
    if low is not None and value < low:
        raise InvalidArgumentError(field, f"{_shown(value)} is under {low}")
    if over is not None and value <= over:
        raise InvalidArgumentError(field, f"{_shown(value)} is not over {over}")
    if high is not None and value > high:
        raise InvalidArgumentError(field, f"{_shown(value)} is over {high}")
    return value


def _check_string(field: str, value: str, schema: Schema) -> str:
    size = len(value)
    if size < schema.get("minLength", 0):
        raise InvalidArgumentError(field, "is empty" if not size else f"has {size} characters")
    if size > schema.get("maxLength", size):
        raise InvalidArgumentError(
            field, f"has {size} characters, the limit is {schema['maxLength']}"
        )
    # Patterns are anchored; Python's `$` alone would let a last newline pass.
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        raise InvalidArgumentError(field, f"{_shown(value)} does not match {schema['pattern']}")
    return value


def _check_array(field: str, value: list[Any], schema: Schema) -> list[Any]:
    if len(value) < schema.get("minItems", 0):
        raise InvalidArgumentError(field, "is empty" if not value else f"has {len(value)} items")
    if len(value) > schema.get("maxItems", len(value)):
        raise InvalidArgumentError(
            field, f"has {len(value)} items, the limit is {schema['maxItems']}"
        )
    items = schema.get("items")
    if items is None:
        return value
    if items.get("type") == "integer" and all(type(item) is int for item in value):
        # Prompts of many thousand token ids: the two that lie outermost speak for all.
        for item in (min(value), max(value)) if value else ():
            _check_number(f"{field}[{value.index(item)}]", item, items)
        return value
    return [check(f"{field}[{i}]", item, items) for i, item in enumerate(value)]


def _check_object(field: str, value: dict[str, Any], schema: Schema) -> dict[str, Any]:
    properties: Mapping[str, Schema] = schema.get("properties", {})
    others = schema.get("additionalProperties", True)
    names = schema.get("propertyNames")
    if len(value) > schema.get("maxProperties", len(value)):
        raise InvalidArgumentError(
            field, f"has {len(value)} entries, the limit is {schema['maxProperties']}"
        )
    inner = f"{field}." if field else ""
    found: dict[str, Any] = {}
    for name, item in value.items():
        if name in properties:
            if item is not None or name in schema.get("required", ()):
                found[name] = check(f"{inner}{name}", item, properties[name])
            continue
        if others is False:
            raise InvalidArgumentError(f"{inner}{_name(name)}", "is no field of this request")
        if names is not None:
            _check_string(f"{field} key", name, names)
        found[name] = item if others is True else check(f"{inner}{_name(name)}", item, others)
    for name in schema.get("required", ()):
        if name not in found:
            raise InvalidArgumentError(f"{inner}{name}", "is missing")
    return found


def published(schema: Schema) -> dict[str, Any]:
    """The schema for readers: that a field may be null where it may be left out is written down."""
    found = dict(schema)
    if "items" in found:
        found["items"] = published(found["items"])
    if isinstance(found.get("additionalProperties"), dict):
        found["additionalProperties"] = published(found["additionalProperties"])
    if "anyOf" in found:
        found["anyOf"] = [published(one) for one in found["anyOf"]]
    if "properties" in found:
        required = found.get("required", ())
        found["properties"] = {
            name: published(one) if name in required else _or_null(published(one))
            for name, one in found["properties"].items()
        }
    return found


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    if not schema.keys() - {"description", "default"}:
        return schema  # anything goes
    about = {word: schema.pop(word) for word in ("description", "default") if word in schema}
    if "anyOf" in schema:
        return about | {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    return about | {"anyOf": [schema, {"type": "null"}]}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidArgumentError(_name(name), "occurs twice")
            seen.add(name)
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _too_deep(value: Any, depth: int = 0) -> bool:
    if depth > MAX_DEPTH:
        return True
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(isinstance(v, dict | list) and _too_deep(v, depth + 1) for v in inner)


def parse(data: bytes, schema: Schema) -> dict[str, Any]:
    """The JSON object in `data`, checked. Raises InvalidArgumentError."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError as error:
        raise InvalidArgumentError("body", f"is not UTF-8: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError("body", f"is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise InvalidArgumentError("body", "is not a JSON object")
    if _too_deep(value):
        raise InvalidArgumentError("body", f"is nested deeper than {MAX_DEPTH}")
    checked: dict[str, Any] = check("", value, schema)
    return checked
