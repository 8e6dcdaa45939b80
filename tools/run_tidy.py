"""Runs clang-tidy on every source of the engine, a process for each core."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# One instruction set stands for all: the sources differ in a name. The bindings need Python's
# headers, which the preset that clang-tidy reads does not look for.
SKIPPED = ("kernels_x86_64_v2.cc", "kernels_x86_64_v4.cc", "kernels_generic.cc")


def check(path: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    command = ["clang-tidy", "-p", "build/cpu", "--quiet", "--warnings-as-errors=*", str(path)]
    return path, subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def main() -> int:
    sources = sorted(p for p in (ROOT / "csrc").rglob("*.cc") if p.name not in SKIPPED)
    sources = [p for p in sources if p.parent.name != "bindings"]
    # What a machine does not build (no UCX here) it cannot check either.
    commands = json.loads((ROOT / "build/cpu/compile_commands.json").read_text())
    built = {Path(command["directory"], command["file"]) for command in commands}
    for path in [p for p in sources if p not in built]:
        print(f"clang-tidy: {path.relative_to(ROOT)} is not built here")
        sources.remove(path)
    failed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, result in pool.map(check, sources):
            if result.returncode != 0:
                failed += 1
                print(f"{path.relative_to(ROOT)}\n{result.stdout}{result.stderr}")
    print(f"clang-tidy: {len(sources)} sources, {failed} with findings")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
