"""Sends the demo's requests when they are due, however many still run, and checks each answer."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loraserve.client import AsyncClient
from loraserve.demo.skills import MAX_ANSWER_TOKENS, prompt
from loraserve.demo.workload import Arrival
from loraserve.errors import LoraServeError
from loraserve.sampling_params import SamplingParams

REQUEST_TIMEOUT_S = 30.0


@dataclass
class Outcome:
    """What became of one request. Times are in seconds; the first token's counts from when the
    request was due, not from when it could be sent."""

    arrival: Arrival
    text: str = ""
    tokens: int = 0
    ttft_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    """Between tokens that came after each other."""
    node_id: str = ""
    attempts: int = 1
    error: str | None = None

    @property
    def correct(self) -> bool:
        return self.error is None and self.text == self.arrival.skill.answer(self.arrival.word)


@dataclass
class Progress:
    """Of a replay that runs; lives on its event loop."""

    total: int
    started_s: float = 0.0
    """On time.monotonic's clock."""
    sent: int = 0
    in_flight: Counter[str] = field(default_factory=Counter)
    """Requests by skill."""
    most_in_flight: int = 0
    most_adapters: int = 0
    """Different adapters among the requests that ran at one moment."""
    outcomes: list[Outcome] = field(default_factory=list)
    tokens: int = 0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s if self.started_s else 0.0

    def begin(self, name: str) -> None:
        self.sent += 1
        self.in_flight[name] += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight.total())
        self.most_adapters = max(self.most_adapters, len(+self.in_flight))

    def end(self, outcome: Outcome) -> None:
        self.in_flight[outcome.arrival.skill.name] -= 1
        self.outcomes.append(outcome)


async def replay(
    client: AsyncClient,
    arrivals: Sequence[Arrival],
    progress: Progress,
    adapter_of: Callable[[Arrival], str | None] = lambda arrival: arrival.skill.name,
    burst_client: AsyncClient | None = None,
) -> None:
    """Fills `progress`; returns when the last request has ended. `burst_client` sends the burst."""
    progress.started_s = time.monotonic()
    tasks = set()
    for arrival in arrivals:
        wait_s = progress.started_s + arrival.at_s - time.monotonic()
        await asyncio.sleep(max(0.0, wait_s))
        sender = burst_client if burst_client and arrival.in_burst else client
        task = asyncio.create_task(_ask(sender, arrival, adapter_of(arrival), progress))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


async def _ask(
    client: AsyncClient, arrival: Arrival, adapter: str | None, progress: Progress
) -> None:
    outcome = Outcome(arrival)
    progress.begin(arrival.skill.name)
    params = SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0)
    last_s = progress.started_s + arrival.at_s
    try:
        stream = client.stream(
            prompt(arrival.word), params, adapter=adapter, timeout_s=REQUEST_TIMEOUT_S
        )
        async with contextlib.aclosing(stream):
            async for chunk in stream:
                outcome.text += chunk.text
                outcome.node_id, outcome.attempts = chunk.node_id, chunk.attempt + 1
                if not chunk.token_ids:
                    continue
                now_s = time.monotonic()
                if outcome.ttft_s is None:
                    outcome.ttft_s = now_s - last_s
                else:
                    outcome.gaps_s.append(now_s - last_s)
                last_s = now_s
                outcome.tokens += len(chunk.token_ids)
                progress.tokens += len(chunk.token_ids)
    except LoraServeError as error:
        outcome.error = str(error)
    finally:
        progress.end(outcome)
