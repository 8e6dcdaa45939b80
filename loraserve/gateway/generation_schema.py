"""What the bodies of /v1/completions and /v1/chat/completions may hold, as JSON Schema."""

from typing import Any

from loraserve.gateway.schema import Schema

MAX_CHOICES = 16
MAX_PROMPTS = 256
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_TOKENS = 1 << 24
MAX_TOKEN_ID = (1 << 31) - 1
MAX_MESSAGES = 10_000
MAX_NAME_CHARACTERS = 256
DEFAULT_MAX_TOKENS = 16

_TOKEN: Schema = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}
_TOKENS: Schema = {"type": "array", "items": _TOKEN, "minItems": 1, "maxItems": 1 << 20}
_TEXT: Schema = {"type": "string", "minLength": 1}
_STOP: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
_HINT = "Taken and without effect."


def _integer(low: int, high: int, about: str, default: Any = None) -> Schema:
    schema = {"type": "integer", "minimum": low, "maximum": high, "description": about}
    return schema if default is None else schema | {"default": default}


def _number(low: float, high: float, about: str, default: float) -> Schema:
    return {
        "type": "number",
        "minimum": low,
        "maximum": high,
        "description": about,
        "default": default,
    }


_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def _flag(about: str, default: bool = False) -> Schema:
    return {"type": "boolean", "description": about, "default": default}


def _only(value: bool | float | str, about: str) -> Schema:
    """A field that other servers know and that has one meaning here."""
    return {"type": _TYPES[type(value)], "enum": [value], "default": value, "description": about}


def _tool_choice(about: str) -> Schema:
    return {"type": "string", "enum": ["none", "auto"], "description": about}


def _hint() -> Schema:
    return {"description": _HINT}


_PLAIN_TEXT: Schema = {
    "type": "object",
    "enum": [{"type": "text"}],
    "description": "Answers are plain text.",
}

_SHARED: dict[str, Schema] = {
    "model": {
        "type": "string",
        "minLength": 1,
        "maxLength": MAX_NAME_CHARACTERS,
        "description": "An adapter, the base model, or `base:adapter`.",
    },
    "n": _integer(1, MAX_CHOICES, "Answers to each prompt.", 1),
    "stream": _flag("Answer in server-sent events, as the tokens are drawn."),
    "stream_options": {
        "type": "object",
        "properties": {
            "include_usage": {
                "type": "boolean",
                "description": "A last chunk, without choices, says what the request used.",
            },
            "continuous_usage_stats": {
                "type": "boolean",
                "description": "Every chunk says what the request has used so far.",
            },
            "include_obfuscation": _hint(),
        },
        "additionalProperties": False,
        "description": "Goes with stream.",
    },
    "min_tokens": _integer(0, MAX_TOKENS, "No end token before so many tokens.", 0),
    "temperature": _number(0, 100, "0 is greedy.", 1.0),
    "top_p": {
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": 1,
        "default": 1.0,
        "description": "Only the likeliest tokens of so much probability.",
    },
    "top_k": _integer(-1, MAX_TOKEN_ID, "Only the likeliest tokens; 0 and -1 are off.", 0),
    "min_p": _number(0, 1, "Relative to the likeliest token's probability.", 0.0),
    "repetition_penalty": _number(0.001, 1000, "Over prompt and answer; 1 is off.", 1.0),
    "presence_penalty": _number(-2, 2, "Over the answer.", 0.0),
    "frequency_penalty": _number(-2, 2, "Over the answer.", 0.0),
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": 1024,
        "description": "Token ids to what is added to their logits.",
    },
    "seed": {
        "type": "integer",
        "minimum": -(1 << 63),
        "maximum": (1 << 64) - 1,
        "description": "Seed and position decide every draw; answer i of n draws by seed + i.",
    },
    "stop": {
        "anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}],
        "description": "Texts that end the answer; they are not part of it.",
    },
    "stop_token_ids": {
        "type": "array",
        "items": _TOKEN,
        "maxItems": 64,
        "description": "Tokens that end the answer.",
    },
    "ignore_eos": _flag("The model's end token does not end the answer."),
    "include_stop_str_in_output": _only(False, "Stop strings are never part of the answer."),
    "skip_special_tokens": _only(True, "Special tokens are never part of the text."),
    "spaces_between_special_tokens": _hint(),
    "use_beam_search": _only(False, "There is no beam search."),
    "length_penalty": _only(1.0, "There is no beam search."),
    "priority": _only(0, "Priorities are for clients of the gRPC interface."),
    "return_token_ids": _only(False, "Not offered."),
    "return_tokens_as_token_ids": _flag("Log-probabilities name tokens as `token_id:N`."),
    "user": _hint(),
    "metadata": _hint(),
    "store": _hint(),
    "service_tier": _hint(),
    "safety_identifier": _hint(),
    "prompt_cache_key": _hint(),
    "prompt_cache_retention": _hint(),
    "request_id": _hint(),
}

