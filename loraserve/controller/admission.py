"""An upload on its way into the cluster: checked while it comes into a staging file, then admitted.

Every byte is checked even where the store holds the revision already: who knows only the header of
an adapter must not come by a name for it.
"""

import asyncio
import contextlib
import errno
import os
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from loraserve.checkpoint.base_names import check_base_name
from loraserve.checkpoint.packed_header import ModuleEntry
from loraserve.checkpoint.packed_stream import PackedStream
from loraserve.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
)
from loraserve.wire import CHUNK_BYTES

MAX_ADAPTER_BYTES = 8 << 30
MAX_UPLOADS = 8
MAX_UPLOADS_OF_A_TENANT = MAX_UPLOADS // 2
# A client that sends nothing for so long has gone.
CHUNK_TIMEOUT_S = 30.0
# Over its whole length an upload is no slower than this; it may be late by the time of one chunk.
MIN_BYTES_PER_S = 128 << 10


T = TypeVar("T")


@dataclass(frozen=True)
class PackedFacts:
    """What a verified packed adapter says about itself; what of its base is not known is empty."""

    revision: str
    base_name: str
    size_bytes: int
    max_rank: int
    base_digest: str = ""
    modules: tuple[ModuleEntry, ...] = ()


class UploadCheck(Protocol):
    """Of one upload. The methods block and raise InvalidCheckpointError or UnsupportedError."""

    def feed(self, data: bytes) -> None:
        """The next bytes, of any length."""

    def finish(self) -> PackedFacts:
        """After the last byte."""


class PackedCheck:
    """Both sums of every chunk, and no weight that is NaN or infinite."""

    def __init__(self) -> None:
        self._stream = PackedStream(verify="sha256")

    def feed(self, data: bytes) -> None:
        self._stream.feed(data)

    def finish(self) -> PackedFacts:
        header = self._stream.finish()
        return PackedFacts(
            header.revision,
            header.base_name,
            header.size_bytes,
            header.max_rank,
            header.base_digest or "",
            header.entries,
        )


class Admission:
    """Receives uploads into `staging`, a directory that is emptied at start."""

    def __init__(
        self,
        staging: Path,
        new_check: Callable[[], UploadCheck] = PackedCheck,
        max_bytes: int = MAX_ADAPTER_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._staging = staging
        self._new_check = new_check
        self._max_bytes = max_bytes
        self._clock = clock
        self._running: Counter[str] = Counter()
        staging.mkdir(parents=True, exist_ok=True)
        for left in staging.iterdir():
            left.unlink()

    @property
    def running(self) -> int:
        """Uploads that have not ended."""
        return self._running.total()

    @contextlib.asynccontextmanager
    async def receive(
        self, tenant: str, size_bytes: int, chunks: AsyncIterator[bytes]
    ) -> AsyncIterator[tuple[Path, PackedFacts]]:
        """The checked upload; its file is gone when the block ends.

        Raises InvalidArgumentError (sizes), InvalidCheckpointError (content), DeadlineExceededError
        (stalled or too slow) and ResourceExhaustedError (too many uploads, disk full)."""
        if not 0 < size_bytes <= self._max_bytes:
            raise InvalidArgumentError(
                "size_bytes", f"{size_bytes} is not within 1 and {self._max_bytes}"
            )
        if self.running >= MAX_UPLOADS:
            raise ResourceExhaustedError("uploads", f"{MAX_UPLOADS} are running", 1.0)
        if self._running[tenant] >= MAX_UPLOADS_OF_A_TENANT:
            raise ResourceExhaustedError(
                "uploads", f"{MAX_UPLOADS_OF_A_TENANT} of tenant {tenant!r} are running", 1.0
            )
        self._running[tenant] += 1
        path = self._staging / f"{secrets.token_hex(16)}.part"
        try:
            facts = await self._write(path, size_bytes, chunks)
            if facts.size_bytes != size_bytes:
                raise InvalidArgumentError(
                    "size_bytes", f"{size_bytes}, but the packed adapter has {facts.size_bytes}"
                )
            yield path, facts
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceExhaustedError("store", "no space left on the controller") from None
            raise
        finally:
            self._running[tenant] -= 1
            if not self._running[tenant]:
                del self._running[tenant]
            path.unlink(missing_ok=True)

    async def _write(
        self, path: Path, size_bytes: int, chunks: AsyncIterator[bytes]
    ) -> PackedFacts:
        check = self._new_check()
        received = 0
        begin = self._clock()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            while True:
                late_s = self._clock() - begin - received / MIN_BYTES_PER_S
                chunk = await _next(chunks, CHUNK_TIMEOUT_S - max(0.0, late_s), received)
                if chunk is None:
                    break
                received += len(chunk)
                if len(chunk) > CHUNK_BYTES:
                    raise InvalidArgumentError("chunk", f"over {CHUNK_BYTES} bytes")
                if received > size_bytes:
                    raise InvalidArgumentError("chunk", f"more bytes than size_bytes {size_bytes}")
                await asyncio.to_thread(_take, chunk, check, file)
        if received != size_bytes:
            raise InvalidArgumentError(
                "chunk", f"the upload ended after {received} of {size_bytes} bytes"
            )
        return await asyncio.to_thread(check.finish)


def _take(chunk: bytes, check: UploadCheck, file: BinaryIO) -> None:
    check.feed(chunk)
    file.write(chunk)


async def in_time(message: Awaitable[T], field: str) -> T:
    """The next message of an upload. Raises DeadlineExceededError about `field`."""
    try:
        return await asyncio.wait_for(message, CHUNK_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise DeadlineExceededError(field, f"nothing for {CHUNK_TIMEOUT_S:g} s") from None


async def _next(chunks: AsyncIterator[bytes], left_s: float, received: int) -> bytes | None:
    try:
        return await asyncio.wait_for(anext(chunks), left_s)
    except StopAsyncIteration:
        return None
    except asyncio.TimeoutError:
        raise DeadlineExceededError(
            "chunk", f"{received} bytes came, then nothing in time for {MIN_BYTES_PER_S} bytes/s"
        ) from None


def check_base(facts: PackedFacts, base: str, digests: set[str], allow_mismatch: bool) -> None:
    """Raises FailedPreconditionError where the packed header is of another base.

    `digests`: of the base, as nodes registered it; where both sides know one, names do not count.
    """
    if allow_mismatch:
        return
    if facts.base_digest and digests:
        if facts.base_digest not in digests:
            raise FailedPreconditionError(
                "base",
                f"the adapter was made for weights {facts.base_digest}, those of {base!r} are "
                f"{', '.join(sorted(digests))}; --allow-base-mismatch (allow_base_mismatch in "
                "code) admits it all the same",
            )
    else:
        check_base_name(facts.base_name, base)
