"""Streams that are kept going while nodes are killed and come back, one after the other.

Shared by the tests and by bench/resume_gaps.py. What a stream says is checked chunk by chunk, apart
from the client's own checks, and every whole answer against that of an undisturbed run.
"""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from loraserve import AsyncClient, SamplingParams
from loraserve.client import Completion
from loraserve.demo.cluster import Cluster
from loraserve.demo.skills import held_out_words, prompt

ADAPTERS = ["upper", "reverse", "stars"]
# Every node serves every adapter, so that one that is back has something to load, and is known to
# have come back whole.
NODES = 3
CONTROLLER_OPTIONS = ["--replicas", str(NODES)]
# Only against hangs.
ANSWER_S = 180.0
BACK_S = 180.0
# From a node's return to the next kill: some of the streams are on it again.
SETTLE_S = 0.5


@dataclass(frozen=True)
class Case:
    """What is asked. `max_tokens` makes an answer last for less than two kills, as a rule: one that
    has gone on as often as it may is not killed again (`_would_be_too_many`)."""

    text: str
    params: SamplingParams
    adapter: str | None


def cases(count: int, max_tokens: int) -> list[Case]:
    """Greedy and seeded in turn, over the base model and all adapters; none ends early."""
    names: list[str | None] = [None, *ADAPTERS]
    return [
        Case(
            prompt(word),
            SamplingParams(
                max_tokens=max_tokens, temperature=(0.0, 1.0)[i % 2], seed=i, ignore_eos=True
            ),
            names[i // 2 % len(names)],
        )
        for i, word in enumerate(held_out_words(count, seed=2))
    ]


@dataclass(frozen=True)
class Gap:
    """Between the last chunk of one attempt and the first of the next, in seconds: until the
    request was sent again, and from there to its first token. `queue` and `prefill` are parts of
    that, as the node tells them: until a step ran the request, and from there to the token."""

    until_sent: float
    to_first_token: float
    queue: float
    prefill: float

    @property
    def whole(self) -> float:
        return self.until_sent + self.to_first_token

    @property
    def beyond_prefill(self) -> float:
        return self.whole - self.prefill


@dataclass
class Report:
    """Times in seconds. `first_tokens`: of requests whose first attempt brought a token."""

    kills: int = 0
    answers: int = 0
    tokens: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: list[str] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    answer_times: list[float] = field(default_factory=list)
    attempts: dict[int, int] = field(default_factory=dict)
    exit_times: list[float] = field(default_factory=list)
    back_times: list[float] = field(default_factory=list)


class KillRun:
    """`nodes` of `cluster` are killed while `asked` are answered through `client`, again and again
    by as many streams as there are cases, each after a pause of `pause_s` in the mean."""

    def __init__(
        self, cluster: Cluster, client: AsyncClient, asked: list[Case], pause_s: float = 0.0
    ) -> None:
        self._cluster = cluster
        self._client = client
        self._asked = asked
        self._pause_s = pause_s
        self._expected: list[Completion] = []
        self._over = False
        self._sent: dict[asyncio.Task[object] | None, float] = {}
        self._running_on: dict[int, str] = {}
        # Of running answers: how often they went on elsewhere, and when they last got a token.
        self._resumes: dict[int, int] = {}
        self._heard: dict[int, float] = {}
        self._killed_at = 0.0
        self.report = Report()
        self._watch_attempts()

    def _watch_attempts(self) -> None:
        """Notes when each attempt is sent: an attempt runs in the task that reads its stream."""
        router = self._client._site.router
        began: Callable[[str, int, int], int] = router.began

        def noted(node_id: str, prompt_tokens: int, rank: int = 0) -> int:
            self._sent[asyncio.current_task()] = time.monotonic()
            return began(node_id, prompt_tokens, rank)

        router.began = noted  # type: ignore[method-assign]

    async def undisturbed(self) -> None:
        """What every case is to be answered with. The second round has caches and clocks warm."""
        for _ in range(2):
            self.report = Report()
            self._expected = list(await asyncio.gather(*map(self._answer, range(len(self._asked)))))
        assert {c.attempts for c in self._expected} == {1}
        assert self.report.lost == self.report.doubled == 0

    async def disturbed(self, kills: int, seed: int = 1) -> Report:
        """Kills that many nodes, each once the one before is back."""
        self.report = Report()
        streams = [asyncio.create_task(self._stream(i)) for i in range(len(self._asked))]
        killing = asyncio.create_task(self._kill(kills, random.Random(seed)))
        try:
            # A stream that fails ends the run; otherwise they go on until the last node is back.
            done, _ = await asyncio.wait([killing, *streams], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            self._over = True
            await asyncio.gather(killing, *streams)
        finally:
            for task in (killing, *streams):
                task.cancel()
            await asyncio.gather(killing, *streams, return_exceptions=True)
        return self.report

    async def _stream(self, index: int) -> None:
        draw = random.Random(index)
        while not self._over:
            if self._pause_s:
                await asyncio.sleep(draw.expovariate(1 / self._pause_s))
            answer = await self._answer(index)
            want = self._expected[index]
            if (answer.token_ids, answer.text) != (want.token_ids, want.text):
                self.report.wrong.append(f"case {index}: {answer.text!r}, not {want.text!r}")

    async def _answer(self, index: int) -> Completion:
        case, report = self._asked[index], self.report
        begin = last = time.monotonic()
        have, attempt, texts = 0, 0, []
        self._resumes[index] = 0
        stream = self._client.stream(
            case.text, case.params, adapter=case.adapter, timeout_s=ANSWER_S
        )
        async with stream:
            async for chunk in stream:
                now, sent = time.monotonic(), self._sent[asyncio.current_task()]
                if not have and chunk.attempt == 0:
                    report.first_tokens.append(now - begin)
                if have and chunk.attempt > attempt:
                    self._resumes[index] += 1
                    report.gaps.append(
                        Gap(sent - last, now - sent, chunk.queue_time_s, chunk.prefill_time_s)
                    )
                report.lost += max(0, chunk.first_index - have)
                report.doubled += max(0, have - chunk.first_index)
                have = chunk.first_index + len(chunk.token_ids)
                attempt, last = chunk.attempt, now
                self._heard[index] = now
                texts.append(chunk.text)
                self._running_on[index] = chunk.node_id
        del self._running_on[index]
        answer = stream.completion()
        assert "".join(texts) == answer.text
        assert have == len(answer.token_ids) == case.params.max_tokens
        report.answers += 1
        report.tokens += have
        report.answer_times.append(time.monotonic() - begin)
        report.attempts[answer.attempts] = report.attempts.get(answer.attempts, 0) + 1
        return answer

    async def _kill(self, kills: int, draw: random.Random) -> None:
        for _ in range(kills):
            name = draw.choice(sorted(self._cluster.nodes))
            await asyncio.wait_for(self._kill_one(name), BACK_S)
            await asyncio.sleep(SETTLE_S)

    async def _kill_one(self, name: str) -> None:
        """Returns when the node is back."""
        while name not in self._running_on.values() or self._would_be_too_many(name):
            await asyncio.sleep(0.01)
        process = self._cluster.nodes[name].process
        process.kill()
        began = self._killed_at = time.monotonic()
        await asyncio.to_thread(process.wait)
        self.report.exit_times.append(time.monotonic() - began)
        self.report.kills += 1
        await self._cluster.ready(self._cluster.spawn_node(name))
        while not self._holds_everything(name):
            await asyncio.sleep(0.05)
        self.report.back_times.append(time.monotonic() - began)

    def _would_be_too_many(self, name: str) -> bool:
        """Whether an answer that may not go on once more is on the node, or may be."""
        most = self._client._site.policy.max_resumes
        for index, node in self._running_on.items():
            resumes = self._resumes[index]
            if resumes >= most and node == name:
                return True
            # It is on its way to some node since the last kill.
            if resumes >= most - 1 and self._heard[index] < self._killed_at:
                return True
        return False

    def _holds_everything(self, name: str) -> bool:
        table = self._client.routes
        routes = [table.find("", adapter) for adapter in ADAPTERS]
        return all(
            route is not None and any(h.node_id == name for r in route.revisions for h in r.holders)
            for route in routes
        ) and self._is_new(name)

    def _is_new(self, name: str) -> bool:
        """Whether the table means the node's new life."""
        node = self._client.routes.nodes.get(name)
        return node is not None and node.address == self._cluster.nodes[name].address
