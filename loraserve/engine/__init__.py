"""The typed face of the C++ engine. Only this package imports loraserve._engine."""

from loraserve.engine.adapters import LoadedAdapter
from loraserve.engine.assembly import Chunk, Completion
from loraserve.engine.config import EngineConfig
from loraserve.engine.core import Engine
from loraserve.engine.request_handle import RequestHandle
from loraserve.engine.stats import EngineStats

__all__ = [
    "Chunk",
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "LoadedAdapter",
    "RequestHandle",
]
