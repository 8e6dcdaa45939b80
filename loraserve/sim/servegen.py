"""ServeGen: what hundreds of real tenants asked for, window by window. Each client becomes an
adapter, so that skew and drift are real.

Rates: columns model, client, t_s (start of a 600 s window), rate_rps, pattern (Gamma, Weibull),
arg1 (shape). Lengths: in_q41 and out_q41, 41 quantiles for each client and 6 hours.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraserve.errors import FailedPreconditionError
from loraserve.named_files import named, wrong
from loraserve.sim.traces import MalformedTraceError
from loraserve.sim.workload import Floats, Ints, Workload, check_positive, ranks_by_share

_DATA = Path(__file__).parent / "data/servegen"
RATES = _DATA / "client_rates_24h.parquet"
LENGTHS = _DATA / "client_lengths_24h.parquet"
WINDOW_S = 600
# The pools that are scaled to equal totals, 314 clients in all.
MODELS = ("m-small", "m-mid", "m-large")
_RATE_COLUMNS = ("model", "client", "t_s", "rate_rps", "pattern", "arg1")
_LENGTH_COLUMNS = ("model", "client", "t_s", "in_q41", "out_q41")

Client = tuple[str, int]


@dataclass(frozen=True)
class ClientRates:
    """`share[client, window]` of all requests, whose mean over the windows sums to 1. `shape` and
    `weibull` describe the times between a client's requests."""

    clients: list[Client]
    share: Floats
    shape: Floats
    weibull: NDArray[np.bool_]
    starts_s: Ints


