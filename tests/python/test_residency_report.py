"""What a node tells of its residency: everything once, then changes, in parts where it is long."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.controller.whole_heartbeat import WholeHeartbeat
from loraserve.node.convert import adapter_id_to_wire
from loraserve.node.residency import ChangeJournal, CopyKey, ResidencyReport
from loraserve.placement.types import AdapterId
from loraserve.v1 import common_pb2


class Copies:
    """Stands in for HeldAdapters."""

    def __init__(self, most: int = 1000) -> None:
        self.held: dict[str, int] = {}
        self.journal: ChangeJournal[CopyKey] = ChangeJournal(most)

    @property
    def generation(self) -> int:
        return self.journal.generation

    def put(self, name: str, state: int | None) -> None:
        if state is None:
            self.held.pop(name, None)
        else:
            self.held[name] = state
        self.journal.changed((AdapterId("t", "base", name), "r"))

    def show(self, name: str) -> common_pb2.AdapterResidency:
        return common_pb2.AdapterResidency(
            adapter=adapter_id_to_wire(AdapterId("t", "base", name)),
            revision="r",
            state=self.held[name],  # type: ignore[arg-type]
        )

    def residency(self) -> list[common_pb2.AdapterResidency]:
        return [self.show(name) for name in self.held]

    def changes_since(
        self, generation: int
    ) -> tuple[list[common_pb2.AdapterResidency], list[CopyKey]] | None:
        keys = self.journal.since(generation)
        if keys is None:
            return None
        names = [adapter.name for adapter, _ in keys]
        gone = [k for k in keys if k[0].name not in self.held]
        return [self.show(n) for n in names if n in self.held], gone


class Listener:
    """The controller's side: takes parts, keeps what it was told."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        self.generation = -1
        self.whole = WholeHeartbeat()

    def hear(self, parts: list[Any]) -> bool:
        """Whether the heartbeat follows the one before."""
        assert [p.more for p in parts] == [True] * (len(parts) - 1) + [False]
        taken = [made for part in parts if (made := self.whole.take(part)) is not None]
        (beat,) = taken
        if beat.since_generation and beat.since_generation != self.generation:
            return False
        if not beat.since_generation:
            self.known = {}
        self.known |= {r.adapter.name: r.state for r in beat.residency}
        for gone in beat.removed:
            self.known.pop(gone.adapter.name, None)
        self.generation = beat.generation
        return True


names = st.sampled_from("abcdefgh")
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), names, st.one_of(st.none(), st.integers(1, 7))),
        st.tuples(st.sampled_from(["tell", "lose", "stream"]), names, st.none()),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(steps, st.sampled_from([40, 1 << 20]), st.sampled_from([3, 1000]))
def test_the_listener_ends_up_with_what_is_held(
    script: list[tuple[str, str, int | None]], part_bytes: int, most: int
) -> None:
    copies, listener = Copies(most), Listener()
    report = ResidencyReport(copies, part_bytes)
    for verb, name, state in script:
        if verb == "put":
            copies.put(name, state)
        elif verb == "lose":
            report.parts()  # told, but it never arrived
        elif verb == "stream":
            report.restart()
        elif not listener.hear(report.parts()):
            report.restart()
            assert listener.hear(report.parts())
    if not listener.hear(report.parts()):
        report.restart()
        assert listener.hear(report.parts())
    assert listener.known == copies.held


def test_an_unchanged_residency_costs_nothing() -> None:
    copies = Copies()
    for i in range(1000):
        copies.put(f"a{i}", 4)
    report = ResidencyReport(copies)
    (first,) = report.parts()
    assert len(first.residency) == 1000
    (second,) = report.parts()
    assert second.ByteSize() < 20
    copies.put("a7", 5)
    copies.put("a8", None)
    (third,) = report.parts()
    assert [r.adapter.name for r in third.residency] == ["a7"]
    assert [r.adapter.name for r in third.removed] == ["a8"]
    assert (third.since_generation, third.generation) == (first.generation, copies.generation)


def test_no_part_is_longer_than_it_may_be() -> None:
    copies = Copies()
    for i in range(3000):
        copies.put(f"adapter-with-a-longer-name-{i:04d}", 4)
    parts = ResidencyReport(copies, 10_000).parts()
    assert len(parts) > 10
    assert max(part.ByteSize() for part in parts) < 11_000
    assert sum(len(part.residency) for part in parts) == 3000


def test_the_journal_forgets_its_oldest_changes() -> None:
    journal: ChangeJournal[str] = ChangeJournal(2)
    start = journal.generation
    for key in "abca":
        journal.changed(key)
    assert journal.since(journal.generation) == []
    assert journal.since(journal.generation - 1) == ["a"]
    assert journal.since(journal.generation - 2) == ["a", "c"]
    assert journal.since(start) is None
