"""What `loraserve serve` is asked for."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loraserve.errors import InvalidArgumentError
from loraserve.named_files import wrong
from loraserve.security.identity import check_base, check_name
from loraserve.wire import is_loopback, split_address

MAX_NODES = 64
MAX_SECONDS = 86400
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class ServeOptions:
    """Raises InvalidArgumentError where values cannot work. `extra` options go to the daemons as
    they are: by "controller", "node" and "gateway"."""

    model: Path
    base: str
    adapters: Mapping[str, Path] = field(default_factory=dict)
    nodes: int = 1
    device: str = "cpu"
    threads: int = 0
    """Of each node's engine; 0: the machine's cores, shared."""
    listen: str = "127.0.0.1:8000"
    data_dir: Path | None = None
    """None: a temporary directory that goes in the end."""
    keys: Path | None = None
    api_key: str | None = None
    aliases: tuple[str, ...] = ()
    chat_template: Path | None = None
    adapter_roots: tuple[Path, ...] = ()
    allow_base_mismatch: bool = False
    start_timeout_s: float = 600.0
    drain_timeout_s: float = 30.0
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_base("base", self.base)
        for name in self.adapters:
            check_name("adapter", name)
            if name in (self.base, *self.aliases):
                raise InvalidArgumentError("adapter", f"{name!r} is a name of the base model")
        if not 1 <= self.nodes <= MAX_NODES:
            raise InvalidArgumentError("nodes", f"{self.nodes} is not within 1 and {MAX_NODES}")
        if self.device not in DEVICES:
            raise InvalidArgumentError("device", f"{self.device!r} is none of {', '.join(DEVICES)}")
        if self.threads < 0:
            raise InvalidArgumentError("threads", f"{self.threads}: at least 0")
        for name, value, lowest in (
            ("start-timeout-s", self.start_timeout_s, 0.001),
            ("drain-timeout-s", self.drain_timeout_s, 0),
        ):
            if not lowest <= value <= MAX_SECONDS:
                raise InvalidArgumentError(
                    name, f"{value:g} is not within {lowest} and {MAX_SECONDS}"
                )
        if not self.model.is_dir():
            raise wrong("model", self.model, "is no directory")
        for root in self.adapter_roots:
            if not root.is_dir():
                raise wrong("adapter-root", root, "is no directory")
        split_address(self.listen, "listen")
        secured = self.keys is not None or self.api_key is not None
        if not secured and not is_loopback(self.listen):
            raise InvalidArgumentError(
                "keys", f"listening on {self.listen}, which others reach, needs --keys or --api-key"
            )
        if self.keys is not None and self.api_key is not None:
            raise InvalidArgumentError("api-key", "excludes --keys")

    @property
    def node_threads(self) -> int:
        """Such that nodes share this machine's cores."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) // self.nodes)
