#!/usr/bin/env bash
# Builds the CUDA backend on a machine with a GPU, runs the tests of device "cuda", measures installs
# from the host pool and, where there is a compute-sanitizer, runs the kernels under it. Needs no network if build/gpu_wheels holds the wheels.
#
#   bench/gpu_suite.sh wheels     on a machine with a network: fills build/gpu_wheels (Python 3.12)
#   bench/gpu_suite.sh [OUT]      on the machine with the GPU: results in OUT (build/gpu_results)
set -euo pipefail
cd "$(dirname "$0")/.."
wheels=build/gpu_wheels
build_tools=("scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.24" ninja grpcio-tools)
test_tools=("pytest>=8" "hypothesis>=6" safetensors transformers psutil)
needs_torch=(peft accelerate)  # torch, and cuBLASLt with it, are on the GPU machine already
mapfile -t runtime < <(python3 tools/requirements.py | tr ' ' '\n')

if [ "${1:-}" = wheels ]; then
  download=(python3 -m pip download -q --python-version 3.12 --only-binary=:all: -d "$wheels")
  "${download[@]}" "${build_tools[@]}" "${test_tools[@]}" "${runtime[@]}"
  "${download[@]}" --no-deps "${needs_torch[@]}"
  exit
fi

out=${1:-build/gpu_results}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >"$out/gpu.txt" || {
  echo "gpu_suite: no GPU (nvidia-smi failed)"
  exit 2
}
command -v nvcc >/dev/null || { echo "gpu_suite: no nvcc on PATH"; exit 2; }
start=$SECONDS
venv=build/gpu_venv
python3 -m venv --system-site-packages "$venv"
pip=("$venv/bin/python" -m pip install -q)
[ -d "$wheels" ] && pip+=(--no-index --find-links "$wheels")
"${pip[@]}" "${build_tools[@]}" "${test_tools[@]}" "${runtime[@]}" "${needs_torch[@]}"
# One architecture: the machine's own.
PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m pip install -q --no-build-isolation --no-deps \
  -C cmake.define.LORASERVE_BUILD_TESTS=ON -C cmake.define.LORASERVE_CUDA=ON \
  -C cmake.define.CMAKE_CUDA_ARCHITECTURES="${LORASERVE_CUDA_ARCHITECTURES:-90a-real}" -e .
built=$((SECONDS - start))

LORASERVE_CUBLASLT=${LORASERVE_CUBLASLT:-$("$venv/bin/python" -c '
import nvidia, pathlib
found = [p for root in nvidia.__path__ for p in pathlib.Path(root).rglob("libcublasLt.so.1?")]
print(max(found, default="libcublasLt.so.13"))')}
export LORASERVE_CUBLASLT
suite=(tests/python/test_backend_ops.py tests/python/test_sampler.py tests/python/test_cuda_lora.py
  tests/python/test_cuda_engine.py tests/python/test_pinned_host_memory.py)
tests=0
timeout 300 "$venv/bin/python" -m pytest -rs -k "cuda and not emulated" \
  --junitxml "$out/tests.xml" "${suite[@]}" >"$out/tests.txt" 2>&1 || tests=$?
tail -15 "$out/tests.txt"
sanitizer=null
if command -v compute-sanitizer >/dev/null; then
  sanitizer=0
  timeout 120 compute-sanitizer --error-exitcode 9 "$venv/bin/python" -m pytest -q \
    -k "cuda and not emulated" tests/python/test_cuda_lora.py >"$out/sanitizer.txt" 2>&1 || sanitizer=$?
fi
# The suite's result is the tests'; what cannot be measured is told in its own file.
timeout 240 "$venv/bin/python" bench/gpu_pool.py --out "$out/gpu_pool.json" >"$out/gpu_pool.txt" 2>&1 ||
  echo "gpu_suite: bench/gpu_pool.py failed, see $out/gpu_pool.txt"
printf '{"gpu": "%s", "commit": "%s", "build_s": %d, "tests_rc": %d, "sanitizer_rc": %s, "total_s": %d}\n' \
  "$(head -1 "$out/gpu.txt")" "$(git rev-parse HEAD 2>/dev/null || echo unknown)" \
  "$built" "$tests" "$sanitizer" $((SECONDS - start)) | tee "$out/suite.json"
exit "$tests"
