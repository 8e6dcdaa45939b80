"""Tokens that nodes report, as smoothed rates per adapter."""

from loraserve.placement.types import AdapterId, Demand

# Of the newest window; the rest of the weight is that of the rate before.
NEWEST_WEIGHT = 0.8


class DemandMeter:
    """Counts within a window; `rates` change when a window is closed."""

    def __init__(self) -> None:
        self.rates: dict[AdapterId, Demand] = {}
        self._prefill: dict[AdapterId, int] = {}
        self._decode: dict[AdapterId, int] = {}

    def add(self, adapter: AdapterId, prefill_tokens: int, decode_tokens: int) -> None:
        self._prefill[adapter] = self._prefill.get(adapter, 0) + prefill_tokens
        self._decode[adapter] = self._decode.get(adapter, 0) + decode_tokens

    def forget(self, adapter: AdapterId) -> None:
        for counts in (self.rates, self._prefill, self._decode):
            counts.pop(adapter, None)

    def close_window(self, seconds: float) -> None:
        """Folds the counts of the last `seconds` into the rates."""
        rates = {}
        for adapter in self.rates.keys() | self._prefill.keys() | self._decode.keys():
            old = self.rates.get(adapter, Demand())
            rates[adapter] = Demand(
                _smooth(old.prefill, self._prefill.get(adapter, 0) / seconds),
                _smooth(old.decode, self._decode.get(adapter, 0) / seconds),
            )
        self.rates, self._prefill, self._decode = rates, {}, {}


def _smooth(old: float, newest: float) -> float:
    return NEWEST_WEIGHT * newest + (1 - NEWEST_WEIGHT) * old
