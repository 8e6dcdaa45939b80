"""Whether this machine can run a node: checks that change nothing and take some seconds."""

import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loraserve.errors import LoraServeError
from loraserve.named_files import named
from loraserve.node.model import cpu_name, memory_bytes
from loraserve.node.transfer.dry_run import dry_run
from loraserve.node.transfer.facts import (
    gpudirect_missing,
    rdma_devices,
    rdma_missing,
    shared_huge_pages,
)
from loraserve.node.transfer.gpudirect import PROOF_SIZES, open_reader, prove

# Flags of /proc/cpuinfo that each level adds to the one before.
_LEVELS = (
    ("x86-64-v2", {"cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"}),
    ("x86-64-v3", {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}),
    ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    ("x86-64-v4-bf16", {"avx512_bf16"}),
)
_LITTLE_MEMORY = 2 << 30


@dataclass(frozen=True)
class Check:
    """`ok` is None where the outcome is worth knowing but stops nothing."""

    name: str
    ok: bool | None
    detail: str


def cpu_level(flags: set[str]) -> str:
    """The highest instruction set level that the flags make up; the engine's kernels follow it."""
    level = "generic"
    for name, needed in _LEVELS:
        if not needed <= flags:
            break
        level = name
    return level


def _cpu() -> Check:
    flags: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    level = cpu_level(flags)
    return Check("cpu", None if level == "generic" else True, f"{cpu_name()}: kernels for {level}")


def _engine() -> Check:
    try:
        import loraserve.engine
    except ImportError as error:
        return Check("engine", False, f"the extension cannot be loaded: {error}")
    return Check("engine", True, f"{Path(loraserve.engine.__file__).parent} loads")


def _cores() -> Check:
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 0
    return Check("cores", True, f"{usable} of {present} may be used")


def _memory() -> Check:
    total = memory_bytes()
    available = total
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    detail = f"{available / 2**30:.1f} of {total / 2**30:.1f} GiB are free"
    return Check("memory", True if available >= _LITTLE_MEMORY else None, detail)


def _loopback() -> Check:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Check("loopback", True, f"port {probe.getsockname()[1]} could be bound")


def _transport() -> Check:
    """A read between two sidecars: what UCX lists, it need not be able to do."""
    try:
        info, reads = asyncio.run(dry_run())
    except LoraServeError as error:
        return Check("transport", None, f"gRPC streams alone: {error}")
    last = reads[-1]
    detail = (
        f"UCX {info.ucx_version}; host memory: {', '.join(info.transports)}; device memory: none; "
        f"{last.size_bytes >> 20} MiB read between two sidecars over "
        f"{', '.join(last.transports) or 'UCX'} in {last.seconds * 1e3:.1f} ms "
        f"({last.gb_per_s:.1f} GB/s); else gRPC streams"
    )
    return Check("transport", True, detail)


def _rdma() -> Check:
    missing = rdma_missing()
    if missing:
        return Check("rdma", None, "not here: " + "; ".join(missing))
    return Check("rdma", True, f"{', '.join(rdma_devices())}; prove it with --read-from")


def _gpudirect() -> Check:
    if missing := gpudirect_missing():
        return Check("gpudirect", None, "not here: " + "; ".join(missing))
    return Check("gpudirect", True, "nothing seems to be missing; prove it with --gpudirect")


def _gpudirect_proof() -> Check:
    """A read into a GPU's memory, by this process."""
    try:
        reads = asyncio.run(prove(open_reader(max(PROOF_SIZES))))
    except LoraServeError as error:
        return Check("gpudirect", False, f"not proven: {error}")
    last = reads[-1]
    detail = (
        f"{last.size_bytes >> 20} MiB read into device memory over "
        f"{', '.join(last.transports) or 'UCX'} in {last.seconds * 1e3:.1f} ms, and to the host to "
        f"be checked in {last.to_host_seconds * 1e3:.1f} ms"
    )
    return Check("gpudirect", True, detail)


def _huge_pages() -> Check:
    if shared_huge_pages():
        return Check("huge pages", True, "for the host pool")
    return Check(
        "huge pages",
        None,
        "none for the host pool; with them nodes of one host read each other at half the cost: "
        "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
    )


def _model(path: Path) -> Check:
    from loraserve.checkpoint.model_config import read_model_config
    from loraserve.checkpoint.model_weights import open_model_weights

    try:
        with named("model", path):
            config = read_model_config(path)
            open_model_weights(path, config)
    except LoraServeError as error:
        return Check("model", False, error.message)
    tokenizer = "with" if (path / "tokenizer.json").exists() else "WITHOUT"
    return Check(
        "model",
        True,
        f"{config.family}, {config.num_layers} layers, context {config.max_position}, "
        f"{tokenizer} tokenizer",
    )


def run_doctor(model: Path | None = None, *, gpudirect: bool = False) -> list[Check]:
    """All checks in the order to show them; none raises. `gpudirect`: reads into a GPU's memory,
    which loads UCX and CUDA into this process; where that fails, so does the check."""
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("cpu", _cpu),
        ("engine", _engine),
        ("cores", _cores),
        ("memory", _memory),
        ("loopback", _loopback),
        ("transport", _transport),
        ("rdma", _rdma),
        ("gpudirect", _gpudirect_proof if gpudirect else _gpudirect),
        ("huge pages", _huge_pages),
    ]
    if model is not None:
        checks.append(("model", lambda: _model(model)))
    found = []
    for name, check in checks:
        try:
            found.append(check())
        except Exception as error:
            found.append(Check(name, False, f"could not be checked: {error}"))
    return found
