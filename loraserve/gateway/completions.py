"""POST /v1/completions."""

import contextlib
import functools
import json
import time
from dataclasses import replace
from typing import Any

from loraserve.client import AsyncClient, Chunk, Completion, Prompt
from loraserve.errors import InvalidArgumentError
from loraserve.gateway.access import Caller
from loraserve.gateway.answers import Choice, Piece, choices, pieces, whole
from loraserve.gateway.echo import Echo, joined
from loraserve.gateway.frames import DONE, Frames
from loraserve.gateway.generation_schema import COMPLETION, DEFAULT_MAX_TOKENS
from loraserve.gateway.http import Request
from loraserve.gateway.logprobs import CompletionLogprobs, TokenNames, beside
from loraserve.gateway.models import resolve
from loraserve.gateway.prompts import echoes, token_ids
from loraserve.gateway.sampling import max_tokens_of, sampling
from loraserve.gateway.site import GatewaySite
from loraserve.gateway.streaming import UsageCount, stream_options
from loraserve.gateway.usage import usage_of


def _prompts(prompt: Any) -> list[Prompt]:
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


class _Writer:
    """Writes one choice, piece by piece."""

    def __init__(self, choice: Choice, echo: Echo | None, names: TokenNames) -> None:
        self._echo = echo
        self._logprobs = None if choice.params.logprobs is None else CompletionLogprobs(names)
        self.plain = self._logprobs is None

    def fields(self, piece: Chunk | Completion) -> dict[str, Any]:
        """Of the choice, but its index."""
        text, logprobs = piece.text, None
        echo, self._echo = self._echo, None
        if self._logprobs is not None:
            told = None
            if echo is not None:
                told = echo.logprobs(
                    self._logprobs, piece.prompt_logprobs, piece.prompt_top_logprobs
                )
            logprobs = self._logprobs(piece.token_ids, piece.logprobs, piece.top_logprobs)
            logprobs = joined(told, logprobs) if told else logprobs
        return {
            "text": echo.text + text if echo else text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }

    @property
    def echoes(self) -> bool:
        """Whether the prompt is still to be told."""
        return self._echo is not None


class Completions:
    schema = COMPLETION

    def __init__(self, site: GatewaySite) -> None:
        self._site = site

    async def __call__(self, request: Request, caller: Caller) -> None:
        site = self._site
        body = await request.json(self.schema, site.max_body_bytes)
        options = stream_options(body)
        client = site.sessions.of(caller)
        request.record.model = body["model"]
        base, adapter = await resolve(client, site.names, body["model"])
        max_tokens, echo = max_tokens_of(body, DEFAULT_MAX_TOKENS), body.get("echo", False)
        if max_tokens == 0 and not echo:
            name = "max_tokens" if "max_tokens" in body else "max_completion_tokens"
            raise InvalidArgumentError(name, "0 goes with echo")
        params = sampling(body, max(1, max_tokens), body.get("logprobs"))
        params = replace(params, prompt_logprobs=echo and params.logprobs is not None)
        n = body.get("n", 1)
        prompts = _prompts(body["prompt"])
        ids = await token_ids(site, prompts, body.get("add_special_tokens", True))
        told = await echoes(site, prompts, ids) if echo else []
        wanted = choices(ids, n, params, base, adapter, only_prompt=max_tokens == 0)
        names = TokenNames(site.tokenizer, body.get("return_tokens_as_token_ids", False))
        writers = [
            _Writer(choice, told[choice.index // n] if echo else None, names) for choice in wanted
        ]
        head = {
            "id": f"cmpl-{request.record.id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body["model"],
        }
        if body.get("stream", False):
            count = UsageCount(n, *options)
            await _stream(request, client, wanted, writers, Frames(head, chat=False), count)
            return
        done = await whole(client, wanted, request.record)

        def answer() -> bytes:
            answers = [
                {"index": index, **writer.fields(completion)}
                for index, (writer, completion) in enumerate(zip(writers, done, strict=True))
            ]
            return json.dumps(head | {"choices": answers, "usage": usage_of(done, n)}).encode()

        tokens = sum(len(one.logprobs) + len(one.prompt_logprobs or ()) for one in done)
        await request.send_bytes(await beside(answer, tokens))


def _event(frames: Frames, piece: Piece, writer: _Writer, used: dict[str, Any] | None) -> bytes:
    return frames.choice(piece.index, writer.fields(piece.chunk), used)


async def _stream(
    request: Request,
    client: AsyncClient,
    wanted: list[Choice],
    writers: list[_Writer],
    frames: Frames,
    count: UsageCount,
) -> None:
    plain = writers[0].plain and not count.in_every_event
    async with contextlib.aclosing(pieces(client, wanted, request.record)) as found:
        async for piece in found:
            if not request.started:
                await request.start_events()
            writer = writers[piece.index]
            if plain and piece.completion is None and not writer.echoes:
                if piece.chunk.text:
                    await request.send_part(frames.text(piece.index, piece.chunk.text))
                continue
            used = count.take(piece)
            event = functools.partial(_event, frames, piece, writer, used)
            await request.send_part(await beside(event, len(piece.chunk.prompt_logprobs or ())))
    if count.at_end:
        await request.send_part(frames.usage(count.total()))
    await request.send_part(DONE, last=True)
