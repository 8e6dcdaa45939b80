"""Packed adapters by revision in a durable store: a local directory, or any URL of fsspec.

The controller writes, nodes may read. A blob is there whole or not at all, and never changes:
its name is its revision.
"""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import fsspec

from loraserve.errors import InvalidArgumentError, NotFoundError
from loraserve.named_files import wrong

SUFFIX = ".lora"
MARK = "store-id"
READ_BYTES = 1 << 20
# Whoever writes a blob has ended, in one way or another, after so long.
STAGED_S = 24 * 3600.0


class DurableStore:
    """Methods block on disk or network; call them outside the event loop. They raise OSError where
    the store fails."""

    def __init__(self, url: str, *, make: bool = True) -> None:
        """`url`: a path, or a URL such as s3://bucket/folder. `make`: a directory that is not
        there; who only reads has nothing of one that it made itself. Raises InvalidArgumentError,
        OSError."""
        try:
            filesystem, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise InvalidArgumentError("store", f"{url!r}: {error}") from None
        self.url = url
        self._filesystem: Any = filesystem
        self._root = str(root).rstrip("/")
        self._local = "file" in (
            (filesystem.protocol,) if isinstance(filesystem.protocol, str) else filesystem.protocol
        )
        if not self._local:
            return
        if make:
            os.makedirs(self._root, exist_ok=True)
        elif os.path.exists(self._root) and not os.path.isdir(self._root):
            raise wrong("store", self._root, "is no directory")

    @property
    def directory(self) -> Path | None:
        """None where the store is no directory of this machine."""
        return Path(self._root) if self._local else None

    def mark(self) -> str:
        """What tells this store from others, the same for all who reach it. Empty where it has none
        yet; see `make_mark`."""
        try:
            found = bytes(self._filesystem.cat_file(f"{self._root}/{MARK}"))
        except (FileNotFoundError, NotADirectoryError):
            return ""
        text = found.decode("ascii", "replace").strip()
        return text if re.fullmatch(r"[0-9a-f]{32}", text) else ""

    def make_mark(self) -> str:
        """`mark`, made where there is none."""
        if not (mark := self.mark()):
            mark = secrets.token_hex(16)
            if self._local:
                Path(self._root, MARK).write_text(f"{mark}\n")
            else:
                self._filesystem.pipe_file(f"{self._root}/{MARK}", f"{mark}\n".encode())
        return mark

    def path_of(self, revision: str) -> str:
        """Where the blob of a revision lies in the store. Raises InvalidArgumentError."""
        if not re.fullmatch(r"[0-9a-f]{64}", revision):
            raise InvalidArgumentError("revision", "is not 64 lower-case hexadecimal digits")
        # Two digits of fan-out keep directories of 100,000 adapters quick.
        return f"{self._root}/{revision[:2]}/{revision}{SUFFIX}"

    def local_path(self, revision: str) -> Path | None:
        """The blob's file where the store is a directory of this machine and has it."""
        path = Path(self.path_of(revision))
        return path if self._local and path.is_file() else None

    def put(self, revision: str, source: Path) -> None:
        """Stores the file `source` as the blob of `revision`; nothing happens where it is there.
        One of another size is not it, whatever made it so, and is replaced."""
        target = self.path_of(revision)
        with contextlib.suppress(FileNotFoundError):
            if self._filesystem.size(target) == source.stat().st_size:
                return
        if not self._local:
            # One upload is atomic in object stores.
            self._filesystem.put_file(str(source), target)
            return
        directory = os.path.dirname(target)
        if not os.path.isdir(directory):
            os.makedirs(directory, exist_ok=True)
            _sync_directory(self._root)
        staged = f"{target}.{secrets.token_hex(8)}.part"
        try:
            with source.open("rb") as read, open(staged, "xb") as write:
                while block := read.read(READ_BYTES):
                    write.write(block)
                write.flush()
                os.fsync(write.fileno())
            os.replace(staged, target)
            _sync_directory(directory)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(staged)
            raise

    def remove_staged(self, older_than_s: float = STAGED_S) -> None:
        """Removes what writers that were killed left. Raises OSError."""
        if not self._local:
            return
        latest = time.time() - older_than_s
        for left in Path(self._root).glob(f"*/*{SUFFIX}.*.part"):
            with contextlib.suppress(FileNotFoundError):
                if left.stat().st_mtime < latest:
                    left.unlink()

    def size_bytes(self, revision: str) -> int:
        """Raises NotFoundError."""
        try:
            return int(self._filesystem.size(self.path_of(revision)))
        except FileNotFoundError:
            raise NotFoundError("revision", f"{revision} is not in the store") from None

    def read(self, revision: str, offset: int = 0) -> Generator[bytes, None, None]:
        """The blob from `offset` on in blocks of at most READ_BYTES. Raises NotFoundError."""
        try:
            file = self._filesystem.open(self.path_of(revision), "rb")
        except FileNotFoundError:
            raise NotFoundError("revision", f"{revision} is not in the store") from None
        with file:
            file.seek(offset)
            while block := file.read(READ_BYTES):
                yield block

    def read_range(self, revision: str, offset: int, length: int) -> bytes:
        """In one request; fewer bytes where the blob ends before. Raises NotFoundError."""
        try:
            return bytes(
                self._filesystem.cat_file(self.path_of(revision), start=offset, end=offset + length)
            )
        except FileNotFoundError:
            raise NotFoundError("revision", f"{revision} is not in the store") from None

    def remove(self, revision: str) -> None:
        """Nothing happens where it is not there. Readers that have it open read on (locally)."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(self.path_of(revision))


def _sync_directory(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
