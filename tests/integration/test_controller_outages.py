"""The controller killed at any moment: serving goes on, and after its restart the nodes tell it all
that it knew. What it acknowledged is there. How long it took is printed and bounds nothing but what
hangs."""

import asyncio
import contextlib
import random
import time
from pathlib import Path

import pytest
from served_cluster import running

from loraserve import AsyncClient, SamplingParams
from loraserve.demo import MODEL_NAME, adapter_directory
from loraserve.demo.cluster import Cluster
from loraserve.demo.skills import SKILLS, prompt
from loraserve.errors import UnavailableError

STEADY = ["upper", "reverse", "stars"]
PATIENCE_S = 60.0
ASKING = 4
# Longer than the longest pause between two tries of a node.
LONG_OUTAGE_S = 12.0
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
# The model answers these right with every skill.
WORDS = ["stone", "dragon", "word"]


class Outages:
    def __init__(self, cluster: Cluster, client: AsyncClient, draw: random.Random) -> None:
        self.cluster, self.client, self.draw = cluster, client, draw
        self.over, self.up = False, True
        self.answered_meanwhile = 0
        self.wrong: list[str] = []
        # Name to revision, as acknowledged; None where the answer has not come, or never will.
        self.added: dict[str, str | None] = {}
        self.rebuilt: list[float] = []

    async def ask(self) -> None:
        """Whatever happens to the controller, adapters that nodes hold answer, and right."""
        while not self.over:
            name, word = self.draw.choice(STEADY), self.draw.choice(WORDS)
            answer = await self.client.generate(
                prompt(word), GREEDY, adapter=name, timeout_s=PATIENCE_S
            )
            want = next(s for s in SKILLS if s.name == name).answer(word)
            if answer.text != want:
                self.wrong.append(f"{name} of {word}: {answer.text}")
            self.answered_meanwhile += not self.up
            await asyncio.sleep(0.02)

    async def add(self) -> None:
        """New names, one after the other, so that kills meet registrations in every state."""
        path = adapter_directory("stars")
        number = 0
        while not self.over:
            number += 1
            name = f"added-{number}"
            self.added[name] = None
            with contextlib.suppress(UnavailableError):
                made = await self.client.adapters.add(name, path, base=MODEL_NAME)
                self.added[name] = made.revision
            await asyncio.sleep(0.05)

    @property
    def acknowledged(self) -> int:
        return sum(revision is not None for revision in self.added.values())

    async def outage(self, seconds: float) -> None:
        assert self.cluster.controller is not None
        begin = time.monotonic()
        while self.acknowledged <= len(self.rebuilt) + 1:
            assert time.monotonic() - begin < PATIENCE_S, "nothing is acknowledged"
            await asyncio.sleep(0.01)
        await asyncio.sleep(self.draw.uniform(0.0, 0.5))
        self.up = False
        self.cluster.controller.process.kill()
        await asyncio.to_thread(self.cluster.controller.process.wait)
        await asyncio.sleep(seconds)
        if seconds:
            await self.goes_on()
        acknowledged = {n: r for n, r in self.added.items() if r is not None}
        begin = time.monotonic()
        await self.cluster.start_controller()
        async with AsyncClient(self.cluster.address) as fresh:
            # Of a client that never heard of the time before.
            await fresh.wait_routable([*STEADY, *acknowledged], timeout_s=PATIENCE_S)
            while len(fresh.routes.nodes) < len(self.cluster.nodes):
                await asyncio.sleep(0.01)
            self.rebuilt.append(time.monotonic() - begin)
            known = {a.name: a.revision for a in await fresh.adapters.list()}
        assert acknowledged.items() <= known.items()
        assert known.keys() <= {*STEADY, *self.added}
        self.up = True

    async def goes_on(self) -> None:
        """More are answered than were asked already, and without the controller."""
        wanted, begin = self.answered_meanwhile + ASKING + 1, time.monotonic()
        while self.answered_meanwhile < wanted:
            assert time.monotonic() - begin < PATIENCE_S, "serving did not go on"
            await asyncio.sleep(0.01)

    async def run(self, outages: list[float]) -> None:
        work = [asyncio.create_task(self.ask()) for _ in range(ASKING)]
        work.append(asyncio.create_task(self.add()))
        try:
            for seconds in outages:
                await self.outage(seconds)
            self.over = True
            await asyncio.gather(*work)
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)


@pytest.mark.parametrize(
    "outages",
    [
        [0.0, 0.7, 3.0],
        pytest.param([0.1 * i for i in range(20)] + [LONG_OUTAGE_S], marks=pytest.mark.long),
    ],
    ids=["few", "many"],
)
def test_serving_goes_on_and_what_was_known_is_known_again(
    tmp_path: Path, outages: list[float]
) -> None:
    with running(tmp_path, skills=STEADY) as (cluster, _):

        async def run() -> Outages:
            async with AsyncClient(cluster.address) as client:
                await client.wait_routable(STEADY)
                found = Outages(cluster, client, random.Random(7))
                await found.run(outages)
                return found

        found = asyncio.run(run())
        print(f"rebuilt after {[round(s, 2) for s in found.rebuilt]} s")
        print(f"{found.answered_meanwhile} answers in outages, {len(found.added)} registrations")
        assert found.wrong == []
        assert len(found.rebuilt) == len(outages)
        assert found.acknowledged > len(outages)
