"""The client SDK for ordinary threads: the asyncio client on a loop of its own."""

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any, TypeVar

from loraserve.client.adapter_calls import AdapterCalls, AdapterFiles
from loraserve.client.aio import AnswerStream, AsyncClient
from loraserve.client.channels import closed
from loraserve.client.retry import RetryPolicy
from loraserve.client.route_table import RouteTable
from loraserve.client.types import AdapterInfo, Chunk, Completion, Prompt
from loraserve.errors import UnavailableError
from loraserve.sampling_params import SamplingParams
from loraserve.security.tls import TlsFiles

T = TypeVar("T")


class _LoopThread:
    """An event loop in a daemon thread, from its making to `close`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="loraserve-client", daemon=True
        )
        self._thread.start()
        self._lock = threading.Lock()
        self._closed = False

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns; blocks. An interrupt cancels it."""
        with self._lock:
            if self._closed:
                work.close()
                raise closed()
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:  # the loop was closed meanwhile
            raise closed() from None
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancels what runs. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @staticmethod
    async def _end() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class SyncAnswerStream:
    """An answer as it comes: an iterator of chunks, for one thread at a time. Leaving it early
    (`close`, or the end of `with`) cancels the request."""

    def __init__(self, loop: _LoopThread, stream: AnswerStream) -> None:
        self._loop = loop
        self._stream = stream

    def __iter__(self) -> "SyncAnswerStream":
        return self

    def __next__(self) -> Chunk:
        chunk = self._loop.run(self._next())
        if chunk is None:
            raise StopIteration
        return chunk

    async def _next(self) -> Chunk | None:
        # StopAsyncIteration cannot leave a coroutine.
        return await anext(self._stream, None)

    def close(self) -> None:
        with contextlib.suppress(UnavailableError):  # closing the client has ended it already
            self._loop.run(self._stream.aclose())

    def __enter__(self) -> "SyncAnswerStream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def completion(self) -> Completion:
        """The whole answer, once the stream has ended. Raises FailedPreconditionError before."""
        return self._stream.completion()


class SyncAdapterCalls:
    """AdapterCalls, blocking. Thread-safe."""

    def __init__(self, loop: _LoopThread, calls: AdapterCalls) -> None:
        self._loop = loop
        self._calls = calls

    def add(
        self, name: str, source: AdapterFiles, *, base: str = "", allow_base_mismatch: bool = False
    ) -> AdapterInfo:
        """Admits a new adapter to the cluster. AlreadyExistsError where the name is taken."""
        return self._loop.run(
            self._calls.add(name, source, base=base, allow_base_mismatch=allow_base_mismatch)
        )

    def update(
        self,
        name: str,
        source: AdapterFiles | None = None,
        *,
        revision: str | None = None,
        expected_revision: str | None = None,
        base: str = "",
        allow_base_mismatch: bool = False,
    ) -> AdapterInfo:
        """Points the name to another revision, see AdapterCalls.update."""
        return self._loop.run(
            self._calls.update(
                name,
                source,
                revision=revision,
                expected_revision=expected_revision,
                base=base,
                allow_base_mismatch=allow_base_mismatch,
            )
        )

    def get(self, name: str, *, base: str = "") -> AdapterInfo:
        return self._loop.run(self._calls.get(name, base=base))

    def list(self, *, base: str = "") -> list[AdapterInfo]:
        """All of the tenant's, by (base, name)."""
        return self._loop.run(self._calls.list(base=base))

    def remove(self, name: str, *, base: str = "") -> None:
        """The name is gone when this returns; copies go when their last request has ended."""
        self._loop.run(self._calls.remove(name, base=base))


class Client:
    """AsyncClient for ordinary code. Thread-safe; a context manager, `close` otherwise."""

    def __init__(
        self,
        controller: str | None = None,
        *,
        nodes: Sequence[str] = (),
        api_key: str | None = None,
        tls: TlsFiles | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        """See AsyncClient."""
        self._client = AsyncClient(controller, nodes=nodes, api_key=api_key, tls=tls, retry=retry)
        self._loop = _LoopThread()
        self.adapters = SyncAdapterCalls(self._loop, self._client.adapters)
        """Adding, changing, listing and removing adapters."""

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        base: str = "",
        revision: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> SyncAnswerStream:
        """The answer in chunks, each token exactly once; see AsyncClient.stream."""

        async def begin() -> AnswerStream:
            return self._client.stream(
                prompt,
                params,
                adapter=adapter,
                base=base,
                revision=revision,
                priority=priority,
                timeout_s=timeout_s,
                request_id=request_id,
            )

        return SyncAnswerStream(self._loop, self._loop.run(begin()))

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        base: str = "",
        revision: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Completion:
        """The whole answer; see AsyncClient.stream."""
        return self._loop.run(
            self._client.generate(
                prompt,
                params,
                adapter=adapter,
                base=base,
                revision=revision,
                priority=priority,
                timeout_s=timeout_s,
                request_id=request_id,
            )
        )

    @property
    def routes(self) -> RouteTable:
        """The table that requests are routed by."""
        return self._client.routes

    def wait_routable(
        self,
        adapters: Iterable[str],
        *,
        base: str = "",
        timeout_s: float = 30.0,
        revision: str | None = None,
    ) -> None:
        """See AsyncClient.wait_routable."""
        self._loop.run(
            self._client.wait_routable(adapters, base=base, timeout_s=timeout_s, revision=revision)
        )

    def wait_admitted(self, added: Iterable[AdapterInfo], *, timeout_s: float = 30.0) -> None:
        """See AsyncClient.wait_admitted."""
        self._loop.run(self._client.wait_admitted(added, timeout_s=timeout_s))

    def close(self) -> None:
        """Ends what runs with UnavailableError. Idempotent."""
        with contextlib.suppress(UnavailableError):
            self._loop.run(self._client.close())
        self._loop.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
