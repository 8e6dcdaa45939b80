"""The simulated engine against CostModel and against a plain simulator that takes every step."""

import random
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.errors import InvalidArgumentError
from loraserve.placement.cost_model import CostModel, Profile, Slo, StepLoad
from loraserve.sim.gaps import GapHistogram
from loraserve.sim.node_model import EngineSettings, NodeEngine
from loraserve.sim.replay import mean_ttft_s, replay
from loraserve.sim.sequence import BASE_ONLY, AdapterTable, Request, SimSequence

# Sums and products of these are exact in floating point, so that times can be compared with ==.
EXACT = CostModel(
    step_s=2**-7,
    prefill_token_s=2**-14,
    decode_token_s=2**-15,
    context_token_s=2**-20,
    chunk_context_s=2**-22,
    token_rank_s=2**-20,
    token_max_rank_s=0.0,
    adapter_s=2**-16,
    adapter_byte_s=2**-24,
)
# With both hinges, in the middle of what the tests' steps do.
HINGED = replace(
    EXACT,
    batch_token_s=2**-13,
    batch_tokens=5,
    spill_byte_s=2**-21,
    cache_bytes=1000,
    context_bytes=2,
)
RANKS = (8, 16, 64, 128)
TABLE = AdapterTable.of(RANKS, bytes_per_rank=4, kv_token_bytes=64)


def profile(**changes: object) -> Profile:
    base = Profile("test", "base", "none", EXACT, 64, 8, bytes_per_rank=4)
    return replace(base, **changes)  # type: ignore[arg-type]


def requests(count: int, seed: int, spread_s: float = 4.0) -> list[Request]:
    rng = random.Random(seed)
    # No two at the same time: the first would begin alone here, and together in the plain one.
    times = sorted(t / 2**12 for t in rng.sample(range(int(spread_s * 2**12)), count))
    return [
        Request(t, rng.randrange(-1, len(RANKS)), rng.randrange(1, 200), rng.randrange(1, 60))
        for t in times
    ]


def results(done: list[SimSequence]) -> list[tuple[int, float, float, int, int]]:
    return [(s.order, s.first_token_s, s.finish_s, s.gaps, s.late_gaps) for s in done]


class PlainSequence:
    def __init__(self, order: int, request: Request) -> None:
        self.order, self.request = order, request
        self.computed = self.generated = 0
        self.first = self.finish = -1.0


def plain(profile: Profile, requests: list[Request]) -> list[tuple[int, float, float]]:
    """Step by step, every step's time from CostModel.seconds: no jumps, no running sums, no
    limits of memory or installs."""
    waiting = [PlainSequence(i, r) for i, r in enumerate(requests)]
    running: list[PlainSequence] = []
    done: list[PlainSequence] = []
    now = 0.0
    while waiting or running:
        if not running and waiting[0].request.time_s > now:
            now = waiting[0].request.time_s
        decodes = [s for s in running if s.generated]
        budget = profile.max_batch_tokens - len(decodes)
        chunks = []
        for s in [s for s in running if not s.generated]:
            count = min(s.request.prompt_tokens - s.computed, budget)
            if count > 0:
                chunks.append((s, count))
                budget -= count
        while (
            waiting
            and waiting[0].request.time_s <= now
            and budget > 0
            and len(running) < profile.max_sequences
        ):
            s = waiting.pop(0)
            running.append(s)
            count = min(s.request.prompt_tokens, budget)
            chunks.append((s, count))
            budget -= count
        tokens = [(s.request.adapter, 1) for s in decodes]
        tokens += [(s.request.adapter, count) for s, count in chunks]
        with_lora = [(a, n) for a, n in tokens if a != BASE_ONLY]
        distinct = {a for a, _ in with_lora}
        top = max((RANKS[a] for a in distinct), default=0)
        load = StepLoad(
            prefill_tokens=sum(count for _, count in chunks),
            decode_tokens=len(decodes),
            context_tokens=sum(s.request.prompt_tokens + s.generated for s in decodes),
            chunk_context=sum(
                sum(range(s.computed + 1, s.computed + count + 1)) for s, count in chunks
            ),
            token_ranks=sum(RANKS[a] * n for a, n in with_lora),
            token_max_rank=sum(n for _, n in with_lora) * top,
            adapters=len(distinct),
            adapter_bytes=(
                len(distinct) * top * profile.bytes_per_rank
                if profile.padded
                else sum(RANKS[a] * profile.bytes_per_rank for a in distinct)
            ),
        )
        now += profile.cost.seconds(load)
        for s, count in chunks:
            s.computed += count
            if s.computed == s.request.prompt_tokens:
                s.first = now
                s.generated = 1
        for s in decodes:
            s.generated += 1
        for s in [s for s in running if s.generated == s.request.output_tokens]:
            s.finish = now
            running.remove(s)
            done.append(s)
    return sorted((s.order, s.first, s.finish) for s in done)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), padded=st.booleans(), exact=st.sampled_from([EXACT, HINGED]))
