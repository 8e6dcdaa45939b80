"""The disk cache: bounded, checked when read, and never a request's trouble."""

import asyncio
import contextlib
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash
from fake_node import FakeSource, blob, letter_of, revision, until
from fake_node import load_of as small_load
from pool_fixtures import MemorySource, fetched, flipped, header_of, hurry, large, load_of

from loraserve.errors import InvalidArgumentError
from loraserve.node import fetch as fetch_module
from loraserve.node.pool.disk_cache import DiskCache

DATA = large()
HEADER = header_of(DATA)
LOAD = load_of(DATA)
SMALL = len(blob("a"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskCache]:
    with contextlib.closing(DiskCache(tmp_path / "cache", 8 << 20)) as cache:
        yield cache


def keep(cache: DiskCache, *letters: str) -> None:
    for letter in letters:
        cache.keep(revision(letter), memoryview(blob(letter)))


def kept(directory: Path) -> str:
    """The letters whose files are there, and no other file."""
    return "".join(sorted(letter_of(path.stem) for path in directory.iterdir()))


def test_what_was_kept_is_read_before_the_store(disk: DiskCache) -> None:
    store = MemorySource(DATA, "store")
    assert fetched(LOAD, store, disk=disk) == (DATA, "store")
    disk.keep(HEADER.revision, memoryview(DATA))
    assert fetched(LOAD, store, disk=disk) == (DATA, "disk")
    assert (store.started, len(store.reads)) == (1, 1)
    assert (disk.files, disk.bytes_held) == (1, len(DATA))
    mode = os.stat(disk._path(HEADER.revision)).st_mode & 0o777
    assert mode == 0o600


def test_it_survives_a_restart(tmp_path: Path) -> None:
    with contextlib.closing(DiskCache(tmp_path, 8 << 20)) as disk:
        disk.keep(HEADER.revision, memoryview(DATA))
    (tmp_path / f".{revision('a')}.0123456789abcdef.part").write_bytes(b"of a run that was killed")
    (tmp_path / "notes.txt").write_bytes(b"somebody's own")
    with contextlib.closing(DiskCache(tmp_path, 8 << 20)) as disk:
        assert (disk.files, disk.bytes_held) == (1, len(DATA))
        assert fetched(LOAD, disk=disk) == (DATA, "disk")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["notes.txt", f"{HEADER.revision}.lora"]
    )


def test_the_least_recently_used_goes(tmp_path: Path) -> None:
    evicted = []
    disk = DiskCache(tmp_path, 3 * SMALL, on_evict=lambda: evicted.append(1))
    keep(disk, "a", "b", "c")
    fetched(small_load("sql", "a"), FakeSource("a"), disk=disk)
    keep(disk, "d")
    assert kept(tmp_path) == "acd"
    keep(disk, "d", "a")  # here already: nothing changes
    assert (kept(tmp_path), disk.bytes_held, len(evicted)) == ("acd", 3 * SMALL, 1)
    disk.keep("ab" * 32, memoryview(bytes(3 * SMALL + 1)))  # would not fit into an empty one
    assert kept(tmp_path) == "acd"
    disk.close()


def test_a_smaller_limit_and_the_order_after_a_restart(tmp_path: Path) -> None:
    with contextlib.closing(DiskCache(tmp_path, 3 * SMALL)) as disk:
        keep(disk, "a", "b", "c")
        for age, letter in enumerate("bca"):
            os.utime(disk._path(revision(letter)), (1000 - age, 1000 - age))
    with contextlib.closing(DiskCache(tmp_path, 2 * SMALL)) as disk:
        assert kept(tmp_path) == "bc"
        keep(disk, "d")
        assert kept(tmp_path) == "bd"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x" * 99,
        DATA[:15],
        DATA[: HEADER.header_bytes - 1],
        DATA[: HEADER.header_bytes],
        DATA[:-1],
        DATA + b"x",
        flipped(DATA, 9),  # another format version
        flipped(DATA, 90),
        flipped(DATA, HEADER.header_bytes),
        flipped(DATA, 2_500_000),
        large(2),
    ],
    ids=range(12),
)
def test_a_damaged_file_is_dropped_and_fetched_again(disk: DiskCache, content: bytes) -> None:
    disk.keep(HEADER.revision, memoryview(DATA))
    path = disk._path(HEADER.revision)
    path.write_bytes(content)
    assert fetched(LOAD, MemorySource(DATA, "store"), disk=disk) == (DATA, "store")
    assert not path.exists()
    assert (disk.files, disk.bytes_held) == (0, 0)


