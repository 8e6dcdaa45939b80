"""Token ids to text as they come, without ever taking back a character.

A decoder may look at what stands before a token (a first token loses its leading space) and needs
all tokens of a character. So the text of new tokens is what `decode` adds behind some context
whose text is already out; and tokens wait while their text ends in U+FFFD, which is how `decode`
shows a character that is not complete.

Invariants: `_pending` starts where a character starts; `_context` is empty only as long as no
text came out.
"""

from collections.abc import Sequence

from loraserve.text.tokenizer import Tokenizer

# Tokens that wait for their character at most; a character has at most four.
MAX_PENDING = 32
# Tokens at the prompt's end that can matter for what follows.
PROMPT_TAIL = 32
INCOMPLETE = "\ufffd"


class Detokenizer:
    """The text that generated tokens add to a prompt. One per sequence; not thread-safe.

    For any chunks, `decode(prompt) + the texts of push and finish == decode(prompt + ids)`, both
    without special tokens. Two things differ, for the better: a character that the prompt began
    and did not end is told whole (so a resumed answer loses nothing), and where byte-fallback
    tokens are not UTF-8, complete characters before the bad bytes are kept.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []
        self._context_text = ""
        self.push(self._tail(prompt_ids))

    def _tail(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last tokens with text, from the start of a character."""
        tail: list[int] = []
        for token in reversed(prompt_ids):
            if not self._tokenizer.has_text(token):
                continue
            tail.append(token)
            byte = self._tokenizer.byte_of(token)
            is_continuation = byte is not None and 0x80 <= byte < 0xC0
            if len(tail) >= PROMPT_TAIL and not is_continuation:
                break
        return tail[::-1]

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain now: complete characters. Special tokens have none."""
        return "".join(self._push_one(token) for token in ids if self._tokenizer.has_text(token))

    def finish(self) -> str:
        """What was held back, incomplete as it is. The sequence ends here."""
        text = self._text_of(self._pending) if self._pending else ""
        self._pending = []
        return text

    def _text_of(self, ids: list[int]) -> str:
        """What `ids` add behind the context."""
        if len(ids) == 1 and len(self._context) == 1:
            pair = self._context[0], ids[0]
            text = self._tokenizer.texts_of_pairs.get(pair)
            if text is None:
                text = self._tokenizer.texts_of_pairs.put(pair, self._decoded(ids))
            return text
        return self._decoded(ids)

    def _decoded(self, ids: list[int]) -> str:
        full = self._tokenizer.decode(self._context + ids)
        if full.startswith(self._context_text):
            return full[len(self._context_text) :]
        # Bad bytes that continue the byte tokens of the context spoil its text as well.
        return self._tokenizer.decode(ids)

    def _push_one(self, token: int) -> str:
        self._pending.append(token)
        text = self._text_of(self._pending)
        if text and (not text.endswith(INCOMPLETE) or self._ends_in_replacement()):
            self._release(len(self._pending))
            return text
        if len(self._pending) > MAX_PENDING:
            return self._give_up_waiting()
        return ""

    def _ends_in_replacement(self) -> bool:
        """The U+FFFD at the end is a character of the text, not a sign of an incomplete one."""
        ids = self._tokenizer.replacement_ids
        return bool(ids) and tuple(self._pending[-len(ids) :]) == ids

    def _release(self, count: int) -> None:
        """The text of the first `count` pending tokens is out."""
        released, self._pending = self._pending[:count], self._pending[count:]
        byte_tokens_only = all(self._tokenizer.byte_of(t) is not None for t in released)
        # Byte tokens in a row are decoded as one: they are context only if there is nothing else.
        if not (byte_tokens_only and self._context):
            self._context = released
            self._context_text = self._context_text_of(released)

    def _context_text_of(self, ids: list[int]) -> str:
        if len(ids) != 1:
            return self._tokenizer.decode(ids)
        texts = self._tokenizer.texts_of_tokens
        text = texts.get(ids[0])
        return texts.put(ids[0], self._tokenizer.decode(ids)) if text is None else text

    def _give_up_waiting(self) -> str:
        """All but what may still be a beginning of a character, or else all."""
        count = len(self._pending)
        for end in range(count - 1, count - 4, -1):
            text = self._text_of(self._pending[:end])
            if text and not text.endswith(INCOMPLETE):
                self._release(end)
                return text
        text = self._text_of(self._pending)
        # Not taken as context: it might end within a character.
        self._pending = []
        return text
