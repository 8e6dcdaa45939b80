"""The record of one answer, from which another node can go on with it. Pure.

Every request that this version offers can go on: what could not, a grammar or several answers to
one prompt, is not offered.

A request that goes on sends the prompt as it was, the tokens that were delivered, the revision and
the seed. That is enough for token ids and for text alike:
- A text prompt is tokenized by every node of one base alike; the count of its tokens is compared.
- Text that the lost node held back (an unfinished character, the beginning of a stop string) is a
  function of the tokens, so the node that goes on runs the delivered tokens through its own
  detokenizer and stop matcher first and sends only what becomes certain after them. The texts of
  the attempts joined are the text of the answer.
"""

from loraserve.client.local_text import LocalText
from loraserve.client.messages import (
    FINISH_REASONS,
    logprobs_from_wire,
    sampling_to_wire,
    set_prompt,
)
from loraserve.client.types import Chunk, Completion, Prompt
from loraserve.errors import InvalidArgumentError, UnavailableError
from loraserve.sampling_params import SamplingParams
from loraserve.v1 import inference_pb2
from loraserve.wire import MAX_MESSAGE_BYTES

# Room for what an attempt adds: its route, and the tokens of the answer that it goes on with.
MAX_REQUEST_BYTES = MAX_MESSAGE_BYTES - (256 << 10)

Response = inference_pb2.GenerateResponse | inference_pb2.StepOutput


def lost(message: str) -> UnavailableError:
    """An attempt that another one may take over from."""
    return UnavailableError("stream", message)


