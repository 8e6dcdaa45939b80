"""One simulation from options to numbers."""

from dataclasses import dataclass, field
from pathlib import Path

from loraserve.controller.state import Settings
from loraserve.errors import InvalidArgumentError
from loraserve.placement.cost_model import Profile, Slo
from loraserve.placement.operating_point import LengthMix
from loraserve.placement.policies import DEFAULT_POLICY, policy_named, routed_by_rank
from loraserve.profiles.files import DEFAULT_PROFILE, load_profile
from loraserve.sim.capacity import load_model, node_rate
from loraserve.sim.cluster import Cluster, ClusterSettings, Failure
from loraserve.sim.lengths import mean_lengths
from loraserve.sim.metrics import summary
from loraserve.sim.servegen import servegen
from loraserve.sim.suite import WorkloadOptions, make_workload, trace_workload
from loraserve.sim.traces import read_trace
from loraserve.sim.workload import RANKS, Workload, check_positive

# Without a rate: this part of what the nodes carry at their operating points, ranks equally.
DEFAULT_LOAD = 0.6
MAX_NODES = 10_000
MAX_ADAPTERS = 1_000_000

Result = dict[str, str | int | float]


@dataclass(frozen=True)
class SimulationOptions:
    """`trace` instead of `workload` replays a file; `rate` then speeds it up or slows it down."""

    policy: str = DEFAULT_POLICY
    workload: str = "zipf"
    trace: Path | None = None
    trace_lengths: Path | None = None
    nodes: int = 8
    adapters: int = 100
    seed: int = 0
    rate: float | None = None
    duration_s: float = 600.0
    cv: float = 1.0
    lengths: str = "azure_conv"
    alpha: float = 1.0
    profile: str = DEFAULT_PROFILE
    slo: Slo = field(default_factory=Slo)
    interval_s: float = 60.0
    replicas: int = 1
    host_gib: float = 256.0
    clients: int = 4
    failures: tuple[Failure, ...] = ()


def check(options: SimulationOptions) -> None:
    """Raises InvalidArgumentError that names the option."""
    o = options
    for name, value, most in (
        ("nodes", o.nodes, MAX_NODES),
        ("adapters", o.adapters, MAX_ADAPTERS),
        ("replicas", o.replicas, MAX_NODES),
        ("clients", o.clients, MAX_NODES),
    ):
        if not 1 <= value <= most:
            raise InvalidArgumentError(name, f"{value} is not within 1 and {most}")
    check_positive(duration=o.duration_s, cv=o.cv, interval=o.interval_s, host_gib=o.host_gib)
    check_positive(slo_ttft=o.slo.ttft_p95_s, slo_tbt=o.slo.tbt_p95_s)
    if o.rate is not None:
        check_positive(rate=o.rate)
    if o.interval_s < 1:
        raise InvalidArgumentError("interval", f"{o.interval_s} is under 1 s")


def default_rate(options: SimulationOptions, profile: Profile) -> float:
    prompt, output = mean_lengths(options.lengths)
    mix = LengthMix(prompt, output, max(1, options.adapters // options.nodes))
    rate = node_rate(profile, options.slo, mix, RANKS)
    if not rate:
        raise InvalidArgumentError(
            "slo", f"profile {profile.name!r} cannot meet it with lengths {options.lengths!r}"
        )
    return DEFAULT_LOAD * options.nodes * rate


def workload_of(options: SimulationOptions, profile: Profile) -> Workload:
    """Raises what the readers raise."""
    o = options
    if o.trace is None:
        rate = default_rate(o, profile) if o.rate is None else o.rate
        made = WorkloadOptions(o.adapters, rate, o.duration_s, o.seed, o.cv, o.lengths, o.alpha)
        return make_workload(o.workload, made)
    if o.trace.suffix == ".parquet":
        rate = default_rate(o, profile) if o.rate is None else o.rate
        beside = o.trace_lengths or o.trace.with_name(o.trace.name.replace("rates", "lengths"))
        return servegen(rate, o.duration_s, o.seed, o.adapters, o.trace, beside)
    return trace_workload(o.trace.name, read_trace(o.trace), o.adapters, o.seed, o.rate)


def simulate(options: SimulationOptions) -> Result:
    """The numbers of one run. Raises LoraServeError."""
    check(options)
    profile = load_profile(options.profile)
    policy_named(options.policy)  # before a workload is made in vain
    return simulate_workload(options, profile, workload_of(options, profile))


def simulate_workload(options: SimulationOptions, profile: Profile, workload: Workload) -> Result:
    """Only the options of the cluster count."""
    cluster = make_cluster(options, profile, workload)
    cluster.run()
    return result_of(options, profile, workload, cluster)


def result_of(
    options: SimulationOptions, profile: Profile, workload: Workload, cluster: Cluster
) -> Result:
    """Of a cluster that has run."""
    return {
        "policy": options.policy,
        "workload": workload.name,
        "profile": profile.name,
        "nodes": options.nodes,
        "adapters": len(workload.ranks),
        "seed": options.seed,
        "duration_s": workload.duration_s,
        "rate_per_s": len(workload) / workload.duration_s,
        **summary(cluster.meter, len(workload), workload.duration_s, cluster.now_s),
        "bytes_moved": cluster.bytes_moved,
        "full_replication_bytes": options.nodes * sum(cluster.adapters.sizes),
        "preemptions": sum(node.engine.preemptions for node in cluster.nodes),
        "events": cluster.events,
    }


def make_cluster(options: SimulationOptions, profile: Profile, workload: Workload) -> Cluster:
    settings = ClusterSettings(
        nodes=options.nodes,
        host_bytes=int(options.host_gib * (1 << 30)),
        control=Settings(
            placement_interval_ticks=round(options.interval_s), replicas=options.replicas
        ),
        slo=options.slo,
        clients=options.clients,
        failures=options.failures,
        seed=options.seed,
    )
    load = load_model(profile, options.slo, workload, options.nodes)
    policy = policy_named(options.policy)
    by_rank = routed_by_rank(options.policy)
    return Cluster(workload, profile, policy, load, settings, by_rank)
