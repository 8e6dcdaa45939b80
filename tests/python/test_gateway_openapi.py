"""The OpenAPI document says what the gateway does, all of it, and so does the copy in docs/."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fake_node import FakeEngine
from http_site import ask, fronted
from node_calls import run

from loraserve.gateway.access import ACCESS
from loraserve.gateway.openapi import OPERATIONS, document, document_text

COPY = Path(__file__).parents[2] / "docs/openapi.json"
DOCUMENT = document()
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]


def test_the_copy_in_docs_is_current() -> None:
    assert COPY.read_text() == document_text(), "make openapi writes it anew"


def test_every_path_is_in_it_and_served() -> None:
    assert set(OPERATIONS) == set(ACCESS)
    names = [operation.name for operation in OPERATIONS.values()]
    assert len(names) == len(set(names))

    async def test() -> None:
        async with fronted(FakeEngine()) as server:
            assert set(server._app._endpoints) == set(OPERATIONS)
            for (method, path), endpoint in server._app._endpoints.items():
                # The very object that bodies are checked by.
                told = OPERATIONS[method, path]
                assert getattr(endpoint, "schema", None) is (told.schema if told.body else None)
            answer = await ask(server.address, "/openapi.json")
            assert answer.headers["content-type"] == "application/json"
            assert answer.body.decode() == document_text()

    run(test)


def places(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """(path, schema) of every property under a schema."""
    for name, one in value.get("properties", {}).items():
        yield f"{at}.{name}", one
        yield from places(one, f"{at}.{name}")
    for inner in ("items", "additionalProperties"):
        if isinstance(value.get(inner), dict):
            yield from places(value[inner], f"{at}[]")
    for one in value.get("anyOf", ()):
        yield from places(one, at)


def alternatives(schema: Any) -> list[Any]:
    return list(schema["anyOf"]) if "anyOf" in schema else [schema]


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_field_is_described_and_has_a_type(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])
    assert "description" in SCHEMAS[name] or name.endswith("Request")
    for path, schema in places(SCHEMAS[name], name):
        if "$ref" in schema:
            continue
        assert schema.get("description"), path
        if schema["description"].startswith("Taken and without effect"):
            continue
        for one in alternatives(schema):
            assert "type" in one or "$ref" in one, path


@pytest.mark.parametrize("name", sorted(n for n in SCHEMAS if n.endswith("Request")))
def test_what_is_taken_has_limits(name: str) -> None:
    for path, schema in places(SCHEMAS[name], name):
        for one in alternatives(schema):
            if "enum" in one:
                continue
            match one.get("type"):
                case "integer" | "number":
                    assert "maximum" in one, path
                    assert {"minimum", "exclusiveMinimum"} & set(one), path
                case "array":
                    assert "maxItems" in one, path
                case "object":
                    closed = one.get("additionalProperties") is False
                    assert closed or "maxProperties" in one or path.endswith("[]"), path


def test_every_reference_leads_somewhere() -> None:
    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if "$ref" in value:
                yield value["$ref"]
            for inner in value.values():
                yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    used = set(references(DOCUMENT))
    for reference in used:
        found: Any = DOCUMENT
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
    kinds = ("schemas", "responses", "headers")
    there = {f"#/components/{k}/{name}" for k in kinds for name in DOCUMENT["components"][k]}
    assert used == there


def test_keys_and_roles_are_told() -> None:
    for (method, path), roles in ACCESS.items():
        shown = f"{path}{{model}}" if path.endswith("/") else path
        told = DOCUMENT["paths"][shown][method.lower()]
        assert told["security"] == ([{"key": []}] if roles else [])
        assert ("401" in told["responses"]) == bool(roles)
        for role in roles:
            assert role.value in told["description"]
