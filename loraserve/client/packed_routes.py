"""The routes of a table as bytes: 100,000 adapters in less than 10 MB, where objects would take ten
times that. Immutable; a changed table shares all shards but those of the adapters that changed.

A shard is one string of records, in no order. A record:

    u16 length of the record, u8 length of the name, name, tenant, base, revision, reason,
    u8 revisions; of each: revision, max_rank, size_bytes, u8 holders;
    of each holder: node, weight, state

Tenants, bases and node ids are numbers of words that all versions of a table share; numbers are
LEB128. A revision is 2 where it is that of the adapter, 1 and the 32 bytes of its hexadecimal
digits, or 0 and a text; a text is its length and UTF-8.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping

from loraserve.client.routes import AdapterRoute, Holder, RevisionRoute
from loraserve.placement.types import AdapterId

SHARDS = 4096
# Routes of names that were looked up last stay unpacked.
CACHED_NAMES = 512
MAX_RECORD = 0xFFFF

_TEXT, _DIGITS, _SAME = 0, 1, 2


class _Words:
    """Strings that come again and again, by number. Only ever grows, so that every version of a
    table may read it; a table that is sent whole begins with a new one."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        found = self._numbers.get(text)
        if found is None:
            found = self._numbers[text] = len(self.texts)
            self.texts.append(text)
        return found


class PackedRoutes(Mapping[AdapterId, AdapterRoute]):
    """In no order that means anything."""

    __slots__ = ("_cache", "_count", "_shards", "_words")

    def __init__(self, routes: Iterable[AdapterRoute] = ()) -> None:
        self._shards: tuple[bytes, ...] = (b"",) * SHARDS
        self._count = 0
        self._words = _Words()
        # Shared by all versions; right where the shard is still the one it was read from.
        self._cache: dict[str, tuple[bytes, list[AdapterRoute]]] = {}
        made = self.changed(routes)
        self._shards, self._count = made._shards, made._count

    def changed(
        self, routes: Iterable[AdapterRoute], removed: Iterable[AdapterId] = ()
    ) -> "PackedRoutes":
        """A table with `removed` taken out, then `routes` put in."""
        shards, count = list(self._shards), self._count
        for adapter in removed:
            at = _shard(adapter.name)
            begin, end = self._find(shards[at], adapter)
            count -= end > begin
            shards[at] = shards[at][:begin] + shards[at][end:]
        for route in routes:
            at = _shard(route.adapter.name)
            begin, end = self._find(shards[at], route.adapter)
            count += end == begin
            shards[at] = shards[at][:begin] + self._pack(route) + shards[at][end:]
        made = PackedRoutes.__new__(PackedRoutes)
        made._shards, made._count = tuple(shards), count
        made._words, made._cache = self._words, self._cache
        return made

    def named(self, name: str) -> list[AdapterRoute]:
        """The routes of all adapters of the name."""
        shard = self._shards[_shard(name)]
        known = self._cache.get(name)
        if known is not None and known[0] is shard:
            return known[1]
        wanted = _name(name)
        found = [
            self._unpack(shard, begin)
            for begin in (_records(shard) if wanted in shard else ())
            if shard.startswith(wanted, begin + 2)
        ]
        if len(self._cache) >= CACHED_NAMES:
            self._cache.clear()
        self._cache[name] = shard, found
        return found

    # Mapping

    def __getitem__(self, adapter: AdapterId) -> AdapterRoute:
        for route in self.named(adapter.name):
            if route.adapter == adapter:
                return route
        raise KeyError(adapter)

    def __contains__(self, adapter: object) -> bool:
        if not isinstance(adapter, AdapterId):
            return False
        begin, end = self._find(self._shards[_shard(adapter.name)], adapter)
        return end > begin

    def __iter__(self) -> Iterator[AdapterId]:
        for shard in self._shards:
            for begin in _records(shard):
                yield self._unpack(shard, begin).adapter

    def __len__(self) -> int:
        return self._count

    # Records

    def _find(self, shard: bytes, adapter: AdapterId) -> tuple[int, int]:
        """Begin and end of the adapter's record; both the end of the shard where it has none."""
        wanted = _name(adapter.name)
        if wanted in shard:
            wanted += _number(self._words.number(adapter.tenant))
            wanted += _number(self._words.number(adapter.base))
            for begin in _records(shard):
                if shard.startswith(wanted, begin + 2):
                    return begin, begin + _length(shard, begin)
        return len(shard), len(shard)

    def _pack(self, route: AdapterRoute) -> bytes:
        number = self._words.number
        out = bytearray(_name(route.adapter.name))
        out += _number(number(route.adapter.tenant)) + _number(number(route.adapter.base))
        out += _revision(route.revision, None) + _text(route.unrouted_reason)
        out.append(len(route.revisions))
        for revision in route.revisions:
            out += _revision(revision.revision, route.revision)
            out += _number(revision.max_rank) + _number(revision.size_bytes)
            out += _number(len(revision.holders))
            for holder in revision.holders:
                out += _number(number(holder.node_id)) + _number(holder.weight)
                out += _number(holder.state)
        if len(out) + 2 > MAX_RECORD:
            raise ValueError(f"the route of {route.adapter} takes {len(out)} bytes")
        return (len(out) + 2).to_bytes(2, "little") + bytes(out)

    def _unpack(self, shard: bytes, begin: int) -> AdapterRoute:
        read = _Reader(shard, begin + 2)
        texts = self._words.texts
        name = read.take(read.byte()).decode()
        adapter = AdapterId(texts[read.number()], texts[read.number()], name)
        revision, reason = read.revision(""), read.text()
        revisions = []
        for _ in range(read.byte()):
            of, rank, size = read.revision(revision), read.number(), read.number()
            holders = tuple(
                Holder(texts[read.number()], read.number(), read.number())
                for _ in range(read.number())
            )
            revisions.append(RevisionRoute(of, holders, rank, size))
        return AdapterRoute(adapter, revision, tuple(revisions), reason)


class _Reader:
    """Reads what is at `at` and goes on behind it."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def take(self, count: int) -> bytes:
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    def text(self) -> str:
        return self.take(self.number()).decode()

    def revision(self, same: str) -> str:
        kind = self.byte()
        if kind == _SAME:
            return same
        return self.take(32).hex() if kind == _DIGITS else self.text()


def _shard(name: str) -> int:
    return zlib.crc32(name.encode()) % SHARDS


def _length(shard: bytes, begin: int) -> int:
    return shard[begin] | shard[begin + 1] << 8


def _records(shard: bytes) -> Iterator[int]:
    """Where each begins."""
    begin = 0
    while begin < len(shard):
        yield begin
        begin += _length(shard, begin)


def _name(name: str) -> bytes:
    encoded = name.encode()
    return bytes((len(encoded),)) + encoded


def _number(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return _number(len(encoded)) + encoded


def _revision(revision: str, same: str | None) -> bytes:
    if revision == same:
        return bytes((_SAME,))
    if len(revision) == 64 and not revision.strip("0123456789abcdef"):
        return bytes((_DIGITS,)) + bytes.fromhex(revision)
    return bytes((_TEXT,)) + _text(revision)
