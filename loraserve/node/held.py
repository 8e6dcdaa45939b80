"""One copy of one revision on this node."""

import asyncio
from typing import Any

from loraserve.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    LoraServeError,
    ResourceExhaustedError,
    UnavailableError,
)
from loraserve.logs import about
from loraserve.node.load_info import AdapterLoadInfo
from loraserve.node.pool.copies import HostCopy
from loraserve.node.requests import LiveRequest
from loraserve.placement.types import AdapterSpec
from loraserve.v1 import common_pb2
from loraserve.v1.common_pb2 import (
    RESIDENCY_STATE_DEVICE,
    RESIDENCY_STATE_DRAINING,
    RESIDENCY_STATE_FAILED,
    RESIDENCY_STATE_FETCHING,
    RESIDENCY_STATE_HOST,
)
from loraserve.wire_errors import to_detail

FETCHING = RESIDENCY_STATE_FETCHING
HOST = RESIDENCY_STATE_HOST
DEVICE = RESIDENCY_STATE_DEVICE
DRAINING = RESIDENCY_STATE_DRAINING
FAILED = RESIDENCY_STATE_FAILED

_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0


class HeldAdapter:
    """FETCHING until it is in the engine, then HOST (the engine itself decides what of it is in
    pages, which is told as DEVICE); DRAINING and gone, or FAILED. `engine_name`
    is another one for every load, so an old copy and a new one never meet in the engine."""

    def __init__(self, load: AdapterLoadInfo, serial: int, placed: bool, failures: int = 0) -> None:
        """`placed`: somebody wants it here whether or not it is used; it is never evicted."""
        self.load = load
        self.serial = serial
        self.placed = placed
        self.failures = failures
        self.engine_name = f"{self.spec.adapter}@{self.spec.revision}#{serial}"
        # In the host pool, from before the engine reads it until after.
        self.copy: HostCopy | None = None
        self.state: common_pb2.ResidencyState.ValueType = FETCHING
        self.error: LoraServeError | None = None
        self.retry_s = 0.0
        # The number of its last use, and the pool's age then, see pool/eviction.py.
        self.used = 0
        self.age = 0.0
        self.users: set[LiveRequest] = set()
        self.idle = asyncio.Event()
        self.idle.set()
        # Loading has ended, one way or the other.
        self.settled = asyncio.Event()
        # The engine is reading it: too late to cancel, it is unloaded afterwards instead.
        self.installing = False
        self.unloading = False
        self.loading: asyncio.Task[None] | None = None
        self.dropping: asyncio.Task[None] | None = None

    @property
    def spec(self) -> AdapterSpec:
        return self.load.spec

    @property
    def about(self) -> dict[str, Any]:
        """For `extra` of a log call."""
        return about(adapter=str(self.spec.adapter), revision=self.spec.revision)

    @property
    def idle_here(self) -> bool:
        """Serves, though nobody needs it at the moment and nobody has placed it."""
        return self.state == HOST and not self.users and not self.placed

    @property
    def leaving(self) -> bool:
        """Goes, and nobody uses it any more: its memory is as good as free."""
        return self.dropping is not None and not self.users

    def pin(self, user: LiveRequest) -> None:
        self.users.add(user)
        self.idle.clear()

    def unpin(self, user: LiveRequest) -> None:
        self.users.discard(user)
        if not self.users:
            self.idle.set()

    def fail(self, error: LoraServeError, now_s: float) -> None:
        self.state = FAILED
        self.error = error
        self.failures += 1
        wait_s = _FIRST_RETRY_S * 2.0 ** min(self.failures - 1, 10)
        self.retry_s = now_s + min(wait_s, _LAST_RETRY_S)
        self.settled.set()

    def to_wire(self, installed: bool) -> common_pb2.AdapterResidency:
        """`installed`: the engine has it in pages now."""
        adapter = self.spec.adapter
        message = common_pb2.AdapterResidency(
            adapter=common_pb2.AdapterId(
                tenant=adapter.tenant, base=adapter.base, name=adapter.name
            ),
            revision=self.spec.revision,
            state=DEVICE if installed and self.state == HOST else self.state,
            size_bytes=self.spec.size_bytes,
            active_requests=len(self.users),
        )
        if self.error is not None:
            message.error.CopyFrom(to_detail(self.error))
        return message


def refusal(error: LoraServeError) -> LoraServeError:
    """What a request is told whose adapter could not be loaded: the request itself is not wrong,
    and another node may well have the adapter unless its bytes are at fault."""
    if isinstance(error, ResourceExhaustedError):
        return error
    if isinstance(error, InvalidArgumentError | FailedPreconditionError):
        return FailedPreconditionError("adapter", f"cannot be loaded: {error}")
    return UnavailableError("adapter", f"could not be loaded here: {error}")
