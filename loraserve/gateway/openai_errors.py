"""Typed errors as OpenAI clients read them: a status, and one JSON object that names the field."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from loraserve.errors import LoraServeError, ResourceExhaustedError

# (status, type) by the error's code. Clients try 408, 409, 429 and 5xx again on their own.
_BY_CODE: Mapping[str, tuple[int, str]] = {
    "INVALID_ARGUMENT": (400, "invalid_request_error"),
    "FAILED_PRECONDITION": (400, "invalid_request_error"),
    "UNIMPLEMENTED": (400, "invalid_request_error"),
    "UNAUTHENTICATED": (401, "authentication_error"),
    "PERMISSION_DENIED": (403, "permission_error"),
    "NOT_FOUND": (404, "not_found_error"),
    "ALREADY_EXISTS": (409, "conflict_error"),
    "RESOURCE_EXHAUSTED": (429, "rate_limit_error"),
    "CANCELLED": (499, "cancelled"),
    "UNAVAILABLE": (503, "service_unavailable"),
    "DEADLINE_EXCEEDED": (504, "timeout_error"),
}
_INTERNAL = (500, "server_error")
# The names that nodes and the controller use, as this front's clients know them.
_FIELDS = {
    "text": "prompt",
    "token_ids": "prompt",
    "adapter": "model",
    "adapter.name": "model",
    "base": "model",
    "authorization": "Authorization",
}
DEFAULT_RETRY_AFTER_S = 1.0


class HttpError(Exception):
    """An answer that is an error by HTTP's own rules: no such path, no such method, too long."""

    def __init__(
        self,
        status: int,
        param: str,
        message: str,
        *,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        """`param`: the part of the request that it is about."""
        super().__init__(message)
        self.status = status
        self.param = param
        self.headers = headers


@contextlib.contextmanager
def named_as_asked(fields: Mapping[str, str]) -> Iterator[None]:
    """Errors name the fields of the request: `fields` by what they became within."""
    try:
        yield
    except LoraServeError as error:
        error.field = fields.get(error.field, error.field)
        raise


def status_of(error: LoraServeError) -> int:
    return _BY_CODE.get(error.code, _INTERNAL)[0]


def error_object(error: LoraServeError) -> dict[str, Any]:
    """What follows "error" in the JSON."""
    _, kind = _BY_CODE.get(error.code, _INTERNAL)
    field = _FIELDS.get(error.field, error.field)
    code = error.reason.lower()
    if error.code == "NOT_FOUND" and field == "model":
        code = "model_not_found"
    return {"message": f"{field}: {error.message}", "type": kind, "param": field, "code": code}


def error_body(error: LoraServeError | HttpError) -> bytes:
    if isinstance(error, HttpError):
        about: dict[str, Any] = {
            "message": f"{error.param}: {error}",
            "type": "invalid_request_error",
            "param": error.param,
            "code": None,
        }
    else:
        about = error_object(error)
    return json.dumps({"error": about}).encode()


def retry_headers(error: LoraServeError) -> tuple[tuple[bytes, bytes], ...]:
    """When to come back, where that can help."""
    if status_of(error) not in (429, 503):
        return ()
    seconds = DEFAULT_RETRY_AFTER_S
    if isinstance(error, ResourceExhaustedError) and error.retry_after_s is not None:
        seconds = error.retry_after_s
    return (
        (b"retry-after", b"%d" % max(1, math.ceil(seconds))),
        (b"retry-after-ms", b"%d" % round(seconds * 1000)),
    )
