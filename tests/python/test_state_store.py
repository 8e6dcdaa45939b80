"""The StateStore on SQLite and the durable store of packed adapters."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraserve.checkpoint.durable_store import READ_BYTES, DurableStore
from loraserve.controller.store import AdapterRecord, SqliteStore
from loraserve.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from loraserve.placement.types import AdapterId, AdapterSpec


def record(name: str, *revisions: str, tenant: str = "acme") -> AdapterRecord:
    adapter = AdapterId(tenant, "base", name)
    return AdapterRecord(tuple(AdapterSpec(adapter, r, 10, 8) for r in revisions), 5, 6)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    opened = SqliteStore(tmp_path / "state.sqlite")
    yield opened
    opened.close()


def test_a_registry_comes_back(store: SqliteStore, tmp_path: Path) -> None:
    sql, poet, other = record("sql", "a2", "a1"), record("poet", "b1"), record("sql", "a1")
    other = record("sql", "a1", tenant="zeta")
    for each in (sql, poet, other):
        store.put_adapter(each)
    placed = {sql.adapter: {"n1": 0.25, "n2": 0.75}, poet.adapter: {"n2": 1.0}}
    store.save_placement(placed)
    store.close()
    again = SqliteStore(tmp_path / "state.sqlite")
    assert again.adapters() == [poet, sql, other]
    assert again.placement() == placed
    again.close()


def test_put_replaces_the_whole_record(store: SqliteStore) -> None:
    store.put_adapter(record("sql", "a2", "a1"))
    store.put_adapter(record("sql", "a3"))
    assert store.adapters() == [record("sql", "a3")]
    assert store.revision_in_use("a3")
    assert not store.revision_in_use("a1")


def test_remove_takes_the_revisions_along(store: SqliteStore) -> None:
    store.put_adapter(record("sql", "a1"))
    store.put_adapter(record("sql", "a1", tenant="zeta"))
    store.remove_adapter(AdapterId("acme", "base", "sql"))
    assert store.revision_in_use("a1")
    store.remove_adapter(AdapterId("zeta", "base", "sql"))
    assert not store.revision_in_use("a1")
    store.remove_adapter(AdapterId("zeta", "base", "sql"))


def test_a_placement_is_saved_by_its_changes(store: SqliteStore) -> None:
    a, b = AdapterId("t", "base", "a"), AdapterId("t", "base", "b")
    store.save_placement({a: {"n1": 1.0}, b: {"n1": 0.5, "n2": 0.5}})
    store.save_placement({b: {"n2": 0.9, "n3": 0.1}})
    assert store.placement() == {a: {"n1": 1.0}, b: {"n2": 0.9, "n3": 0.1}}
    store.save_placement({b: {"n1": 1.0}}, [a])
    assert store.placement() == {b: {"n1": 1.0}}
    store.save_placement({}, [a, b])
    assert store.placement() == {}


def test_a_store_of_the_first_version_is_taken_over(tmp_path: Path) -> None:
    path, a = tmp_path / "state.sqlite", AdapterId("t", "base", "a")
    store = SqliteStore(path)
    store.put_adapter(record("sql", "a1"))
    store.close()
    with sqlite3.connect(path) as old:
        old.execute("ALTER TABLE placement DROP COLUMN share")
        old.execute("INSERT INTO placement VALUES ('t', 'base', 'a', 'n1')")
        old.execute("PRAGMA user_version = 1")
    old.close()
    store = SqliteStore(path)
    assert store.placement() == {a: {"n1": 1.0}}
    assert store.adapters() == [record("sql", "a1")]
    store.save_placement({a: {"n1": 0.5, "n2": 0.5}})
    store.close()
    again = SqliteStore(path)
    assert again.placement() == {a: {"n1": 0.5, "n2": 0.5}}
    again.close()


def test_a_failed_write_changes_nothing(store: SqliteStore) -> None:
    store.put_adapter(record("sql", "a1"))
    broken = AdapterRecord((AdapterSpec(AdapterId("acme", "base", "sql"), "a2", 2**70, 8),), 5, 6)
    with pytest.raises((OSError, OverflowError)):
        store.put_adapter(broken)
    assert store.adapters() == [record("sql", "a1")]
    store.put_adapter(record("sql", "a3"))


def test_epochs_rise_over_restarts(tmp_path: Path) -> None:
    seen = []
    for _ in range(3):
        store = SqliteStore(tmp_path / "state.sqlite")
        seen.append(store.begin_epoch())
        store.close()
    assert seen == [1, 2, 3]


def test_one_controller_per_file(store: SqliteStore, tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match="another controller"):
        SqliteStore(tmp_path / "state.sqlite")


def test_files_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    garbage, foreign, newer = (tmp_path / name for name in ("garbage", "foreign", "newer"))
    garbage.write_bytes(b"not a database" * 100)
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(InvalidArgumentError, match="data-dir"):
        SqliteStore(garbage)
    with pytest.raises(FailedPreconditionError, match="schema 0"):
        SqliteStore(foreign)
    with pytest.raises(FailedPreconditionError, match="schema 99"):
        SqliteStore(newer)
    with pytest.raises(InvalidArgumentError, match="data-dir"):
        SqliteStore(tmp_path / "absent" / "state.sqlite")


WRITER = """
import sys
from pathlib import Path
from loraserve.controller.store import AdapterRecord, SqliteStore
from loraserve.placement.types import AdapterId, AdapterSpec
store = SqliteStore(Path(sys.argv[1]))
for i in range(10**6):
    spec = AdapterSpec(AdapterId("t", "base", f"a{i:06}"), f"r{i}", 10, 8)
    store.put_adapter(AdapterRecord((spec,), i, i))
    print(i, flush=True)
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    last = -1
    for line in writer.stdout:
        last = int(line)
        if last == 25:
            writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    store = SqliteStore(path)
    assert last >= 25
    assert len(store.adapters()) in (last + 1, last + 2)
    store.close()