def test_the_same_times_as_step_by_step_with_the_cost_model(
    seed: int, padded: bool, exact: CostModel
) -> None:
    cost = replace(exact, token_max_rank_s=2**-20 if padded else 0.0)
    p = profile(cost=cost, padded=padded)
    work = requests(25, seed)
    done = replay(p, work, TABLE)  # installing takes no time here
    assert [(s.order, s.first_token_s, s.finish_s) for s in done] == plain(p, work)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kv=st.sampled_from([0, 400, 700]),
    cost=st.sampled_from([EXACT, HINGED]),
)
def test_jumps_equal_single_steps_exactly(seed: int, kv: int, cost: CostModel) -> None:
    """Also with preemptions, evictions and installs."""
    p = profile(cost=cost, kv_tokens=kv, install_byte_s=2.0**-14)
    work = requests(30, seed)
    gaps = [GapHistogram(), GapHistogram()]
    fast = EngineSettings()
    jumps = replay(p, work, TABLE, fast, gaps[0])
    steps = replay(p, work, TABLE, replace(fast, max_jump=1), gaps[1])
    assert results(jumps) == results(steps)
    assert gaps[0].total == gaps[1].total == sum(r.output_tokens - 1 for r in work)
    assert gaps[0].mean == pytest.approx(gaps[1].mean, rel=1e-9)


def test_a_tight_cache_preempts_and_loses_nothing() -> None:
    p = profile(kv_tokens=300)
    engines: list[NodeEngine] = []
    done: list[SimSequence] = []
    engine = NodeEngine(
        p, TABLE, EngineSettings(), Slo(), GapHistogram(), lambda _: None, done.append
    )
    engines.append(engine)
    work = [Request(0.0, i % 4, 40, 60) for i in range(8)]
    for order, request in enumerate(work):
        engine.submit(0.0, SimSequence(order, request))
    while engine.end_s is not None:
        engine.complete(engine.end_s)
        assert 0 <= engine.memory.kv_used <= 300
    assert engine.preemptions > 0
    assert sorted(s.order for s in done) == list(range(8))
    assert all(s.generated == 60 and s.gaps == 59 for s in done)
    assert engine.memory.kv_used == 0
    assert engine.running == engine.queue.count == engine.queue.tokens == 0


def test_a_request_that_never_fits_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="prompt_tokens"):
        replay(profile(kv_tokens=100), [Request(0.0, BASE_ONLY, 90, 20)])


def test_a_cold_adapter_without_room_does_not_hold_up_others() -> None:
    # While the first request runs, there is no room for adapter 3.
    p = profile(kv_tokens=150)
    work = [Request(0.0, 0, 85, 5), Request(0.01, 3, 40, 50), Request(0.02, 0, 8, 4)]
    done = replay(p, work, AdapterTable(RANKS, (32, 64, 256, 512), (10, 10, 10, 60)))
    by_order = {s.order: s for s in done}
    assert by_order[2].finish_s < by_order[1].first_token_s


def test_installs_go_on_beside_the_steps() -> None:
    """Of 32, 64, 256 and 512 bytes, one after another; those who decode notice nothing, and who
    waits joins the first step after."""
    byte_s = 2.0**-8
    p = profile(install_byte_s=byte_s)
    base = Request(0.0, BASE_ONLY, 4, 600)
    alone = replay(p, [base], TABLE)[0]
    late = [Request(2**-9, i, 4, 1) for i in range(4)]
    done = replay(p, [base, *late], TABLE)
    firsts = [s.first_token_s for s in done[1:]]
    # The installs begin with the step after the first, and end when so many bytes are written.
    step_s = alone.first_token_s
    for first_s, written in zip(firsts, (32, 96, 352, 864), strict=True):
        assert step_s + written * byte_s <= first_s <= step_s + written * byte_s + 2.5 * step_s
    assert alone.finish_s <= done[0].finish_s <= alone.finish_s + 4 * step_s


