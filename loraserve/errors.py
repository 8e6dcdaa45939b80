"""Typed errors. Each carries the field it is about; `reason` is the same word on the wire.

`code` is the name of the gRPC status code (google.rpc.Code) that carries the error between
processes, so an error keeps its meaning from the engine to the client.
"""

# How the reason why no node serves an adapter begins, where every node found that it never can.
REFUSED = "refused: "


class LoraServeError(Exception):
    """Base of every error that LoRAServe raises on purpose."""

    code = "INTERNAL"
    reason = "INTERNAL"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class InvalidArgumentError(LoraServeError):
    """A value of the request is wrong by itself, whatever the state of the server."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_ARGUMENT"


class InvalidCheckpointError(InvalidArgumentError):
    """A checkpoint file is broken or hostile; nothing of it was used."""

    reason = "INVALID_CHECKPOINT"


class UnsupportedError(InvalidArgumentError):
    """The configuration asks, by name, for something this version does not do."""

    reason = "UNSUPPORTED"


class UnimplementedError(UnsupportedError):
    """The RPC is part of the protocol, and this version does not offer it."""

    code = "UNIMPLEMENTED"
    reason = "UNIMPLEMENTED"


class UnauthenticatedError(LoraServeError):
    """No key, or a key that nobody issued."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class PermissionDeniedError(LoraServeError):
    """The key is known; its role may not do this."""

    code = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


class NotFoundError(LoraServeError):
    """The named thing does not exist, or belongs to another tenant."""

    code = "NOT_FOUND"
    reason = "NOT_FOUND"


class AlreadyExistsError(LoraServeError):
    """The name or the request id is taken."""

    code = "ALREADY_EXISTS"
    reason = "ALREADY_EXISTS"


class FailedPreconditionError(LoraServeError):
    """The request is well formed, but not for this server: another base, a rank over the limit."""

    code = "FAILED_PRECONDITION"
    reason = "FAILED_PRECONDITION"


class ResourceExhaustedError(LoraServeError):
    """No room now or ever: `retry_after_s` is set where trying again can help."""

    code = "RESOURCE_EXHAUSTED"
    reason = "RESOURCE_EXHAUSTED"

    def __init__(self, field: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(field, message)
        self.retry_after_s = retry_after_s


class UnavailableError(LoraServeError):
    """Loading, draining or unreachable. The only error that another node may cure."""

    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class StaleRouteError(UnavailableError):
    """The node does not hold the adapter, though routes named it; nothing was begun.

    `holders`: ids of nodes that held it when it went, as far as the node knows. `version`: (epoch,
    version) of routes that do not name the node any more; (0, 0) where it does not know.
    """

    reason = "STALE_ROUTE"

    def __init__(
        self,
        field: str,
        message: str,
        holders: tuple[str, ...] = (),
        version: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__(field, message)
        self.holders = holders
        self.version = version


class DeadlineExceededError(LoraServeError):
    """The request's deadline passed before its end."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class CancelledError(LoraServeError):
    """The request was cancelled."""

    code = "CANCELLED"
    reason = "CANCELLED"
