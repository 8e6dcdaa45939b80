"""One engine alone, without controller, network or adapters to fetch: for calibration."""

from collections.abc import Iterable, Sequence

from loraserve.placement.cost_model import Profile, Slo
from loraserve.sim.gaps import GapHistogram
from loraserve.sim.node_model import EngineSettings, NodeEngine
from loraserve.sim.sequence import AdapterTable, Request, SimSequence

NO_ADAPTERS = AdapterTable((), (), ())


def replay(
    profile: Profile,
    requests: Iterable[Request],
    adapters: AdapterTable = NO_ADAPTERS,
    settings: EngineSettings | None = None,
    gaps: GapHistogram | None = None,
) -> list[SimSequence]:
    """The requests, which come in order of time, as the engine served them."""
    done: list[SimSequence] = []
    engine = NodeEngine(
        profile,
        adapters,
        settings or EngineSettings(),
        Slo(),
        gaps if gaps is not None else GapHistogram(),
        on_first_token=lambda _: None,
        on_finish=done.append,
    )
    for order, request in enumerate(requests):
        while engine.end_s is not None and engine.end_s < request.time_s:
            engine.complete(engine.end_s)
        engine.submit(request.time_s, SimSequence(order, request))
    while engine.end_s is not None:
        engine.complete(engine.end_s)
    return sorted(done, key=lambda s: s.order)


def mean_ttft_s(sequences: Sequence[SimSequence]) -> float:
    return sum(s.first_token_s - s.arrival_s for s in sequences) / len(sequences)


def mean_tpot_s(sequences: Sequence[SimSequence]) -> float:
    """Mean over requests of more than one token of the mean time between their tokens."""
    several = [s for s in sequences if s.output_tokens > 1]
    means = [(s.finish_s - s.first_token_s) / (s.output_tokens - 1) for s in several]
    return sum(means) / len(means)
