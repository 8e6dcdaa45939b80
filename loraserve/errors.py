"""Typed errors. Each carries the field it is about; `reason` is the same word on the wire."""


class LoraServeError(Exception):
    """Base of every error that LoRAServe raises on purpose."""

    reason = "INTERNAL"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class InvalidCheckpointError(LoraServeError):
    """A checkpoint file is broken or hostile; nothing of it was used."""

    reason = "INVALID_CHECKPOINT"


class UnsupportedError(LoraServeError):
    """The configuration asks, by name, for something this version does not do."""

    reason = "UNSUPPORTED"