def test_an_install_with_nothing_else_to_do() -> None:
    p = profile(install_byte_s=2.0**-8)
    warm = replay(profile(), [Request(0.0, 1, 4, 3)], TABLE)[0]
    cold = replay(p, [Request(0.0, 1, 4, 3)], TABLE)[0]
    assert cold.first_token_s == pytest.approx(warm.first_token_s + 64 * 2.0**-8)
    # Who needs no adapter does not wait for it, and the engine is not busy meanwhile.
    both = replay(p, [Request(0.0, 1, 4, 3), Request(2**-9, BASE_ONLY, 4, 3)], TABLE)
    assert both[1].finish_s < both[0].first_token_s < cold.first_token_s + warm.first_token_s


@pytest.mark.parametrize(
    # In bytes: 32, 64, 256, 512. The largest does not count.
    ("limit", "begun"),
    [(0, 1), (31, 1), (32, 2), (95, 2), (96, 3), (351, 3), (352, 4)],
)
def test_bytes_under_way_are_limited(limit: int, begun: int) -> None:
    engine = NodeEngine(
        profile(install_byte_s=1.0),
        TABLE,
        EngineSettings(max_install_bytes=limit),
        *(Slo(), GapHistogram(), lambda _: None, lambda _: None),
    )
    for order in range(4):
        engine.submit(0.0, SimSequence(order, Request(0.0, order, 4, 2)))
    assert engine.installs == begun
    assert engine.end_s == 32.0


def test_crashed_sequences_keep_what_got_out() -> None:
    engine = NodeEngine(
        profile(), TABLE, EngineSettings(), Slo(), GapHistogram(), lambda _: None, lambda _: None
    )
    for order in range(3):
        engine.submit(0.0, SimSequence(order, Request(0.0, order, 20, 1000)))
    while engine.end_s is not None and engine.end_s < 0.5:
        engine.complete(engine.end_s)
    lost = engine.crash(0.5)
    assert [s.order for s in lost] == [0, 1, 2]
    for sequence in lost:
        assert 1 < sequence.generated < 64  # at 8 ms a step at least
        assert sequence.tokens == 20 + sequence.generated
        assert sequence.last_token_s <= 0.5
    assert engine.end_s is None
    assert engine.running == 0


def test_waiting_as_in_m_d_1() -> None:
    """Prompts of one size and answers of one token, one at a time: Poisson arrivals and a constant
    service time. The mean wait is rho S / (2 (1 - rho))."""
    service = 2**-7 + 32 * 2**-14
    cost = CostModel(step_s=2**-7, prefill_token_s=2**-14, decode_token_s=1e-9)
    p = profile(cost=cost, max_sequences=1, max_batch_tokens=32)
    rng = random.Random(3)
    for rho in (0.5, 0.8):
        now, work, wait, total = 0.0, [], 0.0, 0.0
        for _ in range(60_000):
            gap = rng.expovariate(rho / service)
            now += gap
            work.append(Request(now, BASE_ONLY, 32, 1))
            wait = max(0.0, wait + service - gap) if len(work) > 1 else 0.0  # Lindley's recursion
            total += wait
        mean = mean_ttft_s(replay(p, work)) - service
        assert mean == pytest.approx(total / len(work), rel=1e-6)
        assert mean == pytest.approx(rho * service / (2 * (1 - rho)), rel=0.1)


def test_gaps_are_right_to_a_percent() -> None:
    gaps = GapHistogram()
    gaps.add_run(0.010, 0.000_1, 100, 3)  # 10.0, 10.1 ... 19.9 ms, each for three sequences
    assert gaps.total == 300
    assert gaps.mean == pytest.approx(0.01495)
    assert gaps.percentile(50) == pytest.approx(0.0150, rel=0.02)
    assert gaps.percentile(95) == pytest.approx(0.0195, rel=0.02)
    assert GapHistogram().percentile(95) == 0


def test_late_steps_are_counted_within_a_jump() -> None:
    cost = CostModel(step_s=0.1, prefill_token_s=1e-6, decode_token_s=0.0, context_token_s=0.001)
    # Contexts 11, 12, ...: gaps 0.111, 0.112 ...; over 0.150 from context 51 on.
    (done,) = replay(profile(cost=cost), [Request(0.0, BASE_ONLY, 10, 61)])
    assert done.gaps == 60
    late = [c for c in range(11, 71) if float(Fraction(100 + c, 1000)) > 0.150]
    assert done.late_gaps == pytest.approx(len(late), abs=1)
