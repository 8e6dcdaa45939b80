"""One node of the simulated cluster: an engine, a host pool, and what it tells the controller."""

from collections.abc import Sequence

from loraserve.client.routing import ObservedLoad
from loraserve.controller.events import Copy, DemandSample, Heartbeat, NodeRecord
from loraserve.placement.types import AdapterSpec
from loraserve.sim.host_pool import HostPool
from loraserve.sim.node_model import NodeEngine
from loraserve.sim.sequence import SimSequence

# A page of the load that nodes report, in tokens of the KV cache.
_PAGE_TOKENS = 16


class ClusterNode:
    """`scheduled_s` is the time of the engine's event that is in the cluster's heap."""

    def __init__(
        self,
        index: int,
        base: str,
        engine: NodeEngine,
        pool: HostPool,
        specs: Sequence[AdapterSpec],
    ) -> None:
        self.index = index
        self.node_id = f"n{index:03d}"
        self.engine = engine
        self.pool = pool
        self.alive = True
        self.incarnation = 1
        self.scheduled_s = -1.0
        self.wakes = False
        self.applied_command = 0
        self.failed_commands: list[tuple[int, str]] = []
        self._base = base
        self._specs = specs
        self._prefill: dict[int, int] = {}
        self._decode: dict[int, int] = {}
        # Of requests that the engine has, how many of each rank.
        self._ranks: dict[int, int] = {}
        self._told = -1  # the generation

    def record(self) -> NodeRecord:
        return NodeRecord(
            self.node_id,
            self.incarnation,
            f"{self.node_id}:1",
            self._base,
            "",
            self.pool.capacity,
        )

    def count_prefill(self, sequence: SimSequence) -> None:
        """Demand of a request that was accepted."""
        adapter = sequence.adapter
        self._prefill[adapter] = self._prefill.get(adapter, 0) + sequence.tokens

    def count_decode(self, sequence: SimSequence) -> None:
        """Demand of the tokens that came since this was called last."""
        generated = self.engine.generated(sequence)
        tokens = generated - sequence.reported
        if tokens:
            sequence.reported = generated
            self._decode[sequence.adapter] = self._decode.get(sequence.adapter, 0) + tokens

    def beat(self, whole: bool = False) -> Heartbeat:
        """What the node says at its next heartbeat; of what it holds nothing that it has said
        before, unless `whole`."""
        steps, decode = self.engine.steps, self._decode
        for sequence in self.engine.decoding_sequences():  # count_decode, written out
            generated = sequence.generated + steps - sequence.start_step
            tokens = generated - sequence.reported
            if tokens:
                sequence.reported = generated
                decode[sequence.adapter] = decode.get(sequence.adapter, 0) + tokens
        generation, since = self.pool.generation, 0
        copies: tuple[Copy, ...] = ()
        if not whole and self._told == generation:
            since = generation
        else:
            self._told = generation
            copies = tuple(
                Copy(self._specs[a].adapter, self._specs[a].revision, state)
                for a, state in self.pool.copies.items()
            )
        demand = tuple(
            DemandSample(
                self._specs[adapter].adapter,
                self._prefill.get(adapter, 0),
                self._decode.get(adapter, 0),
            )
            for adapter in sorted(self._prefill.keys() | self._decode.keys())
            if adapter >= 0
        )
        failed, self.failed_commands = tuple(self.failed_commands), []
        self._prefill, self._decode = {}, {}
        return Heartbeat(
            self.node_id,
            self.incarnation,
            generation,
            copies,
            demand,
            failed,
            applied_command=self.applied_command,
            since_generation=since,
            waiting_tokens=self.engine.pending_prefill_tokens,
        )

    def load(self) -> ObservedLoad:
        """As it goes to clients with answers."""
        engine = self.engine
        return ObservedLoad(
            engine.running,
            engine.queue.count,
            engine.pending_prefill_tokens,
            max(0, engine.memory.reachable) // _PAGE_TOKENS,
            engine.memory.capacity // _PAGE_TOKENS,
            sum(rank * count for rank, count in self._ranks.items()),
            max(self._ranks, default=0),
        )

    def takes(self, rank: int) -> None:
        """A request of an adapter of the rank is here from now on."""
        self._ranks[rank] = self._ranks.get(rank, 0) + 1

    def gives_back(self, rank: int) -> None:
        """One has ended."""
        self._ranks[rank] -= 1
        if not self._ranks[rank]:
            del self._ranks[rank]

    def crash(self, now_s: float) -> list[SimSequence]:
        """Everything is lost; the requests that were here."""
        self.alive = False
        lost = self.engine.crash(now_s) + self.pool.lose_everything()
        self._prefill, self._decode = {}, {}
        self._ranks.clear()
        self._told = -1
        self.failed_commands, self.applied_command = [], 0
        return lost

    def restart(self) -> None:
        self.alive = True
        self.incarnation += 1
