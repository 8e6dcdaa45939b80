"""Which tier holds a copy on a node, in the words and numbers of ResidencyState on the wire."""

import enum


class Residency(enum.Enum):
    PENDING = 1
    FETCHING = 2
    DISK = 3
    HOST = 4
    DEVICE = 5
    DRAINING = 6
    FAILED = 7

    @property
    def serves(self) -> bool:
        """Whether a request that arrives now waits for no fetch."""
        return self in (Residency.HOST, Residency.DEVICE)

    @property
    def present(self) -> bool:
        """Whether a load command has nothing left to begin."""
        return self not in (Residency.FAILED, Residency.DRAINING)