COMPLETION: Schema = {
    "type": "object",
    "required": ["model", "prompt"],
    "additionalProperties": False,
    "properties": _SHARED
    | {
        "prompt": {
            "anyOf": [
                _TEXT,
                {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_PROMPTS},
                _TOKENS,
                {"type": "array", "items": _TOKENS, "minItems": 1, "maxItems": MAX_PROMPTS},
            ],
            "description": "Text, token ids, or several of either.",
        },
        "max_tokens": _integer(
            0, MAX_TOKENS, "Of the answer; 0 goes with echo.", DEFAULT_MAX_TOKENS
        ),
        "max_completion_tokens": _integer(0, MAX_TOKENS, "Another name of max_tokens."),
        "logprobs": _integer(
            0, MAX_LOGPROBS, "Log-probabilities of the tokens and of so many likeliest ones."
        ),
        "echo": _flag("The prompt comes first in the text, with its log-probabilities."),
        "best_of": _only(1, "Answers are not ranked; ask for n."),
        "suffix": _only("", "Text is not filled in."),
        "response_format": _PLAIN_TEXT,
        "add_special_tokens": _flag("Begin the prompt as the tokenizer does.", True),
    },
}

_MESSAGE: Schema = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {
            "type": "string",
            "minLength": 1,
            "maxLength": 64,
            "description": "Such as system, user and assistant.",
        },
        "content": {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["type", "text"],
                        "properties": {
                            "type": {
                                "type": "string",
                                "enum": ["text"],
                                "description": "Models here read text alone.",
                            },
                            "text": {"type": "string", "description": "One part."},
                        },
                    },
                    "maxItems": 1000,
                },
            ],
            "description": "Text, or parts of it, which are put on lines of their own.",
        },
        "name": {
            "type": "string",
            "maxLength": MAX_NAME_CHARACTERS,
            "description": "Of who speaks, where the chat template knows of it.",
        },
    },
    "description": "Roles and further fields are what the model's chat template knows.",
}

CHAT: Schema = {
    "type": "object",
    "required": ["model", "messages"],
    "additionalProperties": False,
    "properties": _SHARED
    | {
        "messages": {
            "type": "array",
            "items": _MESSAGE,
            "minItems": 1,
            "maxItems": MAX_MESSAGES,
            "description": "The chat so far, oldest first.",
        },
        "max_tokens": _integer(1, MAX_TOKENS, "Of the answer; by default what the context holds."),
        "max_completion_tokens": _integer(1, MAX_TOKENS, "Another name of max_tokens."),
        "logprobs": _flag("Log-probabilities of the answer's tokens."),
        "top_logprobs": _integer(0, MAX_LOGPROBS, "Goes with logprobs.", 0),
        "tools": {
            "type": "array",
            "maxItems": 128,
            "items": {"type": "object"},
            "description": "Given to the chat template; calls are not parsed out of the answer.",
        },
        "tool_choice": _tool_choice("No call can be forced."),
        "parallel_tool_calls": _hint(),
        "functions": {"type": "array", "maxItems": 0, "description": "Use tools."},
        "function_call": _tool_choice("Use tools."),
        "modalities": {"type": "array", "enum": [["text"]], "description": "Answers are text."},
        "response_format": _PLAIN_TEXT,
        "reasoning_effort": _hint(),
        "verbosity": _hint(),
        "chat_template_kwargs": {
            "type": "object",
            "maxProperties": 64,
            "description": "Further variables of the chat template.",
        },
        "add_generation_prompt": _flag("End the prompt where an answer begins.", True),
        "add_special_tokens": _flag("Begin the prompt as the tokenizer does, not the template."),
        "echo": _only(False, "Is for /v1/completions."),
    },
}
