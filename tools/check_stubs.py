"""Compares loraserve/_engine.pyi with what the built extension offers; --write makes it so."""

import subprocess
import sys
import tempfile
from pathlib import Path

STUB = Path(__file__).resolve().parent.parent / "loraserve" / "_engine.pyi"


def generate() -> str:
    """The stub of the extension that this interpreter imports."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [sys.executable, "-m", "pybind11_stubgen", "loraserve._engine", "-o", scratch],
            check=True,
            capture_output=True,
        )
        return (Path(scratch) / "loraserve" / "_engine.pyi").read_text()


def main(argv: list[str]) -> int:
    fresh = generate()
    if argv == ["--write"]:
        STUB.write_text(fresh)
        return 0
    if STUB.exists() and STUB.read_text() == fresh:
        return 0
    print(f"{STUB.name} is not what the extension offers: run `make stubs`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
