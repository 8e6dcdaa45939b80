"""Prints the requirements of pyproject.toml, and of the extras named, for pip's command line."""

import re
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def _strings(block: str) -> list[str]:
    return re.findall(r'"([^"]+)"', re.sub(r"#.*", "", block))


def main(argv: list[str]) -> int:
    text = PROJECT.read_text()
    # tomllib came with Python 3.11; the two shapes used here need no more than this.
    if argv:
        blocks = [re.search(rf"^{name} = \[(.*?)\]", text, re.S | re.M) for name in argv]
    else:
        blocks = [re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)]
    for block in blocks:
        assert block is not None
        # Quoted by the caller's shell: no spaces inside.
        print(*(f"{requirement}" for requirement in _strings(block[1])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
