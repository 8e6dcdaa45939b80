"""Channels to the daemons, one per address, and calls on them that raise typed errors only."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Collection
from typing import Any, TypeVar

import grpc
import grpc.aio

from loraserve.client.retry import TRANSPORT_FIELD
from loraserve.errors import CancelledError, LoraServeError, UnavailableError
from loraserve.security.tls import TlsFiles, channel_credentials
from loraserve.wire import bearer_metadata, channel_options, dial, split_address
from loraserve.wire_errors import from_rpc_error

# Of one connection; gRPC's 20 s would hold a request to a host that vanished for as long.
CONNECT_TIMEOUT_MS = 3000

T = TypeVar("T")


class Channels:
    """Lives on one event loop. Closed as a whole."""

    def __init__(self, api_key: str | None = None, tls: TlsFiles | None = None) -> None:
        """Raises InvalidArgumentError that names a TLS file."""
        self.metadata = grpc.aio.Metadata(*bearer_metadata(api_key))
        self._credentials = channel_credentials(tls) if tls else None
        self._options = [
            *channel_options(),
            ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
        ]
        self._open: dict[str, grpc.aio.Channel] = {}
        self.closed = False

    def get(self, address: str) -> grpc.aio.Channel:
        """Raises UnavailableError once closed, InvalidArgumentError where it is not host:port."""
        if self.closed:
            raise closed()
        channel = self._open.get(address)
        if channel is None:
            split_address(address)
            channel = self._open[address] = dial(address, self._credentials, self._options)
        return channel

    def drop(self, addresses: Collection[str]) -> list[grpc.aio.Channel]:
        """Forgets channels, for the caller to close."""
        return [self._open.pop(a) for a in addresses if a in self._open]

    @property
    def addresses(self) -> set[str]:
        return set(self._open)

    async def close(self) -> None:
        """Ends all calls. Idempotent."""
        self.closed = True
        for channel in self.drop(self.addresses):
            await channel.close()


def closed() -> UnavailableError:
    return UnavailableError("client", "is closed")


async def _cancelled_by_peer(call: Any) -> LoraServeError | None:
    """The error where `call` ended with the status CANCELLED that the other side sent, which grpc
    raises as if this task was cancelled; None where it was cancelled here."""
    if not call.done() or await call.code() is not grpc.StatusCode.CANCELLED:
        return None
    details: str = await call.details() or ""
    # grpc's own words, for a call that this process cancelled.
    if details.startswith(("Locally cancelled", "Cancelled upon garbage collection")):
        return None
    try:
        trailing = await call.trailing_metadata()
        await_error = grpc.aio.AioRpcError(
            grpc.StatusCode.CANCELLED, await call.initial_metadata(), trailing, details
        )
    except asyncio.CancelledError:
        return CancelledError(TRANSPORT_FIELD, details)
    return from_rpc_error(await_error)


def _this_task_is_cancelled() -> bool:
    """True also where it cannot be known: before Python 3.11."""
    cancelling = getattr(asyncio.current_task(), "cancelling", None)
    return cancelling is None or cancelling() > 0


async def _ended(channels: Channels, call: Any) -> LoraServeError | None:
    """Why `call` was cancelled by somebody else than this task; None where it was this task."""
    if channels.closed:
        return closed()
    error = await _cancelled_by_peer(call)
    if error is None and not _this_task_is_cancelled():
        # The channel of a node that is gone from the routes was closed at last.
        return UnavailableError("stream", "the channel was closed")
    return error


async def unary(channels: Channels, call: Any, work: Awaitable[T] | None = None) -> T:
    """The response of a call with one, or what `work` makes of the call. Raises LoraServeError."""
    try:
        return await (call if work is None else work)
    except asyncio.CancelledError:
        error = await _ended(channels, call)
        if error is None:
            raise
        raise error from None
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None
    except grpc.aio.UsageError:
        raise closed() from None


async def responses(channels: Channels, call: Any) -> AsyncGenerator[Any, None]:
    """The messages of a server stream; leaving it cancels the call. Raises LoraServeError."""
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            yield message
    except asyncio.CancelledError:
        error = await _ended(channels, call)
        if error is None:
            raise
        raise error from None
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None
    except grpc.aio.UsageError:
        raise closed() from None
    finally:
        call.cancel()
