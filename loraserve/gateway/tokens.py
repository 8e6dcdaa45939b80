"""POST /tokenize and /detokenize, with vLLM's bodies."""

import asyncio
from typing import Any

from loraserve.errors import InvalidArgumentError
from loraserve.gateway.access import Caller
from loraserve.gateway.chat import prompt_of
from loraserve.gateway.generation_schema import CHAT, MAX_NAME_CHARACTERS, MAX_TOKEN_ID
from loraserve.gateway.http import Request
from loraserve.gateway.prompts import INLINE_CHARACTERS
from loraserve.gateway.schema import Schema
from loraserve.gateway.site import GatewaySite
from loraserve.text.tokenizer import Tokenizer

_MODEL: Schema = {
    "type": "string",
    "maxLength": MAX_NAME_CHARACTERS,
    "description": "All models of a gateway have the base model's tokenizer.",
}
TOKENIZE: Schema = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "model": _MODEL,
        "prompt": {"type": "string", "description": "Either this or messages."},
        "messages": CHAT["properties"]["messages"],
        "tools": CHAT["properties"]["tools"],
        "chat_template_kwargs": CHAT["properties"]["chat_template_kwargs"],
        "add_generation_prompt": CHAT["properties"]["add_generation_prompt"],
        "add_special_tokens": {
            "type": "boolean",
            "description": "True by default for a prompt, false for messages.",
        },
        "return_token_strs": {
            "type": "boolean",
            "default": False,
            "description": "Answer with what each token is called, too.",
        },
    },
}
DETOKENIZE: Schema = {
    "type": "object",
    "required": ["tokens"],
    "additionalProperties": False,
    "properties": {
        "model": _MODEL,
        "tokens": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID},
            "maxItems": 1 << 20,
            "description": "Token ids of the base model's tokenizer.",
        },
    },
}


class Tokenize:
    schema = TOKENIZE

    def __init__(self, site: GatewaySite) -> None:
        self._site = site

    async def __call__(self, request: Request, caller: Caller) -> None:
        body = await request.json(self.schema, self._site.max_body_bytes)
        tokenizer = _tokenizer(self._site)
        if ("prompt" in body) == ("messages" in body):
            raise InvalidArgumentError("prompt", "exactly one of prompt and messages is needed")
        if "messages" in body:
            ids = await prompt_of(self._site, body, request.body_bytes)
        else:
            ids = await _encoded(tokenizer, body["prompt"], body.get("add_special_tokens", True))
        names = [tokenizer.name_of(i) for i in ids] if body.get("return_token_strs") else None
        await request.send_json(
            {
                "count": len(ids),
                "max_model_len": self._site.context_tokens,
                "tokens": ids,
                "token_strs": names,
            }
        )


class Detokenize:
    schema = DETOKENIZE

    def __init__(self, site: GatewaySite) -> None:
        self._site = site

    async def __call__(self, request: Request, caller: Caller) -> None:
        body: dict[str, Any] = await request.json(self.schema, self._site.max_body_bytes)
        tokenizer = _tokenizer(self._site)
        text = await asyncio.to_thread(tokenizer.decode, body["tokens"], skip_special_tokens=False)
        await request.send_json({"prompt": text})


def _tokenizer(site: GatewaySite) -> Tokenizer:
    if site.tokenizer is None:
        raise InvalidArgumentError("model", "this gateway has no tokenizer (--tokenizer)")
    return site.tokenizer


async def _encoded(tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
    if len(text) <= INLINE_CHARACTERS:
        return tokenizer.encode(text, add_special_tokens=special)
    return await asyncio.to_thread(tokenizer.encode, text, special)
