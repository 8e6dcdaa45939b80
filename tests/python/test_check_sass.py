"""The judgement of machine code: what a kernel must have, and must not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import check_sass


def good() -> dict[tuple[str, str], set[str]]:
    return {
        (architecture, f"_Z{10 + i}{expected.part}"): {f"{o}.E" for o in expected.opcodes}
        | {"EXIT"}
        for architecture in check_sass.ARCHITECTURES
        for expected in check_sass.HOT
        for i in range(expected.count)
    }


def test_what_is_wanted_passes() -> None:
    assert check_sass.failures(good()) == []


def test_local_memory_is_seen() -> None:
    found = good()
    found["sm_80", "_Z10LoraKernel"].add("STL.64")
    assert check_sass.failures(found) == ["sm_80: _Z10LoraKernel uses local memory"]


def test_a_kernel_without_tensor_cores_is_seen() -> None:
    found = good()
    found["sm_90a", "_Z10PrefillKernel"] = {"FFMA", "LDGSTS", "LDSM"}
    (wrong,) = check_sass.failures(found)
    assert wrong.startswith("sm_90a: _Z10PrefillKernel has no HMMA")


def test_a_missing_kernel_is_seen() -> None:
    found = good()
    del found["sm_80", "_Z10SampleKernel"]
    assert check_sass.failures(found) == ["sm_80: 0 kernels SampleKernel, not 1"]
