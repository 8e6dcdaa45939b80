"""Operating points: the highest token rate of one rank that a node sustains within the SLO.

Steady state of continuous batching. Requests arrive at rate q (1/s), each of `prompt` prefill and
`output` decode tokens. With a mean step time t, a step finds q t requests' worth of work, so

    t = step_s + a(t) + q t w       or      q w + (step_s + a(t)) / t = 1              (balance)

with w the seconds of token work per request (prefill, decode, attention over a context of
prompt + output / 2, products with the adapters; and installing its adapter where the memory that
the KV cache leaves does not hold them all) and a(t) the reads of the distinct adapters of a step.
Of A equally wanted adapters a step with B tokens' worth of appearances sees A (1 - exp(-B / A))
(Poisson arrivals). q grows with t, and so does everything that limits it:

    sequences   q output t                       <= max_sequences        (Little's law)
    tokens      q (prompt + output) t            <= max_batch_tokens
    KV cache    q output t (prompt + output / 2) + running (bytes / kv_token_bytes) <= kv_tokens:
                of A equally wanted adapters A (1 - exp(-q output t / A)) have a request running
    TBT p95     a step with decodes and the prefill of n95 requests, n95 = m + 1.645 sqrt(m) the
                normal approximation of a Poisson 95th percentile with mean m = q t, within the
                batch's token budget, and one install at most
    TTFT p95    W95 + S + t: S is the time of a prompt where full batches leave room for prefill,
                W95 = S ln(20 rho) / (1 - rho), rho = q S, the 95th percentile of waiting in an
                M/M/1 queue (Kleinrock, Queueing Systems I, section 3.2)

so the operating point is the largest t, found by bisection, for which all hold. Tokens and bytes
have the prices beyond the cost model's hinges (`CostModel.loaded`): node loads must add up, and at
the SLO steps are beyond them.
"""

from dataclasses import dataclass

import numpy as np

from loraserve.errors import InvalidArgumentError
from loraserve.placement.arrays import Bools, Floats
from loraserve.placement.cost_model import Profile, Slo

MAX_RANK = 512
# The shortest step considered, in fixed step costs: a rank whose SLO cannot be met is charged as
# if this were its operating point, a thousandth of a node.
SHORTEST_STEP = 1.001
NORMAL_P95 = 1.645


@dataclass(frozen=True)
class LengthMix:
    """Mean tokens of a request, and the distinct adapters that share a node."""

    prompt: float = 512.0
    output: float = 128.0
    adapters: int = 16


@dataclass(frozen=True, eq=False)
class OperatingPoints:
    """Columns by rank, 0 to MAX_RANK. `tokens_per_s` counts prefill and decode; it is 0 where the
    SLO cannot be met at any rate. `step_s` is the mean step time there."""

    tokens_per_s: Floats
    step_s: Floats
    prefill_work_s: Floats
    """Seconds of a node for one prefill token at this rank, without fixed costs of steps."""
    decode_work_s: Floats
    read_s: Floats
    """Seconds to read one adapter of this rank in a step."""
    kept_s: Floats
    """How long an adapter that nobody asks for stays on the device; infinite where all fit."""


