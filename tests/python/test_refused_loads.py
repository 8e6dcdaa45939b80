"""A load that can never succeed is told as such, once no node is left that might do better."""

from dataclasses import dataclass, field

import pytest

from loraserve.controller.convert import heartbeat_from_wire
from loraserve.controller.events import AdapterAdded, Copy, Heartbeat, NodeRecord, NodeRegistered
from loraserve.controller.residency import Residency
from loraserve.controller.settings import Settings
from loraserve.controller.state import ControllerState
from loraserve.errors import (
    REFUSED,
    FailedPreconditionError,
    InvalidCheckpointError,
    LoraServeError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
    UnsupportedError,
)
from loraserve.placement.policies import policy_named
from loraserve.placement.types import AdapterId, AdapterSpec
from loraserve.v1 import common_pb2, controller_pb2
from loraserve.wire_errors import to_detail

SQL = AdapterId("acme", "base", "sql")
REVISION = "a" * 64


@dataclass
class Played:
    """A controller's core; nodes say what a test has them say."""

    state: ControllerState = field(
        default_factory=lambda: ControllerState(Settings(), policy_named("rank_aware"), 1)
    )
    generation: int = 0

    def node(self, name: str) -> None:
        self.state.step(NodeRegistered(NodeRecord(name, 1, f"{name}:1", "base", "", 1000)))
        self.beat(name)

    def beat(self, name: str, *copies: Copy, draining: bool = False) -> None:
        self.generation += 1
        self.state.step(Heartbeat(name, 1, self.generation, copies, draining=draining))

    @property
    def why(self) -> str:
        return self.state.routes.adapters[SQL].unrouted_reason


def failed(refused: bool) -> Copy:
    return Copy(SQL, REVISION, Residency.FAILED, "it is too wide", 10, refused)


def test_the_only_node_refuses() -> None:
    played = Played()
    played.node("n1")
    played.state.step(AdapterAdded(AdapterSpec(SQL, REVISION, 10, 8)))
    assert not played.why.startswith(REFUSED)
    played.beat("n1", failed(refused=True))
    assert played.why == "refused: loading failed on n1: it is too wide"


def test_a_failure_that_may_pass_is_no_refusal() -> None:
    played = Played()
    played.node("n1")
    played.state.step(AdapterAdded(AdapterSpec(SQL, REVISION, 10, 8)))
    played.beat("n1", failed(refused=False))
    assert played.why == "loading failed on n1: it is too wide"


def test_another_node_may_do_better() -> None:
    played = Played()
    for name in ("n1", "n2"):
        played.node(name)
    played.state.step(AdapterAdded(AdapterSpec(SQL, REVISION, 10, 8)))
    played.beat("n1", failed(refused=True))
    assert played.why == "loading failed on n1: it is too wide"
    played.beat("n2", failed(refused=True))
    assert played.why.startswith(REFUSED)


def test_one_that_drains_is_not_waited_for() -> None:
    played = Played()
    for name in ("n1", "n2"):
        played.node(name)
    played.beat("n2", draining=True)
    played.state.step(AdapterAdded(AdapterSpec(SQL, REVISION, 10, 8)))
    played.beat("n1", failed(refused=True))
    assert played.why.startswith(REFUSED)


def test_a_copy_that_serves_ends_it() -> None:
    played = Played()
    played.node("n1")
    played.state.step(AdapterAdded(AdapterSpec(SQL, REVISION, 10, 8)))
    played.beat("n1", failed(refused=True))
    played.beat("n1", Copy(SQL, REVISION, Residency.HOST))
    assert played.why == ""


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (FailedPreconditionError("base", "x"), True),
        (UnsupportedError("header", "x"), True),
        # Of bytes that were whole when they were admitted: a source gave others.
        (InvalidCheckpointError("chunk", "x"), False),
        (ResourceExhaustedError("rpc", "received message larger than max"), False),
        (ResourceExhaustedError("memory_bytes", "x"), True),
        (ResourceExhaustedError("host_pool_bytes", "x", 0.5), False),
        (UnavailableError("store", "x"), False),
        (NotFoundError("revision", "x"), False),
        (LoraServeError("adapter", "x"), False),
    ],
)
def test_which_errors_stay(error: LoraServeError, refused: bool) -> None:
    copy = common_pb2.AdapterResidency(
        adapter=common_pb2.AdapterId(tenant="acme", base="base", name="sql"),
        revision=REVISION,
        state=common_pb2.RESIDENCY_STATE_FAILED,
        error=to_detail(error),
    )
    beat = heartbeat_from_wire(controller_pb2.HeartbeatRequest(node_id="n1", residency=[copy]))
    assert [c.refused for c in beat.copies] == [refused]


def test_a_size_that_is_set_right_leaves_the_rest() -> None:
    played = Played()
    played.node("n1")
    played.state.step(AdapterAdded(AdapterSpec(SQL, REVISION, 10, 8)))
    for size, refused in ((7, True), (7, False)):
        copy = failed(refused)._replace(size_bytes=size)
        played.beat("n1", copy)
        assert played.state.nodes["n1"].copies[SQL, REVISION] == copy._replace(size_bytes=10)
