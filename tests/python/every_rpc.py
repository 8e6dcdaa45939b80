"""Every RPC of every service, from the descriptors, and a way to call any of them."""

import asyncio
import importlib
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2

FILES = ("inference", "adapter", "node", "controller")
OPEN = {"/grpc.health.v1.Health/Check"}


def rpcs() -> Iterator[tuple[str, MethodDescriptor]]:
    modules = [importlib.import_module(f"loraserve.v1.{name}_pb2") for name in FILES]
    modules.append(health_pb2)
    modules.append(importlib.import_module("grpc_reflection.v1alpha.reflection_pb2"))
    for module in modules:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                yield f"/{service.full_name}/{method.name}", method


RPCS = dict(rpcs())


async def call(channel: grpc.aio.Channel, path: str, metadata: Any = ()) -> tuple[str, str]:
    """Calls any RPC with one empty message; the status code and details that come back."""
    for _ in range(20):
        code, details = await _once(channel, path, metadata)
        # grpc's client itself says so where the server ended the call before the message was out.
        if details != "Internal error from Core":
            break
    return code, details


async def _once(channel: grpc.aio.Channel, path: str, metadata: Any) -> tuple[str, str]:
    streaming = RPCS[path].client_streaming if path in RPCS else False
    kind = channel.stream_stream if streaming else channel.unary_stream
    rpc: Any = kind(path, request_serializer=lambda m: m, response_deserializer=lambda m: m)
    running = rpc(iter([b""]) if streaming else b"", metadata=metadata, timeout=60)
    try:
        async for _ in running:
            running.cancel()
    except (grpc.RpcError, asyncio.CancelledError):
        pass
    return (await running.code()).name, (await running.details()) or ""
