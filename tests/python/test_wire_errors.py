"""Every typed error survives the way from a servicer to a client, by real gRPC."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from loraserve import errors
from loraserve.errors import LoraServeError, ResourceExhaustedError
from loraserve.v1 import adapter_pb2, adapter_pb2_grpc, common_pb2
from loraserve.wire import SERVER_OPTIONS, bind, dial
from loraserve.wire_errors import from_detail, from_rpc_error, to_detail, to_status, typed_errors

KINDS = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, LoraServeError)]


class Failing(adapter_pb2_grpc.AdapterServiceServicer):
    def __init__(self, error: Exception) -> None:
        self.error = error

    @typed_errors
    async def GetAdapter(self, request: Any, context: Any) -> adapter_pb2.GetAdapterResponse:
        raise self.error

    @typed_errors
    async def ReadAdapter(self, request: Any, context: Any) -> Any:
        yield adapter_pb2.ReadAdapterResponse(chunk=b"x")
        raise self.error


async def _call(
    error: Exception, call: Callable[[adapter_pb2_grpc.AdapterServiceStub], Awaitable[Any]]
) -> grpc.RpcError:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    adapter_pb2_grpc.add_AdapterServiceServicer_to_server(Failing(error), server)
    address = bind(server, "127.0.0.1:0", None)
    await server.start()
    try:
        async with dial(address) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                await call(adapter_pb2_grpc.AdapterServiceStub(channel))
            return caught.value
    finally:
        await server.stop(None)


def unary(error: Exception) -> grpc.RpcError:
    return asyncio.run(_call(error, lambda s: s.GetAdapter(adapter_pb2.GetAdapterRequest())))


def stream(error: Exception) -> grpc.RpcError:
    async def read(stub: Any) -> None:
        async for _ in stub.ReadAdapter(adapter_pb2.ReadAdapterRequest()):
            pass

    return asyncio.run(_call(error, read))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_each_error_arrives_as_itself(kind: type[LoraServeError]) -> None:
    raised = unary(kind("rank", "700 is over the limit 512"))
    error = from_rpc_error(raised)
    assert type(error) is kind
    assert (error.field, error.message) == ("rank", "700 is over the limit 512")
    assert raised.code().name == kind.code


def test_each_error_has_its_code() -> None:
    assert {kind.__name__: kind.code for kind in KINDS} == {
        "LoraServeError": "INTERNAL",
        "InvalidArgumentError": "INVALID_ARGUMENT",
        "InvalidCheckpointError": "INVALID_ARGUMENT",
        "UnsupportedError": "INVALID_ARGUMENT",
        "UnimplementedError": "UNIMPLEMENTED",
        "UnauthenticatedError": "UNAUTHENTICATED",
        "PermissionDeniedError": "PERMISSION_DENIED",
        "NotFoundError": "NOT_FOUND",
        "AlreadyExistsError": "ALREADY_EXISTS",
        "FailedPreconditionError": "FAILED_PRECONDITION",
        "ResourceExhaustedError": "RESOURCE_EXHAUSTED",
        "UnavailableError": "UNAVAILABLE",
        "StaleRouteError": "UNAVAILABLE",
        "DeadlineExceededError": "DEADLINE_EXCEEDED",
        "CancelledError": "CANCELLED",
    }


def test_a_stream_fails_with_the_error_after_its_first_answers() -> None:
    error = from_rpc_error(stream(errors.UnavailableError("node", "draining")))
    assert type(error) is errors.UnavailableError
    assert error.message == "draining"


@pytest.mark.parametrize("retry", [None, 0.25])
def test_retry_info_says_when(retry: float | None) -> None:
    error = from_rpc_error(unary(ResourceExhaustedError("queue", "full", retry)))
    assert isinstance(error, ResourceExhaustedError)
    assert error.retry_after_s == retry


def test_an_unforeseen_error_tells_the_client_nothing(caplog: pytest.LogCaptureFixture) -> None:
    error = from_rpc_error(unary(ValueError("secret of the server")))
    assert type(error) is LoraServeError
    assert "secret" not in str(error)
    assert "secret of the server" in caplog.text


@pytest.mark.parametrize(
    ("character", "kept"), [("x", 1000), ("%", 1000), ("é", 500), ("中", 333), ("😀", 250)]
)
def test_a_huge_message_is_cut_not_lost(character: str, kept: int) -> None:
    raised = errors.InvalidArgumentError("prompt", character * 100_000)
    error = from_rpc_error(unary(raised))
    assert type(error) is errors.InvalidArgumentError
    assert error.field == "prompt"
    assert kept - len("prompt: ") <= len(error.message) <= kept
    assert set(error.message) == {character}


@pytest.mark.parametrize("character", ["x", "%", "é", "😀"])
def test_a_trailer_stays_below_what_grpc_refuses(character: str) -> None:
    """From 8 KiB it is refused by chance, so that one that gets through proves nothing."""
    huge = character * 100_000
    status = to_status(errors.InvalidArgumentError(huge, huge))
    details = 4 * len(status.SerializeToString()) / 3  # in base64
    assert details + 3000 < 7500  # and at most so much of the message, percent-encoded


def test_an_unreachable_server_is_unavailable() -> None:
    async def run() -> LoraServeError:
        async with dial("127.0.0.1:1") as channel:
            stub: Any = adapter_pb2_grpc.AdapterServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                await stub.GetAdapter(adapter_pb2.GetAdapterRequest(), timeout=60)
            return from_rpc_error(caught.value)

    assert type(asyncio.run(run())) is errors.UnavailableError


def test_an_rpc_that_the_server_lacks_is_unsupported() -> None:
    async def run() -> LoraServeError:
        server = grpc.aio.server()
        address = bind(server, "127.0.0.1:0", None)
        await server.start()
        async with dial(address) as channel:
            stub: Any = adapter_pb2_grpc.AdapterServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                await stub.GetAdapter(adapter_pb2.GetAdapterRequest())
        await server.stop(None)
        return from_rpc_error(caught.value)

    assert type(asyncio.run(run())) is errors.UnsupportedError


def test_errors_inside_messages_round_trip() -> None:
    for kind in KINDS:
        error = from_detail(to_detail(kind("adapter", "why")))
        assert (type(error), error.field, error.message) == (kind, "adapter", "why")
    again = from_detail(to_detail(ResourceExhaustedError("queue", "full", 1.5)))
    assert isinstance(again, ResourceExhaustedError)
    assert again.retry_after_s == 1.5


def test_a_detail_of_a_newer_peer_keeps_its_code() -> None:
    detail = common_pb2.ErrorDetail(code=5, reason="ADAPTER_ASLEEP", field="a", message="m")
    assert type(from_detail(detail)) is errors.NotFoundError
    assert type(from_detail(common_pb2.ErrorDetail(code=999))) is LoraServeError
