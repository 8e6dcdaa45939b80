"""Addresses, binding, and keepalive: a silent stream lives, a frozen server is found out."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraserve.errors import InvalidArgumentError, UnavailableError
from loraserve.v1 import inference_pb2, inference_pb2_grpc
from loraserve.wire import (
    MAX_STREAMS,
    SERVER_OPTIONS,
    bind,
    channel_options,
    dial,
    is_loopback,
    split_address,
)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("[::1]:0", ("::1", 0)),
        ("node-1.example:65535", ("node-1.example", 65535)),
    ],
)
def test_addresses_are_split(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["", "80", ":80", "host:", "host:x", "host:-1", "host:65536"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(InvalidArgumentError, match="host:port"):
        split_address(address)


def test_the_calls_of_one_connection_are_bounded() -> None:
    async def run() -> None:
        begun = 0
        may_end = asyncio.Event()
        may_end.set()

        async def wait(_: Any, context: Any) -> bytes:
            nonlocal begun
            begun += 1
            await may_end.wait()
            return b""

        handlers = {"Wait": grpc.unary_unary_rpc_method_handler(wait)}
        server = grpc.aio.server(options=SERVER_OPTIONS)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("x", handlers)])
        address = bind(server, "127.0.0.1:0", None)
        await server.start()
        async with dial(address) as channel:
            await channel.unary_unary("/x/Wait")(b"")  # now the client has heard of the bound
            may_end.clear()
            calls = [channel.unary_unary("/x/Wait")(b"") for _ in range(MAX_STREAMS + 50)]
            while begun <= MAX_STREAMS:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            assert begun == 1 + MAX_STREAMS <= 2000
            may_end.set()
            await asyncio.gather(*calls)
            assert begun == 1 + MAX_STREAMS + 50
        await server.stop(None)

    asyncio.run(asyncio.wait_for(run(), 180))


def test_calls_that_wait_for_a_busy_loop_are_not_cancelled() -> None:
    """Several connections' worth at once, as after a restart."""
    address: list[str] = []
    listening, cancelled, stopping = threading.Event(), threading.Event(), threading.Event()

    async def serve() -> None:
        async def answer(_: Any, context: Any) -> bytes:
            return b""

        handlers = {"Answer": grpc.unary_unary_rpc_method_handler(answer)}
        server = grpc.aio.server(options=SERVER_OPTIONS)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("x", handlers)])
        address.append(bind(server, "127.0.0.1:0", None))
        await server.start()
        listening.set()
        cancelled.wait(2)  # the loop is busy
        while not stopping.is_set():
            await asyncio.sleep(0.01)
        await server.stop(None)

    def told(call: Any) -> None:
        if call.code() is not grpc.StatusCode.OK:
            cancelled.set()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    channels = []
    try:
        assert listening.wait(30)
        calls = []
        for _ in range(3):
            own = [*channel_options(10_000, 30_000), ("grpc.use_local_subchannel_pool", 1)]
            channels.append(grpc.insecure_channel(address[0], options=own))
            method = channels[-1].unary_unary("/x/Answer")
            calls += [method.future(b"") for _ in range(MAX_STREAMS)]
        for call in calls:
            call.add_done_callback(told)
        assert Counter(call.code() for call in calls) == {grpc.StatusCode.OK: 3 * MAX_STREAMS}
    finally:
        stopping.set()
        for channel in channels:
            channel.close()
        thread.join()


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1")))
    assert not any(map(is_loopback, ("0.0.0.0:1", "[::]:1", "10.0.0.1:1", "localhost.evil:1")))


def test_a_taken_port_is_refused_with_the_reason() -> None:
    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(UnavailableError, match=f"{address}: .*in use"):
                bind(grpc.aio.server(options=SERVER_OPTIONS), address, None)
        first, second = (grpc.aio.server(options=SERVER_OPTIONS) for _ in range(2))
        address = bind(first, "127.0.0.1:0", None)
        await first.start()
        with pytest.raises(UnavailableError, match="in use"):
            bind(second, address, None)
        await first.stop(None)

    asyncio.run(run())


class Slow(inference_pb2_grpc.InferenceServiceServicer):
    async def Generate(self, request: Any, context: Any) -> Any:
        await asyncio.sleep(1.2)
        yield inference_pb2.GenerateResponse(text="at last")


def test_pings_do_not_end_a_silent_stream() -> None:
    async def run() -> list[str]:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(Slow(), server)
        address = bind(server, "127.0.0.1:0", None)
        await server.start()
        async with dial(address, options=channel_options(50, 60_000)) as channel:
            stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            texts = [m.text async for m in stub.Generate(inference_pb2.GenerateRequest())]
        await server.stop(None)
        return texts

    assert asyncio.run(run()) == ["at last"]


def test_a_frozen_server_is_found_out(tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    command = [sys.executable, "-m", "loraserve.controller.main", "--listen", "127.0.0.1:0"]
    command += ["--data-dir", str(tmp_path / "data"), "--port-file", str(port_file)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not port_file.exists() and process.poll() is None:
            time.sleep(0.02)

        async def run() -> None:
            options = channel_options(500, 2000)
            async with dial(port_file.read_text().strip(), options=options) as channel:
                stub: Any = health_pb2_grpc.HealthStub(channel)
                watching = stub.Watch(health_pb2.HealthCheckRequest())
                await watching.read()
                os.kill(process.pid, signal.SIGSTOP)
                # Without pings it would never be.
                with pytest.raises(grpc.RpcError) as caught:
                    await asyncio.wait_for(watching.read(), 60)
                error: Any = caught.value
                assert error.code() is grpc.StatusCode.UNAVAILABLE

        asyncio.run(run())
    finally:
        process.kill()
        process.wait()
