"""What outlives the controller: the adapter registry, the placement and the epoch.

Membership, residency, demand and routes are not here: nodes report them again.
"""

import errno
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loraserve.errors import FailedPreconditionError, InvalidArgumentError
from loraserve.placement.types import AdapterId, AdapterSpec

SCHEMA_VERSION = 2

_SCHEMA = f"""
CREATE TABLE adapters (
    tenant TEXT NOT NULL, base TEXT NOT NULL, name TEXT NOT NULL,
    create_time_us INTEGER NOT NULL, update_time_us INTEGER NOT NULL,
    PRIMARY KEY (tenant, base, name)
) WITHOUT ROWID;
CREATE TABLE revisions (
    tenant TEXT NOT NULL, base TEXT NOT NULL, name TEXT NOT NULL,
    age INTEGER NOT NULL, revision TEXT NOT NULL,
    size_bytes INTEGER NOT NULL, max_rank INTEGER NOT NULL,
    PRIMARY KEY (tenant, base, name, age),
    FOREIGN KEY (tenant, base, name) REFERENCES adapters ON DELETE CASCADE
) WITHOUT ROWID;
CREATE INDEX revisions_by_revision ON revisions (revision);
CREATE TABLE placement (
    tenant TEXT NOT NULL, base TEXT NOT NULL, name TEXT NOT NULL, node_id TEXT NOT NULL,
    share REAL NOT NULL DEFAULT 1,
    PRIMARY KEY (tenant, base, name, node_id)
) WITHOUT ROWID;
CREATE TABLE epoch (epoch INTEGER NOT NULL);
INSERT INTO epoch VALUES (0);
PRAGMA user_version = {SCHEMA_VERSION};
"""
# From each older version to the next.
_UPGRADES = {
    1: (
        "ALTER TABLE placement ADD COLUMN share REAL NOT NULL DEFAULT 1",
        "PRAGMA user_version = 2",
    )
}


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter of the registry. `history`: its revisions, newest first, never empty. Times are
    microseconds since 1970, UTC."""

    history: tuple[AdapterSpec, ...]
    create_time_us: int
    update_time_us: int

    @property
    def adapter(self) -> AdapterId:
        return self.history[0].adapter


# Of one adapter, by node id: which part of its requests the node is to get.
Placed = Mapping[str, float]


class StateStore(Protocol):
    """Every method is durable when it returns, or raises OSError and changed nothing. Methods may
    be called from any thread."""

    def begin_epoch(self) -> int:
        """A number higher than any that this returned before."""
        ...

    def adapters(self) -> list[AdapterRecord]:
        """In the order of AdapterId."""
        ...

    def put_adapter(self, record: AdapterRecord) -> None:
        """Adds or replaces."""
        ...

    def remove_adapter(self, adapter: AdapterId) -> None:
        """Nothing happens where it is not there."""
        ...

    def revision_in_use(self, revision: str) -> bool:
        """Whether any adapter's history has it."""
        ...

    def placement(self) -> dict[AdapterId, Placed]:
        """As saved last."""
        ...

    def save_placement(
        self, placed: Mapping[AdapterId, Placed], removed: Iterable[AdapterId] = ()
    ) -> None:
        """Replaces what was saved for these adapters; others keep theirs."""
        ...

    def close(self) -> None: ...


def _key(adapter: AdapterId) -> tuple[str, str, str]:
    return (adapter.tenant, adapter.base, adapter.name)


