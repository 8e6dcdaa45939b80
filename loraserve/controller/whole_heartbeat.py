"""Heartbeats whose residency is too long for one message, put together again."""

from loraserve.errors import InvalidArgumentError
from loraserve.v1 import controller_pb2

# Of one node; a packed adapter of 1 KiB each would fill a gigabyte.
MAX_COPIES = 1_000_000


class WholeHeartbeat:
    """Of one stream."""

    def __init__(self) -> None:
        self._begun: controller_pb2.HeartbeatRequest | None = None

    def take(self, part: controller_pb2.HeartbeatRequest) -> controller_pb2.HeartbeatRequest | None:
        """The heartbeat once its last part is there. Raises InvalidArgumentError for parts that do
        not belong together."""
        if self._begun is not None:
            begun, at = self._begun, (self._begun.generation, self._begun.since_generation)
            if at != (part.generation, part.since_generation):
                raise InvalidArgumentError("generation", "changed within a heartbeat in parts")
            if len(begun.residency) + len(part.residency) > MAX_COPIES:
                raise InvalidArgumentError("residency", f"over {MAX_COPIES} copies")
            more = part.more
            begun.MergeFrom(part)
            begun.more = more
            part = begun
        self._begun = part if part.more else None
        return None if part.more else part
