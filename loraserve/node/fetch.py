"""Fetching an adapter: a header that hashes to the revision, then data from the first source whose
every chunk agrees with it."""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from loraserve.background import in_background
from loraserve.checkpoint.packed_header import (
    MAX_HEADER_BYTES,
    PackedHeader,
    Verification,
    parse_header,
)
from loraserve.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    InvalidCheckpointError,
    LoraServeError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from loraserve.node.load_info import AdapterLoadInfo
from loraserve.node.pool.checked_writer import CheckedWriter
from loraserve.node.pool.disk_cache import DiskCache
from loraserve.node.pool.slots import SlotWriter
from loraserve.node.source_times import SourceTimes
from loraserve.node.sources import AdapterSource, HeaderSource, LastingSource

_log = logging.getLogger(__name__)

MIN_FETCH_BYTES_PER_S = 4 << 20
# A source has this long before its bandwidth counts.
FETCH_GRACE_S = 2.0
# Holders that are asked for one adapter before the store is.
MAX_PEERS_ASKED = 2
_KEPT_HEADER_BYTES = 32 << 20

T = TypeVar("T")
FETCHED, MISSING, CORRUPT, FAILED = "fetched", "missing", "corrupt", "failed"


@dataclass(frozen=True)
class SourceResult:
    """How one attempt ended: FETCHED, MISSING (does not have it), CORRUPT or FAILED."""

    source: str
    outcome: str
    seconds: float
    size_bytes: int


@dataclass(frozen=True)
class AdapterStart:
    """A checked header, and the bytes that came after it with the same answer."""

    header: PackedHeader
    raw: bytes
    """Header first."""
    source: str


