"""Clients that go away, are slow, or do not speak HTTP: what they hold is free again at once."""

import asyncio
import contextlib
import socket
from typing import Any

import pytest
from fake_node import BASE, FakeEngine, until
from http_site import ask, connected, fronted
from node_calls import run

from loraserve.gateway import connection, http
from loraserve.gateway.connection import BoundedConnection
from loraserve.node.limits import Limits

LONG = {"model": BASE, "prompt": [5, 6], "max_tokens": 1_000_000}
STREAM = LONG | {"stream": True}


def test_a_client_that_leaves_ends_its_request() -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.002)
        async with fronted(engine) as server:
            for body in (STREAM, STREAM | {"n": 3}, LONG, LONG | {"n": 3}):
                for leave in ("close", "reset"):
                    async with connected(server.address) as client:
                        await client.request("POST", "/v1/completions", body)
                        count = body.get("n", 1)
                        await until(lambda n=count: len(engine.live) == n, "runs")  # type: ignore[misc]
                        if "stream" in body:
                            await client.head()
                            await client.part()
                        getattr(client, leave)()
                        await until(lambda: not engine.live, f"freed after {leave}")
            metrics = server._site.metrics
            await until(lambda: not metrics.running and not metrics.waiting, "counted out")
            assert server._site.sessions._users == {}

    run(test)


def test_a_client_that_leaves_while_it_waits_ends_its_request() -> None:
    """Before its first token: the node has not begun it."""

    async def test() -> None:
        engine = FakeEngine(step_s=1000)
        async with fronted(engine) as server:
            async with connected(server.address) as client:
                await client.request("POST", "/v1/chat/completions", _chat(stream=True))
                await until(lambda: len(engine.live) == 1, "waits")
            await until(lambda: not engine.live, "freed")

    run(test)


def _chat(**more: Any) -> dict[str, Any]:
    return {"model": BASE, "messages": [{"role": "user", "content": "x"}], **more}


