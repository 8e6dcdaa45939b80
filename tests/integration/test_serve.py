"""`loraserve serve`: starts in order, says so, serves with keys, drains, and leaves nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from served_http import ServedHttp, serving

from loraserve.demo import MODEL_DIRECTORY, adapter_directory

KEY = "a-key-of-more-than-eight-characters"


def ask(url: str, body: Any = None, key: str | None = KEY) -> tuple[int, Any]:
    """Status, and the body as JSON where it is."""
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as got:
            status, text = got.status, got.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


def completion(url: str, model: str, key: str | None = KEY, **more: Any) -> tuple[int, Any]:
    body = {"model": model, "prompt": "garden=", "temperature": 0, **more}
    return ask(f"{url}/v1/completions", body, key)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # One that has ended and is not yet reaped does nothing any more.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def all_gone(served: ServedHttp, timeout_s: float = 60.0) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if not any(alive(pid) for pid in served.daemons().values()):
            return True
        time.sleep(0.05)
    return False


def test_a_model_with_keys_adapters_and_a_root(tmp_path: Path) -> None:
    """Its own model directory and name, one adapter of the command line, one loaded later."""
    model = tmp_path / "my-model"
    shutil.copytree(MODEL_DIRECTORY, model)
    shutil.copytree(adapter_directory("upper"), tmp_path / "adapters" / "shout")
    shutil.copytree(adapter_directory("stars"), tmp_path / "adapters" / "stars")
    (tmp_path / "secret").mkdir()
    words = [
        *("--model", str(model), "--adapter", f"back={adapter_directory('reverse')}"),
        *("--served-model-name", "gpt", "--api-key", KEY, "--threads", "1"),
        *("--adapter-root", str(tmp_path / "adapters"), "--data-dir", str(tmp_path / "data")),
        "--allow-base-mismatch",
    ]
    with serving(*words) as served:
        url = served.url
        assert completion(url, "back")[1]["choices"][0]["text"] == "nedrag"
        assert completion(url, "back", key=None)[0] == 401
        assert completion(url, "back", key="wrong-key")[0] == 401
        models = {m["id"]: m["parent"] for m in ask(f"{url}/v1/models")[1]["data"]}
        assert models == {"my-model": None, "gpt": None, "back": "my-model"}
        assert completion(url, "gpt")[0] == completion(url, "my-model")[0] == 200
        assert completion(url, "gpt:back")[1]["choices"][0]["text"] == "nedrag"

        load = f"{url}/v1/load_lora_adapter"
        assert completion(url, "shout")[0] == 404
        status, text = ask(load, {"lora_name": "shout", "lora_path": "shout"})
        assert (status, text) == (200, "Success: LoRA adapter 'shout' added successfully.")
        assert completion(url, "shout")[1]["choices"][0]["text"] == "GARDEN"
        # The name is taken; in place it means another adapter from then on.
        again = {"lora_name": "shout", "lora_path": str(tmp_path / "adapters" / "stars")}
        assert ask(load, again)[0] == 409
        assert ask(load, again | {"load_inplace": True})[0] == 200
        assert completion(url, "shout")[1]["choices"][0]["text"] == "g*rd*n"
        for path, status in (("../secret", 403), ("/etc", 403), ("absent", 404), ("stars/x", 404)):
            assert ask(load, {"lora_name": "x", "lora_path": path})[0] == status
        assert ask(load, {"lora_name": "my-model", "lora_path": "stars"})[0] == 400
        unload = f"{url}/v1/unload_lora_adapter"
        assert ask(unload, {"lora_name": "shout"})[0] == 200
        assert ask(unload, {"lora_name": "shout"})[0] == 404
        assert completion(url, "shout")[0] == 404
    assert all_gone(served)
    order = [line for line in served.lines if line.startswith("loraserve: ")]
    steps = ("controller serves", "loads", "back (1 of 1)", "ready: ")
    assert [step for line in order for step in steps if step in line] == list(steps)
    assert order[-1] == "loraserve: stopped"
    # The same data serves again, by a file that says the same.
    about = {
        "model": str(model),
        "adapter": {"back": str(adapter_directory("reverse"))},
        "api_key": KEY,
        "data-dir": str(tmp_path / "data"),
        "allow-base-mismatch": True,
        "node": {"threads": 1, "max-num-seqs": 8},
        "gateway": {"log-level": "warning"},
    }
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(about))
    with serving("--config", str(tmp_path / "serve.yaml")) as served:
        assert completion(served.url, "back")[1]["choices"][0]["text"] == "nedrag"


def test_requests_end_before_the_tree_does() -> None:
    with serving("--demo", "--threads", "1") as served:
        body = {"model": "upper", "prompt": "garden=", "max_tokens": 200, "ignore_eos": True}
        request = urllib.request.Request(
            f"{served.url}/v1/completions",
            json.dumps(body | {"stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as stream:
            first = stream.readline()
            assert first.startswith(b"data: ")
            served.process.send_signal(signal.SIGTERM)
            rest = stream.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason": "length"' in rest
        served.process.wait(60)
    assert all_gone(served)


def test_nothing_outlives_a_killed_parent() -> None:
    with serving("--demo", "--threads", "1", code=-signal.SIGKILL) as served:
        served.process.kill()
        served.process.wait()
    assert len(served.daemons()) >= 1
    assert all_gone(served)


def test_a_daemon_that_dies_ends_the_tree() -> None:
    with serving("--demo", "--threads", "1", code=1) as served:
        os.kill(served.daemons()["node-1"], signal.SIGKILL)
        served.process.wait(60)
    assert "node-1 has ended with code -9" in served.text
    assert all_gone(served)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loraserve.cli", "serve", *words],
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ([], "--model: exactly one of"),
        (["--demo", "--model", "x"], "--model: exactly one of"),
        (["--model", "/absent"], "--model: /absent: is no directory"),
        (["--demo", "--nodes", "0"], "--nodes: 0 is not within"),
        (["--demo", "--adapter", "Bad=x"], "--adapter: 'Bad' is not a name"),
        (["--demo", "--host", "0.0.0.0"], "--keys: listening on 0.0.0.0"),
        (["--demo", "--api-key", "short"], "--api-key: needs 8"),
        (["--demo", "--port", "99999"], "--port: 99999 is not within 0 and 65535"),
        (["--demo", "--adapter-root", "/absent"], "--adapter-root: /absent: is no directory"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(words: list[str], wrong: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"loraserve serve: error: {wrong}"), done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_cannot_be_read_ends_it_with_the_nodes_words(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(MODEL_DIRECTORY / name, tmp_path)
    done = run("--model", str(tmp_path), "--port", "0")
    assert done.returncode == 1
    assert f"loraserve-node: error: --model: {tmp_path}: model.safetensors" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == "loraserve serve: error: node-1: ended with code 2 while it started"


def test_it_can_be_stopped_while_it_starts() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "loraserve.cli", "serve", "--demo", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    served = ServedHttp(process)
    reader = threading.Thread(target=served.read, daemon=True)
    reader.start()
    end = time.monotonic() + 120
    while "starting the controller" not in served.text:
        assert time.monotonic() < end, served.text
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    reader.join(60)
    assert served.lines[-1] == "loraserve: stopped"
    assert all_gone(served)
