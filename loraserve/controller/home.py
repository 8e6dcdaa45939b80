"""A first home for one adapter, beside what stands: placing one must not cost what placing all
does. The next whole placement may think better of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loraserve.controller.targets import Target, target
from loraserve.placement.types import AdapterId, AdapterSpec, NodeCapacity

# Nodes whose predicted utilisation, or use of memory, is in the same step are alike.
LOAD_STEP = 0.05
MEMORY_STEP = 0.1
# A node with so many times the mean number of adapters is crowded.
CROWDED = 1.5


@dataclass(frozen=True)
class Site:
    """A node as it stands: bytes and adapters that it is to hold, the largest rank with demand or,
    where it has none, of all, and the utilisation that was predicted last."""

    capacity: NodeCapacity
    promised_bytes: int
    adapters: int
    rank: int
    utilisation: float


def first_home(
    spec: AdapterSpec,
    sites: Iterable[Site],
    forbidden: frozenset[tuple[AdapterId, str]],
    replicas: int,
) -> Target:
    """Up to `replicas` nodes in different failure domains, the best first; none where no node has
    room. Adapters of like rank go together where load and memory leave the choice."""
    able = [
        s
        for s in sites
        if s.capacity.base == spec.adapter.base
        and not 0 < s.capacity.max_rank < spec.max_rank
        and s.promised_bytes + spec.size_bytes <= s.capacity.adapter_memory_bytes
        and (spec.adapter, s.capacity.node_id) not in forbidden
    ]
    if not able:
        return Target()
    crowd = CROWDED * sum(s.adapters for s in able) / len(able) + 1
    chosen: list[str] = []
    domains: set[str] = set()
    for site in sorted(able, key=lambda s: _dislike(spec, s, crowd)):
        domain = site.capacity.domain or f"\0{site.capacity.node_id}"
        if domain not in domains:
            domains.add(domain)
            chosen.append(site.capacity.node_id)
        if len(chosen) == replicas:
            break
    return target(tuple(chosen))


def _dislike(spec: AdapterSpec, site: Site, crowd: float) -> tuple[float, ...]:
    used = site.promised_bytes / max(1, site.capacity.adapter_memory_bytes)
    return (
        site.utilisation // LOAD_STEP,
        used // MEMORY_STEP,
        site.adapters > crowd,
        abs(site.rank - spec.max_rank) if site.adapters else 0,
        used,
    )


def stays(spec: AdapterSpec, wanted: Target, sites: Mapping[str, Site]) -> bool:
    """Whether all nodes of `wanted`, which hold an earlier revision, can hold this one."""
    return bool(wanted.nodes) and all(
        n in sites
        and not 0 < sites[n].capacity.max_rank < spec.max_rank
        and sites[n].promised_bytes + spec.size_bytes <= sites[n].capacity.adapter_memory_bytes
        for n in wanted.nodes
    )