def test_a_file_that_somebody_removed_is_fetched_again(disk: DiskCache) -> None:
    disk.keep(HEADER.revision, memoryview(DATA))
    disk._path(HEADER.revision).unlink()
    assert fetched(LOAD, MemorySource(DATA, "store"), disk=disk) == (DATA, "store")
    assert disk.files == 0


def test_bytes_forged_to_their_xxh3_sum_are_found_by_sha256(
    disk: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.keep(HEADER.revision, memoryview(DATA))
    disk._path(HEADER.revision).write_bytes(flipped(DATA, 2_000_000))
    start, length = HEADER.chunk_range(1)
    forged = flipped(DATA, 2_000_000)[start : start + length]
    digest = xxhash.xxh3_128_digest

    def collides(data: Any) -> bytes:
        return digest(DATA[start : start + length] if data == forged else data)

    monkeypatch.setattr("loraserve.checkpoint.packed_header.xxhash.xxh3_128_digest", collides)
    assert fetched(LOAD, disk=disk)[0] != DATA  # what xxh3 alone would let through
    source = MemorySource(DATA, "store")
    assert fetched(LOAD, source, disk=disk, verify="sha256") == (DATA, "store")
    assert disk.files == 0


# A disk that does not do its part


def test_a_full_disk_is_a_warning_and_no_more(
    disk: DiskCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit on the size of files stands for a full device: write() fails in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, before[1]))
    try:
        for _ in range(3):
            disk.keep(HEADER.revision, memoryview(DATA))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (disk.files, disk.bytes_held, list(disk._directory.iterdir())) == (0, 0, [])
    assert caplog.text.count("is not kept") == 1  # not for every adapter
    assert fetched(LOAD, MemorySource(DATA, "store"), disk=disk) == (DATA, "store")
    disk.keep(HEADER.revision, memoryview(DATA))
    assert fetched(LOAD, disk=disk) == (DATA, "disk")


def test_a_file_system_without_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount a tmpfs")
    try:
        with contextlib.closing(DiskCache(tmp_path, 8 << 20)) as disk:
            disk.keep(HEADER.revision, memoryview(DATA))
            assert "No space left on device" in caplog.text
            assert (disk.bytes_held, list(tmp_path.iterdir())) == (0, [])
            keep(disk, "a")
            assert kept(tmp_path) == "a"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("step", ["open", "replace"])
def test_a_disk_that_fails_at_any_step(
    disk: DiskCache, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def broken(*_: object, **__: object) -> Any:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, broken)
        keep(disk, "a")
    assert (disk.files, disk.bytes_held) == (0, 0)
    keep(disk, "a")
    assert kept(disk._directory) == "a"


def test_a_disk_that_hangs_costs_its_deadline_and_then_nothing(
    disk: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.keep(HEADER.revision, memoryview(DATA))
    go_on = threading.Event()

    class Stuck(type(disk._directory)):  # type: ignore[misc]
        def open(self, *_: object, **__: object) -> Any:
            go_on.wait(300)
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(disk, "_path", lambda revision: Stuck("/"))
    hurry(monkeypatch, "disk", 0.1)
    try:
        assert fetched(LOAD, MemorySource(DATA, "store"), disk=disk) == (DATA, "store")
    finally:
        go_on.set()


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InvalidArgumentError, match="disk-cache: "):
            DiskCache(directory, 1)
    with (
        contextlib.closing(DiskCache(tmp_path / "cache", 1)),
        pytest.raises(InvalidArgumentError, match="another node uses it"),
    ):
        DiskCache(tmp_path / "cache", 1)
    DiskCache(tmp_path / "cache", 1).close()


