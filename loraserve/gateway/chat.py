"""POST /v1/chat/completions."""

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any

from loraserve.client import AsyncClient
from loraserve.errors import InvalidArgumentError
from loraserve.gateway.access import Caller
from loraserve.gateway.answers import Choice, choices, pieces, whole
from loraserve.gateway.frames import DONE, Frames
from loraserve.gateway.generation_schema import CHAT, MAX_TOKENS
from loraserve.gateway.http import Request
from loraserve.gateway.logprobs import ChatLogprobs, TokenNames, beside
from loraserve.gateway.models import resolve
from loraserve.gateway.openai_errors import named_as_asked
from loraserve.gateway.prompts import INLINE_CHARACTERS, check_fits
from loraserve.gateway.sampling import max_tokens_of, sampling
from loraserve.gateway.site import GatewaySite
from loraserve.gateway.streaming import UsageCount, stream_options
from loraserve.gateway.usage import usage_of

# Longer chats are rendered in a thread, so that the streams of others go on.
_INLINE_MESSAGES = 32
# What becomes of the request's fields, and what is wrong of the request where one of them is.
_FIELDS = {
    **dict.fromkeys(("prompt", "text", "token_ids", "chat_template"), "messages"),
    "chat_template variables": "chat_template_kwargs",
}


def chat_prompt(site: GatewaySite, body: Mapping[str, Any]) -> list[int]:
    """Token ids of the rendered messages. Raises InvalidArgumentError."""
    if site.tokenizer is None:
        raise InvalidArgumentError("messages", "this gateway has no tokenizer (--tokenizer)")
    if site.template is None:
        raise InvalidArgumentError(
            "messages", "the model has no chat template; use /v1/completions or --chat-template"
        )
    with named_as_asked(_FIELDS):
        text = site.template.render(
            [_flat(message) for message in body["messages"]],
            body.get("add_generation_prompt", True),
            body.get("tools") or None,
            **_variables(body),
        )
        check_fits(site, text)
        ids = site.tokenizer.encode(text, add_special_tokens=body.get("add_special_tokens", False))
    if not ids:
        raise InvalidArgumentError("messages", "make an empty prompt")
    return ids


def _variables(body: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = dict(body.get("chat_template_kwargs", {}))
    for name in ("messages", "tools", "add_generation_prompt", "self"):
        if name in found:
            raise InvalidArgumentError(f"chat_template_kwargs.{name}", "is a field of the request")
    return found


def _flat(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Content in parts as one text, which is all that templates of text models know."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


async def prompt_of(site: GatewaySite, body: Mapping[str, Any], body_bytes: int) -> list[int]:
    """`chat_prompt`, in a thread where that may take long; a short template variable can make
    much of little."""
    small = body_bytes <= INLINE_CHARACTERS and len(body["messages"]) <= _INLINE_MESSAGES
    if small and not (body.get("tools") or body.get("chat_template_kwargs")):
        return chat_prompt(site, body)
    return await asyncio.to_thread(chat_prompt, site, body)


def _logprobs(body: Mapping[str, Any]) -> int | None:
    if body.get("logprobs", False):
        count: int = body.get("top_logprobs", 0)
        return count
    if body.get("top_logprobs", 0):
        raise InvalidArgumentError("top_logprobs", "goes with logprobs")
    return None


class ChatCompletions:
    schema = CHAT

    def __init__(self, site: GatewaySite) -> None:
        self._site = site

    async def __call__(self, request: Request, caller: Caller) -> None:
        with named_as_asked(_FIELDS):
            await self._answer(request, caller)

    async def _answer(self, request: Request, caller: Caller) -> None:
        body = await request.json(self.schema, self._site.max_body_bytes)
        options = stream_options(body)
        client = self._site.sessions.of(caller)
        request.record.model = body["model"]
        base, adapter = await resolve(client, self._site.names, body["model"])
        # The engine ends where the context does.
        params = sampling(body, max_tokens_of(body, MAX_TOKENS), _logprobs(body))
        n = body.get("n", 1)
        prompt = await prompt_of(self._site, body, request.body_bytes)
        wanted = choices([prompt], n, params, base, adapter)
        stream = body.get("stream", False)
        head = {
            "id": f"chatcmpl-{request.record.id}",
            "object": "chat.completion.chunk" if stream else "chat.completion",
            "created": int(time.time()),
            "model": body["model"],
        }
        names = TokenNames(self._site.tokenizer, body.get("return_tokens_as_token_ids", False))
        logprobs = None if params.logprobs is None else ChatLogprobs(names)
        if stream:
            count = UsageCount(n, *options)
            await _stream(request, client, wanted, Frames(head, chat=True), count, logprobs)
            return
        done = await whole(client, wanted, request.record)

        def answer() -> bytes:
            return json.dumps(head | {"choices": answers(), "usage": usage_of(done, n)}).encode()

        def answers() -> list[dict[str, Any]]:
            return [
                {
                    "index": choice.index,
                    "message": {"role": "assistant", "content": completion.text, "refusal": None},
                    "logprobs": logprobs(
                        completion.token_ids, completion.logprobs, completion.top_logprobs
                    )
                    if logprobs
                    else None,
                    "finish_reason": completion.finish_reason,
                    "stop_reason": completion.stop_reason,
                }
                for choice, completion in zip(wanted, done, strict=True)
            ]

        tokens = sum(len(completion.logprobs) for completion in done)
        await request.send_bytes(await beside(answer, tokens))


async def _stream(
    request: Request,
    client: AsyncClient,
    wanted: list[Choice],
    frames: Frames,
    count: UsageCount,
    logprobs: ChatLogprobs | None,
) -> None:
    plain = logprobs is None and not count.in_every_event
    begun: set[int] = set()
    async with contextlib.aclosing(pieces(client, wanted, request.record)) as found:
        async for piece in found:
            chunk = piece.chunk
            if not request.started:
                await request.start_events()
            used = count.take(piece)
            if piece.index not in begun:
                begun.add(piece.index)
                role = _fields({"role": "assistant", "content": ""})
                await request.send_part(frames.choice(piece.index, role, used))
            if plain and piece.completion is None:
                if chunk.text:
                    await request.send_part(frames.text(piece.index, chunk.text))
                continue
            fields = _fields({"content": chunk.text} if chunk.text else {})
            if logprobs:
                fields["logprobs"] = logprobs(chunk.token_ids, chunk.logprobs, chunk.top_logprobs)
            fields["finish_reason"] = chunk.finish_reason
            if chunk.finish_reason is not None:
                fields["stop_reason"] = chunk.stop_reason
            await request.send_part(frames.choice(piece.index, fields, used))
    if count.at_end:
        await request.send_part(frames.usage(count.total()))
    await request.send_part(DONE, last=True)


def _fields(delta: dict[str, str]) -> dict[str, Any]:
    return {"delta": delta, "logprobs": None, "finish_reason": None}
