"""The question of a whole placement whose answer is awaited: one at a time, and not for ever."""

from collections import Counter

from loraserve.controller.placing import PlacementQuestion
from loraserve.placement.types import AdapterId

# An answer is waited for so many times the usual patience at most.
MOST_PATIENCE = 16


class AskedPlacement:
    """`failures` counts placements that came to nothing, by reason. Where an answer is overdue, the
    next one is waited for twice as long: a placement that is merely slow comes in time in the end.
    """

    def __init__(self, patience_ticks: int) -> None:
        self.question: PlacementQuestion | None = None
        # Adapters that came, changed or went since it was asked.
        self.touched: set[AdapterId] = set()
        self.failures: Counter[str] = Counter()
        self._patience = patience_ticks
        self._patient = 1
        self._since = 0

    def ask(self, question: PlacementQuestion, tick: int) -> None:
        self.question, self.touched, self._since = question, set(), tick

    def answered(self, failure: str = "") -> None:
        """`failure`: the reason for the count, where the answer is none."""
        self.question, self._patient = None, 1
        if failure:
            self.failures[failure] += 1

    def give_up_overdue(self, tick: int) -> int:
        """After how many ticks nobody awaits the answer any more; 0 where it is not overdue."""
        waited = tick - self._since
        if self.question is None or waited < self._patience * self._patient:
            return 0
        self.question = None
        self._patient = min(2 * self._patient, MOST_PATIENCE)
        self.failures["overdue"] += 1
        return waited
