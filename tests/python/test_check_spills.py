"""The reader of disassembly that guards the CPU kernels."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from check_spills import spills

CLEAN = """
0000000000000010 <_ZGemmTileILi6E>:
   10:	vmovdqa %ymm0,-0x18(%rsp)
   18:	vfmadd231ps %ymm0,%ymm14,%ymm10
   20:	vmovdqa -0x18(%rsp),%ymm7
   28:	vfmadd231ps %ymm0,%ymm14,%ymm9
   30:	vmovups %ymm9,(%rdi)
"""
SPILLING = CLEAN.replace("vmovdqa -0x18(%rsp),%ymm7", "vmovaps %ymm7,0x48(%rsp)")


def test_a_store_before_the_products_or_to_the_result_is_none() -> None:
    assert spills(CLEAN) == (1, [])


@pytest.mark.parametrize(
    "name", ["_ZGemmTileILi6E", "_ZPagedTileILi6E", "_ZScoreTileILi6E", "_ZValueTileILi6E"]
)
def test_a_store_among_the_products_is_named(name: str) -> None:
    tiles, found = spills(SPILLING.replace("_ZGemmTileILi6E", name))
    assert tiles == 1
    assert len(found) == 1
    assert name in found[0]


def test_other_functions_are_left_alone() -> None:
    assert spills(SPILLING.replace("GemmTile", "Rope")) == (0, [])
