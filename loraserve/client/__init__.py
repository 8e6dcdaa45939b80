"""The client SDK: Client for threads, AsyncClient for asyncio."""

from loraserve.client.aio import AnswerStream, AsyncClient
from loraserve.client.retry import RetryPolicy
from loraserve.client.sync import Client, SyncAnswerStream
from loraserve.client.types import AdapterInfo, Chunk, Completion, Prompt
from loraserve.security.tls import TlsFiles

__all__ = [
    "AdapterInfo",
    "AnswerStream",
    "AsyncClient",
    "Chunk",
    "Client",
    "Completion",
    "Prompt",
    "RetryPolicy",
    "SyncAnswerStream",
    "TlsFiles",
]