def test_disconnects_before_the_request_is_there(caplog: pytest.LogCaptureFixture) -> None:
    whole = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 400\r\n\r\n{"

    async def test() -> None:
        async with fronted(FakeEngine()) as server:
            assert server._uvicorn is not None
            state = server._uvicorn.server_state
            for end in range(0, len(whole) + 1, 7):
                async with connected(server.address) as client:
                    await client.send(whole[:end])
                    client.reset()
            await until(lambda: not state.connections and not state.tasks, "all gone")
            assert (await ask(server.address, "/health")).status == 200

    run(test)
    assert "Exception" not in caplog.text
    assert "Traceback" not in caplog.text


def test_headers_must_come_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with (
            fronted(FakeEngine(step_s=0.05)) as server,
            connected(server.address) as patient,
        ):
            await patient.request("GET", "/health")
            assert (await patient.answer()).status == 200
            monkeypatch.setattr(BoundedConnection, "headers_timeout_s", 0.2)
            async with connected(server.address) as silent:
                assert b" 408 " in await silent.gone()
            async with connected(server.address) as slow:
                await slow.send(b"GET /health HTTP/1.1\r\n")

                async def drip() -> None:
                    with contextlib.suppress(ConnectionError):
                        while True:
                            await slow.send(b"x-a: b\r\n")
                            await asyncio.sleep(0.02)

                dripping = asyncio.create_task(drip())
                assert b" 408 " in await slow.gone()
                dripping.cancel()
            # A request that takes longer than that is not meant, nor a pause between two.
            for _ in range(2):
                await patient.request("POST", "/v1/completions", STREAM | {"max_tokens": 8})
                assert (await patient.answer()).events[-1] == "[DONE]"
                await asyncio.sleep(0.3)

    run(test)


def test_a_body_must_come_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http.Request.body, "__defaults__", (0.2,))

    async def test() -> None:
        async with fronted(FakeEngine()) as server, connected(server.address) as client:
            await client.send(
                b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{"
            )
            answer = await client.answer()
            assert answer.status == 408
            assert await client.gone() == b""

    run(test)


def test_a_body_that_comes_behind_an_answer_does_not_cut_it_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pipelined: nothing is read for the second before the first is done. Then its time begins."""
    monkeypatch.setattr(BoundedConnection, "unread_body_timeout_s", 0.2)

    async def test() -> None:
        async with (
            fronted(FakeEngine(step_s=0.05)) as server,
            connected(server.address) as client,
        ):
            await client.request("POST", "/v1/completions", STREAM | {"max_tokens": 20})
            await client.send(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{"
            )
            first = await asyncio.wait_for(client.answer(), 60)
            assert first.events[-1] == "[DONE]"
            await client.gone(60)

    run(test)


def test_headers_that_come_behind_an_answer_do_not_cut_it_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BoundedConnection, "headers_timeout_s", 0.2)

    async def test() -> None:
        async with (
            fronted(FakeEngine(step_s=0.05)) as server,
            connected(server.address) as client,
        ):
            await client.request("POST", "/v1/completions", STREAM | {"max_tokens": 20})
            await client.send(b"GET /health HTTP/1.1\r\n")
            first = await asyncio.wait_for(client.answer(), 60)
            assert first.events[-1] == "[DONE]"
            assert b" 408 " in await client.gone(60)

    run(test)


def test_sizes_are_bounded() -> None:
    async def test() -> None:
        async with fronted(FakeEngine(), max_body_bytes=2048) as server:
            big = {"model": BASE, "prompt": "x" * 4096}
            answer = await ask(server.address, "/v1/completions", big)
            assert answer.status == 413
            assert "2048" in answer.error["message"]
            async with connected(server.address) as client:
                # No length given: it counts what comes.
                await client.send(
                    b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\n"
                    + b"transfer-encoding: chunked\r\n\r\n"
                    + b"400\r\n"
                    + b"x" * 1024
                    + b"\r\n400\r\n"
                    + b"x" * 1024
                    + b"\r\n2\r\nxx\r\n0\r\n\r\n"
                )
                assert (await client.answer()).status == 413
            for head in (
                b"GET /health HTTP/1.1\r\nx-long: " + b"x" * 40000,
                b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 9000,
                b"GET /" + b"x" * 40000,
            ):
                async with connected(server.address) as client:
                    await client.send(head + b"\r\n\r\n")
                    assert (await client.gone()).split(b" ")[1] in (b"431", b"400")
            assert (await ask(server.address, "/health")).status == 200

    run(test)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS handshake
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET http://[/ HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
        b"POST /x HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nbad header\r\n\r\n",
        b"\r\n" * 100 + b"nonsense\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused_and_nothing_else_happens(data: bytes) -> None:
    async def test() -> None:
        async with fronted(FakeEngine()) as server:
            async with connected(server.address) as client:
                await client.send(data)
                client.writer.write_eof()
                answer = await client.gone()
                assert answer.split(b" ")[1:2] in ([], [b"400"], [b"404"], [b"405"], [b"413"])
            assert (await ask(server.address, "/health")).status == 200

    run(test)


def test_a_reader_that_stops_is_cut_off_and_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BoundedConnection, "stall_timeout_s", 3.0)

    class Letters(FakeEngine):
        """Every token has a text."""

        @staticmethod
        def token(call: dict[str, Any], index: int) -> int:
            return 65 + index % 26

    async def test() -> None:
        engine = Letters()
        limits = Limits(stall_timeout_s=60)
        async with (
            fronted(engine, limits=limits) as server,
            connected(server.address) as stopped,
        ):
            stopped.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await stopped.request("POST", "/v1/completions", STREAM)
            await until(lambda: len(engine.live) == 1, "runs")
            assert server._uvicorn is not None
            for served in server._uvicorn.server_state.connections:  # so that it is full soon
                served.transport.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
                )
            other = LONG | {"max_tokens": 50}
            for _ in range(3):
                assert (await ask(server.address, "/v1/completions", other)).status == 200
            # Credit keeps the answer from growing without end meanwhile.
            await until(lambda: not engine.live, "cut off")

    run(test)


def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedConnection, "max_connections", 2)

    async def test() -> None:
        async with fronted(FakeEngine()) as server:
            async with connected(server.address) as one, connected(server.address) as two:
                await one.request("GET", "/health")
                await one.answer()
                await two.request("GET", "/health")
                await two.answer()
                async with connected(server.address) as three:
                    assert b" 503 " in await three.gone()
            await until(lambda: not server._uvicorn.server_state.connections, "gone")  # type: ignore[union-attr]
            assert (await ask(server.address, "/health")).status == 200

    run(test)


def test_streams_end_before_the_server_does() -> None:
    async def test() -> None:
        async with (
            fronted(FakeEngine(step_s=0.01), drain_timeout_s=60.0) as server,
            connected(server.address) as client,
        ):
            usage = {"stream_options": {"include_usage": True}}
            await client.request("POST", "/v1/completions", STREAM | usage | {"max_tokens": 40})
            await client.head()
            stopping = asyncio.create_task(server.stop())
            text = b""
            while part := await client.part():
                text += part
            assert text.endswith(b"data: [DONE]\n\n")
            assert b'"completion_tokens": 40,' in text
            await stopping

    run(test)


def test_limits_are_what_is_documented() -> None:
    assert connection.HEADERS_TIMEOUT_S == 10
    assert connection.MAX_HEADER_BYTES == 32 << 10
    assert http.BODY_TIMEOUT_S == 30


def test_bytes_that_begin_no_request_keep_no_connection_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        async with fronted(FakeEngine()) as server, connected(server.address) as client:
            await client.request("GET", "/health")
            assert (await client.answer()).status == 200
            monkeypatch.setattr(BoundedConnection, "headers_timeout_s", 0.2)
            await client.send(b"\r\n")
            assert b" 408 " in await client.gone(60)

    run(test)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_read_to_its_end_before_the_answer(chunked: bool) -> None:
    """Else the connection would be reset, and most clients would never see the answer."""
    part, parts = b"x" * (1 << 20), 16
    about = "transfer-encoding: chunked" if chunked else f"content-length: {len(part) * parts}"
    head = f"POST /tokenize HTTP/1.1\r\nhost: localhost\r\n{about}\r\n\r\n".encode()

    def post(address: str) -> bytes:
        host, port = address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), 60) as client:
            client.sendall(head)
            for _ in range(parts):
                client.sendall(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
            client.sendall(b"0\r\n\r\n" if chunked else b"")
            data = b""
            while more := client.recv(1 << 16):
                data += more
            return data

    async def test() -> None:
        async with fronted(FakeEngine(), max_body_bytes=2048) as server:
            answer = await asyncio.to_thread(post, server.address)
            assert answer.startswith(b"HTTP/1.1 413 ")
            assert b"the limit of 2048 bytes" in answer

    run(test)


def test_what_runs_at_the_drain_timeout_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.02)
        async with (
            fronted(engine, drain_timeout_s=1.0) as server,
            connected(server.address) as whole,
            connected(server.address) as stream,
        ):
            await whole.request("POST", "/v1/completions", LONG)
            await stream.request("POST", "/v1/completions", STREAM)
            await stream.head()
            await until(lambda: len(engine.live) == 2, "both run")
            stopping = asyncio.create_task(server.stop())
            answer = await asyncio.wait_for(whole.answer(), 60)
            assert answer.status == 503
            assert "stopping" in answer.error["message"]
            text = b""
            while part := await asyncio.wait_for(stream.part(), 60):
                text += part
            *_, last, done = text.decode().strip().split("\n\n")
            assert "stopping" in last
            assert done == "data: [DONE]"
            await stopping

    run(test)
    assert "Traceback" not in caplog.text
    assert "Exception in ASGI" not in caplog.text
