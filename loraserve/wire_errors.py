"""LoraServeError to gRPC status and back, with google.rpc.ErrorInfo, so that a client raises what
the server raised."""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import (  # type: ignore[import-untyped]
    code_pb2,
    error_details_pb2,
    status_pb2,
)

from loraserve import errors
from loraserve.errors import LoraServeError, ResourceExhaustedError, StaleRouteError
from loraserve.v1 import common_pb2

DOMAIN = "loraserve"
DETAILS_KEY = "grpc-status-details-bin"
# The field of an error that gRPC itself made, or whoever stands between.
OF_GRPC = "rpc"
# A trailer over 8 KiB is refused by gRPC, at first by chance: texts are cut, never the error. They
# stand in it percent-encoded (an ASCII character is one byte, others are three for each of UTF-8)
# and once more within the details; budgets are of the former.
MAX_MESSAGE_CHARACTERS = 1000
_MESSAGE_BUDGET = 3 * MAX_MESSAGE_CHARACTERS
_FIELD_BUDGET = 600

_log = logging.getLogger(__name__)


def _classes(base: type[LoraServeError]) -> Iterator[type[LoraServeError]]:
    yield base
    for derived in base.__subclasses__():
        yield from _classes(derived)


_BY_REASON = {c.reason: c for c in _classes(LoraServeError) if c.__module__ == errors.__name__}
# A status from gRPC itself, or from a peer that knows more reasons, still has a code.
_BY_CODE = {c.code: c for c in _BY_REASON.values() if c.code == c.reason}
_BY_CODE["UNIMPLEMENTED"] = errors.UnsupportedError


def _rebuild(
    code: str, reason: str, field: str, message: str, retry_after_s: float | None
) -> LoraServeError:
    kind = _BY_REASON.get(reason) or _BY_CODE.get(code, LoraServeError)
    if issubclass(kind, ResourceExhaustedError):
        return kind(field, message, retry_after_s)
    return kind(field, message)


def _cut(text: str, budget: int) -> str:
    text = text[:MAX_MESSAGE_CHARACTERS]
    for index, character in enumerate(text):
        plain = character.isascii() and character.isprintable() and character != "%"
        budget -= 1 if plain else 3 * len(character.encode(errors="replace"))
        if budget < 0:
            return text[:index]
    return text


def _message(error: LoraServeError) -> str:
    return _cut(error.message, _MESSAGE_BUDGET)


def _route_facts(error: StaleRouteError) -> dict[str, str]:
    epoch, version = error.version
    return {"holders": ",".join(error.holders), "routes": f"{epoch}.{version}"}


def _stale_route(field: str, message: str, facts: Mapping[str, str]) -> StaleRouteError:
    """A peer that gives no sense gives no holders."""
    holders = tuple(filter(None, facts.get("holders", "").split(",")))
    epoch, _, version = facts.get("routes", "").partition(".")
    numbers = _uint64(epoch), _uint64(version)
    known = (0, 0) if None in numbers else cast(tuple[int, int], numbers)
    return StaleRouteError(field, message, holders, known)


def _uint64(digits: str) -> int | None:
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 20):
        return None
    value = int(digits)
    return value if value < 1 << 64 else None


def to_status(error: LoraServeError) -> status_pb2.Status:
    """The google.rpc.Status that carries the error."""
    field = _cut(error.field, _FIELD_BUDGET)
    info = error_details_pb2.ErrorInfo(
        reason=error.reason, domain=DOMAIN, metadata={"field": field}
    )
    status = status_pb2.Status(
        code=code_pb2.Code.Value(error.code), message=f"{field}: {_message(error)}"
    )
    if isinstance(error, StaleRouteError):
        info.metadata.update(_route_facts(error))
    status.details.add().Pack(info)
    if isinstance(error, ResourceExhaustedError) and error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(error.retry_after_s * 1000))
        status.details.add().Pack(retry)
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: LoraServeError) -> NoReturn:
    """Ends the RPC with the error. Does not return."""
    status = to_status(error)
    await context.abort(
        grpc.StatusCode[error.code],
        _cut(status.message, _MESSAGE_BUDGET),
        ((DETAILS_KEY, status.SerializeToString()),),
    )
    raise AssertionError("abort returned")


def _details_of(error: grpc.RpcError) -> status_pb2.Status | None:
    trailing = cast(Any, error).trailing_metadata()
    for key, value in trailing or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            status = status_pb2.Status()
            try:
                status.ParseFromString(value)
            except DecodeError:  # a peer that lies about its trailer still gave a code
                return None
            return status
    return None


def from_rpc_error(error: grpc.RpcError) -> LoraServeError:
    """The typed error that a failed call means; of grpc and of grpc.aio."""
    code: str = cast(Any, error).code().name
    message: str = cast(Any, error).details() or ""
    field, reason, retry_after_s = OF_GRPC, "", None
    facts: Mapping[str, str] = {}
    status = _details_of(error)
    for detail in status.details if status else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            field, reason = info.metadata.get("field", field), info.reason
            facts = info.metadata
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    if reason:
        message = message.removeprefix(f"{field}: ")
    if reason == StaleRouteError.reason:
        return _stale_route(field, message, facts)
    return _rebuild(code, reason, field, message, retry_after_s)


def to_detail(error: LoraServeError) -> common_pb2.ErrorDetail:
    """The error as a part of a message."""
    detail = common_pb2.ErrorDetail(
        code=code_pb2.Code.Value(error.code),
        reason=error.reason,
        field=error.field,
        message=_message(error),
    )
    if isinstance(error, ResourceExhaustedError) and error.retry_after_s is not None:
        detail.retry_after_ms = round(error.retry_after_s * 1000)
    if isinstance(error, StaleRouteError):
        detail.holder_node_ids.extend(error.holders)
        detail.routes.epoch, detail.routes.version = error.version
    return detail


def from_detail(detail: common_pb2.ErrorDetail) -> LoraServeError:
    """The inverse of `to_detail`."""
    known = detail.code in code_pb2.Code.values()
    code = code_pb2.Code.Name(cast(Any, detail.code)) if known else "UNKNOWN"
    retry_after_s = detail.retry_after_ms / 1000 if detail.HasField("retry_after_ms") else None
    if detail.reason == StaleRouteError.reason:
        version = detail.routes.epoch, detail.routes.version
        return StaleRouteError(detail.field, detail.message, tuple(detail.holder_node_ids), version)
    return _rebuild(code, detail.reason, detail.field, detail.message, retry_after_s)


async def abort_as(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    """Ends the RPC as `error` asks; what nobody foresaw is logged and told as INTERNAL, no more."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, LoraServeError):
        await abort(context, error)
    _log.error("unexpected error in an RPC", exc_info=error)
    await abort(context, LoraServeError("server", "internal error; the server's log says more"))


Method = TypeVar("Method", bound=Callable[..., Any])


def typed_errors(method: Method) -> Method:
    """Decorator of a grpc.aio servicer's method, coroutine or async generator: exceptions become
    statuses as `abort_as` says."""
    if inspect.isasyncgenfunction(method):

        @functools.wraps(method)
        async def stream(self: Any, request: Any, context: Any) -> Any:
            try:
                async for response in method(self, request, context):
                    yield response
            except Exception as error:
                await abort_as(context, error)

        return cast(Method, stream)

    @functools.wraps(method)
    async def call(self: Any, request: Any, context: Any) -> Any:
        try:
            return await method(self, request, context)
        except Exception as error:
            await abort_as(context, error)

    return cast(Method, call)
