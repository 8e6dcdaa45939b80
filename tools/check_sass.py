"""Looks at the machine code of the CUDA kernels: tensor cores where they belong, nothing in local
memory where it would hurt.

    check_sass.py BUILD_FOLDER

Needs cuobjdump and nvdisasm: on PATH, in CUDA_HOME, or from their wheels, which are among the
`check` requirements. Without them, says so and passes.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ARCHITECTURES = {"sm_80", "sm_90a"}


@dataclass(frozen=True)
class Expected:
    """Of every kernel whose name has `part`: how many there are on each architecture, and the
    opcodes that each must have. None of these may touch local memory."""

    part: str
    count: int
    opcodes: tuple[str, ...]


HOT = (
    Expected("LoraKernel", 2, ("HMMA.16816.F32.BF16",)),
    Expected("DecodeKernel", 2, ("HMMA.16816.F32.BF16", "LDGSTS", "LDSM")),
    Expected("PrefillKernel", 2, ("HMMA.16816.F32.BF16", "LDGSTS", "LDSM")),
    Expected("JoinKernel", 2, ()),
    Expected("RmsNormKernel", 1, ()),
    Expected("SiluMulKernel", 1, ()),
    Expected("InstallKernel", 1, ()),
    Expected("WorkListKernel", 1, ()),
    Expected("SampleKernel", 1, ()),
)


def find_cuobjdump() -> str | None:
    """It asks nvdisasm, which lies beside it."""
    places = [shutil.which("cuobjdump"), f"{os.environ.get('CUDA_HOME', '')}/bin/cuobjdump"]
    wheels = find_spec("nvidia")
    for folder in (wheels.submodule_search_locations or []) if wheels else []:
        places.append(f"{folder}/cu13/bin/cuobjdump")
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


def kernels(cuobjdump: str, objects: list[Path]) -> dict[tuple[str, str], set[str]]:
    """Opcodes by (architecture, mangled name)."""
    found: dict[tuple[str, str], set[str]] = {}
    environment = {**os.environ, "PATH": f"{Path(cuobjdump).parent}:{os.environ['PATH']}"}
    for path in objects:
        text = subprocess.run(
            [cuobjdump, "--dump-sass", str(path)],
            check=True, capture_output=True, text=True, env=environment,
        ).stdout  # fmt: skip
        architecture, opcodes = "", set[str]()
        for line in text.splitlines():
            if match := re.match(r"arch = (\S+)", line):
                architecture = match[1]
            elif match := re.match(r"\s*Function : (\S+)", line):
                opcodes = found.setdefault((architecture, match[1]), set())
            elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
                opcodes.add(match[1])
    return found


def failures(found: dict[tuple[str, str], set[str]]) -> list[str]:
    wrong = []
    for architecture in sorted(ARCHITECTURES):
        for expected in HOT:
            own = {
                name: opcodes
                for (at, name), opcodes in found.items()
                if at == architecture and re.search(rf"\d{expected.part}", name)
            }
            if len(own) != expected.count:
                wrong.append(
                    f"{architecture}: {len(own)} kernels {expected.part}, not {expected.count}"
                )
            for name, opcodes in own.items():
                wrong += [
                    f"{architecture}: {name} has no {wanted}"
                    for wanted in expected.opcodes
                    if not any(opcode.startswith(wanted) for opcode in opcodes)
                ]
                if any(re.match(r"(LDL|STL)\b", opcode) for opcode in opcodes):
                    wrong.append(f"{architecture}: {name} uses local memory")
    return wrong


def main() -> int:
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        print("check_sass: skipped, there is no cuobjdump (on PATH, in CUDA_HOME or its wheel)")
        return 0
    objects = sorted(Path(sys.argv[1]).rglob("*.cu.o"))
    found = kernels(cuobjdump, objects)
    wrong = failures(found)
    print(
        "\n".join(wrong) or f"check_sass: {len(found)} kernels in {len(objects)} objects, as wanted"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
