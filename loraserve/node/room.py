"""Which copies must go so that one more fits into the adapter memory of a node."""

from collections.abc import Iterable

from loraserve.errors import ResourceExhaustedError
from loraserve.node.held import FAILED, HOST, HeldAdapter
from loraserve.node.limits import RETRY_AFTER_S
from loraserve.placement.types import AdapterSpec


def _takes_room(held: HeldAdapter) -> bool:
    """A copy that goes and that nobody uses any more has given its room away already."""
    return held.state != FAILED and (held.dropping is None or bool(held.users))


def copies_to_evict(
    copies: Iterable[HeldAdapter], spec: AdapterSpec, placed: bool, limit_bytes: int
) -> list[HeldAdapter]:
    """The coldest copies that nobody uses or has placed here, as few of them as make room for
    `spec`. Raises ResourceExhaustedError where that is not enough."""
    if spec.size_bytes > limit_bytes:
        raise ResourceExhaustedError(
            "adapter_memory_bytes",
            f"{spec.adapter}: {spec.size_bytes} bytes, of {limit_bytes} here",
        )
    counted = [
        held
        for held in copies
        if _takes_room(held)
        # A placed revision may stand beside the one that it replaces: that one goes only when
        # this one serves.
        and not (
            held.spec.adapter == spec.adapter and (placed or held.spec.revision == spec.revision)
        )
    ]
    taken = sum(held.spec.size_bytes for held in counted)
    evicted = []
    idle = [held for held in counted if held.state == HOST and not held.users and not held.placed]
    for held in sorted(idle, key=lambda held: held.used_s):
        if taken + spec.size_bytes <= limit_bytes:
            break
        taken -= held.spec.size_bytes
        evicted.append(held)
    if taken + spec.size_bytes > limit_bytes:
        raise ResourceExhaustedError(
            "adapter_memory_bytes",
            f"{spec.adapter} needs {spec.size_bytes} bytes, {taken} of {limit_bytes} are in use",
            RETRY_AFTER_S,
        )
    return evicted