class AdapterFetch:
    """Asks sources in order, each with a deadline of its own. Event loop only."""

    def __init__(
        self,
        lasting: Sequence[LastingSource],
        *,
        peers: AdapterSource | None = None,
        disk: DiskCache | None = None,
        max_bytes: int,
        verify: Verification = "xxh3",
        min_bytes_per_s: float = MIN_FETCH_BYTES_PER_S,
        on_result: Callable[[SourceResult], None] = lambda result: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Data are asked of `peers`, for one holder at a time (it reads from the first of
        `load.peers`), then of `disk` and of `lasting`. `max_bytes` bounds an adapter. A source is
        given up after FETCH_GRACE_S and the time its bytes take at `min_bytes_per_s`. `on_result`
        hears of every attempt to read data, and of headers that were wrong or did not come."""
        self._lasting = tuple(lasting)
        self._peers = peers
        self._disk = disk
        self._max_bytes = max_bytes
        self._verify: Verification = verify
        self._min_bytes_per_s = min_bytes_per_s
        self._on_result = on_result
        self._clock = clock
        self._known: OrderedDict[str, bytes] = OrderedDict()
        self._known_bytes = 0
        self.times = SourceTimes()

    @property
    def names(self) -> list[str]:
        """Of the sources, in the order in which they are asked."""
        return [s.name for s in (self._peers, self._disk, *self._lasting) if s is not None]

    def cost_s(self, load: AdapterLoadInfo) -> float:
        """What it takes to get the adapter back, from the quickest source it may be had from."""
        size = load.spec.size_bytes
        names = [source.name for source in self._lasting]
        if self._peers is not None and load.peers:
            names.append(self._peers.name)
        if self._disk is not None and self._disk.has(load.spec.revision):
            names.append(self._disk.name)
        return min((self.times.estimate(name, size) for name in names), default=0.0)

    def _deadline_s(self, size_bytes: int) -> float:
        return FETCH_GRACE_S + size_bytes / self._min_bytes_per_s

    # The header

    async def start(self, load: AdapterLoadInfo) -> AdapterStart:
        """The header of the revision. Raises the error of the last source that has it."""
        spec = load.spec
        kept = self._known.get(spec.revision)
        if kept is not None:
            self._known.move_to_end(spec.revision)
            return self._checked(load, kept, "memory")
        failure: LoraServeError | None = None
        headers: Sequence[HeaderSource] = self._lasting
        if self._disk is not None and self._disk.has(spec.revision):
            headers = (self._disk, *self._lasting)
        for source in headers:
            try:
                raw = await self._in_time(
                    source.name, source.read_start(load), self._deadline_s(MAX_HEADER_BYTES)
                )
                start = self._checked(load, raw, source.name)
                self._keep(spec.revision, raw[: start.header.header_bytes])
                return start
            except Exception as error:
                failure = self._heard(load, source.name, error, failure)
                outcome = _outcome(error)
                if outcome != MISSING:
                    self._on_result(SourceResult(source.name, outcome, 0.0, 0))
        raise failure or NotFoundError("adapter", "this node has no source of adapters")

    def _checked(self, load: AdapterLoadInfo, raw: bytes, source: str) -> AdapterStart:
        """What was asked for is what came: a source is not trusted."""
        spec = load.spec
        header = parse_header(raw, revision=spec.revision)
        if spec.size_bytes and header.size_bytes != spec.size_bytes:
            raise InvalidCheckpointError(
                "size_bytes", f"{header.size_bytes}, announced were {spec.size_bytes}"
            )
        if spec.max_rank and header.max_rank != spec.max_rank:
            raise FailedPreconditionError(
                "max_rank", f"{header.max_rank}, announced was {spec.max_rank}"
            )
        if header.size_bytes > self._max_bytes:
            raise ResourceExhaustedError(
                "adapter", f"{header.size_bytes} bytes, over the {self._max_bytes} that fit here"
            )
        return AdapterStart(header, raw, source)

    def _keep(self, revision: str, raw: bytes) -> None:
        self._known[revision] = raw
        self._known_bytes += len(raw)
        while self._known_bytes > _KEPT_HEADER_BYTES:
            self._known_bytes -= len(self._known.popitem(last=False)[1])

    # The data

    async def fill(self, load: AdapterLoadInfo, start: AdapterStart, slot: SlotWriter) -> str:
        """All of the adapter into `slot`, and every byte of it checked; the name of the source that
        gave it. Raises the error of the last source that has the revision."""
        header = start.header
        failure: LoraServeError | None = None
        for source, wanted in self._attempts(load, start):
            writer = CheckedWriter(slot, header, self._verify)
            begin, outcome = self._clock(), FAILED
            try:
                slot.view[: header.header_bytes] = start.raw[: header.header_bytes]
                reading = source.read_into(wanted, header, writer)
                await self._in_time(source.name, reading, self._deadline_s(header.data_bytes))
                await in_background(writer.finish)
                outcome = FETCHED
                self.times.measured(source.name, self._clock() - begin, header.size_bytes)
                return source.name
            except Exception as error:
                failure = self._heard(load, source.name, error, failure)
                outcome = _outcome(error)
            finally:
                writer.revoke()
                seconds = self._clock() - begin
                self._on_result(SourceResult(source.name, outcome, seconds, header.size_bytes))
        raise failure or NotFoundError("adapter", "this node has no source of adapters")

    def _attempts(
        self, load: AdapterLoadInfo, start: AdapterStart
    ) -> Iterator[tuple[AdapterSource, AdapterLoadInfo]]:
        arrived = len(start.raw) >= start.header.size_bytes
        if arrived:
            yield _Arrived(start), load
        if self._peers is not None:
            for peer in load.peers[:MAX_PEERS_ASKED]:
                yield self._peers, replace(load, peers=(peer,))
        if self._disk is not None and self._disk.has(load.spec.revision):
            yield self._disk, load
        for source in self._lasting:
            if not (arrived and source.name == start.source):
                yield source, load

    async def _in_time(self, name: str, reading: Coroutine[Any, Any, T], limit_s: float) -> T:
        try:
            return await asyncio.wait_for(reading, limit_s)
        except asyncio.TimeoutError:
            raise UnavailableError(name, f"took over {limit_s:.1f} s") from None

    def _heard(
        self, load: AdapterLoadInfo, name: str, error: Exception, failure: LoraServeError | None
    ) -> LoraServeError:
        """The error to raise in the end: what a source with the revision said counts more than that
        another one lacks it."""
        if isinstance(error, NotFoundError):
            return failure or error
        adapter = load.spec.adapter
        if isinstance(error, LoraServeError):
            _log.warning("adapter %s: %s cannot give it: %s", adapter, name, error)
            return error
        # Of a file system's driver; the next source may do better.
        _log.error("adapter %s: %s failed", adapter, name, exc_info=error)
        return UnavailableError(name, "failed; the node's log says why")


def _outcome(error: Exception) -> str:
    if isinstance(error, NotFoundError):
        return MISSING
    return CORRUPT if isinstance(error, InvalidArgumentError) else FAILED


class _Arrived:
    """What came with the header was all there is."""

    def __init__(self, start: AdapterStart) -> None:
        self.name = start.source
        self._start = start

    async def read_into(
        self, load: AdapterLoadInfo, header: PackedHeader, writer: CheckedWriter
    ) -> None:
        writer.write(self._start.raw[header.header_bytes :])
