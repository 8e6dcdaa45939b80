"""Hosts that say nothing any more, over connections that do not break."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from fake_node import until
from request_site import ANSWER, client, good_node, nodes_table, run

from loraserve import wire
from loraserve.client import channels


@contextlib.asynccontextmanager
async def _relay(address: str, frozen: asyncio.Event) -> AsyncIterator[str]:
    """Stands before a server; what is sent through it is lost from `frozen` on, and no connection
    breaks, as where a cable is cut."""
    host, port = address.split(":")
    pumps: set[asyncio.Task[None]] = set()
    writers: list[asyncio.StreamWriter] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if not frozen.is_set():
                writer.write(data)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(host, int(port))
        writers.extend((writer, up_writer))
        pumps.add(asyncio.ensure_future(pump(reader, up_writer)))
        pumps.add(asyncio.ensure_future(pump(up_reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for writer in writers:
            writer.close()


def test_a_host_that_goes_silent_is_found_and_its_answer_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire.channel_options, "__defaults__", (wire.KEEPALIVE_TIME_MS, 3000))

    async def test() -> None:
        frozen = asyncio.Event()
        async with (
            good_node(node_id="one") as (silenced, first),
            good_node(node_id="two") as (second, other),
            _relay(first.address, frozen) as silent,
            client(nodes_table(a=silent, b=other.address)) as asks,
        ):
            silenced.stops_at = 2
            task = asyncio.ensure_future(asks.answer())
            await until(lambda: asks.tokens == 2, "tokens")
            frozen.set()
            silenced.stops_at = None
            # Nothing breaks: without pings it would wait for ever.
            done = await task
            assert done.token_ids == ANSWER
            assert (done.attempts, done.node_id) == (2, "two")
            assert second.calls[0]["start_index"] == 2

    run(test)


def test_a_host_that_never_answers_costs_one_connect_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channels, "CONNECT_TIMEOUT_MS", 300)

    async def test() -> None:
        frozen = asyncio.Event()
        frozen.set()
        async with (
            good_node() as (_, server),
            _relay(server.address, frozen) as silent,
            client(nodes_table(a=silent, b=server.address)) as asks,
        ):
            begin = asyncio.get_running_loop().time()
            assert (await asks.answer()).attempts == 2
            # Well below gRPC's own 20 s.
            assert 0.2 < asyncio.get_running_loop().time() - begin < 15

    run(test)
