class StatusError(Exception): ...

class SlotReader:
    def __init__(self, device: bool) -> None: ...
    def register(self, address: int, bytes: int, device: bool) -> None: ...
    def read(
        self,
        *,
        address: int,
        generation: int,
        size_bytes: int,
        skip_bytes: int,
        local_offset: int,
        timeout_us: int,
        header_bytes: int,
        worker_address: bytes,
        rkey: bytes,
    ) -> str: ...
    @property
    def stuck(self) -> bool: ...
    @property
    def ucx_version(self) -> str: ...
    @property
    def transports(self) -> str: ...