WRITER = """
import sys
from pathlib import Path
from loraserve.node.pool.disk_cache import DiskCache
disk = DiskCache(Path(sys.argv[1]), 1 << 30)
data = memoryview(Path(sys.argv[2]).read_bytes())
print("ready", flush=True)
for number in range(10**6):
    disk.keep(f"{number:064x}", data)
"""


def test_a_killed_writer_leaves_nothing_that_is_taken_for_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(DATA)
    command = [sys.executable, "-c", WRITER, str(tmp_path / "cache"), str(tmp_path / "data")]
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.03)  # in the middle of a file, most likely
            process.kill()
        with contextlib.closing(DiskCache(tmp_path / "cache", 1 << 30)) as disk:
            left = list((tmp_path / "cache").iterdir())
            assert len(left) == disk.files
            assert all(path.read_bytes() == DATA for path in left)


def test_many_at_once(tmp_path: Path) -> None:
    """Readers and writers of a cache that is too small for all: bounded at the end, never wrong."""
    disk = DiskCache(tmp_path, 4 * SMALL)
    letters = "abcdefgh"

    def write() -> None:
        for turn in range(40):
            keep(disk, letters[turn % len(letters)], letters[-1 - turn * 3 % len(letters)])

    async def read() -> None:
        fetch = fetch_module.AdapterFetch([FakeSource(*letters)], max_bytes=1 << 30, disk=disk)
        for turn in range(80):
            start = await fetch.start(small_load("sql", letters[turn % len(letters)]))
            assert start.header.revision == revision(letters[turn % len(letters)])

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    asyncio.run(read())
    for thread in threads:
        thread.join()
    assert disk.bytes_held == sum(p.stat().st_size for p in tmp_path.iterdir()) <= 4 * SMALL
    assert disk.files == len(list(tmp_path.iterdir())) > 0
    disk.close()


class HungUnlink:
    """Removing a file stands still until `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        right = Path.unlink

        def unlink(path: Path, missing_ok: bool = False) -> None:
            self.begun.set()
            assert self.go.wait(60)
            right(path, missing_ok)

        monkeypatch.setattr(Path, "unlink", unlink)


def test_a_disk_that_hangs_as_it_removes_holds_up_nobody_who_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(DiskCache(tmp_path, 2 * SMALL)) as disk:
        keep(disk, "a", "b")
        hung = HungUnlink(monkeypatch)
        evicting = threading.Thread(target=keep, args=(disk, "c"))
        evicting.start()
        assert hung.begun.wait(60)
        asked = threading.Thread(target=lambda: disk.has(revision("b")))
        asked.start()
        asked.join(30)
        assert not asked.is_alive()
        assert not disk.has(revision("a"))
        keep(disk, "a")  # not before the old file has gone
        assert not disk.has(revision("a"))
        hung.go.set()
        evicting.join()
        assert kept(tmp_path) == "bc"
        keep(disk, "a")
        assert kept(tmp_path) == "ac"
        assert disk.bytes_held == 2 * SMALL


def test_a_damaged_file_is_removed_beside_the_event_loop(
    disk: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.keep(HEADER.revision, memoryview(DATA))
    disk._path(HEADER.revision).write_bytes(b"damaged")
    hung = HungUnlink(monkeypatch)

    async def test() -> None:
        reading = asyncio.create_task(disk.read_start(LOAD))
        await until(hung.begun.is_set, "removing")
        assert not reading.done()
        hung.go.set()
        with pytest.raises(InvalidArgumentError):
            await reading

    asyncio.run(test())
    assert disk.files == 0
