"""What this machine has of RDMA and of reads into device memory, without starting anything."""

import ctypes
import importlib.util
import os
import resource
from pathlib import Path

from loraserve.errors import LoraServeError
from loraserve.node.transfer.program import UCX_PREFIX, library_folder

_SHMEM_HUGE = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_INFINIBAND = Path("/sys/class/infiniband")
_DEVICES = Path("/dev/infiniband")
_DMA_BUF_SUPPORTED = 124  # CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED


def ucx_modules() -> set[str]:
    """The transports' libraries of the UCX that the sidecar runs on: "cma", "ib", "cuda"..."""
    try:
        if prefix := os.environ.get(UCX_PREFIX):
            folder = library_folder(Path(prefix))
        else:
            wheel = importlib.util.find_spec("libucx")
            if wheel is None or not wheel.submodule_search_locations:
                return set()
            folder = Path(wheel.submodule_search_locations[0]) / "lib"
    except LoraServeError:
        return set()
    return {path.name[7:].split(".")[0] for path in (folder / "ucx").glob("libuct_*.so*")}


def rdma_devices() -> list[str]:
    return sorted(path.name for path in _INFINIBAND.iterdir()) if _INFINIBAND.is_dir() else []


def rdma_missing() -> list[str]:
    """Empty where nothing seems to be in the way of reads over a network."""
    missing = []
    if not rdma_devices():
        missing.append("no RDMA device (/sys/class/infiniband is empty)")
    elif not (_DEVICES / "rdma_cm").exists() and not list(_DEVICES.glob("uverbs*")):
        missing.append("no /dev/infiniband here (in a container: hand the devices in)")
    if "ib" not in ucx_modules():
        missing.append(f"a UCX with verbs: the wheel has none, set {UCX_PREFIX}")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY and os.geteuid() != 0:
        missing.append(f"ulimit -l is {soft >> 10} KiB and must be unlimited")
    return missing


def _dma_buf() -> bool:
    """What the CUDA driver says of the first GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    value, device = ctypes.c_int(0), ctypes.c_int(0)
    return (
        cuda.cuInit(0) == 0
        and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
        and cuda.cuDeviceGetAttribute(ctypes.byref(value), _DMA_BUF_SUPPORTED, device) == 0
        and value.value == 1
    )


def gpudirect_missing() -> list[str]:
    """What stands between this machine and a network card that writes into GPU memory."""
    missing = []
    if not Path("/proc/driver/nvidia/gpus").is_dir():
        missing.append("no NVIDIA GPU")
    elif not Path("/sys/module/nvidia_peermem").is_dir() and not _dma_buf():
        missing.append("neither nvidia_peermem nor a driver with dma-buf")
    missing += rdma_missing()
    if "cuda" not in ucx_modules():
        missing.append("a UCX with CUDA")
    if importlib.util.find_spec("loraserve._transfer_reader") is None:
        missing.append("the reader for the node's process (a build where UCX and ucxx were found)")
    return missing


def shared_huge_pages() -> bool:
    """Whether the kernel gives the host pool huge pages when it is asked to."""
    try:
        chosen = _SHMEM_HUGE.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return False
    return chosen in ("always", "within_size", "advise", "force")
