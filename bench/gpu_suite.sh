#!/usr/bin/env bash
# On a machine with a GPU: builds the CUDA backend, runs the tests of device "cuda" and a soak, runs
# the kernels under compute-sanitizer where there is one, and measures the LoRA operation, the whole
# engine, installs from the host pool and, where there is Google Benchmark, single kernels. In ten
# minutes (LORASERVE_GPU_SUITE_S, seconds, says otherwise): what time is left for is begun, each part
# within its own limit, and a part that fails or runs out of time is told in suite.json and ends
# nothing else. Needs no network if build/gpu_wheels holds the wheels, and 20 GB for two models
# (LORASERVE_GPU_MODELS, build/gpu_models).
#
#   bench/gpu_suite.sh wheels          on a machine with a network: fills build/gpu_wheels (Python 3.12),
#                                      with the sources of Google Benchmark among them
#   bench/gpu_suite.sh peers           there too: the LoRA kernels of vLLM and SGLang, into build/gpu_peers
#   bench/gpu_suite.sh [OUT]           on the machine with the GPU: results in OUT (build/gpu_results)
#   bench/gpu_suite.sh rehearse [OUT]  anywhere, after `make test`: the parts in small on the emulation
#
# LORASERVE_GPU_SUITE_PARTS="gpu_lora gpu_pool" runs no other parts.
set -euo pipefail
cd "$(dirname "$0")/.."
wheels=build/gpu_wheels
build_tools=("scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.24" ninja grpcio-tools)
test_tools=("pytest>=8" "hypothesis>=6" safetensors transformers psutil)
needs_torch=(peft accelerate)  # torch, and cuBLASLt with it, are on the GPU machine already

if [ "${1:-}" = peers ]; then  # of their wheels only the few files that bench/lora_peers.py reads
  peers=build/gpu_peers
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_34_x86_64 \
    -d "$peers/wheels" vllm==0.33.0 sglang==0.5.23
  unzip -qo "$peers"/wheels/vllm-*.whl 'vllm/lora/ops/triton_ops/*' -d "$peers"
  unzip -qo "$peers"/wheels/sglang-*.whl 'sglang/kernels/ops/lora/dense/*' -d "$peers"
  rm -r "$peers/wheels"
  exit
fi

rehearsal=false
if [ "${1:-}" = rehearse ]; then
  rehearsal=true
  shift
else
  mapfile -t runtime < <(python3 tools/requirements.py | tr ' ' '\n')
fi

if [ "${1:-}" = wheels ]; then
  download=(python3 -m pip download -q --python-version 3.12 --only-binary=:all: -d "$wheels")
  "${download[@]}" "${build_tools[@]}" "${test_tools[@]}" "${runtime[@]}"
  "${download[@]}" --no-deps "${needs_torch[@]}"
  clone=$(mktemp -d)
  git -c advice.detachedHead=false clone -q --depth 1 --branch v1.9.5 \
    https://github.com/google/benchmark "$clone"
  git -C "$clone" archive --prefix=benchmark/ -o "$PWD/$wheels/google-benchmark-1.9.5.tar.gz" HEAD
  rm -rf "$clone"
  exit
fi