class SqliteStore:
    """A StateStore in one SQLite file. One connection behind a lock: writes are few and each
    waits for the disk (synchronous=FULL)."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file. Raises InvalidArgumentError (not ours, cannot be opened) and
        FailedPreconditionError (in use, or of a newer version)."""
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(
                path, timeout=1.0, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise InvalidArgumentError("data-dir", f"{path}: {error}") from None
        try:
            self._open(path)
        except BaseException:
            self._connection.close()
            raise

    def _open(self, path: Path) -> None:
        run = self._connection.execute
        try:
            # One process only: two controllers would not see each other's changes.
            run("PRAGMA locking_mode = EXCLUSIVE")
            run("PRAGMA journal_mode = WAL")
            run("PRAGMA synchronous = FULL")
            run("PRAGMA foreign_keys = ON")
            run("BEGIN IMMEDIATE")
            version = run("PRAGMA user_version").fetchone()[0]
            tables = run("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if version == 0 and tables == 0:
                for statement in _SCHEMA.split(";\n"):
                    run(statement)
            while (version := run("PRAGMA user_version").fetchone()[0]) in _UPGRADES:
                for statement in _UPGRADES[version]:
                    run(statement)
            run("COMMIT")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise FailedPreconditionError(
                    "data-dir", f"{path} is in use by another controller"
                ) from None
            raise InvalidArgumentError("data-dir", f"{path}: {error}") from None
        except sqlite3.DatabaseError as error:
            raise InvalidArgumentError("data-dir", f"{path}: {error}") from None
        version = run("PRAGMA user_version").fetchone()[0]
        if version != SCHEMA_VERSION:
            raise FailedPreconditionError(
                "data-dir", f"{path} has schema {version}, this version knows {SCHEMA_VERSION}"
            )

    def _write(self, statements: Sequence[tuple[str, tuple[object, ...]]]) -> None:
        """All or nothing."""
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                for sql, values in statements:
                    self._connection.execute(sql, values)
                self._connection.execute("COMMIT")
            except BaseException as error:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    code = errno.ENOSPC if "full" in str(error) else errno.EIO
                    raise OSError(code, f"state store: {error}") from error
                raise

    def _read(self, sql: str, values: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
        with self._lock:
            return self._connection.execute(sql, values).fetchall()

    def begin_epoch(self) -> int:
        self._write([("UPDATE epoch SET epoch = epoch + 1", ())])
        return int(str(self._read("SELECT epoch FROM epoch")[0][0]))

    def adapters(self) -> list[AdapterRecord]:
        rows: list[Any] = self._read(
            "SELECT tenant, base, name, create_time_us, update_time_us, "
            "revision, size_bytes, max_rank "
            "FROM adapters JOIN revisions USING (tenant, base, name) "
            "ORDER BY tenant, base, name, age"
        )
        # A start waits for this: tenants and bases, which are few, are one string each, so that
        # what is made of them is compared quickly.
        one: dict[str, str] = {}
        same = one.setdefault
        histories: dict[AdapterId, list[AdapterSpec]] = {}
        times: list[tuple[int, int]] = []
        last: AdapterId | None = None
        for tenant, base, name, created, updated, *revision in rows:
            adapter = AdapterId(same(tenant, tenant), same(base, base), name)
            if adapter != last:
                last, histories[adapter] = adapter, []
                times.append((created, updated))
            histories[last].append(AdapterSpec(last, *revision))
        return [
            AdapterRecord(tuple(history), created, updated)
            for history, (created, updated) in zip(histories.values(), times, strict=True)
        ]

    def put_adapter(self, record: AdapterRecord) -> None:
        key = _key(record.adapter)
        times = (record.create_time_us, record.update_time_us)
        self._write(
            [
                ("DELETE FROM adapters WHERE (tenant, base, name) = (?, ?, ?)", key),
                ("INSERT INTO adapters VALUES (?, ?, ?, ?, ?)", (*key, *times)),
            ]
            + [
                (
                    "INSERT INTO revisions VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (*key, age, spec.revision, spec.size_bytes, spec.max_rank),
                )
                for age, spec in enumerate(record.history)
            ]
        )

    def remove_adapter(self, adapter: AdapterId) -> None:
        self._write(
            [("DELETE FROM adapters WHERE (tenant, base, name) = (?, ?, ?)", _key(adapter))]
        )

    def revision_in_use(self, revision: str) -> bool:
        return bool(self._read("SELECT 1 FROM revisions WHERE revision = ? LIMIT 1", (revision,)))

    def placement(self) -> dict[AdapterId, Placed]:
        placed: dict[AdapterId, dict[str, float]] = {}
        rows: list[Any] = self._read(
            "SELECT tenant, base, name, node_id, share FROM placement "
            "ORDER BY tenant, base, name, node_id"
        )
        one: dict[str, str] = {}
        same = one.setdefault
        for tenant, base, name, node, share in rows:
            adapter = AdapterId(same(tenant, tenant), same(base, base), name)
            placed.setdefault(adapter, {})[same(node, node)] = share
        return dict(placed)

    def save_placement(
        self, placed: Mapping[AdapterId, Placed], removed: Iterable[AdapterId] = ()
    ) -> None:
        gone = "DELETE FROM placement WHERE (tenant, base, name) = (?, ?, ?)"
        self._write(
            [(gone, _key(adapter)) for adapter in (*placed, *removed)]
            + [
                ("INSERT INTO placement VALUES (?, ?, ?, ?, ?)", (*_key(adapter), node, share))
                for adapter, nodes in placed.items()
                for node, share in nodes.items()
            ]
        )

    def close(self) -> None:
        with self._lock:
            self._connection.close()
