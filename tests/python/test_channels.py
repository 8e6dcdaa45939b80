"""Channels of the client: one per address, and calls that raise typed errors only."""

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import pytest
from fake_node import until
from request_site import abort_with, bad_node, good_node, run, token

from loraserve.client.channels import Channels, responses, unary
from loraserve.errors import (
    CancelledError,
    InvalidArgumentError,
    LoraServeError,
    UnavailableError,
    UnsupportedError,
)
from loraserve.security import TlsFiles
from loraserve.v1 import inference_pb2_grpc, node_pb2, node_pb2_grpc
from loraserve.v1.inference_pb2 import GenerateRequest


def generate(channels: Channels, address: str) -> Any:
    stub = inference_pb2_grpc.InferenceServiceStub(channels.get(address))
    return stub.Generate(GenerateRequest(request_id="r"), metadata=channels.metadata)


def info(channels: Channels, address: str) -> Any:
    stub = node_pb2_grpc.NodeServiceStub(channels.get(address))
    return stub.GetNodeInfo(node_pb2.GetNodeInfoRequest(), metadata=channels.metadata)


async def read_all(channels: Channels, address: str) -> list[Any]:
    return [m async for m in responses(channels, generate(channels, address))]


async def ask(channels: Channels, address: str) -> Any:
    return await unary(channels, info(channels, address))


def test_an_address_has_one_channel_until_it_is_dropped() -> None:
    async def test() -> None:
        channels = Channels()
        first = channels.get("127.0.0.1:1")
        assert channels.get("127.0.0.1:1") is first
        other = channels.get("[::1]:2")
        assert other is not first
        assert channels.addresses == {"127.0.0.1:1", "[::1]:2"}
        assert channels.drop(["127.0.0.1:1", "h:9"]) == [first]
        assert channels.get("127.0.0.1:1") is not first
        await first.close()
        await channels.close()
        await channels.close()
        assert not channels.addresses
        with pytest.raises(UnavailableError, match="client: is closed"):
            channels.get("127.0.0.1:1")

    run(test)


@pytest.mark.parametrize("address", ["", "h", "h:", ":1", "h:x", "h:65536", "http://h"])
def test_what_is_no_address_is_refused_by_name(address: str) -> None:
    async def test() -> None:
        channels = Channels()
        with pytest.raises(InvalidArgumentError) as caught:
            channels.get(address)
        assert caught.value.field == "address"
        assert not channels.addresses
        await channels.close()

    run(test)


def test_a_missing_tls_file_is_refused_by_name(tmp_path: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="nowhere"):
        Channels(tls=TlsFiles(ca=tmp_path / "nowhere.pem"))


def test_a_call_with_one_response_gives_it_or_a_typed_error() -> None:
    async def test() -> None:
        channels = Channels()
        async with good_node() as (_, server), bad_node(abort_with("INTERNAL")) as bad:
            assert (await ask(channels, server.address)).node_id == "good"
            with pytest.raises(UnsupportedError):  # it has no NodeService
                await ask(channels, bad.address)
        with pytest.raises(UnavailableError):
            await ask(channels, server.address)
        await channels.close()

    run(test)


@pytest.mark.parametrize("sent", [0, 1])
def test_what_the_other_side_cancelled_is_not_the_end_of_this_task(sent: int) -> None:
    async def test() -> None:
        async def serve(request: GenerateRequest, context: Any) -> None:
            for index in range(sent):
                await context.write(token(index))
            await abort_with("CANCELLED", "by the server")(request, context)

        channels = Channels()
        async with bad_node(serve) as node:
            with pytest.raises(CancelledError, match="by the server") as caught:
                await read_all(channels, node.address)
            assert caught.value.field == "rpc"
        await channels.close()

    run(test)


async def _never(_: GenerateRequest, context: Any) -> None:
    await context.write(token(0))
    await asyncio.Event().wait()


def test_cancelling_the_task_cancels_the_call() -> None:
    async def test() -> None:
        channels = Channels()
        async with bad_node(_never) as node:
            task = asyncio.ensure_future(read_all(channels, node.address))
            await until(lambda: len(node.requests) == 1, "asked")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: node.ended == 1, "ended there")
        await channels.close()

    run(test)


def test_leaving_a_stream_cancels_the_call() -> None:
    async def test() -> None:
        channels = Channels()
        async with bad_node(_never) as node:
            stream = responses(channels, generate(channels, node.address))
            assert (await anext(stream)).first_index == 0
            await stream.aclose()
            await until(lambda: node.ended == 1, "ended there")
        await channels.close()

    run(test)


@pytest.mark.parametrize("call", [read_all, ask])
def test_closing_ends_calls_as_closed(call: Callable[[Channels, str], Any]) -> None:
    async def test() -> None:
        reached = asyncio.Event()

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            reached.set()
            await reader.read(-1)
            writer.close()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        channels = Channels()
        task = asyncio.ensure_future(call(channels, address))
        await reached.wait()
        await channels.close()
        with pytest.raises(LoraServeError) as caught:
            await task
        assert str(caught.value) == "client: is closed"
        server.close()
        await server.wait_closed()

    run(test)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tasks do not know who cancelled them")
def test_a_channel_that_is_closed_under_a_call_does_not_cancel_the_task() -> None:
    async def test() -> None:
        channels = Channels()
        async with bad_node(_never) as node:
            task = asyncio.ensure_future(read_all(channels, node.address))
            await until(lambda: len(node.requests) == 1, "asked")
            (channel,) = channels.drop([node.address])
            await channel.close()
            with pytest.raises(UnavailableError, match="stream: the channel was closed"):
                await task
            asking = info(channels, node.address)
            (channel,) = channels.drop([node.address])
            await channel.close()
            with pytest.raises(UnavailableError, match="stream: the channel was closed"):
                await unary(channels, asking)
        await channels.close()

    run(test)


def test_a_call_that_was_made_before_the_end_is_a_typed_error() -> None:
    async def test() -> None:
        channels = Channels()
        async with bad_node(_never) as node:
            calls = [generate(channels, node.address), info(channels, node.address)]
            await channels.close()
            with pytest.raises(UnavailableError, match="client: is closed"):
                await anext(responses(channels, calls[0]))
            with pytest.raises(UnavailableError, match="client: is closed"):
                await unary(channels, calls[1])

    run(test)