def check_profile(profile: Profile, slo: Slo, mix: LengthMix) -> None:
    """Raises InvalidArgumentError that names the field."""
    at_least = [(f"profile.cost.{k}", v, 0.0) for k, v in vars(profile.cost).items()]
    at_least.append(("profile.kv_tokens", profile.kv_tokens, 0.0))
    at_least.append(("profile.bytes_per_rank", profile.bytes_per_rank, 0.0))
    at_least.append(("profile.kv_token_bytes", profile.kv_token_bytes, 0.0))
    at_least.append(("profile.install_byte_s", profile.install_byte_s, 0.0))
    at_least.append(("mix.output", mix.output, 1.0))
    at_least.append(("mix.prompt", mix.prompt, 1.0))
    at_least.append(("mix.adapters", mix.adapters, 0.0))
    at_least.append(("profile.max_batch_tokens", profile.max_batch_tokens, 1.0))
    at_least.append(("profile.max_sequences", profile.max_sequences, 1.0))
    for field, value, least in at_least:
        if not (np.isfinite(value) and value >= least):
            raise InvalidArgumentError(field, f"{value}: a finite number, at least {least:g}")
    for field, value in (("slo.ttft_p95_s", slo.ttft_p95_s), ("slo.tbt_p95_s", slo.tbt_p95_s)):
        if not (np.isfinite(value) and value > 0):
            raise InvalidArgumentError(field, f"{value}: a finite number over 0")
    cost = profile.cost
    if cost.step_s <= 0 or cost.prefill_token_s <= 0 or cost.decode_token_s <= 0:
        raise InvalidArgumentError("profile.cost", "a step and its tokens must take time")
    if cost.step_s * SHORTEST_STEP >= slo.tbt_p95_s:
        raise InvalidArgumentError(
            "slo.tbt_p95_s", f"{slo.tbt_p95_s}: an empty step takes {cost.step_s}"
        )


def work_by_rank(profile: Profile, mix: LengthMix) -> tuple[Floats, Floats, Floats]:
    """(seconds per prefill token, per decode token, per adapter read) for ranks 0 to MAX_RANK."""
    cost = profile.cost.loaded()
    rank = np.arange(MAX_RANK + 1, dtype=np.float64)
    per_rank = cost.token_rank_s + (cost.token_max_rank_s if profile.padded else 0.0)
    context = mix.prompt + mix.output / 2
    prefill = cost.prefill_token_s + cost.chunk_context_s * mix.prompt / 2 + per_rank * rank
    decode = cost.decode_token_s + cost.context_token_s * context + per_rank * rank
    read = cost.adapter_s + cost.adapter_byte_s * profile.bytes_per_rank * rank
    return prefill, decode, read


def operating_points(profile: Profile, slo: Slo, mix: LengthMix) -> OperatingPoints:
    """Raises InvalidArgumentError (a value out of range, or an SLO below an empty step)."""
    check_profile(profile, slo, mix)
    prefill, decode, read = work_by_rank(profile, mix)
    low = np.full(MAX_RANK + 1, profile.cost.step_s * SHORTEST_STEP)
    possible = _within(profile, slo, mix, low, prefill, decode, read)
    high = np.full(MAX_RANK + 1, slo.tbt_p95_s)
    for _ in range(40):
        middle = (low + high) / 2
        good = _within(profile, slo, mix, middle, prefill, decode, read)
        low, high = np.where(good, middle, low), np.where(good, high, middle)
    requests, _, missing = _requests(profile, mix, low, prefill, decode, read)
    tokens = np.where(possible, requests * (mix.prompt + mix.output), 0.0)
    # Of equally wanted adapters under Poisson requests, exp(-rate x kept) are missing (Che, Tung,
    # Wang: Hierarchical Web caching systems, 2002).
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = -np.log(missing) * max(1, mix.adapters) / requests
    kept = np.where((missing > 0) & (requests > 0), kept, np.inf)
    return OperatingPoints(tokens, low, prefill, decode, read, kept)


def appearances(profile: Profile, mix: LengthMix) -> float:
    """Steps in which a request's adapter is needed: its tokens, and the chunks of its prompt."""
    return mix.output + max(1.0, mix.prompt / profile.max_batch_tokens)


def _balance(
    profile: Profile, mix: LengthMix, t: Floats, work: Floats, read: Floats
) -> tuple[Floats, Floats]:
    """Requests per second at mean step time t with `work` seconds each, and the seconds of adapter
    reads in a step."""
    count, seen = max(1, mix.adapters), appearances(profile, mix)
    read = read if mix.adapters else np.zeros_like(read)
    q = np.zeros_like(t)
    # The balance is concave in q: Newton's steps from 0 rise to the root and never pass it.
    for _ in range(12):
        rest = np.exp(-q * t * seen / count)
        value = q * work + (profile.cost.step_s + read * count * (1 - rest)) / t - 1
        q = q - value / (work + read * seen * rest)
    return np.maximum(q, 0), read * count * (1 - np.exp(-q * t * seen / count))


