"""What a node takes, and the checks of a request that need nothing but the request."""

from dataclasses import dataclass

from loraserve.errors import InvalidArgumentError, ResourceExhaustedError
from loraserve.v1 import inference_pb2

MAX_REQUEST_ID_CHARACTERS = 128
MAX_RANK = 512
# What a client is told to wait where the node is full: a few steps, so that others can end.
RETRY_AFTER_S = 0.5


@dataclass(frozen=True)
class Limits:
    """Of one node. Sizes in bytes of UTF-8."""

    max_sequences: int = 64
    """Requests in one engine step."""
    max_queued_requests: int = 256
    """Beyond those."""
    max_waiting_per_adapter: int = 64
    """Requests that wait for one adapter to be loaded."""
    max_prompt_bytes: int = 1 << 20
    max_stop_strings: int = 16
    max_stop_bytes: int = 256
    """Of one stop string."""
    stall_timeout_s: float = 30.0
    """A client that reads nothing of its answer for so long has its request ended."""

    @property
    def max_requests(self) -> int:
        return self.max_sequences + self.max_queued_requests

    @property
    def max_requests_of_a_tenant(self) -> int:
        """An eighth of the slots is out of reach of any one tenant, where there are eight."""
        return self.max_requests - self.max_requests // 8


def check_request(
    request: inference_pb2.GenerateRequest, limits: Limits, context_tokens: int
) -> None:
    """Raises InvalidArgumentError that names the field, ResourceExhaustedError for sizes."""
    if not 1 <= len(request.request_id) <= MAX_REQUEST_ID_CHARACTERS:
        raise InvalidArgumentError(
            "request_id", f"needs 1 to {MAX_REQUEST_ID_CHARACTERS} characters"
        )
    emitted = len(request.emitted_token_ids)
    if request.start_index != emitted:
        raise InvalidArgumentError(
            "start_index", f"{request.start_index}, but emitted_token_ids has {emitted}"
        )
    match request.WhichOneof("prompt"):
        case "text":
            size = len(request.text.encode())
            if size == 0:
                raise InvalidArgumentError("text", "is empty")
            if size > limits.max_prompt_bytes:
                raise InvalidArgumentError(
                    "text", f"{size} bytes, at most {limits.max_prompt_bytes}"
                )
        case "token_ids":
            count = len(request.token_ids.ids)
            if count == 0:
                raise InvalidArgumentError("token_ids", "is empty")
            if count + emitted >= context_tokens:
                raise InvalidArgumentError(
                    "token_ids",
                    f"{count} tokens with {emitted} of the answer leave no room in a context of "
                    f"{context_tokens}",
                )
        case _:
            raise InvalidArgumentError("prompt", "needs text or token_ids")
    _check_stops(request, limits)
    if request.omit_text and request.sampling.stop:
        raise InvalidArgumentError("stop", "needs the text: goes without omit_text")


def _check_stops(request: inference_pb2.GenerateRequest, limits: Limits) -> None:
    stops = request.sampling.stop
    if len(stops) > limits.max_stop_strings:
        raise InvalidArgumentError(
            "stop", f"{len(stops)} strings, at most {limits.max_stop_strings}"
        )
    for stop in stops:
        if not 1 <= len(stop.encode()) <= limits.max_stop_bytes:
            raise InvalidArgumentError("stop", f"a string needs 1 to {limits.max_stop_bytes} bytes")


def full(what: str, count: int, whose: str = "") -> ResourceExhaustedError:
    """The node, a tenant of it, or the queue of one adapter, has its bound of requests."""
    return ResourceExhaustedError(what, f"{count} requests{whose} are here already", RETRY_AFTER_S)


def stalled(seconds: float) -> ResourceExhaustedError:
    """The client does not read its answer. Not to be retried: it would not read that either."""
    return ResourceExhaustedError(
        "stall_timeout_s", f"the client has read nothing of its answer for {seconds:g} s"
    )
