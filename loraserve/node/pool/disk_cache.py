"""Packed adapters on this node's own disk, so that what left the host pool comes back quickly.

A cache: nothing in it is needed. What is read is checked like the bytes of any other source, and a
damaged file is removed; a disk that is full or broken costs a warning. Files are not synced: one
that a crash left in pieces fails its check.
"""

import contextlib
import fcntl
import logging
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from loraserve.checkpoint.packed_header import (
    HEADER_SIZE_BYTES,
    PackedHeader,
    missing_header_bytes,
    parse_header,
)
from loraserve.errors import (
    InvalidArgumentError,
    InvalidCheckpointError,
    NotFoundError,
    UnavailableError,
)
from loraserve.named_files import wrong
from loraserve.node.blocking import BlockingCalls
from loraserve.node.load_info import AdapterLoadInfo
from loraserve.node.pool.checked_writer import CheckedWriter

_log = logging.getLogger(__name__)

_SUFFIX = ".lora"
_READ_BYTES = 1 << 20
_MAX_CALLS = 16
_WARN_EVERY_S = 60.0

T = TypeVar("T")


class DiskCache:
    """Files by revision, the least recently used ones removed to stay within a limit of bytes.

    A directory is of one node at a time. `has`, `keep` and `discard` are thread-safe; `keep` and
    `discard` block, `has` never does. A HeaderSource and an AdapterSource.
    """

    name = "disk"

    def __init__(
        self,
        directory: Path,
        max_bytes: int,
        *,
        on_evict: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes over what an earlier run left there. Raises InvalidArgumentError where the
        directory cannot be used or another node uses it. `on_evict` is called, in any thread, for
        each file that makes room for another."""
        self._directory = directory
        self._max_bytes = max_bytes
        self._on_evict = on_evict
        self._clock = clock
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()  # least recently used first
        # Files that a thread writes or removes now: of no account, and left to that thread.
        self._busy: set[str] = set()
        self._bytes = 0
        self._warned_s = -_WARN_EVERY_S
        self._calls = BlockingCalls(self.name, _MAX_CALLS)
        self._owned = -1
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._owned = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._owned, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._scan()
        except OSError as error:
            self.close()
            busy = isinstance(error, BlockingIOError)
            raise wrong(
                "disk-cache", directory, "another node uses it" if busy else error
            ) from None

    def _scan(self) -> None:
        found = []
        for path in self._directory.iterdir():
            if path.name.endswith(".part"):  # of a run that was killed
                path.unlink()
            elif re.fullmatch(r"[0-9a-f]{64}" + re.escape(_SUFFIX), path.name) and path.is_file():
                about = path.stat()
                found.append((about.st_mtime, path.name[:64], about.st_size))
        for _, revision, size in sorted(found):
            self._sizes[revision] = size
            self._bytes += size
        self._remove(self._make_room(0)[0])

    def close(self) -> None:
        """Another node may have the directory."""
        if self._owned >= 0:
            os.close(self._owned)
            self._owned = -1

    # What is here

    @property
    def bytes_held(self) -> int:
        return self._bytes

    @property
    def files(self) -> int:
        return len(self._sizes)

    def has(self, revision: str) -> bool:
        with self._lock:
            return revision in self._sizes

    def _path(self, revision: str) -> Path:
        return self._directory / f"{revision}{_SUFFIX}"

    # Writing

    def keep(self, revision: str, data: memoryview) -> None:
        """Writes a packed adapter that was checked, unless it is here or there is no room. Raises
        nothing for a disk that does not do its part."""
        with self._lock:
            if revision in self._sizes or revision in self._busy or len(data) > self._max_bytes:
                return
            victims, there_is = self._make_room(len(data))
            if there_is:
                self._busy.add(revision)
                self._bytes += len(data)
        self._remove(victims)
        if not there_is:
            return
        staged = self._directory / f".{revision}.{secrets.token_hex(8)}.part"
        kept = False
        try:
            with open(
                os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", 0
            ) as file:
                rest = data
                while rest:
                    rest = rest[file.write(rest[:_READ_BYTES]) :]
            os.replace(staged, self._path(revision))
            kept = True
        except OSError as error:
            with contextlib.suppress(OSError):
                staged.unlink()
            self._warn(f"{revision[:12]} is not kept: {error.strerror}")
        finally:
            with self._lock:
                self._busy.discard(revision)
                if kept:
                    self._sizes[revision] = len(data)
                else:
                    self._bytes -= len(data)

    def _make_room(self, need: int) -> tuple[list[str], bool]:
        """What goes, and whether there is room for `need` bytes then. Under the lock; the caller
        removes the files without it: a disk may hang."""
        victims = []
        while self._sizes and self._bytes + need > self._max_bytes:
            victims.append(self._take_out(next(iter(self._sizes))))
            self._on_evict()
        return victims, self._bytes + need <= self._max_bytes

    def _take_out(self, revision: str) -> str:
        """Under the lock."""
        self._bytes -= self._sizes.pop(revision)
        self._busy.add(revision)  # not to be written anew before it has gone
        return revision

    def _remove(self, revisions: list[str]) -> None:
        for revision in revisions:
            try:
                self._path(revision).unlink(missing_ok=True)
            except OSError as error:
                self._warn(f"{revision[:12]} is not removed: {error.strerror}")
            finally:
                with self._lock:
                    self._busy.discard(revision)

    def discard(self, revision: str) -> None:
        """Removes a file that is damaged; nothing happens where there is none."""
        with self._lock:
            victims = [self._take_out(revision)] if revision in self._sizes else []
        self._remove(victims)

    def _warn(self, what: str) -> None:
        """Not for every adapter: a full disk stays full."""
        now = self._clock()
        if now - self._warned_s >= _WARN_EVERY_S:
            self._warned_s = now
            _log.warning("disk cache %s: %s", self._directory, what)

    # Reading

    async def read_start(self, load: AdapterLoadInfo) -> bytes:
        """No more than the header, and checked, so as to remove a damaged file."""
        revision = load.spec.revision

        def read() -> bytes:
            with self._path(revision).open("rb") as file:
                start = file.read(HEADER_SIZE_BYTES)
                start += file.read(missing_header_bytes(start))
            parse_header(start, revision=revision)
            return start

        return await self._reading(revision, read)

    async def read_into(
        self, load: AdapterLoadInfo, header: PackedHeader, writer: CheckedWriter
    ) -> None:
        """Checks all of it, so as to remove what is damaged."""
        revision = load.spec.revision

        def read() -> None:
            with self._path(revision).open("rb") as file:
                file.seek(writer.position)
                while block := file.read(_READ_BYTES):
                    writer.write(block)
            if writer.position != header.size_bytes:
                raise InvalidCheckpointError(
                    self.name, f"{revision} ends after {writer.position} of {header.size_bytes}"
                )
            writer.finish()
            with contextlib.suppress(OSError):  # the order after a restart
                os.utime(self._path(revision))

        await self._reading(revision, read)

    async def _reading(self, revision: str, read: Callable[[], T]) -> T:
        with self._lock:
            if revision not in self._sizes:
                raise NotFoundError("revision", f"{revision} is not on this disk")
            self._sizes.move_to_end(revision)

        def call() -> T:
            try:
                return read()
            except InvalidArgumentError:  # another format version is unsupported
                self.discard(revision)
                raise
            except OSError as error:
                self.discard(revision)
                raise UnavailableError(self.name, str(error)) from None

        return await self._calls.run(call)
