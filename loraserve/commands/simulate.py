"""`loraserve simulate`: see loraserve.sim."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loraserve.command_line import number
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
    )
    add = parser.add_argument
    add("what", nargs="?", choices=["run", "claims"], default="run", help="one run, or the report")
    add("--policy", default=defaults.policy, help=", ".join(sorted(POLICIES)))
    suite = ", ".join(f"{short} {name}" for short, name in SUITE.items())
    others = ", ".join(name for name in WORKLOADS if name not in SUITE.values())
    add("--workload", default=defaults.workload, help=f"{suite}; also {others}")
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="replay Azure .csv, Mooncake .jsonl (also .gz) or ServeGen .parquet instead",
    )
    add(
        "--trace-lengths",
        type=Path,
        metavar="FILE",
        help="ServeGen's second file (default: beside --trace, `lengths` for `rates` in its name)",
    )
    number(add, "--nodes", defaults.nodes, "NODES", "of the cluster")
    number(add, "--adapters", defaults.adapters, "ADAPTERS", "of the workload")
    number(add, "--seed", defaults.seed, "N", "of the workload and the router")
    add(
        "--rate",
        type=float,
        metavar="REQUESTS_PER_S",
        help="of the cluster (default: 60 %% of what it carries)",
    )
    number(add, "--duration", defaults.duration_s, "SECONDS", "of requests, in simulated time")
    number(add, "--cv", defaults.cv, "FACTOR", "coefficient of variation between requests")
    add("--lengths", default=defaults.lengths, help=", ".join(LENGTHS))
    number(add, "--alpha", defaults.alpha, "FACTOR", "of workload slora; 1 is uniform")
    add(
        "--profile",
        default=defaults.profile,
        help=f"a file, or one that ships: {', '.join(shipped_profiles())}",
    )
    number(add, "--slo-ttft", defaults.slo.ttft_p95_s, "SECONDS", "to the first token, p95")
    number(add, "--slo-tbt", defaults.slo.tbt_p95_s, "SECONDS", "between tokens, p95")
    number(add, "--interval", defaults.interval_s, "SECONDS", "between placements")
    number(add, "--replicas", defaults.replicas, "COPIES", "of each adapter, at least")
    number(add, "--host-gib", defaults.host_gib, "GIB", "of each node, for adapters")
    add(
        "--fail",
        action="append",
        default=[],
        metavar="TIME:NODE[:DOWN]",
        help="a node dies at that second, for so many (60); may be given repeatedly",
    )
    add("--json", action="store_true", help="one object")
    add("--quick", action="store_true", help="claims: small, a minute or two")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="claims: folder for JSON, plots and report, which are overwritten "
        f"(default: {_FULL_OUTPUT}, with --quick {_QUICK_OUTPUT})",
    )
    number(add, "--workers", 2, "PROCESSES", "claims: at once")
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
