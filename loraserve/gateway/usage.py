"""What a request used, in OpenAI's words."""

from collections.abc import Iterable
from typing import Any

from loraserve.client import Completion


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def usage_of(completions: Iterable[Completion], n: int) -> dict[str, Any]:
    """Of all choices in order of their index; each of the prompts counts once for its `n`."""
    prompts = answers = cached = 0
    for index, completion in enumerate(completions):
        answers += len(completion.token_ids)
        if index % n == 0:
            prompts += completion.prompt_tokens
            cached += completion.cached_prompt_tokens
    return usage(prompts, answers, cached)
