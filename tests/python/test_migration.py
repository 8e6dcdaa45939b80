"""Migrations told step by step, and whatever nodes report: nothing is lost on the way."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loraserve.placement.migration import CopyState, Migration, Pair, Step, StepKind
from loraserve.placement.types import AdapterId, Placement

S, L, D, F = CopyState.SERVING, CopyState.LOADING, CopyState.DRAINED, CopyState.FAILED
NODES = ("n1", "n2", "n3", "n4")


def adapter(name: str) -> AdapterId:
    return AdapterId("t", "base", name)


A, B, C = adapter("a"), adapter("b"), adapter("c")


def wanted(**holders: tuple[str, ...]) -> Placement:
    return Placement({adapter(k): n for k, n in holders.items()}, {})


def told(steps: list[Step]) -> list[str]:
    return [f"{s.kind.name} {s.adapter.name} {s.node_id or dict(s.weights)}" for s in steps]


def test_load_then_route_then_drain_then_drop() -> None:
    m = Migration(wanted(a=("n2",)), {A: 10}, {})
    copies: dict[Pair, CopyState] = {(A, "n1"): S}
    assert told(m.steps(copies, NODES)) == ["ROUTE a {'n1': 100}", "LOAD a n2"]
    copies[A, "n2"] = L
    assert told(m.steps(copies, NODES)) == []
    copies[A, "n2"] = S
    assert told(m.steps(copies, NODES)) == ["ROUTE a {'n2': 100}", "DRAIN a n1"]
    assert told(m.steps(copies, NODES)) == ["DRAIN a n1"]
    copies[A, "n1"] = D
    assert told(m.steps(copies, NODES)) == ["DROP a n1"]
    del copies[A, "n1"]
    assert m.steps(copies, NODES) == []


def test_a_new_controller_goes_on_where_the_old_one_was() -> None:
    copies: dict[Pair, CopyState] = {(A, "n1"): D, (A, "n2"): S}
    m = Migration(wanted(a=("n2",)), {A: 10}, {})
    assert told(m.steps(copies, NODES)) == ["ROUTE a {'n2': 100}", "DROP a n1"]


def test_routes_carry_the_shares_once_all_targets_serve() -> None:
    placement = Placement({A: ("n1", "n2")}, {}, {A: (0.75, 0.25)})
    m = Migration(placement, {A: 10}, {})
    copies: dict[Pair, CopyState] = {(A, "n1"): S, (A, "n3"): S}
    assert told(m.steps(copies, NODES))[0] == "ROUTE a {'n1': 75, 'n3': 75}"
    copies[A, "n2"] = S
    assert told(m.steps(copies, NODES)) == ["ROUTE a {'n1': 75, 'n2': 25}", "DRAIN a n3"]


def test_what_the_budget_does_not_pay_waits_most_valuable_per_byte_first() -> None:
    sizes, values = {A: 10, B: 10, C: 5}, {A: 100.0, B: 300.0, C: 80.0}
    m = Migration(wanted(a=("n2",), b=("n2",), c=("n2",)), sizes, values, byte_budget=16)
    copies = {(x, "n1"): S for x in (A, B, C)}
    loads = [s for s in told(m.steps(copies, NODES)) if s.startswith("LOAD")]
    assert loads == ["LOAD b n2", "LOAD c n2"]
    assert m.waiting(copies) == [(A, "n2")]
    assert m.spent_bytes == 15
    m.new_interval()
    assert "LOAD a n2" in told(m.steps(copies, NODES))


def test_a_copy_over_the_whole_budget_is_not_stuck() -> None:
    m = Migration(wanted(a=("n2",)), {A: 100}, {}, byte_budget=10)
    assert "LOAD a n2" in told(m.steps({(A, "n1"): S}, NODES))


def test_what_nothing_serves_does_not_wait() -> None:
    sizes = {A: 10, B: 10, C: 10}
    m = Migration(wanted(a=("n2", "n3"), b=("n2",), c=("n2",)), sizes, {C: 1e9}, byte_budget=10)
    loads = told(m.steps({(C, "n1"): S}, NODES))
    assert "LOAD a n2" in loads
    assert "LOAD b n2" in loads
    assert "LOAD a n3" not in loads
    assert "LOAD c n2" not in loads


def test_a_flash_crowds_copies_come_within_two_intervals() -> None:
    """A hundred moves of no hurry wait behind one hot adapter's three copies."""
    cold = {f"x{i}": ("n2",) for i in range(100)}
    m = Migration(
        wanted(a=("n1", "n2", "n3", "n4"), **cold),
        dict.fromkeys([A, *map(adapter, cold)], 10),
        {A: 5000.0} | {adapter(k): 1.0 for k in cold},
        byte_budget=20,
    )
    copies: dict[Pair, CopyState] = {(x, "n1"): S for x in (A, *map(adapter, cold))}
    for _ in range(2):
        for step in m.steps(copies, NODES):
            if step.kind is StepKind.LOAD:
                copies[step.adapter, step.node_id] = S
        m.new_interval()
    assert {n for (x, n) in copies if x == A} == set(NODES)


