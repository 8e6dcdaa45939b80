"""The readers of disassembly and symbols that guard the CPU kernels."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from check_spills import shared, spills

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


SYMBOLS = """
build/cpu/libbackend.a:kernels.cc.o:0000000000000000 W std::vector<int>::push_back(int&&)
build/cpu/libbackend.a:kernels_x86_64_v4.cc.o:0000000000000000 t loraserve::x86_64_v4::Gemm()
build/cpu/libbackend.a:kernels_x86_64_v4.cc.o:0000000000000000 D loraserve::x86_64_v4::kKernels
build/cpu/libbackend.a:kernels_x86_64_v4.cc.o:0000000000000000 V DW.ref.__gxx_personality_v0
"""
WEAK = "0000000000000010 W loraserve::F32ToBF16(float)"


def test_functions_of_one_object_and_data_are_not_shared() -> None:
    assert shared(SYMBOLS) == []


@pytest.mark.parametrize("path", ["build/cpu/libbackend.a:", "build/cpu/", ""])
def test_a_function_that_every_instruction_set_has_is_named(path: str) -> None:
    (found,) = shared(f"{SYMBOLS}{path}kernels_x86_64_v3.cc.o:{WEAK}\n")
    assert found.startswith("kernels_x86_64_v3.cc.o: loraserve::F32ToBF16(float)")
