"""Text that the client makes of tokens itself, so that nodes need not."""

from collections.abc import Sequence

from loraserve.text.detokenizer import Detokenizer
from loraserve.text.tokenizer import Tokenizer


class LocalText:
    """Of one answer: the text that a node would send with its tokens."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)

    def push(self, token_ids: Sequence[int], *, ends: bool = False, end_token: bool = False) -> str:
        """What became certain. `ends`: these are the last; `end_token`: the last of them is the one
        that ended the answer, and no part of its text."""
        text = self._detokenizer.push(token_ids[:-1] if end_token else token_ids)
        return text + self._detokenizer.finish() if ends else text
