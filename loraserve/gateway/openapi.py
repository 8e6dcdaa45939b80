"""The OpenAPI 3.1 document. Bodies are the schemas that the endpoints check with, so that it cannot
say anything else; tests hold what it says of answers against the answers."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from loraserve.gateway.access import ACCESS
from loraserve.gateway.adapters import LoadAdapter, UnloadAdapter
from loraserve.gateway.answer_schema import SCHEMAS, events
from loraserve.gateway.chat import ChatCompletions
from loraserve.gateway.completions import Completions
from loraserve.gateway.schema import Schema, published
from loraserve.gateway.tokens import Detokenize, Tokenize
from loraserve.security import Role

_JSON = "application/json"
_TEXT: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
_ANSWERS: Mapping[int, str] = {
    400: "A field is wrong, is unknown and would change the answer, or contradicts another one.",
    401: "No key of this cluster.",
    403: "The key's role may not do this, or the path lies under no root.",
    404: "There is no such model, adapter or path.",
    405: "The path takes other methods, which the header `allow` names.",
    408: "The headers or the body did not come in time.",
    409: "The name is taken.",
    413: "The body is over the limit.",
    415: "The body is not application/json.",
    429: "The cluster is full, or an adapter does not fit; `retry-after` says when to try again.",
    431: "Too many headers, or too long ones.",
    499: "The cluster ended the request.",
    500: "A fault of the server; its log says more.",
    503: "Nobody can serve this now; `retry-after` says when to try again.",
    504: "Not answered in time.",
}
# What HTTP itself may answer anywhere, with a body, to callers, from the cluster.
_EVERYWHERE = (400, 405, 408, 431, 500, 503)
_OF_BODIES = (413, 415)
_OF_CALLERS = (401, 403)
_OF_CLUSTERS = (404, 429, 499, 504)


@dataclass(frozen=True)
class Operation:
    """`answer` is the content of status 200, by media type."""

    name: str
    summary: str
    answer: Mapping[str, Any]
    body: str = ""
    """Name of its component."""
    schema: Schema = field(default_factory=dict)
    """Of the body: the endpoint's own object."""
    more: tuple[int, ...] = ()
    """Statuses besides those that every such operation has."""
    content: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """Of statuses that answer with other bodies than an Error."""


def _ref(kind: str, name: str) -> dict[str, str]:
    return {"$ref": f"#/components/{kind}/{name}"}


def _json(name: str) -> dict[str, Any]:
    return {_JSON: {"schema": _ref("schemas", name)}}


_READY = _json("Ready")
OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("GET", "/health"): Operation("health", "The process lives.", _TEXT),
    ("GET", "/ping"): Operation("ping", "The process lives.", _TEXT),
    ("POST", "/ping"): Operation("postPing", "The process lives.", _TEXT),
    ("GET", "/ready"): Operation(
        "ready", "Whether requests are welcome.", _READY, content={503: _READY}
    ),
    ("GET", "/version"): Operation("version", "Of the gateway.", _json("Version")),
    ("GET", "/openapi.json"): Operation(
        "openapi", "This document.", {_JSON: {"schema": {"type": "object"}}}
    ),
    ("GET", "/metrics"): Operation("metrics", "In Prometheus' text format.", _TEXT),
    ("GET", "/v1/models"): Operation(
        "listModels", "The base model and the caller's adapters.", _json("ModelList"), more=(504,)
    ),
    ("GET", "/v1/models/"): Operation(
        "retrieveModel", "One of them.", _json("Model"), more=(404, 504)
    ),
    ("POST", "/v1/completions"): Operation(
        "createCompletion",
        "Continues texts or tokens.",
        _json("Completion") | {"text/event-stream": events("CompletionChunk")},
        "CompletionRequest",
        Completions.schema,
        _OF_CLUSTERS,
    ),
    ("POST", "/v1/chat/completions"): Operation(
        "createChatCompletion",
        "Answers a chat, by the model's chat template.",
        _json("ChatCompletion") | {"text/event-stream": events("ChatCompletionChunk")},
        "ChatCompletionRequest",
        ChatCompletions.schema,
        _OF_CLUSTERS,
    ),
    ("POST", "/tokenize"): Operation(
        "tokenize",
        "A text or a chat in tokens.",
        _json("Tokens"),
        "TokenizeRequest",
        Tokenize.schema,
    ),
    ("POST", "/detokenize"): Operation(
        "detokenize", "Tokens as a text.", _json("Text"), "DetokenizeRequest", Detokenize.schema
    ),
    ("POST", "/v1/load_lora_adapter"): Operation(
        "loadLoraAdapter",
        "Adds an adapter; answers when it can be used.",
        _TEXT,
        "LoadLoraAdapterRequest",
        LoadAdapter.schema,
        (*_OF_CLUSTERS, 409),
    ),
    ("POST", "/v1/unload_lora_adapter"): Operation(
        "unloadLoraAdapter",
        "Removes an adapter.",
        _TEXT,
        "UnloadLoraAdapterRequest",
        UnloadAdapter.schema,
        _OF_CLUSTERS,
    ),
}
_ABOUT = """\
An OpenAI-compatible front of a LoRAServe cluster. Every adapter is a model of its own name.

Where the gateway runs without `--keys`, on loopback, no key is looked at. A null field is one that
was left out; a field that is not named here is refused where it could change the answer.
"""
_MODEL_PARAMETER = {
    "name": "model",
    "in": "path",
    "required": True,
    "description": "The `id` of an entry of `/v1/models`.",
    "schema": {"type": "string", "minLength": 1},
}
_HEADERS = {
    "x-request-id": ("In the answer's id and in the gateway's log.", {"type": "string"}),
    "retry-after": ("Whole seconds.", {"type": "integer", "minimum": 1}),
    "retry-after-ms": ("The same, finer.", {"type": "integer", "minimum": 0}),
    "allow": ("The methods that the path takes.", {"type": "string"}),
}
# Refused before there is a request, they may come without the headers.
_HEADERS_OF = {405: ("allow",), 429: ("retry-after", "retry-after-ms")}
_HEADERS_OF |= {503: ("retry-after", "retry-after-ms")}


