"""From the engine's raw outputs to what a caller sees: text, stop strings, log-probabilities."""

from dataclasses import dataclass, field

from loraserve.errors import (
    AlreadyExistsError,
    CancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    LoraServeError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from loraserve.sampling_params import SamplingParams
from loraserve.text.detokenizer import Detokenizer
from loraserve.text.stop_matcher import StopMatcher
from loraserve.text.tokenizer import Tokenizer

_BY_CODE: dict[str, type[LoraServeError]] = {
    error.code: error
    for error in (
        InvalidArgumentError,
        AlreadyExistsError,
        CancelledError,
        DeadlineExceededError,
        FailedPreconditionError,
        NotFoundError,
        ResourceExhaustedError,
        UnavailableError,
    )
}


def typed_error(code: str, message: str) -> LoraServeError:
    """The exception for a C++ status, whose message is "field: what is wrong"."""
    field_name, _, text = message.partition(": ")
    return _BY_CODE.get(code, LoraServeError)(field_name, text or message)


@dataclass(slots=True)
class RawOutput:
    """New tokens of one request as the engine gave them. `error` ends the request."""

    first_index: int
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    prompt_logprobs: list[float]
    prompt_top_logprobs: list[dict[int, float]]
    cached_tokens: int
    queue_s: float
    finish_reason: str
    error: LoraServeError | None

    def joined(self, later: "RawOutput") -> "RawOutput":
        """This output and the next one of the same request as one. Neither is an error, and this
        one does not end the request."""
        return RawOutput(
            first_index=self.first_index,
            token_ids=self.token_ids + later.token_ids,
            logprobs=self.logprobs + later.logprobs,
            top_logprobs=self.top_logprobs + later.top_logprobs,
            prompt_logprobs=self.prompt_logprobs + later.prompt_logprobs,
            prompt_top_logprobs=self.prompt_top_logprobs + later.prompt_top_logprobs,
            cached_tokens=self.cached_tokens,
            queue_s=self.queue_s,
            finish_reason=later.finish_reason,
            error=None,
        )


@dataclass(slots=True)
class Chunk:
    """A piece of an answer. `first_index` counts generated tokens from 0."""

    first_index: int
    token_ids: list[int]
    text: str | None
    """None where the model directory has no tokenizer."""
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    finish_reason: str | None
    """None while there is more; "length", "stop" or "cancelled"."""
    stop_reason: str | int | None
    """The stop string or stop token id that ended the answer."""
    prompt_logprobs: list[float | None] | None
    """In the first chunk, if asked for; None of the first token, which nothing comes before."""
    prompt_top_logprobs: list[dict[int, float] | None] | None
    cached_tokens: int
    queue_s: float
    """In the first chunk: seconds from submission to the first step that ran the request."""


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    token_ids: list[int] = field(default_factory=list)
    text: str | None = None
    logprobs: list[float] = field(default_factory=list)
    """Of each token, if asked for."""
    top_logprobs: list[dict[int, float]] | None = None
    finish_reason: str = ""
    stop_reason: str | int | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[dict[int, float] | None] | None = None
    """The likeliest tokens at each of its positions, as many as `logprobs` asks for."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    queue_s: float = 0.0
    """Seconds from submission to the first step that ran the request."""
    revision: str | None = None
    """Of the adapter that answered; None for the base model."""


class Assembler:
    """One request's outputs in order; not thread-safe.

    `matched` becomes true when a stop string ended the answer before the engine did: the caller
    then aborts the request, and what still comes is ignored.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: list[int],
        tokenizer: Tokenizer | None,
        end_ids: frozenset[int],
        resumed_tokens: int = 0,
    ) -> None:
        """The last `resumed_tokens` of `prompt_ids` are of the answer; their text is not told
        again, but what they hold back (an unfinished character, the beginning of a stop string)
        comes with the tokens that follow. Raises InvalidArgumentError."""
        self._params = params
        self._end_ids = end_ids
        prompt = prompt_ids[: len(prompt_ids) - resumed_tokens]
        self._detokenizer = Detokenizer(tokenizer, prompt) if tokenizer else None
        self._stops = StopMatcher(params.stop) if params.stop else None
        if self._stops and not self._detokenizer:
            raise InvalidArgumentError("stop", "the model directory has no tokenizer")
        self.matched = False
        if self._detokenizer and resumed_tokens:
            _, _, matched = self._text(prompt_ids[len(prompt) :], last=False)
            if matched is not None:
                raise InvalidArgumentError(
                    "start_index", f"the answer had ended before it, with {matched!r}"
                )

    def _text(self, token_ids: list[int], last: bool) -> tuple[str, int, str | None]:
        """New text, how many of the tokens it took, and the stop string that matched."""
        assert self._detokenizer is not None
        out = ""
        for count, token in enumerate(token_ids, 1):
            piece = "" if token in self._end_ids else self._detokenizer.push([token])
            if self._stops is None:
                out += piece
                continue
            result = self._stops.push(piece)
            out += result.emit
            if result.matched is not None:
                return out, count, result.matched
        if last:
            rest = self._detokenizer.finish()
            if self._stops is None:
                return out + rest, len(token_ids), None
            result = self._stops.push(rest)
            if result.matched is not None:
                return out + result.emit, len(token_ids), result.matched
            out += result.emit + self._stops.finish()
        return out, len(token_ids), None

    def push(self, raw: RawOutput) -> Chunk:
        """The chunk for one raw output. Raises its error."""
        if raw.error is not None:
            raise raw.error
        finish: str | None = raw.finish_reason or None
        stop_reason: str | int | None = None
        if finish == "stop":
            stop_reason = raw.token_ids[-1]
        text: str | None = None
        taken = len(raw.token_ids)
        if self._detokenizer is not None:
            text, taken, matched = self._text(raw.token_ids, last=finish is not None)
            if matched is not None:
                self.matched = True
                finish, stop_reason = "stop", matched
        told = self._params.prompt_logprobs and raw.first_index == 0
        return Chunk(
            first_index=raw.first_index,
            token_ids=raw.token_ids[:taken],
            text=text,
            logprobs=raw.logprobs[:taken],
            top_logprobs=raw.top_logprobs[:taken],
            finish_reason=finish,
            stop_reason=stop_reason,
            prompt_logprobs=[None, *raw.prompt_logprobs] if told else None,
            prompt_top_logprobs=(
                [None, *raw.prompt_top_logprobs] if told and self._params.logprobs else None
            ),
            cached_tokens=raw.cached_tokens,
            queue_s=raw.queue_s,
        )
