"""Operating points against a scan over rates, and utilisation against operating points."""

import math
from dataclasses import replace

import numpy as np
import pytest
from placement_makers import model

from loraserve.errors import InvalidArgumentError
from loraserve.placement.cost_model import CostModel, Profile, Slo, StepLoad
from loraserve.placement.load import LoadModel, default_load_model
from loraserve.placement.operating_point import LengthMix, operating_points

MODELS = {
    "proportional": model(),
    "padded": model(padded=True),
    "adapters read": model(adapter_s=300e-6),
    "few sequences": replace(model(), profile=replace(model().profile, max_sequences=24)),
    "little cache": replace(model(), profile=replace(model().profile, kv_tokens=20_000)),
    "shared memory": replace(
        model(),
        profile=replace(
            model().profile, kv_tokens=60_000, kv_token_bytes=131_072, install_byte_s=4e-11
        ),
        mix=LengthMix(512.0, 128.0, 100),
    ),
    "strict gaps": replace(model(), slo=Slo(5.0, 0.03)),
    "strict start": replace(model(), slo=Slo(0.4, 0.5)),
}


def sustains(load: LoadModel, rank: int, requests: float) -> bool:
    """Whether the SLO holds: CostModel.seconds of the mean step, iterated to its fixed point."""
    profile, mix, cost = load.profile, load.mix, load.profile.cost
    seen = mix.output + max(1.0, mix.prompt / profile.max_batch_tokens)

    size = profile.bytes_per_rank * rank

    def install(t: float) -> float:
        """Seconds of a request."""
        if not profile.kv_token_bytes or not rank:
            return 0.0
        free = profile.kv_tokens - requests * mix.output * t * (mix.prompt + mix.output / 2)
        held = max(0.0, free) / (size / profile.kv_token_bytes)
        return max(0.0, 1 - held / mix.adapters) * size * profile.install_byte_s

    def step(t: float, prefill: float | None = None) -> float:
        tokens = requests * mix.prompt * t if prefill is None else prefill
        decodes = requests * mix.output * t
        ranks = (tokens + decodes) * rank
        distinct = mix.adapters * (1 - math.exp(-requests * t * seen / mix.adapters))
        return cost.seconds(
            StepLoad(
                tokens,
                decodes,
                decodes * (mix.prompt + mix.output / 2),
                tokens * mix.prompt / 2,
                0.0 if profile.padded else ranks,
                ranks if profile.padded else 0.0,
                distinct,
                distinct * profile.bytes_per_rank * rank,
            )
        )

    t = cost.step_s
    for _ in range(3000):
        t = step(t) + requests * t * install(t)
        if t > 2 * load.slo.tbt_p95_s:
            return False
    decodes, room = requests * mix.output * t, profile.max_batch_tokens - requests * mix.output * t
    burst = requests * t + 1.645 * math.sqrt(requests * t)
    slow, full = step(t, min(room, mix.prompt * burst)), step(t, room)
    slow += min(burst, 1.0) * install(t)
    service = mix.prompt * full / room + install(t)
    busy = requests * service
    if busy >= 1:
        return False
    wait = service * math.log(max(20 * busy, 1)) / (1 - busy)
    cached = decodes * (mix.prompt + mix.output / 2)
    if profile.kv_token_bytes:
        running = mix.adapters * (1 - math.exp(-decodes / mix.adapters))
        cached += running * size / profile.kv_token_bytes
    return (
        slow <= load.slo.tbt_p95_s
        and wait + service + t <= load.slo.ttft_p95_s
        and decodes <= profile.max_sequences
        and requests * (mix.prompt + mix.output) * t <= profile.max_batch_tokens
        and (not profile.kv_tokens or cached <= profile.kv_tokens)
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rank", [0, 16, 128])
def test_is_the_highest_rate_within_the_slo(name: str, rank: int) -> None:
    load = MODELS[name]
    requests = load.points.tokens_per_s[rank] / (load.mix.prompt + load.mix.output)
    assert requests > 0
    assert sustains(load, rank, requests * 0.99)
    assert not sustains(load, rank, requests * 1.01)


@pytest.mark.parametrize("name", MODELS)
def test_utilisation_is_one_at_the_operating_point(name: str) -> None:
    load = MODELS[name]
    for rank in (8, 128):
        count = load.mix.adapters
        each = load.points.tokens_per_s[rank] / (load.mix.prompt + load.mix.output) / count
        charges = load.charges(
            np.full(count, rank * load.profile.bytes_per_rank),
            np.full(count, rank),
            np.full(count, each * load.mix.prompt),
            np.full(count, each * load.mix.output),
        )
        assert charges.alone(np.full(count, rank)).sum() == pytest.approx(1.0, rel=2e-3)


def test_falls_with_the_rank_and_is_flat_without_its_cost() -> None:
    points = model().points.tokens_per_s
    assert np.all(np.diff(points) < 0)
    assert np.ptp(model(rank_s=0.0).points.tokens_per_s) < 1e-6 * points[0]


def test_spreading_an_adapter_costs_reads() -> None:
    load = model(adapter_s=300e-6)
    one = [np.array([8000]), np.array([8]), np.array([80.0]), np.array([60.0])]
    charges = load.charges(*one)
    whole = charges.features(np.array([0]), np.array([1.0]))
    halves = charges.features(np.array([0, 0]), np.array([0.5, 0.5]))
    assert halves.sum() > 1.1 * whole.sum()


def test_slow_nodes_have_less_than_their_speed() -> None:
    capacity = model().capacity(np.array([1.0, 0.5, 2.0, 0.01]))
    assert capacity[0] == pytest.approx(1.0)
    assert 0 < capacity[3] < capacity[1] < 0.5
    assert capacity[2] > 2.0


def test_the_slo_that_an_empty_step_breaks_is_refused() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        operating_points(model().profile, Slo(tbt_p95_s=0.005), LengthMix())
    assert caught.value.field == "slo.tbt_p95_s"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"token_rank_s": math.nan}, "profile.cost.token_rank_s"),
        ({"adapter_s": -1.0}, "profile.cost.adapter_s"),
        ({"step_s": 0.0}, "profile.cost"),
        ({"prefill_token_s": math.inf}, "profile.cost.prefill_token_s"),
    ],
)
def test_rubbish_in_a_profile_is_refused(change: dict[str, float], field: str) -> None:
    profile = model().profile
    bad = replace(profile, cost=replace(profile.cost, **change))
    with pytest.raises(InvalidArgumentError) as caught:
        operating_points(bad, Slo(), LengthMix())
    assert caught.value.field == field


