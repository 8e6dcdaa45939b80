"""What the doctor says of this machine and of models."""

import platform
from pathlib import Path

import pytest

from loraserve import Engine, EngineConfig
from loraserve.demo import MODEL_DIRECTORY
from loraserve.node import doctor
from loraserve.node.doctor import cpu_level, run_doctor


def test_this_machine_can_run_a_node() -> None:
    found = {check.name: check for check in run_doctor(MODEL_DIRECTORY)}
    first = ["cpu", "engine", "cores", "memory", "loopback"]
    assert list(found) == [*first, "transport", "rdma", "gpudirect", "huge pages", "model"]
    assert not any(check.ok is False for check in found.values())
    assert "gRPC" in found["transport"].detail
    assert found["model"].detail == "llama, 4 layers, context 256, with tokenizer"


def test_a_directory_without_a_model_is_found_out(tmp_path: Path) -> None:
    (check,) = (c for c in run_doctor(tmp_path) if c.name == "model")
    assert check.ok is False
    assert "config.json" in check.detail


def test_a_check_that_breaks_is_a_finding_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> doctor.Check:
        raise OSError("no /proc here")

    monkeypatch.setattr(doctor, "_memory", broken)
    (check,) = (c for c in run_doctor() if c.name == "memory")
    assert (check.ok, check.detail) == (False, "could not be checked: no /proc here")


def test_the_kernels_it_names_are_those_the_engine_takes() -> None:
    (check,) = (c for c in run_doctor() if c.name == "cpu")
    with Engine(EngineConfig(model=MODEL_DIRECTORY, threads=1)) as engine:
        assert engine.backend_name == f"cpu {check.detail.rpartition(' ')[2]}"


def test_every_level_it_may_name_can_be_asked_of_the_engine() -> None:
    for name in ("generic", *(level for level, _ in doctor._LEVELS)):
        if platform.machine() != "x86_64" and name != "generic":
            continue
        with Engine(EngineConfig(model=MODEL_DIRECTORY, threads=1, isa=name)) as engine:
            assert engine.backend_name.removeprefix("cpu ") <= name or name == "generic"
            assert name != "generic" or engine.backend_name == "cpu generic"


def test_levels_build_on_each_other() -> None:
    flags: set[str] = set()
    seen = [cpu_level(flags)]
    for name, added in doctor._LEVELS:
        seen.append(cpu_level(flags | set(list(added)[1:])))  # one is missing
        flags |= added
        seen.append(cpu_level(flags))
        assert seen[-1] == name
    assert seen == [
        *("generic", "generic", "x86-64-v2", "x86-64-v2"),
        *("x86-64-v3", "x86-64-v3", "x86-64-v4", "x86-64-v4", "x86-64-v4-bf16"),
    ]