out=${1:-build/gpu_results}
models=${LORASERVE_GPU_MODELS:-build/gpu_models}
limit=${LORASERVE_GPU_SUITE_S:-590}
start=$SECONDS
mkdir -p "$out"
parts=()
wanted() { [[ " ${LORASERVE_GPU_SUITE_PARTS:-$1} " == *" $1 "* ]]; }
# part NAME SECONDS COMMAND...: its output in NAME.txt; its exit status also in rc, 124: out of time.
part() {
  local name=$1 room=$2 begin=$SECONDS left=$((limit - (SECONDS - start)))
  shift 2
  rc=0
  wanted "$name" || return 0
  [ "$left" -ge "$room" ] || room=$left
  if [ "$room" -lt 5 ]; then
    rc=124
    echo "no time was left" >"$out/$name.txt"
  else
    timeout -k 5 "$room" "$@" >"$out/$name.txt" 2>&1 || rc=$?
  fi
  [ "$rc" = 0 ] || echo "gpu_suite: $name ended with $rc, see $out/$name.txt"
  parts+=("\"$name\": {\"rc\": $rc, \"s\": $((SECONDS - begin))}")
}
# What is built and written beside the tests, and while something is waited for, stands still while
# something is timed: each of it is a session, as ninja gives every compiler a group of its own.
declare -A beside=()
# beside NAME COMMAND...: begins it, its output in NAME.txt, for as long as there is time.
beside() {
  local name=$1 left=$((limit - (SECONDS - start)))
  shift
  setsid timeout -k 5 "$((left > 1 ? left : 1))" "$@" >"$out/$name.txt" 2>&1 &
  beside[$name]=$!
}
signal_beside() {
  local pid
  for pid in "${beside[@]}"; do  # alone, while it is no session yet
    pkill "-$1" -s "$pid" || kill "-$1" "$pid" 2>/dev/null || true
  done
}
trap 'signal_beside CONT; signal_beside TERM' EXIT
# timed NAME SECONDS COMMAND...: a part, with nothing beside it.
timed() {
  signal_beside STOP
  part "$@"
  signal_beside CONT
}
# awaited NAME SECONDS: waits so long for its end, within the time that is left, and then ends it;
# fails, which is told, unless it is done.
awaited() {
  local pid=${beside[$1]:-} until=$((SECONDS + $2)) rc=0
  [ -n "$pid" ] || return 1
  [ "$until" -le $((start + limit)) ] || until=$((start + limit))
  while kill -0 "$pid" 2>/dev/null && [ "$SECONDS" -lt "$until" ]; do sleep 0.2; done
  pkill -TERM -s "$pid" || true
  wait "$pid" || rc=$?
  unset "beside[$1]"
  [ "$rc" != 0 ] || return 0
  echo "gpu_suite: $1 ended with $rc, see $out/$1.txt"
  parts+=("\"$1\": {\"rc\": $rc}")
  return 1
}

if $rehearsal; then
  python=.venv/bin/python device=cuda-emulated only=emulated small=(--tiny)
  eight_layers=() all_layers=()
  models=$out/models
  echo "none: a rehearsal" >"$out/gpu.txt"
