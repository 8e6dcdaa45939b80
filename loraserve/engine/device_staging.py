"""Device memory that a network card may write to, outside the engine's own."""

from loraserve import _engine
from loraserve.engine.assembly import typed_error


class DeviceStaging:
    """`size_bytes` of the device's memory, released with the object; on devices without memory of
    their own ("cpu", "cuda-emulated") host memory stands in. One thread at a time.

    Raises InvalidArgumentError (no such device in this build), UnavailableError (no such device on
    this machine), ResourceExhaustedError.
    """

    def __init__(self, device: str, size_bytes: int) -> None:
        try:
            self._native = _engine.DeviceStaging(device, size_bytes)
        except _engine.StatusError as error:
            raise typed_error(*error.args) from None
        self.size_bytes = size_bytes

    @property
    def address(self) -> int:
        """In the device's address space."""
        return self._native.address

    def copy_from_host(self, offset: int, host: memoryview) -> None:
        """Sets the bytes from `offset` on. Blocks; other threads run. Raises ValueError."""
        self._native.copy_from_host(offset, host)

    def copy_to_host(self, offset: int, into: memoryview) -> None:
        """Fills writable `into` with the bytes from `offset` on. Blocks; other threads run. Raises
        ValueError past the end."""
        self._native.copy_to_host(offset, into)
