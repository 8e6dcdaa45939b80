"""One life of the sidecar program: from its start until it ends or is killed."""

import asyncio
import contextlib
import itertools
import logging
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from loraserve.errors import UnavailableError
from loraserve.node.transfer import messages

_log = logging.getLogger(__name__)

_LINE_BYTES = 4096
_CLOSE_S = 5.0


class _Call:
    """A request whose answer is to come."""

    def __init__(self, on_progress: Callable[[int], None] | None) -> None:
        self.answer: asyncio.Future[messages.Answer] = asyncio.get_running_loop().create_future()
        self.on_progress = on_progress
        self.error: Exception | None = None  # of on_progress


class SidecarProcess:
    """Lives on the event loop. Every request ends: with the program's answer, or UnavailableError
    once the program has ended and can touch the pool no more."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        ready: messages.Ready,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        logging_lines: "asyncio.Task[None]",
    ) -> None:
        self.ready = ready
        self.ended = asyncio.Event()
        """The program is gone and every call has its answer."""
        self._process = process
        self._reader = reader
        self._writer = writer
        self._calls: dict[int, _Call] = {}
        self._ids = itertools.count(1)
        self._tasks = [logging_lines, asyncio.create_task(self._receive())]

    @classmethod
    async def start(
        cls,
        program: Path,
        environment: Mapping[str, str],
        arena_fd: int,
        capacity_bytes: int,
        timeout_s: float,
    ) -> "SidecarProcess":
        """Raises UnavailableError, or what the program says it cannot do."""
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise UnavailableError("transfer", f"{program} cannot be started: {error}") from None
        try:
            process = await asyncio.create_subprocess_exec(
                *(str(program), str(theirs.fileno())),
                env=dict(environment),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                limit=_LINE_BYTES,
            )
        except BaseException as error:
            ours.close()
            if not isinstance(error, OSError):
                raise
            raise UnavailableError("transfer", f"{program} cannot be started: {error}") from None
        finally:
            theirs.close()
        writer = None
        lines = asyncio.create_task(_log_lines(process))
        try:
            # A frame of 24 bytes: the socket takes it whole.
            frame = messages.encode(messages.HELLO, 0, messages.hello(capacity_bytes))
            socket.send_fds(ours, [frame], [arena_fd])
            ours.setblocking(False)
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            ready = await asyncio.wait_for(_first_answer(reader), timeout_s)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            if writer is not None:
                writer.transport.abort()  # the loop lets go of the socket before it is closed
            else:
                ours.close()
            await process.wait()
            await lines
            if isinstance(error, asyncio.TimeoutError):
                why = f"was not ready within {timeout_s:g} s"
            elif isinstance(error, OSError | EOFError | messages.ProtocolError):
                why = f"ended at its start with {process.returncode}: {error}"
            else:
                raise
            raise UnavailableError("transfer", f"{program} {why}") from None
        return cls(process, ready, reader, writer, lines)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def call(
        self,
        kind: int,
        body: bytes,
        timeout_s: float,
        on_progress: Callable[[int], None] | None = None,
    ) -> messages.Answer:
        """Raises what the program answered, what `on_progress` raised, and UnavailableError. The
        program ends by itself what it cannot do; one that does not answer in time hangs, and is
        killed. When this returns or raises, cancelled or not, nothing of the request goes on."""
        if self.ended.is_set():
            raise UnavailableError("transfer", "the sidecar has ended")
        request_id = next(self._ids)
        call = self._calls[request_id] = _Call(on_progress)
        self._writer.write(messages.encode(kind, request_id, body))
        try:
            await self._wait(call, timeout_s)
        except asyncio.CancelledError:
            # Until it says so, the program may still write to the pool.
            self._cancel(request_id)
            await _to_the_end(asyncio.ensure_future(self._wait(call, timeout_s)))
            raise
        finally:
            del self._calls[request_id]
        answer = call.answer.result()
        if call.error is not None:
            raise call.error
        if isinstance(answer, messages.Failed):
            raise answer.error
        return answer

    async def _wait(self, call: _Call, timeout_s: float) -> None:
        await asyncio.wait([call.answer], timeout=timeout_s)
        if not call.answer.done():
            await self.kill(f"it has not answered within {timeout_s:g} s")

    def _cancel(self, request_id: int) -> None:
        self._writer.write(messages.encode(messages.CANCEL, request_id))

    async def _receive(self) -> None:
        why = ""
        try:
            while True:
                kind, length, request_id = messages.head(
                    await self._reader.readexactly(messages.HEAD_BYTES)
                )
                body = await self._reader.readexactly(length)
                self._take(request_id, messages.decode(kind, body))
        except EOFError:
            pass
        except (OSError, messages.ProtocolError) as error:
            why = f", {error}"
        self._writer.close()
        # Its end of the socket is closed, or it cannot be talked to. An end of its own accord has
        # a moment to show its status.
        await asyncio.wait([asyncio.ensure_future(self._process.wait())], timeout=1.0)
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        gone = messages.Failed(
            UnavailableError("transfer", f"the sidecar ended with {self._process.returncode}{why}")
        )
        for call in self._calls.values():
            if not call.answer.done():
                call.answer.set_result(gone)
        self.ended.set()

    def _take(self, request_id: int, answer: messages.Answer) -> None:
        call = self._calls.get(request_id)
        if call is None or call.answer.done():
            raise messages.ProtocolError(f"an answer to {request_id}, which was not asked")
        if not isinstance(answer, messages.Progress):
            call.answer.set_result(answer)
        elif call.on_progress is not None:
            try:
                call.on_progress(answer.bytes_arrived)
            except Exception as error:
                call.error, call.on_progress = error, None
                self._cancel(request_id)

    async def kill(self, why: str) -> None:
        """Returns when it has ended."""
        if not self.ended.is_set():
            _log.error("sidecar %d is killed: %s", self.pid, why)
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self.ended.wait()

    async def close(self) -> None:
        """The program ends when its socket does."""
        self._writer.close()
        try:
            await asyncio.wait_for(self.ended.wait(), _CLOSE_S)
        except asyncio.TimeoutError:
            await self.kill("it did not end by itself")
        await asyncio.gather(*self._tasks)


async def _to_the_end(task: "asyncio.Future[None]") -> None:
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])


async def _first_answer(reader: asyncio.StreamReader) -> messages.Ready:
    kind, length, _ = messages.head(await reader.readexactly(messages.HEAD_BYTES))
    answer = messages.decode(kind, await reader.readexactly(length))
    if isinstance(answer, messages.Failed):
        raise answer.error
    if not isinstance(answer, messages.Ready):
        raise messages.ProtocolError(f"{type(answer).__name__} before it was ready")
    return answer


async def _log_lines(process: asyncio.subprocess.Process) -> None:
    assert process.stdout is not None
    while True:
        try:
            line = await process.stdout.readline()
        except ValueError:  # longer than a line may be; the rest of it comes as another
            continue
        if not line:
            return
        _log.warning("sidecar %d: %s", process.pid, line.decode("utf-8", "replace").rstrip())
