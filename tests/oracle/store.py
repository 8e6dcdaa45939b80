"""Checkpoints, adapters and references, each made on first use and shared by all tests."""

from pathlib import Path

from oracle.adapters import ADAPTERS, make_adapters
from oracle.checkpoints import SPECS, make_checkpoint
from oracle.reference import Reference


class OracleStore:
    """Everything by the name of its CheckpointSpec; files live under `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._checkpoints: dict[str, Path] = {}
        self._adapters: dict[str, dict[str, Path]] = {}
        self._references: dict[tuple[str, str, str], Reference] = {}

    def checkpoint(self, name: str) -> Path:
        if name not in self._checkpoints:
            self._checkpoints[name] = make_checkpoint(SPECS[name], self._root / name)
        return self._checkpoints[name]

    def adapters(self, name: str) -> dict[str, Path]:
        """All of ADAPTERS on this checkpoint: PEFT directories by adapter name."""
        if name not in self._adapters:
            self._adapters[name] = make_adapters(
                self.checkpoint(name), self._root / f"{name}-adapters", list(ADAPTERS.values())
            )
        return self._adapters[name]

    def reference(
        self, name: str, weights: str = "float32", adapter_weights: str = "float32"
    ) -> Reference:
        """The oracle with all adapters loaded; each is asserted to move the log-probabilities."""
        key = (name, weights, adapter_weights)
        if key not in self._references:
            reference = Reference(self.checkpoint(name), weights, adapter_weights)
            for adapter, directory in self.adapters(name).items():
                reference.add_adapter(adapter, directory)
            self._references[key] = reference
        return self._references[key]
