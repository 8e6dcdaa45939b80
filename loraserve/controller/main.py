"""loraserve-controller: reads the command line, runs the controller until SIGTERM or SIGINT."""

import argparse
import functools
import gc
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loraserve.command_line import number
from loraserve.controller.server import GC_THRESHOLDS, ControllerOptions, ControllerServer
from loraserve.controller.state import Settings
from loraserve.daemon import DaemonParser, run_daemon
from loraserve.logs import add_log_arguments
from loraserve.placement.cost_model import Slo
from loraserve.placement.load import DEFAULT_PROFILE, LoadModel
from loraserve.placement.operating_point import LengthMix
from loraserve.placement.policies import DEFAULT_POLICY, POLICIES
from loraserve.profiles.files import load_profile
from loraserve.security import TlsFiles

_log = logging.getLogger("loraserve.controller")

# Of the top level of a configuration file.
_SHARED = {name: name for name in ("data-dir", "keys", "log-level", "log-format")}


def _parser() -> argparse.ArgumentParser:
    parser = DaemonParser(
        prog="loraserve-controller",
        description="Keeps the adapters of a cluster, places them on nodes and publishes routes.",
        section="controller",
        shared=_SHARED,
    )
    add = parser.add_argument
    at = "HOST:PORT"
    add("--listen", default="127.0.0.1:7400", metavar=at, help="port 0 takes a free one")
    file = functools.partial(add, type=Path, metavar="FILE")
    file("--port-file", help="gets the bound address, for scripts")
    add(
        "--data-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="registry, placement and packed adapters",
    )
    add(
        "--store",
        metavar="PATH_OR_URL",
        help="of the packed adapters; URLs as of fsspec (default: `adapters` in --data-dir)",
    )
    file("--keys", help="key file; without one only loopback is served")
    file("--tls-cert", help="PEM, certificate of this server")
    file("--tls-key", help="PEM, key of --tls-cert")
    file("--tls-client-ca", help="PEM, authority of the client certificates that are demanded")
    add("--metrics-listen", metavar=at, help="loopback, of /metrics; port 0 takes a free one")
    file("--metrics-port-file", help="gets the bound address of /metrics")
    add("--policy", default=DEFAULT_POLICY, choices=sorted(POLICIES), help="of placement")
    number(add, "--replicas", 1, "COPIES", "of each adapter that are wanted")
    number(add, "--heartbeat-period", 1.0, "SECONDS", "in which nodes send two heartbeats")
    number(add, "--missed-heartbeats", 3, "PERIODS", "of silence after which a node is lost")
    number(add, "--placement-interval", 60.0, "SECONDS", "between placements by demand")
    add(
        "--move-budget-mib",
        type=float,
        metavar="MIB",
        help="of adapters that may move for balance in a placement interval (default: no limit)",
    )
    add(
        "--profile",
        metavar="FILE_OR_NAME",
        help="of the nodes' engine: a file of `loraserve bench profile`, or one that ships "
        f"(default: {DEFAULT_PROFILE.name})",
    )
    add(
        "--profile-base",
        metavar="NAME",
        help="base model that --profile stands for (default: the one it names)",
    )
    slo, mix = Slo(), LengthMix()
    number(add, "--slo-ttft", slo.ttft_p95_s, "SECONDS", "to the first token, p95")
    number(add, "--slo-tbt", slo.tbt_p95_s, "SECONDS", "between tokens, p95")
    number(add, "--prompt", mix.prompt, "TOKENS", "of a prompt, on average")
    number(add, "--output", mix.output, "TOKENS", "of an answer, on average")
    number(add, "--node-adapters", mix.adapters, "ADAPTERS", "distinct ones on a node")
    add("--end-with", type=int, metavar="PID", help="stop when this process, the parent, has gone")
    add_log_arguments(parser)
    return parser


def _load_model(arguments: argparse.Namespace) -> LoadModel:
    """Raises NotFoundError, InvalidArgumentError."""
    profile = DEFAULT_PROFILE if arguments.profile is None else load_profile(arguments.profile)
    if arguments.profile_base is not None:
        profile = replace(profile, base=arguments.profile_base)
    return LoadModel(
        profile,
        Slo(arguments.slo_ttft, arguments.slo_tbt),
        LengthMix(arguments.prompt, arguments.output, arguments.node_adapters),
    )


def _options(arguments: argparse.Namespace) -> ControllerOptions:
    tls = None
    if arguments.tls_cert or arguments.tls_key or arguments.tls_client_ca:
        tls = TlsFiles(arguments.tls_cert, arguments.tls_key, arguments.tls_client_ca)
    period, budget = arguments.heartbeat_period, arguments.move_budget_mib
    settings = Settings(
        tick_seconds=period,
        silent_ticks=arguments.missed_heartbeats,
        placement_interval_ticks=max(1, round(arguments.placement_interval / period)),
        replicas=arguments.replicas,
        move_bytes=None if budget is None else int(budget * (1 << 20)),
    )
    return ControllerOptions(
        listen=arguments.listen,
        data_dir=arguments.data_dir,
        keys=arguments.keys,
        tls=tls,
        metrics_listen=arguments.metrics_listen,
        store=arguments.store,
        policy=arguments.policy,
        settings=settings,
        load=_load_model(arguments),
    )


def _check(arguments: argparse.Namespace) -> None:
    """Ranges that argparse does not know. Exits like argparse."""
    if not 0.01 <= arguments.heartbeat_period <= 3600:
        _parser().error("--heartbeat-period: from 0.01 to 3600 seconds")
    if arguments.replicas < 1 or arguments.missed_heartbeats < 1:
        _parser().error("--replicas and --missed-heartbeats: at least 1")
    if not 0 < arguments.placement_interval < float("inf"):
        _parser().error("--placement-interval: over 0 seconds")
    budget = arguments.move_budget_mib
    if budget is not None and not 0 <= budget < float("inf"):
        _parser().error("--move-budget-mib: at least 0")
    if arguments.profile_base is not None and arguments.profile is None:
        _parser().error("--profile-base goes with --profile")
    if arguments.metrics_port_file and not arguments.metrics_listen:
        _parser().error("--metrics-port-file goes with --metrics-listen")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked by themselves. Exits like argparse where they cannot work."""
    arguments = _parser().parse_args(argv)
    _check(arguments)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 after a signal, 2 where it cannot start (one line on stderr says why)."""
    arguments = parse_arguments(argv)
    gc.set_threshold(*GC_THRESHOLDS)
    return run_daemon(
        "loraserve-controller", arguments, _log, lambda: ControllerServer(_options(arguments))
    )


if __name__ == "__main__":
    sys.exit(main())
