"""`loraserve simulate`: see loraserve.sim."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loraserve.errors import InvalidArgumentError
from loraserve.placement.cost_model import Slo
from loraserve.placement.policies import POLICIES
from loraserve.profiles.files import shipped_profiles
from loraserve.sim.claims import run_claims
from loraserve.sim.cluster import Failure
from loraserve.sim.lengths import LENGTHS
from loraserve.sim.run import Result, SimulationOptions, simulate
from loraserve.sim.suite import SUITE, WORKLOADS

_BYTES = 1 << 30
_FULL_OUTPUT, _QUICK_OUTPUT = Path("claims"), Path("claims-quick")


def add_parser(commands: Any) -> None:
    defaults = SimulationOptions()
    parser = commands.add_parser(
        "simulate",
        help="a cluster in simulated time: which policy, how many nodes",
        description="Runs a workload or a trace through a simulated cluster whose controller and "
        "router are the real ones and whose engines follow a profile. `loraserve simulate claims` "
        "compares all policies over the whole suite and writes the report (needs loraserve[sim]).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("what", nargs="?", choices=["run", "claims"], default="run")
    parser.add_argument("--policy", default=defaults.policy, help=", ".join(sorted(POLICIES)))
    suite = ", ".join(f"{short} {name}" for short, name in SUITE.items())
    parser.add_argument(
        "--workload",
        default=defaults.workload,
        help=f"{suite}; also {', '.join(n for n in WORKLOADS if n not in SUITE.values())}",
    )
    parser.add_argument(
        "--trace",
        type=Path,
        help="replay Azure .csv, Mooncake .jsonl (also .gz) or ServeGen .parquet instead",
    )
    parser.add_argument("--trace-lengths", type=Path, help="ServeGen's second file")
    parser.add_argument("--nodes", type=int, default=defaults.nodes)
    parser.add_argument("--adapters", type=int, default=defaults.adapters)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument(
        "--rate", type=float, help="requests/s of the cluster; without it 60 %% of what it carries"
    )
    parser.add_argument("--duration", type=float, default=defaults.duration_s, help="seconds")
    parser.add_argument("--cv", type=float, default=defaults.cv, help="of times between requests")
    parser.add_argument("--lengths", default=defaults.lengths, help=", ".join(LENGTHS))
    parser.add_argument(
        "--alpha", type=float, default=defaults.alpha, help="of slora: 1 is uniform"
    )
    parser.add_argument(
        "--profile", default=defaults.profile, help=f"a file or {', '.join(shipped_profiles())}"
    )
    parser.add_argument("--slo-ttft", type=float, default=defaults.slo.ttft_p95_s, help="p95, s")
    parser.add_argument("--slo-tbt", type=float, default=defaults.slo.tbt_p95_s, help="p95, s")
    parser.add_argument(
        "--interval", type=float, default=defaults.interval_s, help="of placement, s"
    )
    parser.add_argument("--replicas", type=int, default=defaults.replicas, help="at least")
    parser.add_argument("--host-gib", type=float, default=defaults.host_gib, help="for adapters")
    parser.add_argument(
        "--fail",
        action="append",
        default=[],
        metavar="TIME:NODE[:DOWN]",
        help="a node dies at that second, for so many (60)",
    )
    parser.add_argument("--json", action="store_true", help="one object")
    parser.add_argument("--quick", action="store_true", help="claims: small, a minute or two")
    parser.add_argument(
        "--output",
        type=Path,
        # So that the formatter adds no "(default: None)".
        default=argparse.SUPPRESS,
        help="claims: folder for JSON, plots and report, which are overwritten "
        f"(default: {_FULL_OUTPUT}, with --quick {_QUICK_OUTPUT})",
    )
    parser.add_argument("--workers", type=int, default=2, help="claims: processes")
    parser.set_defaults(run=_simulate)


def _simulate(arguments: argparse.Namespace) -> int:
    if arguments.what == "claims":
        return _claims(arguments)
    result = simulate(
        SimulationOptions(
            policy=arguments.policy,
            workload=arguments.workload,
            trace=arguments.trace,
            trace_lengths=arguments.trace_lengths,
            nodes=arguments.nodes,
            adapters=arguments.adapters,
            seed=arguments.seed,
            rate=arguments.rate,
            duration_s=arguments.duration,
            cv=arguments.cv,
            lengths=arguments.lengths,
            alpha=arguments.alpha,
            profile=arguments.profile,
            slo=Slo(arguments.slo_ttft, arguments.slo_tbt),
            interval_s=arguments.interval,
            replicas=arguments.replicas,
            host_gib=arguments.host_gib,
            failures=tuple(_failure(text) for text in arguments.fail),
        )
    )
    if arguments.json:
        print(json.dumps(result))
    else:
        Console().print(_table(result))
    return 0


def _failure(text: str) -> Failure:
    parts = text.split(":")
    try:
        if len(parts) not in (2, 3):
            raise ValueError
        return Failure(float(parts[0]), int(parts[1]), float(parts[2]) if parts[2:] else 60.0)
    except ValueError:
        raise InvalidArgumentError("fail", f"{text!r} is not TIME:NODE[:DOWN]") from None


def _table(result: Result) -> Table:
    table = Table(show_header=False)
    for key, value in result.items():
        if "bytes" in key and isinstance(value, int | float):
            text = f"{value / _BYTES:.1f} GiB"
        else:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(key, text)
    return table


def _claims(arguments: argparse.Namespace) -> int:
    if not 1 <= arguments.workers <= 256:
        raise InvalidArgumentError("workers", f"{arguments.workers} is not within 1 and 256")
    usual = _QUICK_OUTPUT if arguments.quick else _FULL_OUTPUT
    output: Path = getattr(arguments, "output", usual)
    report = run_claims(arguments.quick, arguments.workers, output, print)
    print(f"report: {report}")
    return 0
