"""What requests asked of each adapter since the controller was told last."""

from dataclasses import dataclass

from loraserve.node.convert import adapter_id_to_wire
from loraserve.placement.types import AdapterId
from loraserve.v1 import common_pb2


@dataclass
class Demand:
    """Counters of one adapter. A request adds to them itself, token by token; `users` counts the
    requests that may still do so."""

    requests: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    users: int = 0


Sample = dict[AdapterId, tuple[int, int, int]]


class DemandCounter:
    """Counts between two heartbeats."""

    def __init__(self) -> None:
        self._demand: dict[AdapterId, Demand] = {}

    def of(self, adapter: AdapterId) -> Demand:
        """To be added to; raise and lower `users` around that."""
        return self._demand.setdefault(adapter, Demand())

    def take(self) -> Sample:
        """The counts so far (requests, prefill tokens, decode tokens); they begin at 0 again."""
        taken: Sample = {}
        for adapter, demand in list(self._demand.items()):
            counts = (demand.requests, demand.prefill_tokens, demand.decode_tokens)
            if any(counts):
                taken[adapter] = counts
                demand.requests = demand.prefill_tokens = demand.decode_tokens = 0
            elif not demand.users:
                del self._demand[adapter]
        return taken

    def give_back(self, sample: Sample) -> None:
        """A heartbeat did not get through: its counts go with the next."""
        for adapter, (requests, prefill_tokens, decode_tokens) in sample.items():
            demand = self.of(adapter)
            demand.requests += requests
            demand.prefill_tokens += prefill_tokens
            demand.decode_tokens += decode_tokens


def sample_to_wire(sample: Sample) -> list[common_pb2.AdapterDemand]:
    return [
        common_pb2.AdapterDemand(
            adapter=adapter_id_to_wire(adapter),
            requests=requests,
            prefill_tokens=prefill_tokens,
            decode_tokens=decode_tokens,
        )
        for adapter, (requests, prefill_tokens, decode_tokens) in sample.items()
    ]