def _statuses(operation: Operation, roles: frozenset[Role]) -> Iterator[int]:
    yield from _EVERYWHERE
    yield from operation.more
    if operation.body:
        yield from _OF_BODIES
    if roles:
        yield from _OF_CALLERS


def _described(operation: Operation, roles: frozenset[Role]) -> dict[str, Any]:
    """An operation object."""
    responses: dict[str, Any] = {
        "200": {
            "description": "Done.",
            "headers": {"x-request-id": _ref("headers", "x-request-id")},
            "content": operation.answer,
        }
    }
    for status in sorted(set(_statuses(operation, roles))):
        content = operation.content.get(status)
        responses[str(status)] = (
            {"description": "Not now.", "content": content}
            if content
            else _ref("responses", str(status))
        )
    found: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": responses,
        "security": [{"key": []}] if roles else [],
    }
    if roles:
        names = " or ".join(sorted(role.value for role in roles))
        found["description"] = f"For keys of role {names}."
    if operation.body:
        content = {_JSON: {"schema": _ref("schemas", operation.body)}}
        found["requestBody"] = {"required": True, "content": content}
    return found


def _response(status: int, about: str) -> dict[str, Any]:
    names = ("x-request-id", *_HEADERS_OF.get(status, ()))
    return {
        "description": about,
        "headers": {name: _ref("headers", name) for name in names},
        "content": _json("Error"),
    }


def document() -> dict[str, Any]:
    """The whole document, of plain JSON values."""
    paths: dict[str, Any] = {}
    for (method, path), operation in OPERATIONS.items():
        shown = f"{path}{{model}}" if path.endswith("/") else path
        item = paths.setdefault(shown, {"parameters": [_MODEL_PARAMETER]} if shown != path else {})
        item[method.lower()] = _described(operation, ACCESS[method, path])
    bodies = {o.body: published(o.schema) for o in OPERATIONS.values() if o.body}
    return {
        "openapi": "3.1.0",
        "info": {"title": "LoRAServe", "version": version("loraserve"), "description": _ABOUT},
        "paths": paths,
        "components": {
            "schemas": bodies | dict(SCHEMAS),
            "responses": {str(status): _response(status, _ANSWERS[status]) for status in _ANSWERS},
            "headers": {
                name: {"description": about, "schema": schema}
                for name, (about, schema) in _HEADERS.items()
            },
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "A key of the cluster."}
            },
        },
    }


def document_text() -> str:
    """As it is served and as it lies in docs/openapi.json."""
    return json.dumps(document(), indent=1) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document_text())
