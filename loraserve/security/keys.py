"""Bearer keys. The key file holds one JSON object per line: name, tenant, role and the SHA-256 of
the key. Keys are 256 random bits, so a plain hash of one cannot be searched."""

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loraserve.errors import InvalidArgumentError
from loraserve.named_files import named, wrong
from loraserve.security.identity import Identity, Role, check_name

PREFIX = "lsk_"
KEY_BYTES = 32
MAX_KEY_CHARACTERS = 256
MAX_FILE_BYTES = 16 << 20
# Hex digits of the hash that pick the candidates; the rest is compared in constant time.
_BUCKET = 8


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _parse_line(line: str) -> tuple[str, Identity]:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError("entry", f"not JSON: {error}") from None
    wanted = {"name", "tenant", "role", "sha256"}
    if not isinstance(entry, dict) or set(entry) != wanted:
        raise InvalidArgumentError("entry", f"needs exactly {', '.join(sorted(wanted))}")
    if not all(isinstance(value, str) for value in entry.values()):
        raise InvalidArgumentError("entry", "every value is a string")
    digest: str = entry["sha256"]
    if len(digest) != 64 or any(c not in "0123456789abcdef" for c in digest):
        raise InvalidArgumentError("sha256", "is not 64 lower-case hexadecimal digits")
    if entry["role"] not in {role.value for role in Role}:
        raise InvalidArgumentError("role", f"{entry['role']!r}: user, admin or node")
    return digest, Identity(
        check_name("name", entry["name"]),
        check_name("tenant", entry["tenant"]),
        frozenset({Role(entry["role"])}),
    )


class KeyRing:
    """The keys that a server accepts. Immutable: a changed file is read at the next start."""

    def __init__(self, entries: Iterable[tuple[str, Identity]]) -> None:
        """`entries`: hexadecimal SHA-256 of a key, and whose it is."""
        self._buckets: dict[str, list[tuple[str, Identity]]] = {}
        self.names: set[str] = set()
        for digest, identity in entries:
            self._buckets.setdefault(digest[:_BUCKET], []).append((digest, identity))
            self.names.add(identity.name)

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def load(cls, path: Path) -> "KeyRing":
        """Reads a key file. Raises InvalidArgumentError that names the file and line."""
        with named("keys", path):
            if path.stat().st_size > MAX_FILE_BYTES:
                raise wrong("keys", path, f"over {MAX_FILE_BYTES} bytes")
            lines = path.read_text("utf-8").splitlines()
        entries = []
        for number, line in enumerate(lines, 1):
            try:
                entries += [_parse_line(line)] if line.strip() else []
            except InvalidArgumentError as error:
                raise wrong("keys", path, f"line {number}: {error}") from None
        names = [identity.name for _, identity in entries]
        if len(set(names)) != len(names):
            raise wrong("keys", path, "two keys of one name")
        if not entries:
            raise wrong("keys", path, "no key in it, so nobody could call")
        return cls(entries)

    def identify(self, key: str) -> Identity | None:
        """Whose key this is; None where nobody's."""
        if len(key) > MAX_KEY_CHARACTERS:
            return None
        digest = _digest(key)
        found = None
        for candidate, identity in self._buckets.get(digest[:_BUCKET], ()):
            if hmac.compare_digest(candidate, digest):
                found = identity
        return found


def _ends_its_line(path: Path) -> bool:
    """Whether more can be appended as it is; an editor may have left out the last newline."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")


def check_key(key: str) -> None:
    """Whether a key that a person made may be one. Raises InvalidArgumentError."""
    if not 8 <= len(key) <= MAX_KEY_CHARACTERS or not re.fullmatch(r"[!-~]+", key):
        raise InvalidArgumentError(
            "key", f"needs 8 to {MAX_KEY_CHARACTERS} characters of ASCII, without spaces"
        )


def create_key(path: Path, name: str, tenant: str, role: Role, key: str | None = None) -> str:
    """Makes a key, appends its hash to the key file (made with mode 0600) and returns the key.

    `key`: one that the caller has made; a hash of one that can be guessed can be searched.

    The key is stored nowhere: who calls must show or keep it.
    Raises InvalidArgumentError (bad name, name taken, bad key) and OSError.
    """
    check_name("name", name)
    check_name("tenant", tenant)
    if path.exists() and path.stat().st_size and name in KeyRing.load(path).names:
        raise InvalidArgumentError("name", f"{name!r} has a key in {path} already")
    if key is None:
        key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    else:
        check_key(key)
    entry = {"name": name, "tenant": tenant, "role": role.value, "sha256": _digest(key)}
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "a", encoding="utf-8") as file:
        file.write(("" if _ends_its_line(path) else "\n") + json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return key
