"""Coefficients of a CostModel from measured steps, and their error on others. Needs scipy.

For given places of the hinges the model is linear in its coefficients; the places come from a
grid. A hinge that explains too little is left out.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from loraserve.errors import FailedPreconditionError, InvalidArgumentError
from loraserve.placement.cost_model import CostModel, StepLoad

Floats = npt.NDArray[np.float64]

FEATURES = tuple(field.name for field in fields(StepLoad))
HINGES = ("batch_token_s", "spill_byte_s")
_PLACES = ("batch_tokens", "cache_bytes", "context_bytes")
# In the order of the features, 1 for the step itself, then the hinges.
COEFFICIENTS = tuple(f.name for f in fields(CostModel) if f.name not in _PLACES)

# Where hinges are looked for. A token's KV cache counts with what it costs, which is more than its
# bytes where they are read less well than adapters.
BATCH_TOKENS = (4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 128.0)
CACHE_BYTES = tuple(float(mib << 20) for mib in (1, 2, 4, 6, 8, 10, 12, 16, 24, 32))
CONTEXT_BYTES = (0.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0)
# Each hinge must lower the mean squared error by this part, or it stays out.
_LEAST_GAIN = 0.1
# A point of no noise is still not known better than this, relative.
_LEAST_SPREAD = 0.03


@dataclass(frozen=True)
class Point:
    """One composition of a step, measured several times in turn with others. Seconds."""

    load: StepLoad
    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return float(np.median(self.seconds))

    @property
    def noise(self) -> float:
        """Of the median, relative: half the distance between the medians of the odd and the even
        repeats. What no model of the step could predict."""
        odd, even = np.median(self.seconds[::2]), np.median(self.seconds[1::2])
        return float(abs(odd - even) / 2 / self.median_s)


@dataclass(frozen=True)
class FitReport:
    """Relative errors |predicted / median - 1|, every point's by a model that was not fitted on
    it. `fitted_points`: of one such model."""

    fitted_points: int
    held_out_points: int
    error_p50: float
    error_p95: float
    error_max: float
    noise_p50: float
    noise_p95: float


Places = tuple[float, float, float]
"""batch_tokens, cache_bytes and context_bytes."""


class _Table:
    """The points as columns, in the order of the coefficients."""

    def __init__(self, points: Sequence[Point]) -> None:
        loads = [point.load for point in points]
        self.linear = np.array([[1.0, *(getattr(x, name) for name in FEATURES)] for x in loads])
        self.times = np.array([point.median_s for point in points])
        weights = 1 / np.hypot(_LEAST_SPREAD, [point.noise for point in points])
        self.weights = weights / np.sqrt((weights**2).mean())
        self._tokens = np.array([x.prefill_tokens + x.decode_tokens for x in loads])
        self._context = np.array([x.context_tokens + x.prefill_tokens for x in loads])
        self._bytes = np.array([x.adapter_bytes for x in loads])

    def rows(self, places: Places) -> Floats:
        batch, cache, context = places
        over = np.maximum(self._tokens - batch, 0.0)
        spilled = np.maximum(self._bytes + context * self._context - cache, 0.0)
        return np.column_stack([self.linear, over, spilled])


def nnls_function() -> Any:
    """scipy's. Raises FailedPreconditionError where it is missing."""
    try:
        from scipy.optimize import nnls
    except ImportError:
        raise FailedPreconditionError(
            "scipy", "fitting needs it: pip install 'loraserve[sim]'"
        ) from None
    return nnls


def fit_cost_model(points: Sequence[Point], used: Sequence[str] = COEFFICIENTS) -> CostModel:
    """Non-negative least squares of the relative error, noisy points counting less. `used`: the
    coefficients that may differ from 0. Raises InvalidArgumentError where the points cannot tell
    them apart."""
    if len(points) < len(used) or not all(point.median_s > 0 for point in points):
        raise InvalidArgumentError("points", f"{len(points)} for {len(used)} coefficients")
    hinges = [name for name in HINGES if name in used]
    table = _Table(points)
    best, least = CostModel(0.0, 0.0, 0.0), np.inf
    # From no hinge to all of them: each must earn its place.
    for count in range(len(hinges) + 1):
        found = [
            _fit_at(table, [n for n in used if n not in HINGES or n in chosen], places)
            for chosen in itertools.combinations(hinges, count)
            for places in _places(chosen)
        ]
        error, model = min(found, key=lambda pair: pair[0])
        if error < least * (1 - _LEAST_GAIN):
            best, least = model, error
    return best


def _places(hinges: Sequence[str]) -> list[Places]:
    batch = BATCH_TOKENS if "batch_token_s" in hinges else (0.0,)
    spills = "spill_byte_s" in hinges
    cache, context = (CACHE_BYTES, CONTEXT_BYTES) if spills else ((0.0,), (0.0,))
    return list(itertools.product(batch, cache, context))


def _fit_at(table: _Table, used: Sequence[str], places: Places) -> tuple[float, CostModel]:
    """The mean squared error, and the model."""
    columns = [i for i, name in enumerate(COEFFICIENTS) if name in used]
    rows = table.rows(places)[:, columns]
    # Relative errors: every row by its time. Columns to unit size, for the solver's sake.
    relative = rows * (table.weights / table.times)[:, None]
    scale = np.linalg.norm(relative, axis=0)
    present = scale > 0
    solution = np.zeros(len(columns))
    found, residual = nnls_function()(relative[:, present] / scale[present], table.weights)
    solution[present] = found / scale[present]
    values = dict.fromkeys(COEFFICIENTS, 0.0) | dict(zip(_PLACES, places, strict=True))
    values.update({COEFFICIENTS[c]: float(v) for c, v in zip(columns, solution, strict=True)})
    return float(residual**2 / len(rows)), CostModel(**values)


def evaluate(model: CostModel, fitted: int, held_out: Sequence[Point]) -> FitReport:
    """`held_out`: points that `model` was not fitted on; at least one."""
    return _report(_errors(model, held_out), fitted, held_out)


def cross_validate(
    points: Sequence[Point], folds: int, used: Sequence[str] = COEFFICIENTS
) -> FitReport:
    """Each fold in turn is held out from the fit, in the order that the points have. Raises as
    fit_cost_model."""
    errors: list[Floats] = []
    held_out: list[Point] = []
    fitted = 0
    for fold in range(folds):
        rest = [point for i, point in enumerate(points) if i % folds != fold]
        fitted = len(rest)
        model = fit_cost_model(rest, used)
        held_out += points[fold::folds]
        errors.append(_errors(model, points[fold::folds]))
    return _report(np.concatenate(errors), fitted, held_out)


def _errors(model: CostModel, points: Sequence[Point]) -> Floats:
    return np.array([abs(model.seconds(p.load) / p.median_s - 1) for p in points])


def _report(errors: Floats, fitted: int, held_out: Sequence[Point]) -> FitReport:
    noise = np.array([p.noise for p in held_out])
    return FitReport(
        fitted,
        len(held_out),
        *(float(np.quantile(errors, q)) for q in (0.5, 0.95, 1.0)),
        *(float(np.quantile(noise, q)) for q in (0.5, 0.95)),
    )
