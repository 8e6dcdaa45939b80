"""Coefficients of a CostModel from measured steps, and their error on others. Needs scipy."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from loraserve.errors import FailedPreconditionError, InvalidArgumentError
from loraserve.placement.cost_model import CostModel, StepLoad

Floats = npt.NDArray[np.float64]

# Features of StepLoad in the order of CostModel's coefficients behind step_s.
FEATURES = tuple(field.name for field in fields(StepLoad))
COEFFICIENTS = tuple(field.name for field in fields(CostModel))


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
    """Relative errors |predicted / median - 1| over the points that were not fitted on."""

    fitted_points: int
    held_out_points: int
    error_p50: float
    error_p95: float
    error_max: float
    noise_p50: float
    noise_p95: float


def features(load: StepLoad) -> list[float]:
    """1 for the step itself, then the features in the order of the coefficients."""
    return [1.0, *(float(getattr(load, name)) for name in FEATURES)]


def _nnls() -> Any:
    try:
        from scipy.optimize import nnls
    except ImportError:
        raise FailedPreconditionError(
            "scipy", "fitting needs it: pip install 'loraserve[sim]'"
        ) from None
    return nnls


def fit_cost_model(points: Sequence[Point], used: Sequence[str] = COEFFICIENTS) -> CostModel:
    """Non-negative least squares of the relative error. `used`: the coefficients that may differ
    from 0. Raises InvalidArgumentError where the points cannot tell them apart."""
    columns = [i for i, name in enumerate(COEFFICIENTS) if name in used]
    rows = np.array([features(point.load) for point in points])[:, columns]
    times = np.array([point.median_s for point in points])
    if len(points) < len(columns) or not np.all(times > 0):
        raise InvalidArgumentError("points", f"{len(points)} for {len(columns)} coefficients")
    # Relative errors: every row by its time. Columns to unit size, for the solver's sake.
    relative = rows / times[:, None]
    scale = np.linalg.norm(relative, axis=0)
    present = scale > 0
    solution = np.zeros(len(columns))
    found, _ = _nnls()(relative[:, present] / scale[present], np.ones(len(points)))
    solution[present] = found / scale[present]
    values = dict.fromkeys(COEFFICIENTS, 0.0)
    values.update({COEFFICIENTS[c]: float(v) for c, v in zip(columns, solution, strict=True)})
    return CostModel(**values)


def evaluate(model: CostModel, fitted: int, held_out: Sequence[Point]) -> FitReport:
    """`held_out`: points that `model` was not fitted on; at least one."""
    errors = np.array([abs(model.seconds(p.load) / p.median_s - 1) for p in held_out])
    noise = np.array([p.noise for p in held_out])
    return FitReport(
        fitted,
        len(held_out),
        *(float(np.quantile(errors, q)) for q in (0.5, 0.95, 1.0)),
        *(float(np.quantile(noise, q)) for q in (0.5, 0.95)),
    )
