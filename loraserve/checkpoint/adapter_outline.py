"""What an adapter says of itself before a weight of it is read: cheap however large it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loraserve.checkpoint.model_shape import AdaptedModule
from loraserve.checkpoint.packed_adapter import check_adapter_path
from loraserve.checkpoint.packed_header import MAX_HEADER_BYTES, parse_header
from loraserve.checkpoint.peft_adapter import read_peft_directory


@dataclass(frozen=True)
class AdapterOutline:
    """What of the base is not known is empty."""

    base_name: str
    base_digest: str
    modules: Sequence[AdaptedModule]


def read_outline(path: Path) -> AdapterOutline:
    """Of a PEFT directory or a packed file. Raises InvalidCheckpointError, UnsupportedError and
    OSError."""
    check_adapter_path(path)
    if path.is_dir():
        source = read_peft_directory(path, finite=False)
        return AdapterOutline(source.base_name or "", "", source.modules)
    with path.open("rb") as file:
        header = parse_header(file.read(MAX_HEADER_BYTES))
    return AdapterOutline(header.base_name, header.base_digest or "", header.entries)
