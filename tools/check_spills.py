"""The built CPU kernels: no tile of a product or of attention may store a vector to the stack
between its products, and no function of theirs may be shared with other objects.

    python tools/check_spills.py OBJECT_OR_LIBRARY...

An accumulator that does not fit the registers goes through memory with every k-row, and a tile so
compiled runs at half its speed or less. An inline function that is compiled as one of its own is
the same symbol in every instruction set's object, and the linker keeps one of them for all: it may
be one that this machine cannot run. Needs objdump and nm (binutils) and symbols.
"""

import re
import subprocess
import sys
from pathlib import Path

# The name is mangled, which is enough to know it by.
TILE = re.compile(r"(Gemm|Paged|Score|Value)Tile")
SYMBOL = re.compile(r"^[0-9a-f]+ <(?P<name>.*)>:$")
PRODUCT = re.compile(r"\bv(fmadd|fmla|mulps|dpbf16ps)|\bfmla\b")
# A vector register stored to the stack; a store of the result goes through other registers.
SPILL = re.compile(r"\bvmov\w*\s+%[xyz]mm\d+,-?(0x[0-9a-f]+)?\(%r[sb]p\)|\bst[rp]\s+q\d+.*\[sp")

# Objects whose sources are compiled once for each instruction set, and a weak function of one.
SHARED = re.compile(r"(?P<object>\bkernels_[^/:]*):[0-9a-f]+ W (?P<name>.*)$")


def shared(listing: str) -> list[str]:
    """The functions in nm's listing (-A) of kernels that may be taken from another's object. Data
    is left alone: it is the same whatever the instruction set."""
    matches = [SHARED.search(line) for line in listing.splitlines()]
    return [f"{m['object']}: {m['name']} is not inlined, and shared" for m in matches if m]


def spills(listing: str) -> tuple[int, list[str]]:
    """How many tiles with products there are, and those that spill between two of them."""
    tiles, found = 0, []
    name = ""
    body: list[str] = []

    def judge() -> None:
        nonlocal tiles
        products = [i for i, line in enumerate(body) if PRODUCT.search(line)]
        if not TILE.search(name) or not products:
            return
        tiles += 1
        inner = body[products[0] : products[-1] + 1]
        count = sum(1 for line in inner if SPILL.search(line))
        if count:
            found.append(f"{name}: {count} stores of vectors to the stack among its products")

    for line in listing.splitlines():
        match = SYMBOL.match(line)
        if match:
            judge()
            name, body = match["name"], []
        else:
            body.append(line)
    judge()
    return tiles, found


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    total, spilling, common = 0, [], []
    for path in map(Path, sys.argv[1:]):
        tiles, found = spills(output("objdump", "-d", "--no-show-raw-insn", str(path)))
        total += tiles
        spilling += [f"{path.name}: {one}" for one in found]
        symbols = output("nm", "-A", "-C", "--defined-only", str(path))
        common += shared(symbols) if "kernels_" in symbols else [f"{path.name}: no kernels in it"]
    for one in spilling + common:
        print(one)
    print(f"{total} tiles, {len(spilling)} that spill; {len(common)} functions that are shared")
    return int(bool(spilling or common) or total == 0)


if __name__ == "__main__":
    sys.exit(main())
