"""The floors of the house: every include and import points downwards."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A folder of csrc/ to the folders it may include.
CPP_FLOORS: dict[str, set[str]] = {
    "base": set(),
    "transfer": {"base"},
    "memory": {"base"},
    "backend": {"base"},
    "kv": {"memory", "base"},
    "lora": {"memory", "base"},
    "model": {"kv", "lora", "memory", "backend", "base"},
    "engine": {"model", "kv", "lora", "memory", "backend", "base"},
    "bindings": {"engine", "model", "kv", "lora", "memory", "backend", "transfer", "base"},
}

GROUND = {
    "background",
    "v1",
    "buckets",
    "command_line",
    "daemon",
    "errors",
    "logs",
    "named_files",
    "option_sources",
    "otlp",
    "security",
    "sampling_params",
    "serving",
    "tracing",
    "vllm_metrics",
    "wire",
    "wire_errors",
    "__init__",
}
MIDDLE = {"placement", "profiles", "engine", "text", "checkpoint"}
UPPER = {"client", "controller", "node"}
# A module or package of loraserve/ to what it may import of it.
PYTHON_FLOORS: dict[str, set[str]] = (
    {name: GROUND for name in GROUND}
    | {name: GROUND for name in MIDDLE}
    | {"engine": GROUND | {"_engine", "text", "checkpoint"}, "text": GROUND | {"checkpoint"}}
    | {"profiles": GROUND | {"placement"}}
    | {name: GROUND | MIDDLE for name in UPPER}
    # One module of it loads the reader of device memory, late.
    | {"node": GROUND | MIDDLE | {"_transfer_reader"}}
    # The simulator runs the pure parts only; see SIMULATED.
    | {"sim": GROUND | {"placement", "profiles", "client", "controller"}}
    # A client that speaks HTTP to its own.
    | {"gateway": GROUND | MIDDLE | {"client"}}
    # The top: commands and the demo.
    | {"cli": GROUND | MIDDLE | UPPER | {"commands", "demo"}}
    | {"commands": GROUND | MIDDLE | UPPER | {"demo", "sim", "profiler", "serve", "gateway"}}
    # Starts the daemons as processes, by their names.
    | {"serve": GROUND | {"client", "checkpoint", "text"}}
    | {"demo": GROUND | MIDDLE | UPPER, "profiler": GROUND | MIDDLE}
)
PYTHON_FLOORS["__init__"] = GROUND | {"engine", "client"}
# What of the floors below the simulator runs: it speaks no RPC.
SIMULATED = {
    "client": {"retry", "routing", "route_table"},
    "controller": {"state", "events", "routes"},
}
# Pure parts: no RPC, no clock, no unseeded randomness, no disk.
# Of loraserve/controller: what the simulator runs, and what it imports.
CORE = (
    *("adapter_map", "asked", "catalog", "choice", "events", "failures", "home", "membership"),
    *("moves", "peers", "placing", "planner", "problem", "reports", "residency", "route_log"),
    *("routes", "settings", "state", "targets", "timers", "view"),
)
PURE = [
    "loraserve/placement",
    *(f"loraserve/controller/{name}.py" for name in CORE),
    *(f"loraserve/client/{name}.py" for name in ("packed_routes", "route_table", "routing")),
]
IMPURE_MODULES = {"grpc", "time", "datetime", "random", "socket", "asyncio", "sqlite3", "os"}


def cpp_files() -> list[Path]:
    return sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cc", ".inc", ".cu"})


def test_includes_point_downwards() -> None:
    wrong = []
    for path in cpp_files():
        folder = path.relative_to(ROOT / "csrc").parts[0]
        for target in re.findall(r'^#include "([^"]+)"', path.read_text(), re.M):
            into = target.split("/")[0]
            if into != folder and into not in CPP_FLOORS[folder]:
                wrong.append(f"{path.relative_to(ROOT)} includes {target}")
    assert not wrong


def test_only_the_backend_floor_knows_a_device() -> None:
    # The bindings' test module reaches into the backends to test their parts.
    parts = ("testing.cc", "testing_speed.cc", "testing_work_list.cc")
    allowed = {ROOT / "csrc/bindings" / name for name in parts}
    wrong = [
        str(path)
        for path in cpp_files()
        if "backend" not in path.parts
        and path not in allowed
        and re.search(r'#include "backend/(cpu|cuda)/', path.read_text())
    ]
    assert not wrong


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "loraserve":
                found |= {f"loraserve.{alias.name}" for alias in node.names}
    return found


def python_files() -> list[Path]:
    return sorted(p for p in (ROOT / "loraserve").rglob("*.py") if "_pb2" not in p.name)


def unit(path: Path) -> str:
    return path.relative_to(ROOT / "loraserve").parts[0].removesuffix(".py")


def test_every_module_has_a_floor() -> None:
    assert {unit(path) for path in python_files()} <= set(PYTHON_FLOORS)


def test_imports_point_downwards() -> None:
    wrong = []
    for path in python_files():
        own = unit(path)
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "loraserve" or len(parts) < 2 or parts[1] == own:
                continue
            if name in {"loraserve.__version__", "loraserve.SamplingParams"}:
                continue
            if parts[1] not in PYTHON_FLOORS[own]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_the_simulator_runs_pure_parts_only() -> None:
    wrong = []
    for path in sorted((ROOT / "loraserve/sim").rglob("*.py")):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "grpc" or (
                len(parts) > 2 and parts[1] in SIMULATED and parts[2] not in SIMULATED[parts[1]]
            ):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_pure_parts_have_no_world() -> None:
    wrong = []
    for place in PURE:
        path = ROOT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            used = {name.split(".")[0] for name in imports(file)} & IMPURE_MODULES
            if used:
                wrong.append(f"{file.relative_to(ROOT)}: {used}")
    assert not wrong


def test_no_pickle_anywhere() -> None:
    for path in python_files():
        text = path.read_text()
        assert not re.search(r"\b(import pickle|torch\.load|pickle\.load)\b", text), path
