"""A gateway in this process before a node without a model, and HTTP as a test wants to speak it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fake_node import BASE, FakeEngine, serving

from loraserve.demo import MODEL_DIRECTORY
from loraserve.gateway.server import GatewayOptions, GatewayServer
from loraserve.node.limits import Limits


@dataclass
class Answer:
    """One HTTP response, whole."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """Of server-sent ones; "[DONE]" as it is."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


class Connection:
    """One TCP connection to a gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> None:
        """`body`: bytes as they are, anything else as JSON."""
        data = (
            body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        )
        about = {"host": "localhost", "content-type": "application/json"}
        about |= {"content-length": str(len(data))} | (headers or {})
        lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in about.items())]
        await self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + data)

    async def head(self) -> Answer:
        """Status and headers of the next response."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        pairs = [line.split(": ", 1) for line in lines[1:] if line]
        headers = {name.lower(): value for name, value in pairs}
        return Answer(int(lines[0].split(" ")[1]), headers)

    async def part(self) -> bytes:
        """The next chunk of a chunked body; empty at its end."""
        size = int(await self.reader.readline(), 16)
        data = await self.reader.readexactly(size)
        assert await self.reader.readexactly(2) == b"\r\n"
        return data

    async def answer(self, method: str = "GET") -> Answer:
        answer = await self.head()
        if method == "HEAD":
            return answer
        if answer.headers.get("transfer-encoding") == "chunked":
            while part := await self.part():
                answer.body += part
        else:
            answer.body = await self.reader.readexactly(int(answer.headers["content-length"]))
        return answer

    async def gone(self, timeout_s: float = 60.0) -> bytes:
        """What still comes until the server closes the connection."""
        data = b""
        try:
            while part := await asyncio.wait_for(self.reader.read(1 << 16), timeout_s):
                data += part
        except ConnectionError:  # it had not read all that we sent
            data += bytes(self.reader._buffer)  # type: ignore[attr-defined]
        return data

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[Connection]:
    host, port = address.rsplit(":", 1)
    connection = Connection(*await asyncio.open_connection(host, int(port)))
    try:
        yield connection
    finally:
        connection.close()


async def ask(
    address: str,
    path: str,
    body: Any = None,
    method: str | None = None,
    headers: dict[str, str] | None = None,
) -> Answer:
    """One request on a connection of its own. POST where there is a body."""
    chosen = method or ("GET" if body is None else "POST")
    async with connected(address) as connection:
        await connection.request(chosen, path, body, headers)
        return await asyncio.wait_for(connection.answer(chosen), 60)


@contextlib.asynccontextmanager
async def gateway(**options: Any) -> AsyncIterator[GatewayServer]:
    given = {"listen": "127.0.0.1:0", "tokenizer": MODEL_DIRECTORY, "drain_timeout_s": 1.0}
    server = GatewayServer(GatewayOptions(**{**given, **options}))
    try:
        await server.start()
        yield server
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def fronted(
    engine: FakeEngine, limits: Limits | None = None, keys: Path | None = None, **options: Any
) -> AsyncIterator[GatewayServer]:
    """A gateway before one node of base model BASE."""
    async with (
        serving(engine, limits=limits, keys=keys) as (node, _),
        gateway(nodes=(node.address,), base=BASE, keys=keys, **options) as server,
    ):
        yield server
