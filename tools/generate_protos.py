"""Generates OUT_DIR/loraserve/v1/*_pb2*.py from proto/; also stubs where mypy-protobuf is there.

Usage: python tools/generate_protos.py OUT_DIR
Files whose content would not change keep their time stamp, so that builds stay incremental.
"""

import importlib.util
import shutil
import sys
import sysconfig
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

PROTO_ROOT = Path(__file__).resolve().parent.parent / "proto"


def _plugin(name: str) -> str | None:
    """Path of a protoc plugin: of this interpreter's environment first, then of PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def generate(out_dir: Path) -> list[Path]:
    """Writes the modules below `out_dir`; their paths. Raises RuntimeError where protoc fails."""
    sources = sorted(str(p.relative_to(PROTO_ROOT)) for p in PROTO_ROOT.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [
            "protoc",
            f"-I{PROTO_ROOT}",
            f"-I{files('grpc_tools') / '_proto'}",
            f"--python_out={scratch}",
            f"--grpc_python_out={scratch}",
        ]
        mypy, mypy_grpc = _plugin("protoc-gen-mypy"), _plugin("protoc-gen-mypy_grpc")
        # Where pip builds isolated, the environment's scripts are there without their package.
        if mypy and mypy_grpc and importlib.util.find_spec("mypy_protobuf"):
            arguments += [f"--plugin=protoc-gen-mypy={mypy}", f"--mypy_out=quiet:{scratch}"]
            arguments += [f"--plugin=protoc-gen-mypy_grpc={mypy_grpc}"]
            arguments += [f"--mypy_grpc_out=quiet:{scratch}"]
        if protoc.main([*arguments, *sources]) != 0:
            raise RuntimeError("protoc failed; its message is above")
        written = []
        for made in sorted(Path(scratch).rglob("*_pb2*")):
            target = out_dir / made.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists() or target.read_bytes() != made.read_bytes():
                shutil.copyfile(made, target)
            written.append(target)
    return written


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    for path in generate(Path(argv[1])):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
