"""Ways to the PeerService of other nodes: apart from those of requests, so that nobody's tokens
wait behind an adapter's bytes."""

import asyncio
import contextlib
import ssl
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import grpc.aio

from loraserve.node.peers.copy_stream import CopyStream
from loraserve.v1 import node_pb2_grpc
from loraserve.wire import Options, channel_options, dial

# Each channel has connections, and pauses between tries, of its own.
_OPTIONS: Options = [*channel_options(), ("grpc.use_local_subchannel_pool", 1)]


class _Open:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.stub: Any = node_pb2_grpc.PeerServiceStub(channel)
        self.users = 0
        self.closing: asyncio.TimerHandle | None = None


class PeerChannels:
    """For short calls one channel to an address, closed when it has not been used for IDLE_S; for
    bytes a connection for each copy. Event loop only."""

    IDLE_S = 30.0

    def __init__(
        self,
        credentials: grpc.ChannelCredentials | None = None,
        tls: ssl.SSLContext | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        """`credentials` and `tls` say the same, for channels and for streams. `metadata`: of every
        call, to authenticate it."""
        self._credentials = credentials
        self._tls = tls
        self.metadata = tuple(metadata)
        self._open: dict[str, _Open] = {}
        self._closes: set[asyncio.Task[None]] = set()

    @contextlib.contextmanager
    def stub(self, address: str) -> Iterator[Any]:
        """A stub of PeerService. Connects when it is first used."""
        opened = self._open.get(address)
        if opened is None:
            opened = self._open[address] = _Open(dial(address, self._credentials, _OPTIONS))
        opened.users += 1
        if opened.closing is not None:
            opened.closing.cancel()
        try:
            yield opened.stub
        finally:
            opened.users -= 1
            if not opened.users and self._open.get(address) is not opened:  # forgotten
                self._close(address, opened)
            elif not opened.users:
                loop = asyncio.get_running_loop()
                opened.closing = loop.call_later(self.IDLE_S, self._close, address, opened)

    def forget(self, address: str) -> None:
        """The next call connects anew, without the pause of a channel that could not connect: what
        is at the address may be another node by then."""
        opened = self._open.pop(address, None)
        if opened is not None and not opened.users:
            self._close(address, opened)  # else its last user does

    def _close(self, address: str, opened: _Open) -> None:
        if self._open.get(address) is opened:
            del self._open[address]
        if opened.closing is not None:
            opened.closing.cancel()
        closing = asyncio.ensure_future(opened.channel.close())
        self._closes.add(closing)
        closing.add_done_callback(self._closes.discard)

    def stream(self, address: str, timeout_s: float) -> CopyStream:
        return CopyStream(address, self._tls, self.metadata, timeout_s)

    async def close(self) -> None:
        """Ends calls that run."""
        for address, opened in list(self._open.items()):
            self._close(address, opened)
        if self._closes:
            await asyncio.wait(self._closes)
