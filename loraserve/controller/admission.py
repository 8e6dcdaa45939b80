"""An upload on its way into the cluster: received into a staging file, checked, then admitted."""

import asyncio
import contextlib
import errno
import os
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from loraserve.checkpoint.packed_adapter import open_packed
from loraserve.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
)
from loraserve.wire import CHUNK_BYTES

MAX_ADAPTER_BYTES = 8 << 30
MAX_UPLOADS = 8
# A client that sends nothing for so long has gone.
CHUNK_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class PackedFacts:
    """What a verified packed adapter says about itself; what of its base is not known is empty."""

    revision: str
    base_name: str
    size_bytes: int
    max_rank: int
    base_digest: str = ""


Inspector = Callable[[Path], PackedFacts]


def inspect_packed(path: Path) -> PackedFacts:
    """Reads and checks every byte of the file against its header's sha256 sums. Raises
    InvalidCheckpointError."""
    packed = open_packed(path, verify="sha256")
    return PackedFacts(
        packed.revision,
        packed.base_name,
        packed.size_bytes,
        packed.max_rank,
        packed.base_digest or "",
    )


class Admission:
    """Receives uploads into `staging`, a directory that is emptied at start."""

    def __init__(
        self,
        staging: Path,
        inspector: Inspector = inspect_packed,
        max_bytes: int = MAX_ADAPTER_BYTES,
    ) -> None:
        self._staging = staging
        self._inspector = inspector
        self._max_bytes = max_bytes
        self._running = 0
        staging.mkdir(parents=True, exist_ok=True)
        for left in staging.iterdir():
            left.unlink()

    @property
    def running(self) -> int:
        """Uploads that have not ended."""
        return self._running

    @contextlib.asynccontextmanager
    async def receive(
        self, size_bytes: int, chunks: AsyncIterator[bytes]
    ) -> AsyncIterator[tuple[Path, PackedFacts]]:
        """The checked upload; its file is gone when the block ends.

        Raises InvalidArgumentError (sizes), InvalidCheckpointError (content), DeadlineExceededError
        (stalled) and ResourceExhaustedError (too many uploads, disk full)."""
        if not 0 < size_bytes <= self._max_bytes:
            raise InvalidArgumentError(
                "size_bytes", f"{size_bytes} is not within 1 and {self._max_bytes}"
            )
        if self._running >= MAX_UPLOADS:
            raise ResourceExhaustedError("uploads", f"{MAX_UPLOADS} are running", 1.0)
        self._running += 1
        path = self._staging / f"{secrets.token_hex(16)}.part"
        try:
            await self._write(path, size_bytes, chunks)
            facts = await asyncio.to_thread(self._inspector, path)
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
            self._running -= 1
            path.unlink(missing_ok=True)

    async def _write(self, path: Path, size_bytes: int, chunks: AsyncIterator[bytes]) -> None:
        received = 0
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            while (chunk := await _next(chunks)) is not None:
                received += len(chunk)
                if len(chunk) > CHUNK_BYTES:
                    raise InvalidArgumentError("chunk", f"over {CHUNK_BYTES} bytes")
                if received > size_bytes:
                    raise InvalidArgumentError("chunk", f"more bytes than size_bytes {size_bytes}")
                await asyncio.to_thread(file.write, chunk)
        if received != size_bytes:
            raise InvalidArgumentError(
                "chunk", f"the upload ended after {received} of {size_bytes} bytes"
            )


async def _next(chunks: AsyncIterator[bytes]) -> bytes | None:
    try:
        return await asyncio.wait_for(anext(chunks), CHUNK_TIMEOUT_S)
    except StopAsyncIteration:
        return None
    except asyncio.TimeoutError:
        raise DeadlineExceededError("chunk", f"nothing for {CHUNK_TIMEOUT_S:g} s") from None


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
                f"{', '.join(sorted(digests))}; allow_base_mismatch admits it all the same",
            )
    elif facts.base_name and facts.base_name != base:
        raise FailedPreconditionError(
            "base",
            f"the adapter was made for {facts.base_name!r}, not {base!r}; "
            "allow_base_mismatch admits it all the same",
        )