def test_failed_loads_are_asked_for_again_and_failed_strays_dropped() -> None:
    m = Migration(wanted(a=("n2",)), {A: 10}, {})
    copies: dict[Pair, CopyState] = {(A, "n1"): S, (A, "n2"): F, (A, "n3"): F}
    assert told(m.steps(copies, NODES))[1:] == ["DROP a n3", "LOAD a n2"]
    m.failed(A, "n2")
    del copies[A, "n2"]
    assert "LOAD a n2" in told(m.steps(copies, NODES))


def test_unplaced_adapters_keep_their_copies_and_removed_ones_none() -> None:
    m = Migration(Placement({}, {A: "no room"}), {}, {})
    copies: dict[Pair, CopyState] = {(A, "n1"): S, (B, "n1"): S, (B, "n2"): D}
    assert told(m.steps(copies, NODES)) == ["DRAIN b n1", "DROP b n2"]


def test_only_changed_adapters_are_looked_at() -> None:
    m = Migration(wanted(a=("n2",), b=("n2",)), {A: 1, B: 1}, {})
    copies: dict[Pair, CopyState] = {(A, "n1"): S, (B, "n1"): S}
    assert all(s.adapter == A for s in m.steps(copies, NODES, [A]))


class Cluster(RuleBasedStateMachine):
    """Nodes that load, fail, die and drain; placements that change at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[Pair, CopyState] = {(A, "n1"): S, (B, "n2"): S}
        self.routes: dict[AdapterId, dict[str, int]] = {}
        self.todo: list[Step] = []
        self.target: dict[AdapterId, tuple[str, ...]] = {A: ("n1",), B: ("n2",)}
        self.budget: int | None = None
        self.loaded = self.served = 0
        self.renew()

    def renew(self) -> None:
        self.m = Migration(Placement(self.target, {}), {A: 10, B: 10}, {A: 5.0}, self.budget)
        self.loaded = 0

    @rule(
        x=st.sampled_from([A, B]),
        nodes=st.lists(st.sampled_from(NODES), min_size=1, max_size=3, unique=True),
        budget=st.sampled_from([None, 10, 20]),
    )
    def placed_anew(self, x: AdapterId, nodes: list[str], budget: int | None) -> None:
        self.target = self.target | {x: tuple(sorted(nodes))}
        self.budget = budget
        self.renew()

    @rule()
    def restarted(self) -> None:
        self.renew()

    @rule()
    def asked(self) -> None:
        self.todo = self.m.steps(self.copies, NODES)
        serving = {x for (x, _), s in self.copies.items() if s in (S, D)}
        for step in self.todo:
            if step.kind is StepKind.ROUTE:
                assert step.weights
                assert all(w > 0 for _, w in step.weights)
                assert all(self.copies.get((step.adapter, n)) in (S, D) for n, _ in step.weights)
                self.routes[step.adapter] = dict(step.weights)
            if step.kind is StepKind.DROP and self.copies[step.adapter, step.node_id] is not F:
                assert self.copies[step.adapter, step.node_id] is D
                others = {n for (x, n), s in self.copies.items() if x == step.adapter and s is S}
                assert others - {step.node_id}
        if self.budget is not None and serving == {A, B}:
            assert self.m.spent_bytes <= max(self.budget, 20)

    @rule(data=st.data(), fails=st.booleans())
    def carried_out(self, data: st.DataObject, fails: bool) -> None:
        if not self.todo:
            return
        step = data.draw(st.sampled_from(self.todo))
        key = (step.adapter, step.node_id)
        if step.kind is StepKind.LOAD and self.copies.get(key) in (None, F):
            self.copies[key] = F if fails else L
        routed = step.node_id in self.routes.get(step.adapter, {})
        if step.kind is StepKind.DRAIN and self.copies.get(key) is S and not routed:
            self.copies[key] = D
        if step.kind is StepKind.DROP:
            self.copies.pop(key, None)
        self.todo = []

    @rule()
    def loads_end(self) -> None:
        self.copies = {k: S if s is L else s for k, s in self.copies.items()}

    @rule()
    def interval_ends(self) -> None:
        self.m.new_interval()

    @invariant()
    def something_serves(self) -> None:
        for x in (A, B):
            assert any(s in (S, D) for (y, _), s in self.copies.items() if y == x)

    def teardown(self) -> None:
        """It ends where the placement says, in few steps."""
        for _ in range(30):
            self.m.new_interval()
            for step in self.m.steps(self.copies, NODES):
                key = (step.adapter, step.node_id)
                if step.kind is StepKind.LOAD:
                    self.copies[key] = S
                elif step.kind is StepKind.DRAIN:
                    self.copies[key] = D
                elif step.kind is StepKind.DROP:
                    del self.copies[key]
                else:
                    self.routes[step.adapter] = dict(step.weights)
            self.copies = {
                k: S if s is L or (s is D and k[1] in self.routes.get(k[0], {})) else s
                for k, s in self.copies.items()
            }
        for x in (A, B):
            assert {n for (y, n) in self.copies if y == x} == set(self.target[x])
            assert set(self.routes[x]) == set(self.target[x])
        assert self.m.steps(self.copies, NODES) == []


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
