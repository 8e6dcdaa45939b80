"""The bodies that are taken: the checks agree with JSON Schema, and name what is wrong."""

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.errors import InvalidArgumentError
from loraserve.gateway import adapters, generation_schema, schema, tokens

SCHEMAS = {
    "completion": generation_schema.COMPLETION,
    "chat": generation_schema.CHAT,
    "tokenize": tokens.TOKENIZE,
    "detokenize": tokens.DETOKENIZE,
    "load": adapters.LOAD,
    "unload": adapters.UNLOAD,
}
SCALARS: Any = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.sampled_from([2.0, 2.5, -0.0, 1e300, 0.5, 100.5, 2**70])
    | st.sampled_from(["", "x", "12", "x" * 300, "text", "a\x00"])
)
KEYS = st.sampled_from(["1", "x", "type", "text", "role", "content"])
VALUES: Any = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(KEYS, inner)
        | st.builds(lambda role, content: [{"role": role, "content": content}], inner, inner)
        | st.builds(lambda usage: {"include_usage": usage}, inner)
    ),
    max_leaves=8,
)


def words_of(value: Any) -> set[str]:
    """Every keyword of a schema."""
    found = set(value)
    for inner in ("items", "propertyNames", "additionalProperties"):
        if isinstance(value.get(inner), dict):
            found |= words_of(value[inner])
    for one in (*value.get("anyOf", ()), *value.get("properties", {}).values()):
        found |= words_of(one)
    return found


@pytest.mark.parametrize("name", SCHEMAS)
def test_no_schema_says_what_is_not_checked(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])
    assert words_of(SCHEMAS[name]) <= schema.WORDS


def right(body: dict[str, Any], one: Any) -> bool:
    """What jsonschema says."""
    return bool(jsonschema.Draft202012Validator(schema.published(one)).is_valid(body))


BODIES: dict[str, dict[str, Any]] = {
    "completion": {"model": "m", "prompt": "x"},
    "chat": {"model": "m", "messages": [{"role": "user", "content": "x"}]},
    "tokenize": {},
    "detokenize": {"tokens": [1]},
    "load": {"lora_name": "x", "lora_path": "x"},
    "unload": {"lora_name": "x"},
}


def same_as_json_schema(name: str, field: str, value: Any) -> None:
    one: Any = SCHEMAS[name]
    body = BODIES[name] | {field: value}
    data = json.dumps(body).encode()
    if right(body, one):
        schema.parse(data, one)
        return
    with pytest.raises(InvalidArgumentError) as caught:
        schema.parse(data, one)
    assert caught.value.field.startswith(field)


@given(st.sampled_from(sorted(SCHEMAS)), st.data())
def test_the_checks_are_those_of_json_schema(name: str, data: Any) -> None:
    field = data.draw(st.sampled_from(sorted(SCHEMAS[name]["properties"])))
    same_as_json_schema(name, field, data.draw(VALUES))


@pytest.mark.parametrize("value", [0, 0.0, 1, 1.0, False, True])
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_number_is_no_boolean(name: str, value: Any) -> None:
    for field in SCHEMAS[name]["properties"]:
        same_as_json_schema(name, field, value)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"[]", "body"),
        (b'"x"', "body"),
        (b"{", "body"),
        (b'{"model": NaN}', "body"),
        (b'{"model": "\xff"}', "body"),
        (b'{"model": "a", "model": "b", "prompt": "x"}', "model"),
        (b'{"model": "a", "prompt": "x", "": 1}', '""'),
        (b'{"": 1, "": 2}', '""'),
        (b'{"prompt": "x"}', "model"),
        (b'{"model": "a"}', "prompt"),
        (b'{"model": "a", "prompt": null}', "prompt"),
        (b'{"model": "a", "prompt": []}', "prompt"),
        (b'{"model": "a", "prompt": ""}', "prompt"),
        (b'{"model": "a", "prompt": [1, "x"]}', "prompt[1]"),
        (b'{"model": "a", "prompt": ["x", 1]}', "prompt[1]"),
        (b'{"model": "a", "prompt": [[1], [2, "x"]]}', "prompt[1][1]"),
        (b'{"model": "a", "prompt": [1, -1]}', "prompt[1]"),
        (b'{"model": "a", "prompt": [4294967296]}', "prompt[0]"),
        (b'{"model": "a", "prompt": {"x": 1}}', "prompt"),
        (b'{"model": "a", "prompt": "x", "temperature": "hot"}', "temperature"),
        (b'{"model": "a", "prompt": "x", "temperature": 1e400}', "temperature"),
        (b'{"model": "a", "prompt": "x", "top_p": 0}', "top_p"),
        (b'{"model": "a", "prompt": "x", "n": 17}', "n"),
        (b'{"model": "a", "prompt": "x", "n": true}', "n"),
        (b'{"model": "a", "prompt": "x", "logprobs": 21}', "logprobs"),
        (b'{"model": "a", "prompt": "x", "stop": [""]}', "stop[0]"),
        (b'{"model": "a", "prompt": "x", "logit_bias": {"x": 1}}', "logit_bias key"),
        (b'{"model": "a", "prompt": "x", "logit_bias": {"1": 101}}', "logit_bias.1"),
        (b'{"model": "a", "prompt": "x", "guided_json": {}}', "guided_json"),
        (b'{"model": "a", "prompt": "x", "best_of": 2}', "best_of"),
        (b'{"model": "a", "prompt": "x", "stream_options": {"x": 1}}', "stream_options.x"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "body"),
        (b"[" * 1_000_000, "body"),
        (b'{"model": "a", "prompt": ' + b"1" * 5000 + b"}", "body"),
    ],
)
def test_the_field_is_named(body: bytes, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        schema.parse(body, generation_schema.COMPLETION)
    assert caught.value.field == field
    assert len(caught.value.message) < 600


def test_whole_floats_are_integers_and_nulls_are_left_out() -> None:
    body = b'{"model": "a", "prompt": [1.0, 2], "n": 2.0, "seed": null, "user": null}'
    got = schema.parse(body, generation_schema.COMPLETION)
    assert got == {"model": "a", "prompt": [1, 2], "n": 2}
    assert all(type(item) is int for item in (*got["prompt"], got["n"]))