def read_parquet(path: Path, columns: tuple[str, ...]) -> Mapping[str, Any]:
    """Columns as arrays. Raises FailedPreconditionError where pyarrow is missing,
    InvalidArgumentError for a file that is not what it should be."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise FailedPreconditionError(
            "trace", "Parquet files need pyarrow: pip install 'loraserve[sim]'"
        ) from None
    with named("trace", path):
        path.open("rb").close()  # says what is wrong in the system's words, not in pyarrow's
    try:
        table = pq.read_table(path, columns=list(columns))
        missing = [c for c in columns if c not in table.column_names]
        if missing:
            raise wrong("trace", path, f"no column {missing[0]!r}")
        return {c: table.column(c).to_numpy(zero_copy_only=False) for c in columns}
    except (OSError, pa.ArrowException) as error:
        raise wrong("trace", path, error) from None


def read_rates(path: Path = RATES) -> ClientRates:
    """Each pool counts as much as the others. Windows in which nobody asked are left out."""
    raw = read_parquet(path, _RATE_COLUMNS)
    rate, shape = (raw[name].astype(float) for name in ("rate_rps", "arg1"))
    for name, values in (("rate_rps", rate), ("arg1", np.where(rate > 0, shape, 1.0))):
        unfit = ~np.isfinite(values) | (values < 0)
        if unfit.any():
            raise MalformedTraceError(
                path, int(np.argmax(unfit)) + 1, 1 + _RATE_COLUMNS.index(name), f"{name} is wrong"
            )
    model = raw["model"].astype(str)
    used = np.flatnonzero((rate > 0) & (shape > 0) & np.isin(model, MODELS))
    if not len(used):
        raise wrong("trace", path, f"no traffic of {', '.join(MODELS)}")
    rate, shape, model = rate[used], shape[used], model[used]
    weibull = raw["pattern"][used].astype(str) == "Weibull"
    keys = list(zip(model.tolist(), raw["client"][used].astype(int).tolist(), strict=True))
    clients = sorted(set(keys))
    index = {client: i for i, client in enumerate(clients)}
    row = np.array([index[key] for key in keys])
    starts, window = np.unique(raw["t_s"][used].astype(np.int64), return_inverse=True)
    rates = np.zeros((len(clients), len(starts)))
    np.add.at(rates, (row, window), rate)
    total = rates.sum(axis=1)
    for pool in MODELS:
        members = np.array([client[0] == pool for client in clients])
        if members.any():
            rates[members] /= rates[members].sum()
    return ClientRates(
        clients,
        rates * len(starts) / rates.sum(),
        np.bincount(row, rate * shape, len(clients)) / total,
        np.bincount(row, rate * weibull, len(clients)) > total / 2,
        starts,
    )


def read_lengths(path: Path = LENGTHS) -> dict[Client, list[tuple[int, Floats, Floats]]]:
    """By client: (start of the window, quantiles of the prompt, of the output), in order."""
    raw = read_parquet(path, _LENGTH_COLUMNS)
    found: dict[Client, list[tuple[int, Floats, Floats]]] = {}
    rows = zip(*(raw[name] for name in _LENGTH_COLUMNS), strict=True)
    for number, (model, client, start, prompt, output) in enumerate(rows, 1):
        prompt, output = np.asarray(prompt, dtype=float), np.asarray(output, dtype=float)
        for column, q in ((4, prompt), (5, output)):
            if len(q) < 2 or not np.isfinite(q).all() or (q < 0).any():
                raise MalformedTraceError(path, number, column, "these are no quantiles")
        found.setdefault((str(model), int(client)), []).append((int(start), prompt, output))
    return {client: sorted(windows, key=lambda w: w[0]) for client, windows in found.items()}


def servegen(
    rate: float,
    duration_s: float,
    seed: int,
    adapters: int | None = None,
    rates_path: Path = RATES,
    lengths_path: Path = LENGTHS,
) -> Workload:
    """The day compressed into `duration_s`, at `rate` requests/s on average. `adapters`: the
    busiest so many clients, or idle adapters beside them; by default one for each client."""
    check_positive(rate=rate, duration_s=duration_s)
    rng = np.random.default_rng(seed)
    rates, lengths = read_rates(rates_path), read_lengths(lengths_path)
    if not lengths:
        raise wrong("trace", lengths_path, "no lengths")
    count = adapters or len(rates.clients)
    busiest = np.sort(np.argsort(-rates.share.sum(axis=1), kind="stable")[:count])
    share = rates.share[busiest] / rates.share[busiest].sum() * len(rates.starts_s)
    window_s = duration_s / len(rates.starts_s)
    with_lengths = sorted(lengths)
    columns: list[tuple[Floats, Ints, Ints, Ints]] = []
    for adapter, client in enumerate(busiest):
        # Times in which one request is expected, then mapped through the client's own rate.
        expected = np.concatenate([[0.0], np.cumsum(share[adapter] * rate * window_s)])
        gaps = _unit_gaps(rng, rates.shape[client], rates.weibull[client], expected[-1])
        ticks = np.cumsum(gaps) - rng.random() * gaps[0]
        times = np.interp(
            ticks[ticks < expected[-1]], expected, np.arange(len(expected)) * window_s
        )
        # Clients without lengths borrow those of another.
        owner = rates.clients[client]
        if owner not in lengths:
            owner = with_lengths[int(rng.integers(len(with_lengths)))]
        seconds = rates.starts_s[0] + times / duration_s * (
            rates.starts_s[-1] + WINDOW_S - rates.starts_s[0]
        )
        prompt, output = _draw_lengths(rng, lengths[owner], seconds)
        columns.append((times, np.full(len(times), adapter), prompt, output))
    times, index, prompt, output = (np.concatenate(c) for c in zip(*columns, strict=True))
    order = np.argsort(times, kind="stable")
    return Workload(
        "servegen",
        ranks_by_share(rng, count),
        times[order],
        index[order],
        prompt[order],
        output[order],
        duration_s,
    )


def _unit_gaps(rng: np.random.Generator, shape: float, weibull: bool, total: float) -> Floats:
    """Gaps of mean 1 whose sum is over `total`."""
    shape = max(shape, 0.05)
    gaps = np.empty(0)
    while gaps.sum() <= total:
        size = int((total - gaps.sum()) * 1.2) + 16
        if weibull:
            more = rng.weibull(shape, size) / math.gamma(1 + 1 / shape)
        else:
            more = rng.gamma(shape, 1 / shape, size)
        gaps = np.concatenate([gaps, more])
    return gaps


def _draw_lengths(
    rng: np.random.Generator, windows: list[tuple[int, Floats, Floats]], seconds: Floats
) -> tuple[Ints, Ints]:
    """Each request's by the window that it falls into, or the nearest before or after."""
    starts = np.array([w[0] for w in windows])
    of_window = np.clip(np.searchsorted(starts, seconds, side="right") - 1, 0, None)
    prompt = np.ones(len(seconds), dtype=np.int64)
    output = np.ones(len(seconds), dtype=np.int64)
    for index in np.unique(of_window):
        chosen = of_window == index
        for into, quantiles in ((prompt, windows[index][1]), (output, windows[index][2])):
            points = rng.random(int(chosen.sum()))
            drawn = np.interp(points, np.linspace(0, 1, len(quantiles)), quantiles)
            into[chosen] = np.maximum(drawn.astype(np.int64), 1)
    return prompt, output