REVISION = "ab" + "0" * 62


def test_blobs_come_back_whole(tmp_path: Path) -> None:
    blobs = DurableStore(str(tmp_path / "blobs"))
    data = os.urandom(READ_BYTES * 2 + 17)
    (tmp_path / "source").write_bytes(data)
    blobs.put(REVISION, tmp_path / "source")
    assert b"".join(blobs.read(REVISION)) == data
    assert b"".join(blobs.read(REVISION, READ_BYTES + 3)) == data[READ_BYTES + 3 :]
    assert max(len(block) for block in blobs.read(REVISION)) <= READ_BYTES
    assert blobs.size_bytes(REVISION) == len(data)
    path = blobs.local_path(REVISION)
    assert path is not None
    assert path.read_bytes() == data
    assert [p for p in (tmp_path / "blobs").rglob("*") if p.is_file()] == [path]


def test_blobs_that_are_absent(tmp_path: Path) -> None:
    blobs = DurableStore(str(tmp_path / "blobs"))
    for ask in (blobs.size_bytes, lambda r: list(blobs.read(r))):
        with pytest.raises(NotFoundError, match="not in the store"):
            ask(REVISION)
    assert blobs.local_path(REVISION) is None
    blobs.remove(REVISION)
    (tmp_path / "source").write_bytes(b"x")
    blobs.put(REVISION, tmp_path / "source")
    blobs.remove(REVISION)
    assert blobs.local_path(REVISION) is None


@pytest.mark.parametrize("revision", ["", "../../etc/passwd", "AB" + "0" * 62, "0" * 63, "0" * 65])
def test_blob_names_are_revisions_only(tmp_path: Path, revision: str) -> None:
    with pytest.raises(InvalidArgumentError, match="revision"):
        DurableStore(str(tmp_path / "blobs")).path_of(revision)


def test_a_failed_put_leaves_nothing(tmp_path: Path) -> None:
    blobs = DurableStore(str(tmp_path / "blobs"))
    with pytest.raises(OSError, match="absent"):
        blobs.put(REVISION, tmp_path / "absent")
    assert [p for p in (tmp_path / "blobs").rglob("*") if p.is_file()] == []


def test_a_store_may_be_a_url(tmp_path: Path) -> None:
    blobs = DurableStore("memory://blobs")
    (tmp_path / "source").write_bytes(b"abc")
    blobs.put(REVISION, tmp_path / "source")
    assert b"".join(blobs.read(REVISION)) == b"abc"
    assert blobs.local_path(REVISION) is None
    with pytest.raises(InvalidArgumentError, match="store"):
        DurableStore("nonsense://x")
