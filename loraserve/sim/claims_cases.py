"""What the claims are measured on. Fixed before any policy runs."""

from dataclasses import dataclass

# Profiles of this name with the engines' endings.
FAMILY = "a100-llama-3-8b"
ENGINES = ("padded", "proportional")
# Load of the comparison by nodes, memory and recovery.
MIDDLE_LOAD = 0.6


@dataclass(frozen=True)
class Case:
    """One workload of the comparison. `shift`: when demand changes, as a part of the duration.
    `loads` and `duration_s`: instead of the plan's."""

    name: str
    workload: str
    adapters: int = 100
    nodes: int = 8
    lengths: str = "azure_conv"
    cv: float = 1.0
    shift: float | None = None
    loads: tuple[float, ...] | None = None
    duration_s: float | None = None


@dataclass(frozen=True)
class Plan:
    """What is run. Loads are parts of what the case's nodes carry at the operating points of the
    proportional engine. `node_cases`: those whose number of nodes is searched; `sensitive`: those
    run with the LoRA coefficients times `scales`, and nearly without rank's effect."""

    cases: tuple[Case, ...]
    loads: tuple[float, ...]
    duration_s: float
    node_cases: tuple[str, ...]
    node_counts: tuple[int, ...]
    sensitive: tuple[str, ...]
    scales: tuple[float, ...]
    interval_s: float = 60.0


# Lengths "uniform" and thousands of adapters as in S-LoRA's tests: there steps meet many adapters,
# which is where ranks cost. Four minutes each, so that two cores do all of it within an hour; but
# ServeGen's day, which is uneven, takes sixteen at lower loads.
CASES = (
    Case("uniform", "uniform"),
    Case("uniform-2000", "uniform", adapters=2000, lengths="uniform"),
    Case("zipf-100", "zipf"),
    Case("zipf-1000", "zipf", adapters=1000, lengths="uniform"),
    Case("zipf-bursty", "zipf", cv=4.0),
    Case("zipf-code", "zipf", adapters=400, lengths="azure_code"),
    Case("hot-large", "hot_large"),
    Case("hot-small", "hot_small", adapters=1000, lengths="uniform"),
    Case("drift", "drift", adapters=400, lengths="uniform"),
    Case("drift-step", "drift_step", adapters=400, lengths="uniform", shift=0.5),
    Case(
        "servegen",
        "servegen",
        adapters=213,
        loads=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
        duration_s=960.0,
    ),
    Case("flash", "flash", shift=1 / 3),
    Case("slora-2000", "slora", adapters=2000, lengths="uniform"),
    Case("long-tail", "long_tail", adapters=4000, lengths="uniform"),
    Case("one-rank", "one_rank"),
    Case("two-nodes", "zipf", nodes=2),
)
FULL = Plan(
    CASES,
    loads=(0.4, 0.5, 0.6, 0.75, 0.9, 1.05),
    duration_s=240.0,
    node_cases=("zipf-1000", "long-tail"),
    node_counts=(4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20),
    sensitive=("uniform-2000", "drift"),
    scales=(0.5, 2.0),
)
QUICK = Plan(
    (
        Case("zipf", "zipf", adapters=40, nodes=4),
        Case("answers", "uniform", adapters=40, nodes=4, lengths="uniform"),
        Case("drift-step", "drift_step", adapters=40, nodes=4, shift=0.5),
    ),
    loads=(0.6, 0.9),
    duration_s=60.0,
    node_cases=("zipf",),
    node_counts=(3, 5),
    sensitive=("answers",),
    scales=(2.0,),
    interval_s=15.0,
)
