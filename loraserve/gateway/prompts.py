"""Prompts as token ids: made once for each, and off the event loop where they are long."""

import asyncio
from collections.abc import Sequence

from loraserve.client import Prompt
from loraserve.errors import InvalidArgumentError
from loraserve.gateway.echo import Echo
from loraserve.gateway.site import GatewaySite
from loraserve.text.tokenizer import Tokenizer

# More is tokenized in a thread, so that the streams of others go on.
INLINE_CHARACTERS = 4096


def check_fits(site: GatewaySite, text: str) -> None:
    """Raises InvalidArgumentError for text that could not fit the context if it were all of the
    longest token: it is not worth the time to tokenize it."""
    longest = site.tokenizer.longest_token_bytes if site.tokenizer else None
    if longest is None or site.context_tokens is None:
        return
    limit = longest * site.context_tokens
    if len(text) > limit or (
        4 * len(text) > limit and len(text.encode("utf-8", "replace")) > limit
    ):
        raise InvalidArgumentError(
            "prompt", f"over {limit} bytes are more than a context of {site.context_tokens} tokens"
        )


def encode_all(tokenizer: Tokenizer, prompts: Sequence[Prompt], special: bool) -> list[list[int]]:
    """Token ids of each. Raises InvalidArgumentError."""
    return [
        tokenizer.encode(prompt, add_special_tokens=special)
        if isinstance(prompt, str)
        else list(prompt)
        for prompt in prompts
    ]


async def token_ids(site: GatewaySite, prompts: Sequence[Prompt], special: bool) -> list[Prompt]:
    """What is sent to nodes: token ids, where this gateway has a tokenizer. Raises
    InvalidArgumentError."""
    tokenizer = site.tokenizer
    if tokenizer is None:
        if not special:
            raise InvalidArgumentError(
                "add_special_tokens", "this gateway has no tokenizer (--tokenizer)"
            )
        return list(prompts)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    for text in texts:
        check_fits(site, text)
    if sum(map(len, texts)) <= INLINE_CHARACTERS:
        return [*encode_all(tokenizer, prompts, special)]
    return [*await asyncio.to_thread(encode_all, tokenizer, prompts, special)]


async def echoes(site: GatewaySite, prompts: Sequence[Prompt], ids: Sequence[Prompt]) -> list[Echo]:
    """Of each prompt, with what `token_ids` made of it. Raises InvalidArgumentError."""

    def made() -> list[Echo]:
        return [Echo(*pair, site.tokenizer) for pair in zip(prompts, ids, strict=True)]

    if sum(map(len, prompts)) <= INLINE_CHARACTERS:
        return made()
    return await asyncio.to_thread(made)