def _requests(
    profile: Profile, mix: LengthMix, t: Floats, prefill: Floats, decode: Floats, read: Floats
) -> tuple[Floats, Floats, Floats]:
    """Requests per second at mean step time t, the seconds of adapter reads in a step, and the
    part of the requests that find their adapter not on the device."""
    work = mix.prompt * prefill + mix.output * decode
    q, reads = _balance(profile, mix, t, work, read)
    missing = np.zeros_like(t)
    if not _installs(profile, mix):
        return q, reads, missing
    install = profile.install_byte_s * profile.bytes_per_rank * np.arange(len(t))
    # More requests leave less room for idle adapters, and more misses allow fewer requests: halving
    # the step finds where both agree.
    for _ in range(24):
        missing = (missing + _missing(profile, mix, q * mix.output * t)) / 2
        q, reads = _balance(profile, mix, t, work + install * missing, read)
    return q, reads, missing


def _installs(profile: Profile, mix: LengthMix) -> bool:
    shared = profile.kv_tokens and profile.kv_token_bytes and mix.adapters
    return bool(shared and profile.install_byte_s)


def _missing(profile: Profile, mix: LengthMix, sequences: Floats) -> Floats:
    """The part of equally wanted adapters for which the KV cache of so many sequences leaves no
    room, by rank."""
    size = np.arange(len(sequences)) * profile.bytes_per_rank / profile.kv_token_bytes
    room = profile.kv_tokens - sequences * (mix.prompt + mix.output / 2)
    held = np.maximum(room, 0.0) / np.maximum(size, 1e-9)
    return np.maximum(0.0, 1.0 - held / mix.adapters)


def _within(
    profile: Profile,
    slo: Slo,
    mix: LengthMix,
    t: Floats,
    prefill: Floats,
    decode: Floats,
    read: Floats,
) -> Bools:
    """Whether every limit of the module's docstring holds at mean step time t."""
    q, reads, missing = _requests(profile, mix, t, prefill, decode, read)
    install = profile.install_byte_s * profile.bytes_per_rank * np.arange(len(t)) * missing
    fixed = profile.cost.step_s + reads
    sequences = q * mix.output * t
    room = np.maximum(profile.max_batch_tokens - sequences, 0.0)
    bursts = q * t + NORMAL_P95 * np.sqrt(q * t)
    slow_step = fixed + sequences * decode + np.minimum(room, mix.prompt * bursts) * prefill
    slow_step += np.minimum(bursts, 1.0) * install
    full_step = fixed + sequences * decode + room * prefill
    service = mix.prompt * full_step / np.maximum(room, 1e-9) + install
    busy = np.minimum(q * service, 1 - 1e-9)
    wait = service * np.log(np.maximum(20 * busy, 1.0)) / (1 - busy)
    good = (sequences <= profile.max_sequences) & (q * service < 1)
    good &= q * (mix.prompt + mix.output) * t <= profile.max_batch_tokens
    if profile.kv_tokens:
        cached = sequences * (mix.prompt + mix.output / 2)
        good &= cached + _adapter_room(profile, mix, sequences) <= profile.kv_tokens
    good &= (slow_step <= slo.tbt_p95_s) & (wait + service + t <= slo.ttft_p95_s)
    return np.asarray(good)


def _adapter_room(profile: Profile, mix: LengthMix, sequences: Floats) -> Floats:
    """Tokens of the KV cache that the adapters of so many running sequences take, by rank."""
    if not profile.kv_token_bytes or not mix.adapters:
        return np.zeros_like(sequences)
    rank = np.arange(len(sequences))
    distinct = mix.adapters * -np.expm1(-sequences / mix.adapters)
    return np.asarray(distinct * rank * profile.bytes_per_rank / profile.kv_token_bytes)
