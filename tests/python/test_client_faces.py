"""Client and AsyncClient: what the faces add to the parts behind them."""

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Iterator

import pytest
from fake_node import FakeEngine, serving, until

from loraserve import AsyncClient, Client, SamplingParams
from loraserve.client.resume import AnswerLog
from loraserve.errors import (
    CancelledError,
    FailedPreconditionError,
    InvalidArgumentError,
    LoraServeError,
    UnavailableError,
)
from loraserve.wire import MAX_MESSAGE_BYTES

PROMPT = [1, 2, 3]


@pytest.fixture
def slow_node() -> Iterator[tuple[str, FakeEngine]]:
    """Address of a node whose answers take 10 ms a token, and its engine."""
    engine = FakeEngine(step_s=0.01)
    ready, stop = threading.Event(), threading.Event()
    address: list[str] = []

    async def serve() -> None:
        async with serving(engine) as (server, _):
            address.append(server.address)
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(60)
    yield address[0], engine
    stop.set()
    thread.join(60)
    assert not thread.is_alive()


def test_exactly_one_of_controller_and_nodes_is_needed() -> None:
    for given in ({}, {"controller": "127.0.0.1:1", "nodes": ["127.0.0.1:2"]}):
        with pytest.raises(InvalidArgumentError, match="controller"):
            Client(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("adapter", {"adapter": ""}),
        ("revision", {"revision": "a" * 64}),
        ("prompt", {"prompt": "x" * (MAX_MESSAGE_BYTES + 1)}),
        ("priority", {"priority": 2**40}),
    ],
)
def test_what_could_never_be_meant_is_refused_here(field: str, change: dict[str, object]) -> None:
    given = {"request_id": "r", "prompt": PROMPT, "params": SamplingParams()} | change
    with pytest.raises(InvalidArgumentError) as caught:
        AnswerLog(**given)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_nobody_listens() -> None:
    with Client("127.0.0.1:1") as client:
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
            client.generate(PROMPT)
        with pytest.raises(UnavailableError):
            client.adapters.list()


def test_a_client_of_nodes_has_no_registry(slow_node: tuple[str, FakeEngine]) -> None:
    with Client(nodes=[slow_node[0]]) as client:
        client.wait_routable(["anything"])  # nothing to wait for
        with pytest.raises(FailedPreconditionError, match="controller"):
            client.adapters.list()


def test_many_threads_share_a_client(slow_node: tuple[str, FakeEngine]) -> None:
    with (
        Client(nodes=[slow_node[0]]) as client,
        concurrent.futures.ThreadPoolExecutor(16) as pool,
    ):
        params = SamplingParams(max_tokens=5)
        answers = list(pool.map(lambda n: client.generate([1] * n, params), range(1, 33)))
    assert [a.token_ids for a in answers] == [[n + i for i in range(5)] for n in range(1, 33)]


def test_completion_waits_for_the_end(slow_node: tuple[str, FakeEngine]) -> None:
    with Client(nodes=[slow_node[0]]) as client:
        stream = client.stream(PROMPT, SamplingParams(max_tokens=3))
        with pytest.raises(FailedPreconditionError, match="not ended"):
            stream.completion()
        assert len(list(stream)) == 3
        assert list(stream) == []
        assert stream.completion().token_ids == [3, 4, 5]
        stream.close()


def test_a_closed_stream_ends_its_request(slow_node: tuple[str, FakeEngine]) -> None:
    address, engine = slow_node
    with Client(nodes=[address]) as client:
        with client.stream(
            PROMPT, SamplingParams(max_tokens=1_000_000), request_id="left"
        ) as stream:
            next(stream)
        deadline = time.monotonic() + 60
        while not engine.ended:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not engine.live


def test_closing_a_client_ends_what_runs(slow_node: tuple[str, FakeEngine]) -> None:
    client = Client(nodes=[slow_node[0]])
    caught: list[LoraServeError] = []

    def ask() -> None:
        try:
            client.generate(PROMPT, SamplingParams(max_tokens=1_000_000))
        except LoraServeError as error:
            caught.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 60
    while len(slow_node[1].live) < 4:
        assert time.monotonic() < end
        time.sleep(0.01)
    client.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert len(caught) == 4
    assert {type(error) for error in caught} <= {UnavailableError, CancelledError}
    client.close()  # once more is once too often, and nothing happens
    with pytest.raises(UnavailableError, match="closed"):
        client.generate(PROMPT)
    with pytest.raises(UnavailableError, match="closed"):
        client.adapters.list()


def test_an_async_client_that_is_left_leaves_no_task(slow_node: tuple[str, FakeEngine]) -> None:
    async def test() -> None:
        async with AsyncClient(nodes=[slow_node[0]]) as client:
            answers = await asyncio.gather(*[client.generate(PROMPT) for _ in range(20)])
            assert len({a.seed for a in answers}) > 1  # each drew its own
        async with AsyncClient("127.0.0.1:1") as client:
            assert client.routes_age_s is None
            with pytest.raises(UnavailableError):
                await client.wait_routable(["sql"], timeout_s=0.2)
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()}, "no task is left")

    asyncio.run(test())


@pytest.mark.parametrize("timeout_s", [float("inf"), float("nan"), 1e300])
def test_a_timeout_must_be_a_time(timeout_s: float) -> None:
    with Client(nodes=["127.0.0.1:1"]) as client, pytest.raises(InvalidArgumentError) as caught:
        client.generate(PROMPT, timeout_s=timeout_s)
    assert caught.value.field == "timeout_s"


def test_leaving_a_stream_of_a_closed_client_hides_no_error(
    slow_node: tuple[str, FakeEngine],
) -> None:
    client = Client(nodes=[slow_node[0]])

    def leave() -> None:
        with client.stream(PROMPT, SamplingParams(max_tokens=1_000_000)) as stream:
            next(stream)
            client.close()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        leave()
