"""llama.cpp beside us: its converter, its own benchmarks and its server, from a build directory."""

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from random_llama import VOCAB

_TRIES = 10


class LlamaCpp:
    """A CMake build directory of llama.cpp (or a copy of its bin/ and CMakeCache.txt)."""

    def __init__(self, build: Path, threads: int) -> None:
        self.bin = build / "bin"
        self.threads = threads
        self._environment = os.environ | {"LD_LIBRARY_PATH": str(self.bin)}
        cache = (build / "CMakeCache.txt").read_text().splitlines()
        home = [line for line in cache if line.startswith("CMAKE_HOME_DIRECTORY")]
        self.source = Path(home[0].partition("=")[2])

    def made_with(self) -> str:
        """The directory of its sources, and what of its instruction sets was chosen."""
        wanted = ("GGML_NATIVE:", "GGML_AVX", "GGML_FMA:", "GGML_F16C:", "GGML_BMI2:")
        cache = (self.bin.parent / "CMakeCache.txt").read_text().splitlines()
        return " ".join([self.source.parts[-3], *(x for x in cache if x.startswith(wanted))])

    def convert(self, base: Path, dtype: str, out: Path) -> Path:
        """A Hugging Face directory as GGUF in f32, f16 or bf16."""
        self._convert("convert_hf_to_gguf.py", [str(base), "--outtype", dtype], out)
        return out

    def convert_adapter(self, base: Path, adapter: Path, out: Path) -> Path:
        self._convert(
            "convert_lora_to_gguf.py", [str(adapter), "--base", str(base), "--outtype", "f16"], out
        )
        return out

    def _convert(self, script: str, arguments: list[str], out: Path) -> None:
        if out.exists():
            return
        partial = out.with_suffix(".partial")
        command = [sys.executable, str(self.source / script), *arguments, "--outfile", str(partial)]
        python = os.environ | {"PYTHONPATH": str(self.source / "gguf-py")}
        done = subprocess.run(command, env=python, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
        partial.rename(out)

    def _records(self, program: str, model: Path, arguments: list[str]) -> list[dict[str, Any]]:
        command = [str(self.bin / program), "-m", str(model), "-t", str(self.threads), *arguments]
        # Its log is written by a thread of its own, which the end of the program may overtake: then
        # it has measured and printed nothing, and is asked again.
        for _ in range(_TRIES):
            done = subprocess.run(command, env=self._environment, capture_output=True, text=True)
            records = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == "{"]
            if records or done.returncode != 0:
                break
        if done.returncode != 0 or not records:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
        return records

    def prefill(self, model: Path, tokens: int) -> float:
        """tokens/s of one prompt, after a warm-up of its own."""
        arguments = ["-p", str(tokens), "-n", "0", "-r", "1", "-o", "jsonl"]
        return float(self._records("llama-bench", model, arguments)[0]["avg_ts"])

    def decode(self, model: Path, batch: int, context: int, steps: int) -> float:
        """Generated tokens/s of `batch` sequences that all begin with `context` tokens."""
        cells = (context + steps) * batch + 512
        arguments = ["-tb", str(self.threads), "-c", str(cells), "-b", "2048", "-ub", "512"]
        arguments += ["-npp", str(context), "-ntg", str(steps), "-npl", str(batch)]
        arguments += ["--output-format", "jsonl"]
        return float(self._records("llama-batched-bench", model, arguments)[0]["speed_tg"])


class LlamaServer:
    """llama-server with every adapter loaded and none applied; eight slots on loopback."""

    def __init__(
        self, build: LlamaCpp, model: Path, adapters: list[Path], slots: int, context: int
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        threads = str(build.threads)
        command = [str(build.bin / "llama-server"), "-m", str(model), "-t", threads, "-tb", threads]
        command += ["--host", "127.0.0.1", "--port", str(port), "-np", str(slots)]
        command += ["-c", str(slots * context), "--lora-init-without-apply"]
        command += ["--lora", ",".join(map(str, adapters))]
        self._process = subprocess.Popen(
            command,
            env=build._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._wait()

    def _wait(self) -> None:
        for _ in range(600):
            try:
                urllib.request.urlopen(self._url + "/health", timeout=1)
                return
            except OSError:
                if self._process.poll() is not None:
                    raise RuntimeError("llama-server ended while it started") from None
                time.sleep(0.5)
        raise RuntimeError("llama-server did not start")

    def generate(
        self, requests: int, prompt: int, steps: int, adapter_of: Callable[[int], int | None]
    ) -> float:
        """Generated tokens/s over the whole group of requests, prompts included."""
        counts = [0] * requests
        gate = threading.Barrier(requests + 1)

        def one(index: int) -> None:
            adapter = adapter_of(index)
            # An empty list would mean the server's own scales: all adapters at once.
            scale = 0.0 if adapter is None else 1.0
            body = {
                "prompt": [random.randrange(300, VOCAB) for _ in range(prompt)],
                "n_predict": steps,
                "ignore_eos": True,
                "temperature": 0,
                "cache_prompt": False,
                "lora": [{"id": adapter or 0, "scale": scale}],
            }
            data = json.dumps(body).encode()
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(self._url + "/completion", data, headers)
            gate.wait()
            with urllib.request.urlopen(request, timeout=600) as answer:
                counts[index] = json.load(answer)["tokens_predicted"]

        threads = [threading.Thread(target=one, args=(index,)) for index in range(requests)]
        for thread in threads:
            thread.start()
        gate.wait()
        begin = time.perf_counter()
        for thread in threads:
            thread.join()
        if sum(counts) != requests * steps:
            raise RuntimeError(f"llama-server answered {counts}")
        return requests * steps / (time.perf_counter() - begin)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
