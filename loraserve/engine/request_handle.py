"""A submitted request, as who submitted it holds it."""

from collections.abc import AsyncIterator, Callable
from typing import Any

from loraserve.engine.adapters import LoadedAdapter
from loraserve.engine.assembly import Assembler, Chunk, Completion, RawOutput
from loraserve.engine.delivery import Mailbox
from loraserve.errors import DeadlineExceededError, LoraServeError


class Submitted:
    """One that the engine has."""

    def __init__(
        self, abort: Callable[[], None], close: Callable[[], None], prompt_tokens: int
    ) -> None:
        self.abort = abort
        """Ends the request; its last output has finish_reason "cancelled"."""
        self.close = close
        """To be called when its last output is there, or nobody wants it any more."""
        self.prompt_tokens = prompt_tokens


class SunkRequest:
    """One whose outputs go to a StepSink."""

    def __init__(self, submitted: Submitted, assembler: Assembler) -> None:
        self._assembler = assembler
        self.abort = submitted.abort
        self.close = submitted.close

    def chunk(self, output: RawOutput) -> Chunk:
        """An output, without text. Raises the error that ends the request."""
        return self._assembler.push(output)


class RequestHandle:
    """One whose outputs become chunks. Read by one thread or coroutine at a time."""

    def __init__(
        self,
        request: Submitted,
        request_id: str,
        mailbox: Mailbox,
        assembler: Assembler,
        adapter: LoadedAdapter | None,
    ) -> None:
        self._request = request
        self._mailbox = mailbox
        self._assembler = assembler
        self._chunks: list[Chunk] = []
        self._error: LoraServeError | None = None
        self._done = False
        self.request_id = request_id
        self.revision = adapter.revision if adapter else None

    def abort(self) -> None:
        """Ends the request; what was generated so far stays, with finish_reason "cancelled"."""
        self._request.abort()

    def _end(self) -> None:
        self._done = True
        self._request.close()

    def _take(self, raw: Any) -> Chunk:
        try:
            chunk = self._assembler.push(raw)
        except LoraServeError as error:
            self._error = error
            self._end()
            raise
        if chunk.finish_reason is not None:
            self._end()
        if self._assembler.matched:
            self.abort()
        self._chunks.append(chunk)
        return chunk

    def result(self, timeout_s: float | None = None) -> Completion:
        """The whole answer. Raises the request's error, or DeadlineExceededError if it takes more
        than `timeout_s` for the next token; the request itself then goes on."""
        if self._error is not None:
            raise self._error
        while not self._done:
            raw = self._mailbox.get(timeout_s)
            if raw is None:
                raise DeadlineExceededError("timeout_s", f"no output within {timeout_s} s")
            self._take(raw)
        return self._completion()

    async def chunks(self) -> AsyncIterator[Chunk]:
        """The answer as it comes. Leaving the loop early aborts the request."""
        try:
            while not self._done:
                yield self._take(await self._mailbox.aget())
        finally:
            if not self._done:
                self.abort()
                self._end()

    def _completion(self) -> Completion:
        chunks = self._chunks
        last = chunks[-1]
        texts = [chunk.text for chunk in chunks if chunk.text is not None]
        tops = [top for chunk in chunks for top in chunk.top_logprobs]
        return Completion(
            token_ids=[token for chunk in chunks for token in chunk.token_ids],
            text="".join(texts) if texts else None,
            logprobs=[value for chunk in chunks for value in chunk.logprobs],
            top_logprobs=tops or None,
            finish_reason=last.finish_reason or "",
            stop_reason=last.stop_reason,
            prompt_logprobs=chunks[0].prompt_logprobs,
            prompt_top_logprobs=chunks[0].prompt_top_logprobs,
            prompt_tokens=self._request.prompt_tokens,
            cached_tokens=chunks[0].cached_tokens,
            queue_s=chunks[0].queue_s,
            revision=self.revision,
        )
