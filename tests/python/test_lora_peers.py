"""bench/lora_peers.py calls other projects' kernels rightly, seen under Triton's interpreter: where
it and their sources are (LORASERVE_PEER_SOURCES: a folder that `bench/gpu_suite.sh peers` filled).
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from backend_fixtures import open_backend

BENCH = Path(__file__).parents[2] / "bench"
SOURCES = os.environ.get("LORASERVE_PEER_SOURCES")

CHECK = """
import sys
from pathlib import Path

import torch
from lora_peers import GROUPS, Pool, open_peer

shapes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]
# The interpreter does no arithmetic in bfloat16.
pool = Pool.random(torch, "cpu", 2, shapes, [16, 8, 32, 5], "float16")
chosen = [0, 0, 1, *[3] * 18]  # more rows of one than a chunk has
peer = open_peer(sys.argv[1], Path(sys.argv[2]), pool)
peer.prepare(chosen)
torch.manual_seed(1)
for layer in range(2):
    for group, (begin, end) in enumerate(GROUPS):
        x = torch.randn(len(chosen), shapes[begin][0]).half()
        y = torch.randn(len(chosen), sum(out for _, out in shapes[begin:end])).half()
        expected = y.float()
        for row, adapter in enumerate(chosen):
            expected[row] += torch.cat(
                [
                    pool.b[layer][m][adapter].float()
                    @ (pool.a[layer][m][adapter].float() @ x[row].float())
                    for m in range(begin, end)
                ]
            )
        assert (expected - y.float()).abs().max() > 0.1
        peer.run(layer, group, x, y)
        assert (expected - y.float()).abs().max() < 5e-3, (layer, group)
print("right")
"""


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_a_peer_computes_what_ours_does(name: str) -> None:
    if not SOURCES or importlib.util.find_spec("triton") is None:
        pytest.skip("wants Triton, and LORASERVE_PEER_SOURCES")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    path = os.pathsep.join([str(BENCH), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECK, name, SOURCES],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.strip() == "right", done.stderr[-2000:]


def test_a_peer_that_is_not_there_is_told(tmp_path: Path) -> None:
    open_backend("cuda-emulated")
    out = tmp_path / "gpu_lora.json"
    command = [sys.executable, BENCH / "gpu_lora.py", "--device", "cuda-emulated", "--tiny"]
    command += ["--out", out, "--peers", "vllm,nobody", "--peer-sources", tmp_path]
    subprocess.run(command, check=True, timeout=240, stdout=subprocess.DEVNULL)
    found = json.loads(out.read_text())
    assert len(found["points"]) > 0
    assert found["peers"].keys() == {"vllm", "nobody"}
    assert all(peer.keys() == {"error"} for peer in found["peers"].values())