else
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >"$out/gpu.txt" || {
    echo "gpu_suite: no GPU (nvidia-smi failed)"
    exit 2
  }
  command -v nvcc >/dev/null || { echo "gpu_suite: no nvcc on PATH"; exit 2; }
  venv=build/gpu_venv
  python=$venv/bin/python device=cuda only="cuda and not emulated" small=()
  eight_layers=(--model llama-3-8b --layers 8) all_layers=(--model llama-2-7b)
  python3 -m venv --system-site-packages "$venv"
  pip=("$python" -m pip install -q)
  [ -d "$wheels" ] && pip+=(--no-index --find-links "$wheels")
  "${pip[@]}" "${build_tools[@]}" "${test_tools[@]}" "${runtime[@]}" "${needs_torch[@]}"
  architectures=${LORASERVE_CUDA_ARCHITECTURES:-90a-real}  # one: the machine's own
  PATH="$PWD/$venv/bin:$PATH" "$python" -m pip install -q --no-build-isolation --no-deps \
    -C cmake.define.LORASERVE_BUILD_TESTS=ON -C cmake.define.LORASERVE_CUDA=ON \
    -C cmake.define.CMAKE_CUDA_ARCHITECTURES="$architectures" -e .
  LORASERVE_CUBLASLT=${LORASERVE_CUBLASLT:-$("$python" -c '
import nvidia, pathlib
found = [p for root in nvidia.__path__ for p in pathlib.Path(root).rglob("libcublasLt.so.1?")]
print(max(found, default="libcublasLt.so.13"))')}
  export LORASERVE_CUBLASLT
fi
built=$((SECONDS - start))

engine=("$python" bench/gpu_engine.py --device "$device" --models "$models" "${small[@]}")
# The models are written beside the tests, which need the GPU and few cores.
if wanted gpu_engine_8b; then beside write_8b "${engine[@]}" "${eight_layers[@]}" --write-only; fi
if wanted gpu_engine_7b && ! $rehearsal; then
  beside write_7b "${engine[@]}" "${all_layers[@]}" --write-only
fi

# So are the benchmarks of single kernels built, with Google Benchmark from the wheels' folder or as
# it is installed.
kernels=(bench_cuda_lora bench_cuda_attention bench_cuda_step)
build_kernels=build/gpu_bench
if wanted bench_cuda_lora || wanted bench_cuda_attention || wanted bench_cuda_step; then
  options=(-DCMAKE_BUILD_TYPE=Release -DLORASERVE_BUILD_PYTHON=OFF -DLORASERVE_BUILD_BENCH=ON
    "-DLORASERVE_BENCHMARK_SOURCE=$(realpath -qe "$wheels"/google-benchmark-*.tar.gz || true)")
  if $rehearsal; then
    options+=(-DLORASERVE_CUDA=EMULATED)
  else
    options+=(-DLORASERVE_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$architectures")
  fi
  beside build_kernels env PATH="$PWD/$(dirname "$python"):$PATH" bash -c '
    cmake -S . -B "$0" -G Ninja "$@" && cmake --build "$0" --target '"${kernels[*]}" \
    "$build_kernels" "${options[@]}"
fi

suite=(tests/python/test_backend_ops.py tests/python/test_rounded_gemm.py tests/python/test_sampler.py
  tests/python/test_cuda_lora.py tests/python/test_cuda_engine.py tests/python/test_pinned_host_memory.py)
if $rehearsal; then suite=(tests/python/test_cuda_lora.py); fi
part tests 150 "$python" -m pytest -rs -k "$only" --junitxml "$out/tests.xml" "${suite[@]}"
tests=$rc
wanted tests || tests=null
[ ! -e "$out/tests.txt" ] || tail -15 "$out/tests.txt"
part soak 90 "$python" -m pytest -rs -k "$only" --durations 1 tests/python/test_cuda_soak.py
timed gpu_lora 70 "$python" bench/gpu_lora.py --device "$device" --budget 45 "${small[@]}" \
  --out "$out/gpu_lora.json"
if awaited write_8b 90; then
  timed gpu_engine_8b 100 "${engine[@]}" "${eight_layers[@]}" --graphs-off --budget 70 \
    --out "$out/gpu_engine_8b.json"
fi
sanitizer=null
if command -v compute-sanitizer >/dev/null && ! $rehearsal; then
  part sanitizer 60 compute-sanitizer --error-exitcode 9 "$python" -m pytest -q -k "$only" \
    tests/python/test_cuda_lora.py
  ! wanted sanitizer || sanitizer=$rc
fi
if awaited write_7b 120; then
  timed gpu_engine_7b 170 "${engine[@]}" "${all_layers[@]}" --budget 130 \
    --out "$out/gpu_engine_7b.json"
fi
if [ -d build/gpu_peers ] && ! $rehearsal; then
  timed gpu_lora_peers 150 "$python" bench/gpu_lora.py --budget 20 --repeats 10 \
    --peers vllm,sglang --peer-budget 90 --out "$out/gpu_lora_peers.json"
fi
timed gpu_pool 45 "$python" bench/gpu_pool.py --device "$device" --seconds 2 --rounds 2 \
  "${small[@]}" --out "$out/gpu_pool.json"

if awaited build_kernels "$limit"; then
  for kernel in "${kernels[@]}"; do
    timed "$kernel" 120 "$build_kernels/$kernel" --benchmark_out="$out/$kernel.json" \
      --benchmark_out_format=json
  done
fi

# The suite's result is the tests'; what could not be measured is told here and in its own file.
printf '{"gpu": "%s", "commit": "%s", "build_s": %d, "tests_rc": %s, "sanitizer_rc": %s, "total_s": %d,\n "parts": {%s}}\n' \
  "$(head -1 "$out/gpu.txt")" "$(git rev-parse HEAD 2>/dev/null || echo unknown)" \
  "$built" "$tests" "$sanitizer" $((SECONDS - start)) \
  "$(IFS=,; echo "${parts[*]}")" | tee "$out/suite.json"
[ "$tests" = null ] || exit "$tests"
