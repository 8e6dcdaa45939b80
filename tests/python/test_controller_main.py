"""loraserve-controller as a process: starts, says where it is, drains, and fails in one line."""

import asyncio
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraserve.wire import dial

COMMAND = [sys.executable, "-m", "loraserve.controller.main"]


def start(*arguments: object) -> subprocess.Popen[str]:
    words = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    return process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_a_signal_and_exits_cleanly(tmp_path: Path, number: int) -> None:
    port_file = tmp_path / "port"
    process = start(
        "--listen", "127.0.0.1:0", "--data-dir", tmp_path / "data", "--port-file", port_file
    )
    deadline = time.monotonic() + 15
    while not port_file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    address = port_file.read_text().strip()

    async def health() -> Any:
        async with dial(address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="loraserve.v1.ControllerService")
            # An open stream must not hold up the end.
            watching = stub.Watch(request)
            status = (await watching.read()).status
            process.send_signal(number)
            code, errors = await asyncio.to_thread(finish, process)
            return status, code, errors

    status, code, errors = asyncio.run(health())
    assert status == health_pb2.HealthCheckResponse.SERVING
    assert code == 0, errors
    assert f"serving on {address}" in errors
    assert errors.splitlines()[-1].endswith("stopped")
    assert "no key file" in errors
    assert not port_file.exists()


def test_what_keeps_it_from_starting_is_one_line_and_code_2(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (tmp_path / "file").write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        free = ("--listen", "127.0.0.1:0")
        quiet = ("--log-level", "error")
        cases = [
            (("--listen", f"127.0.0.1:{port}", "--data-dir", data), f"127.0.0.1:{port}"),
            ((*free, "--data-dir", tmp_path / "file"), "data-dir"),
            (("--listen", "0.0.0.0:0", "--data-dir", data / "2"), "key file"),
            ((*free, "--data-dir", data / "3", "--keys", tmp_path / "file"), "keys file:1"),
            ((*free, "--data-dir", data / "4", "--tls-cert", tmp_path / "file"), "go together"),
            (("--listen", "nonsense", "--data-dir", data / "5"), "host:port"),
        ]
        running = [(start(*arguments, *quiet), told) for arguments, told in cases]
        for process, told in running:
            code, errors = finish(process)
            assert code == 2, errors
            assert len(errors.splitlines()) == 1, errors
            assert errors.startswith("loraserve-controller: ")
            assert told in errors