class AnswerLog:
    """One request, and what of its answer is there."""

    def __init__(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        adapter: str | None = None,
        base: str = "",
        revision: str | None = None,
        priority: int = 0,
        text: LocalText | None = None,
    ) -> None:
        """`text`: makes the answer's, which nodes are then not asked for. Raises
        InvalidArgumentError where the wire cannot carry a value."""
        if adapter == "":
            raise InvalidArgumentError("adapter", "is empty; None means the base model")
        if adapter is None and revision is not None:
            raise InvalidArgumentError("revision", "goes with an adapter")
        self._request = inference_pb2.GenerateRequest(sampling=sampling_to_wire(params))
        ref = self._request.adapter
        field = ""
        try:
            field, self._request.request_id = "request_id", request_id
            field, self._request.priority = "priority", priority
            field, ref.base = "base", base
            field, ref.name = "adapter", adapter or ""
            if revision is not None:
                field, ref.revision = "revision", revision
        except (ValueError, TypeError) as error:
            raise InvalidArgumentError(field, f"{error}") from None
        self._text = text
        self._request.omit_text = text is not None
        self.prompt_tokens = set_prompt(self._request, prompt)
        """Estimated for text until a node has counted them."""
        if (size := self._request.ByteSize()) > MAX_REQUEST_BYTES:
            raise InvalidArgumentError(
                "prompt", f"the request has {size} bytes, the limit is {MAX_REQUEST_BYTES}"
            )
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._max_tokens = params.max_tokens
        self._wants_logprobs = params.logprobs is not None
        self._start: inference_pb2.GenerateStart | None = None
        self._attempt_started = False
        self._texts: list[str] = []
        self._logprobs: list[float] = []
        self._top_logprobs: list[dict[int, float]] = []
        self._wants_prompt_logprobs = params.prompt_logprobs
        # Of the prompt's tokens but the first, as far as the attempt that runs has told them.
        self._prompt_logprobs: list[float] = []
        self._prompt_tops: list[dict[int, float]] = []
        self._stop_reason: str | int | None = None
        self._usage = inference_pb2.Usage()
        self.node_id = ""

    def set_token_ids(self, token_ids: list[int], text: LocalText) -> None:
        """In place of the text prompt, before anything is sent."""
        self.prompt_tokens = set_prompt(self._request, token_ids)
        self._text = text
        self._request.omit_text = True

    @property
    def started(self) -> bool:
        """Whether a token was delivered: from now on only this answer may go on."""
        return bool(self.token_ids)

    @property
    def base(self) -> str:
        """The base model that is asked for; once tokens are there, the one they came from."""
        named: str = self._request.adapter.base
        if self.started and self._start is not None:
            return named or self._start.base.name
        return named

    @property
    def revision(self) -> str | None:
        """What the request asks for by revision; once tokens are there, what they came from."""
        if self.started and self._start is not None:
            return self._start.revision or None
        ref = self._request.adapter
        return ref.revision if ref.HasField("revision") else None

    def request(
        self,
        attempt: int,
        timeout_s: float | None,
        routed_revision: str | None = None,
        routes: tuple[int, int] | None = None,
    ) -> inference_pb2.GenerateRequest:
        """What to send for an attempt. `timeout_s`: what is left of the request's time.
        `routed_revision`: what the name means by the route table; asked for where the caller named
        none, so that a node with an older copy does not answer from that. `routes`: (epoch,
        version) of the table that names the node as a holder, where one does."""
        request = inference_pb2.GenerateRequest()
        request.CopyFrom(self._request)
        request.attempt = attempt
        request.start_index = len(self.token_ids)
        request.emitted_token_ids.extend(self.token_ids)
        if self.started and self._start is not None:
            # What began the answer must go on with it.
            request.sampling.seed = self._start.seed
            request.sampling.prompt_logprobs = False  # they came with the first token
            request.adapter.base = self.base
            if self._start.revision:
                request.adapter.revision = self._start.revision
        elif routed_revision is not None and not request.adapter.HasField("revision"):
            request.adapter.revision = routed_revision
        if routes is not None:
            request.routes.epoch, request.routes.version = routes
        if timeout_s is not None:
            request.timeout.FromMicroseconds(max(1, round(timeout_s * 1e6)))
        self._attempt_started = False
        if not self.started:
            self._prompt_logprobs, self._prompt_tops = [], []
        return request

    def finish_if_full(self, attempt: int) -> Chunk | None:
        """The last chunk where all tokens are there and only the word of it was lost."""
        if not self.started or len(self.token_ids) < self._max_tokens:
            return None
        self.finish_reason = "length"
        text = self._text.push([], ends=True) if self._text is not None else ""
        self._texts.append(text)
        return Chunk(
            len(self.token_ids),
            [],
            text,
            finish_reason="length",
            node_id=self.node_id,
            attempt=attempt,
        )

    def accept(self, response: Response) -> Chunk | None:
        """What is new in a response; None for nothing.

        Raises UnavailableError where the response does not continue the answer: another attempt
        may.
        """
        if response.HasField("start"):
            self._take_start(response.start)
        elif not self._attempt_started:
            raise lost("the node's first message does not say what serves the request")
        have, first = len(self.token_ids), response.first_index
        if first > have:
            raise lost(f"tokens {have} to {first - 1} are missing")
        token_ids = list(response.token_ids)
        logprobs, tops = logprobs_from_wire(response.logprobs)
        if self._wants_logprobs and len(logprobs) != len(token_ids):
            raise lost(f"{len(logprobs)} logprobs for {len(token_ids)} tokens")
        known = min(have - first, len(token_ids))
        if token_ids[:known] != self.token_ids[first : first + known]:
            raise lost("the node goes on with another answer than the one that is here")
        text = response.text
        if known:
            if known < len(token_ids) and text:
                raise lost("a message repeats tokens among new ones: its text cannot be told apart")
            # Their text was delivered with them.
            token_ids, logprobs, tops, text = token_ids[known:], logprobs[known:], tops[known:], ""
        if response.finish_reason and first + known < have:
            raise lost(f"the answer ends after {first + known} tokens, but {have} are here")
        return self._extend(response, token_ids, logprobs, tops, text)

    def accept_tokens(self, token_ids: list[int]) -> Chunk:
        """The chunk of tokens that follow those which are here, and are all that the node has to
        tell. Raises UnavailableError where that cannot be."""
        if not (self._attempt_started and self.started) or self._wants_logprobs:
            raise lost("tokens without what belongs to them")
        if self._text is None:
            raise lost("tokens without text")
        first = len(self.token_ids)
        text = self._text.push(token_ids)
        self.token_ids += token_ids
        self._texts.append(text)
        return Chunk(first, token_ids, text, node_id=self.node_id)

    def _local_text(self, response: Response, token_ids: list[int]) -> str:
        assert self._text is not None
        ends = bool(response.finish_reason)
        end_token = ends and bool(token_ids) and response.usage.HasField("stop_token_id")
        return self._text.push(token_ids, ends=ends, end_token=end_token)

    def _extend(
        self,
        response: Response,
        token_ids: list[int],
        logprobs: list[float],
        tops: list[dict[int, float]],
        text: str,
    ) -> Chunk | None:
        first = len(self.token_ids)
        if self._text is not None:
            text = self._local_text(response, token_ids)
        if response.prompt_logprobs and not first:
            self._take_prompt_logprobs(response)
        prompt_logprobs = prompt_tops = None
        if self._wants_prompt_logprobs and token_ids and not first:
            prompt_logprobs, prompt_tops = self._all_prompt_logprobs()
        self.token_ids += token_ids
        self._logprobs += logprobs
        self._top_logprobs += tops
        self._texts.append(text)
        self.finish_reason = FINISH_REASONS.get(response.finish_reason)
        if self.finish_reason is not None:
            self._take_usage(response.usage)
        if not token_ids and not text and self.finish_reason is None:
            return None
        return Chunk(
            first,
            token_ids,
            text,
            logprobs,
            tops,
            self.finish_reason,
            self._stop_reason,
            self.node_id,
            response.attempt,
            response.start.queue_time_us / 1e6,
            response.start.prefill_time_us / 1e6,
            prompt_logprobs,
            prompt_tops,
        )

    def _take_prompt_logprobs(self, response: Response) -> None:
        logprobs, tops = logprobs_from_wire(response.prompt_logprobs)
        self._prompt_logprobs += logprobs
        self._prompt_tops += tops

    def _all_prompt_logprobs(
        self,
    ) -> tuple[list[float | None], list[dict[int, float] | None]]:
        """Raises UnavailableError where some are missing."""
        if len(self._prompt_logprobs) != self.prompt_tokens - 1:
            raise lost(
                f"{len(self._prompt_logprobs)} logprobs for a prompt of {self.prompt_tokens} tokens"
            )
        return [None, *self._prompt_logprobs], [None, *self._prompt_tops]

    def _take_start(self, start: inference_pb2.GenerateStart) -> None:
        before = self._start
        if before is None or not self.started:
            self._start = start
            self.prompt_tokens = start.prompt_tokens or self.prompt_tokens
        else:
            same_weights = "" in (before.base.digest, start.base.digest) or (
                before.base.digest == start.base.digest
            )
            if before.revision != start.revision or not same_weights:
                raise lost("the node would go on with another revision or base model")
            if before.prompt_tokens != start.prompt_tokens:
                raise lost("the node tokenizes the prompt differently")
        self._attempt_started = True
        self.node_id = start.node_id
        self._usage.cached_prompt_tokens = start.cached_prompt_tokens

    def _take_usage(self, usage: inference_pb2.Usage) -> None:
        self._usage = usage
        if usage.HasField("stop_string"):
            self._stop_reason = usage.stop_string
        elif usage.HasField("stop_token_id"):
            self._stop_reason = usage.stop_token_id

    def completion(self, attempts: int) -> Completion:
        """The answer, once it has a finish reason."""
        start = self._start or inference_pb2.GenerateStart()
        wanted = self._wants_prompt_logprobs and self.started
        told = self._all_prompt_logprobs() if wanted else (None, None)
        return Completion(
            token_ids=self.token_ids,
            text="".join(self._texts),
            logprobs=self._logprobs,
            top_logprobs=self._top_logprobs,
            finish_reason=self.finish_reason or "",
            stop_reason=self._stop_reason,
            prompt_tokens=start.prompt_tokens,
            cached_prompt_tokens=self._usage.cached_prompt_tokens,
            revision=start.revision or None,
            seed=start.seed,
            node_id=self.node_id,
            attempts=attempts,
            queue_time_s=self._usage.queue_time_us / 1e6,
            prompt_logprobs=told[0],
            prompt_top_logprobs=told[1],
        )
