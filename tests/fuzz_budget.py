"""How much the property tests try: a little in `make test`, much more in `make fuzz`."""

import os


def examples(count: int) -> int:
    """`count`, times LORASERVE_FUZZ."""
    return count * int(os.environ.get("LORASERVE_FUZZ", "1"))
