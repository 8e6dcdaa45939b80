"""Whether the nodes of a base could ever serve an adapter: found when it is admitted, rather than
by whoever waits for it. Without a node of the base nothing is known, and nothing refused."""

from collections.abc import Sequence

from loraserve.checkpoint.model_shape import check_shapes
from loraserve.controller.admission import PackedFacts
from loraserve.controller.events import NodeRecord
from loraserve.errors import FailedPreconditionError


def check_room(size_bytes: int, base: str, nodes: Sequence[NodeRecord]) -> None:
    """Raises FailedPreconditionError where a packed adapter of this size is over what adapters may
    take on each of the nodes."""
    largest = max((node.adapter_memory_bytes for node in nodes), default=size_bytes)
    if size_bytes > largest:
        raise FailedPreconditionError(
            "size_bytes",
            f"{size_bytes}, but of the nodes of {base!r} none has more than {largest} bytes for "
            "adapters (--host-pool-bytes)",
        )


def check_fits(facts: PackedFacts, base: str, nodes: Sequence[NodeRecord]) -> None:
    """Raises FailedPreconditionError that names the limit, or the tensor that does not fit."""
    # No limit is 0; all nodes of a base have its shape, those that tell it.
    able = [n for n in nodes if not 0 < n.max_rank < facts.max_rank]
    if nodes and not able:
        limit = max(node.max_rank for node in nodes)
        raise FailedPreconditionError(
            "rank", f"{facts.max_rank}, but no node of {base!r} takes one over {limit}"
        )
    check_room(facts.size_bytes, base, able)
    shape = next((node.shape for node in nodes if node.shape is not None), None)
    if shape is not None:
        check_shapes(facts.modules, shape, base)