def test_there_is_a_built_in_model() -> None:
    points = default_load_model().points.tokens_per_s
    assert 1000 < points[512] < points[0] < 50_000


def test_prices_beyond_the_hinges_are_an_upper_bound_and_exact_beyond_them() -> None:
    hinged = CostModel(
        *(1e-3, 1e-5, 2e-5, 1e-8, 1e-9, 1e-7, 0.0, 1e-5, 1e-11),
        batch_token_s=3e-5,
        batch_tokens=8,
        spill_byte_s=4e-11,
        cache_bytes=1e7,
        context_bytes=4096,
    )
    flat = hinged.loaded()
    most = hinged.batch_token_s * hinged.batch_tokens + hinged.spill_byte_s * hinged.cache_bytes
    rng = np.random.default_rng(0)
    beyond = 0
    for _ in range(200):
        prefill, decode, adapters = (int(v) for v in rng.integers(0, 20, 3))
        load = StepLoad(
            prefill + 1, decode, decode * 150, prefill * 30, 8 * decode, 0, adapters, adapters * 1e6
        )
        more = flat.seconds(load) - hinged.seconds(load)
        assert -1e-12 <= more <= most + 1e-12
        held = load.adapter_bytes + 4096 * (load.context_tokens + load.prefill_tokens)
        if prefill + 1 + decode >= 8 and held >= 1e7:
            beyond += 1
            assert more == pytest.approx(most)
    assert beyond > 20
    # A hinged engine carries less than one without, and no more than its prices say.
    profile = Profile("p", "b", "d", hinged, 256, 64, 20_000)
    free = replace(profile, cost=replace(hinged, batch_token_s=0.0, spill_byte_s=0.0))
    rates = [operating_points(p, Slo(), LengthMix(64, 32, 8)).tokens_per_s for p in (profile, free)]
    assert (rates[0] < rates[1]).all()
    same = replace(profile, cost=flat)
    assert (operating_points(same, Slo(), LengthMix(64, 32, 8)).tokens_per_s == rates[0]).all()
