"""The adapters an engine has loaded, by name. Thread-safe."""

import contextlib
import itertools
import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from loraserve import _engine
from loraserve.checkpoint.base_names import same_base
from loraserve.checkpoint.packed_adapter import (
    PackedAdapter,
    load_adapter_source,
    pack,
    parse_packed,
)
from loraserve.checkpoint.peft_adapter import read_arrays
from loraserve.engine.assembly import typed_error
from loraserve.engine.config import EngineConfig
from loraserve.engine.loading import adapter_modules, installed_dtype
from loraserve.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)

_log = logging.getLogger(__name__)

AdapterInput: TypeAlias = str | Path | PackedAdapter | Mapping[str, Any]


@dataclass(frozen=True)
class LoadedAdapter:
    """One load of an adapter. A new revision under the same name is another load."""

    name: str
    engine_id: int
    revision: str
    max_rank: int
    size_bytes: int
    """Of the packed adapter in host memory."""


def read_adapter(source: AdapterInput, config: Mapping[str, Any] | None) -> PackedAdapter:
    """A packed adapter from a PEFT directory, a packed file, arrays with a PEFT config, or itself.

    Raises InvalidCheckpointError or UnsupportedError, naming the field.
    """
    if isinstance(source, PackedAdapter):
        return source
    if isinstance(source, str | Path):
        if config is not None:
            raise InvalidArgumentError("config", "goes with arrays, not with a path")
        return load_adapter_source(Path(source))
    if config is None:
        raise InvalidArgumentError("config", "arrays need their PEFT config")
    return parse_packed(pack(read_arrays(source, config)))


class AdapterTable:
    """Names to loads. The engine keeps an unloaded adapter until its last request has ended.

    Changes wait for the engine's current step, so they have a lock of their own: `_lock`, which
    every request takes, is held for moments only.
    """

    def __init__(self, engine: _engine.Engine, config: EngineConfig, base_digest: str) -> None:
        self._engine = engine
        self._config = config
        self._base_digest = base_digest
        self._changes = threading.Lock()  # taken before _lock
        self._lock = threading.Lock()
        self._loads: dict[str, LoadedAdapter] = {}
        self._draining: dict[int, threading.Event] = {}
        # By name, what `unload` was told to wait for and is not gone yet.
        self._leaving: dict[str, threading.Event] = {}
        self._installed: set[int] = set()
        self._ids = itertools.count(1)

    def _check_base(self, adapter: PackedAdapter) -> None:
        digest, name = adapter.base_digest, self._config.base_name
        if digest is not None and digest != self._base_digest:
            raise FailedPreconditionError(
                "base",
                f"the adapter was packed for base digest {digest}, this engine has "
                f"{self._base_digest}",
            )
        # Of the same weights under another name, the weights count.
        if digest is None and name and adapter.base_name and not same_base(adapter.base_name, name):
            raise FailedPreconditionError(
                "base", f"the adapter was trained on {adapter.base_name!r}, this is {name!r}"
            )

    def load(
        self, name: str, adapter: PackedAdapter, *, replace: bool, allow_base_mismatch: bool
    ) -> LoadedAdapter:
        """The load; the former one of this name, if any, drains in the background."""
        if not name:
            raise InvalidArgumentError("adapter", "needs a name")
        if not allow_base_mismatch:
            self._check_base(adapter)
        with self._changes:
            known = self._loads.get(name)
            if known is not None and known.revision == adapter.revision:
                return known
            if known is not None and not replace:
                raise AlreadyExistsError("adapter", f"{name!r} is loaded in another revision")
            engine_id = next(self._ids)
            try:
                self._engine.add_adapter(engine_id, adapter_modules(adapter))
            except _engine.StatusError as error:
                raise typed_error(*error.args) from None
            load = LoadedAdapter(
                name, engine_id, adapter.revision, adapter.max_rank, adapter.size_bytes
            )
            with self._lock:
                self._loads[name] = load
                self._leaving.pop(name, None)  # the name means the new one
            self._log_dtype(name, adapter)
            if known is not None:
                self._drain(known)
            return load

    def _log_dtype(self, name: str, adapter: PackedAdapter) -> None:
        stored = {module.dtype for module in adapter.modules}
        kept = installed_dtype(stored, self._config.adapter_dtype, self._config.device)
        if stored != {kept}:
            _log.info(
                "adapter %s is stored as %s and installed as %s",
                name,
                "+".join(sorted(stored)),
                kept,
            )

    def _drain(self, load: LoadedAdapter) -> threading.Event:
        drained = threading.Event()
        with self._lock:
            self._draining[load.engine_id] = drained
        try:
            self._engine.remove_adapter(load.engine_id)
        except _engine.StatusError as error:  # the engine has stopped
            self.removed([load.engine_id])
            raise typed_error(*error.args) from None
        return drained

    def unload(self, name: str, timeout_s: float | None) -> None:
        """New requests are refused at once; returns when the last running one has ended. After
        DeadlineExceededError it can be called again, to wait on."""
        with self._changes:
            with self._lock:
                load = self._loads.pop(name, None)
                drained = self._leaving.get(name) if load is None else None
            if load is not None:
                drained = self._drain(load)
        if drained is None:
            raise NotFoundError("adapter", f"{name!r} is not loaded")
        gone = drained.wait(timeout_s)
        with self._lock:
            if not gone:
                self._leaving[name] = drained
            elif self._leaving.get(name) is drained:
                del self._leaving[name]
        if not gone:
            raise DeadlineExceededError(
                "timeout_s", f"{name!r} is still in use; it goes on draining"
            )

    def prefetch(self, name: str) -> None:
        """A hint: the engine may bring it into pages."""
        with self.using(name) as load:
            if load is not None:
                self._engine.prefetch(load.engine_id)

    def installs(self, changes: list[tuple[int, bool]]) -> None:
        """The engine wrote adapters into pages, or took them out."""
        with self._lock:
            for engine_id, installed in changes:
                (self._installed.add if installed else self._installed.discard)(engine_id)

    def installed(self) -> frozenset[str]:
        """Names whose current load is in pages."""
        with self._lock:
            return frozenset(
                load.name for load in self._loads.values() if load.engine_id in self._installed
            )

    def removed(self, engine_ids: list[int]) -> None:
        """The engine reads these no more."""
        with self._lock:
            for engine_id in engine_ids:
                self._installed.discard(engine_id)
                drained = self._draining.pop(engine_id, None)
                if drained is not None:
                    drained.set()

    def closed(self) -> None:
        """The engine has stopped: nothing is in use any more."""
        with self._lock:
            draining = list(self._draining)
        self.removed(draining)

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[LoadedAdapter | None]:
        """The load to submit a request with, inside the block: so the engine gets the request
        before it is told to let this load go. None is the base model. Raises NotFoundError."""
        if name is None:
            yield None
            return
        with self._lock:
            load = self._loads.get(name)
            if load is None:
                raise NotFoundError("adapter", f"{name!r} is not loaded")
            yield load

    def loads(self) -> list[LoadedAdapter]:
        """By name."""
        with self._lock:
            return sorted(self._loads.values(), key=lambda load: load.name)
