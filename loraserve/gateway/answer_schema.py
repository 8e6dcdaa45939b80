"""What the gateway answers, as JSON Schema: components of the OpenAPI document."""

from collections.abc import Mapping
from typing import Any

_Schema = dict[str, Any]
_COUNT: _Schema = {"type": "integer", "minimum": 0}
_TEXT: _Schema = {"type": "string"}
_INDEX: _Schema = _COUNT | {"description": "Of the choice; those of the first prompt come first."}


def _null_or(schema: _Schema, about: str) -> _Schema:
    return {"anyOf": [schema, {"type": "null"}], "description": about}


def _list(items: _Schema, about: str) -> _Schema:
    return {"type": "array", "items": items, "description": about}


def _object(about: str, optional: tuple[str, ...] = (), **properties: _Schema) -> _Schema:
    """No field but these, and all of them but the `optional` ones are there."""
    return {
        "type": "object",
        "description": about,
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _constant(value: str, about: str) -> _Schema:
    return {"type": "string", "enum": [value], "description": about}


def _of(name: str) -> _Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_LOGPROB: _Schema = {"type": "number", "description": "Natural logarithm of the probability."}
_TOKEN_TEXT: _Schema = _TEXT | {"description": "The token's text, or `token_id:N`."}
_BYTES: _Schema = _list(
    {"type": "integer", "minimum": 0, "maximum": 255}, "UTF-8 of the token's text."
)
_FINISH: _Schema = _null_or(
    {"type": "string", "enum": ["stop", "length", "cancelled"]},
    "Why the answer ended; null while it goes on.",
)
_STOP_REASON: _Schema = {
    "anyOf": [_TEXT, {"type": "integer"}, {"type": "null"}],
    "description": "The stop string or token that ended it.",
}
_COMPLETION_LOGPROBS = _null_or(_of("CompletionLogprobs"), "Where they were asked for.")
_CHAT_LOGPROBS = _null_or(_of("ChatLogprobs"), "Where they were asked for.")


def _answer(kind: str, choice: _Schema, about: str, optional: tuple[str, ...] = ()) -> _Schema:
    """The outer object of answers and of their chunks."""
    return _object(
        about,
        optional,
        id=_TEXT | {"description": "Ends with the request's `x-request-id`."},
        object=_constant(kind, "What this is."),
        created=_COUNT | {"description": "Seconds since 1970."},
        model=_TEXT | {"description": "As the request named it."},
        choices=_list(choice, "One for each of `n` answers to each prompt."),
        usage=_of("Usage"),
    )


_COMPLETION_CHOICE = _object(
    "One answer, or a piece of it.",
    index=_INDEX,
    text=_TEXT | {"description": "With the prompt before it where `echo` is set."},
    logprobs=_COMPLETION_LOGPROBS,
    finish_reason=_FINISH,
    stop_reason=_STOP_REASON,
)

SCHEMAS: Mapping[str, _Schema] = {
    "Error": _object(
        "Every answer of a status from 400, and the last event of a stream that failed.",
        error=_object(
            "What is wrong.",
            message=_TEXT | {"description": "One sentence for people."},
            type=_TEXT | {"description": "The kind of error; one for each status."},
            param=_TEXT | {"description": "The field of the request that it is about."},
            code=_null_or(_TEXT, "A word for programs; null for errors of HTTP's own."),
        ),
    ),
    "Usage": _object(
        "Tokens of the request.",
        prompt_tokens=_COUNT | {"description": "Each prompt counts once, whatever `n` is."},
        completion_tokens=_COUNT | {"description": "Of all answers."},
        total_tokens=_COUNT | {"description": "Both together."},
        prompt_tokens_details=_object(
            "Of the prompts' tokens:",
            cached_tokens=_COUNT | {"description": "Whose KV was in the prefix cache."},
        ),
    ),
    "CompletionLogprobs": _object(
        "Four lists as long as the answer in tokens.",
        tokens=_list(_TEXT, "Texts of the tokens."),
        token_logprobs=_list(
            _null_or(_LOGPROB, "Null for the first token of a prompt."), "Of the tokens."
        ),
        top_logprobs=_list(
            _null_or(
                {"type": "object", "additionalProperties": _LOGPROB},
                "The likeliest tokens and the one that is there, by their texts.",
            ),
            "Of the likeliest tokens in each place.",
        ),
        text_offset=_list(_COUNT, "Where each token's text begins, in characters."),
    ),
    "ChatLogprobs": _object(
        "Of the answer's tokens.",
        content=_list(
            _object(
                "One token.",
                token=_TOKEN_TEXT,
                logprob=_LOGPROB,
                bytes=_BYTES,
                top_logprobs=_list(
                    _object("A likely token.", token=_TOKEN_TEXT, logprob=_LOGPROB, bytes=_BYTES),
                    "The likeliest tokens in its place.",
                ),
            ),
            "One entry for each token.",
        ),
        refusal={"type": "null", "description": "Models here refuse in words."},
    ),
    "Completion": _answer("text_completion", _COMPLETION_CHOICE, "A whole answer."),
    "CompletionChunk": _answer(
        "text_completion",
        _COMPLETION_CHOICE,
        "An event of a stream; `usage` as `stream_options` ask for it.",
        optional=("usage",),
    ),
    "ChatCompletion": _answer(
        "chat.completion",
        _object(
            "One answer.",
            index=_INDEX,
            message=_object(
                "What the model says.",
                role=_constant("assistant", "Who speaks."),
                content=_TEXT | {"description": "The text."},
                refusal={"type": "null", "description": "Models here refuse in words."},
            ),
            logprobs=_CHAT_LOGPROBS,
            finish_reason=_FINISH,
            stop_reason=_STOP_REASON,
        ),
        "A whole answer.",
    ),
    "ChatCompletionChunk": _answer(
        "chat.completion.chunk",
        _object(
            "A piece of one answer.",
            ("stop_reason",),
            index=_INDEX,
            delta=_object(
                "What is new; the first piece tells the role.",
                ("role", "content"),
                role=_constant("assistant", "Who speaks."),
                content=_TEXT | {"description": "What follows the pieces before."},
            ),
            logprobs=_CHAT_LOGPROBS,
            finish_reason=_FINISH,
            stop_reason=_STOP_REASON,
        ),
        "An event of a stream; `usage` as `stream_options` ask for it.",
        optional=("usage",),
    ),
    "Model": _object(
        "A base model or an adapter.",
        id=_TEXT | {"description": "What requests name it by."},
        object=_constant("model", "What this is."),
        created=_COUNT | {"description": "When this gateway started, in seconds since 1970."},
        owned_by=_constant("loraserve", "Always the same."),
        root=_TEXT | {"description": "The base model, or the adapter's revision."},
        parent=_null_or(_TEXT, "An adapter's base model."),
    ),
    "ModelList": _object(
        "What the caller sees.",
        object=_constant("list", "What this is."),
        data=_list(_of("Model"), "Base models, then adapters by name."),
    ),
    "Tokens": _object(
        "A text in tokens.",
        count=_COUNT | {"description": "How many there are."},
        max_model_len=_null_or(_COUNT, "The model's context in tokens, where it is known."),
        tokens=_list(_COUNT, "Their ids."),
        token_strs=_null_or(_list(_TEXT, "Their texts."), "Where they were asked for."),
    ),
    "Text": _object("Tokens as a text.", prompt=_TEXT | {"description": "Special ones as well."}),
    "Ready": _object(
        "Whether requests are welcome.",
        ready={"type": "boolean", "description": "False: send them elsewhere."},
        reason=_null_or(_TEXT, "Why not."),
    ),
    "Version": _object("Of the gateway.", version=_TEXT | {"description": "Of LoRAServe."}),
}


def events(chunk: str) -> _Schema:
    """The content of a stream whose events are `chunk`s, as one of its events."""
    data = {
        "description": f"A {chunk} in JSON; `[DONE]` is the last, after an Error if there was one.",
        "anyOf": [
            {"type": "string", "enum": ["[DONE]"]},
            {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": {"anyOf": [_of(chunk), _of("Error")]},
            },
        ],
    }
    about = "One of the server-sent events."
    event = {"type": "object", "description": about, "properties": {"data": data}}
    return {"schema": event | {"required": ["data"]}}
