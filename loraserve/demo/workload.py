"""What the demo asks: Poisson arrivals, and a few adapters that most requests want. Pure."""

import random
from dataclasses import dataclass

from loraserve.demo.skills import SKILLS, Skill, held_out_words

# Enough that a word seldom comes twice for one skill.
_WORDS = 600


@dataclass(frozen=True)
class Arrival:
    """One request: `at_s` seconds after the start somebody asks for `word` with this skill.
    `in_burst`: many others do so at the same moment."""

    at_s: float
    skill: Skill
    word: str
    in_burst: bool = False


def popularity(count: int, exponent: float) -> list[float]:
    """Shares of the adapters, most wanted first: the k-th is proportional to k**-exponent."""
    weights = [(k + 1) ** -exponent for k in range(count)]
    total = sum(weights)
    return [weight / total for weight in weights]


def arrivals(
    seconds: float, rate_per_s: float, burst: int = 0, exponent: float = 1.0, seed: int = 0
) -> list[Arrival]:
    """Arrivals in [0, seconds), by time; the same for the same arguments. `burst` requests more
    come all at once in the middle. Which skills are popular is drawn too, so that popularity does
    not follow rank."""
    rng = random.Random(seed)
    skills = list(SKILLS)
    rng.shuffle(skills)
    shares = popularity(len(skills), exponent)
    words = held_out_words(_WORDS, seed)
    times = [(seconds / 2, True)] * burst
    at_s = rng.expovariate(rate_per_s)
    while at_s < seconds:
        times.append((at_s, False))
        at_s += rng.expovariate(rate_per_s)
    return [
        Arrival(at_s, rng.choices(skills, shares)[0], rng.choice(words), in_burst)
        for at_s, in_burst in sorted(times)
    ]
