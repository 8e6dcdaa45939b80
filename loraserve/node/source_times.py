"""How long sources take, as measured: what it costs to get an adapter back."""

# What is taken for a source that has not been measured yet.
_FIRST_BYTES_PER_S = 100e6
# A fetch of no bytes.
_LATENCY_S = 0.005
# Weight of what was known, against the next fetch.
_KEEP = 0.8


class SourceTimes:
    """Of each source the seconds per byte, as moving averages over its fetches."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}  # seconds, bytes

    def measured(self, source: str, seconds: float, size_bytes: int) -> None:
        """A fetch that succeeded."""
        took_s, brought = self._sums.get(source, (0.0, 0.0))
        transfer_s = max(1e-9, seconds - _LATENCY_S)
        self._sums[source] = (_KEEP * took_s + transfer_s, _KEEP * brought + size_bytes)

    def estimate(self, source: str, size_bytes: int) -> float:
        """Seconds."""
        took_s, brought = self._sums.get(source, (0.0, 0.0))
        per_byte = took_s / brought if brought else 1 / _FIRST_BYTES_PER_S
        return _LATENCY_S + size_bytes * per_byte
