"""loraserve-controller as a process: starts, says where it is, drains, and fails in one line."""

import asyncio
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from daemon_process import address_in, finish, start
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraserve.controller.main import main
from loraserve.wire import dial

ROOT = Path(__file__).parents[2]
MODULE = "loraserve.controller.main"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_a_signal_and_exits_cleanly(tmp_path: Path, number: int) -> None:
    port_file = tmp_path / "port"
    process = start(
        *(MODULE, "--listen", "127.0.0.1:0", "--data-dir", tmp_path / "data"),
        *("--port-file", port_file),
    )
    address = address_in(port_file, process)

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


def test_a_second_one_takes_nothing_from_the_first(tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    shared = ("--data-dir", tmp_path / "data", "--port-file", port_file)
    first = start(MODULE, "--listen", "127.0.0.1:0", *shared)
    address = address_in(port_file, first)
    upload = tmp_path / "data" / "staging" / "of-the-first.part"
    upload.write_bytes(b"x")
    left = tmp_path / "data" / "adapters" / "aa" / f"{'a' * 64}.lora.bb.part"
    left.parent.mkdir()
    left.write_bytes(b"x")
    os.utime(left, (0, 0))
    for arguments, told in (
        (("--listen", "127.0.0.1:0", *shared), "--data-dir: "),
        (
            ("--listen", address, "--data-dir", tmp_path / "2", "--port-file", port_file),
            "--listen: ",
        ),
    ):
        code, errors = finish(start(MODULE, *arguments))
        assert code == 2
        assert errors.splitlines()[-1].startswith(f"loraserve-controller: error: {told}")
    assert port_file.read_text().strip() == address
    assert upload.exists()
    assert left.exists()
    first.send_signal(signal.SIGTERM)
    assert finish(first)[0] == 0
    assert not port_file.exists()
    # The next one, alone, cleans up.
    third = start(MODULE, "--listen", "127.0.0.1:0", *shared)
    address_in(port_file, third)
    assert not upload.exists()
    assert not left.exists()
    third.send_signal(signal.SIGTERM)
    assert finish(third)[0] == 0


def test_what_keeps_it_from_starting_is_one_line_and_code_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = ("--data-dir", tmp_path / "data")
    file = tmp_path / "file"
    file.write_text("x")
    slow = tmp_path / "slow.json"
    values = json.loads((ROOT / "loraserve/profiles/a100-llama-3-8b-padded.json").read_text())
    values["cost"]["prefill_token_s"] = 1.0
    slow.write_text(json.dumps(values))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        free = ("--listen", "127.0.0.1:0")
        cases: list[tuple[tuple[object, ...], str]] = [
            (("--listen", f"127.0.0.1:{port}", *data), f"listen: cannot bind 127.0.0.1:{port}"),
            ((*free,), "--data-dir"),
            ((*free, "--data-dir", file), "data-dir: "),
            (("--listen", "0.0.0.0:0", *data), "keys: listening on 0.0.0.0:0"),
            (("--listen", "nonsense", *data), "listen: 'nonsense' is not host:port"),
            ((*free, *data, "--keys", file), f"keys: {file}: line 1: "),
            ((*free, *data, "--keys", tmp_path / "none"), "keys: "),
            ((*free, *data, "--tls-cert", file), "tls: "),
            ((*free, *data, "--tls-cert", file, "--tls-key", file), "tls-cert: "),
            ((*free, *data, "--metrics-listen", "0.0.0.0:0"), "metrics-listen: "),
            ((*free, *data, "--metrics-listen", f"127.0.0.1:{port}"), "metrics-listen: "),
            ((*free, *data, "--metrics-port-file", file), "--metrics-port-file"),
            ((*free, *data, "--port-file", tmp_path / "none" / "p"), "port-file: "),
            ((*free, *data, "--store", "nonsense://x"), "store: "),
            ((*free, *data, "--policy", "dice"), "--policy"),
            ((*free, *data, "--replicas", 0), "--replicas"),
            ((*free, *data, "--heartbeat-period", "nan"), "--heartbeat-period"),
            ((*free, *data, "--placement-interval", "nan"), "--placement-interval"),
            ((*free, *data, "--profile", "nonsense"), "--profile: 'nonsense' is no file ("),
            ((*free, *data, "--profile", file), "profile: "),
            ((*free, *data, "--profile", slow), "profile: 'a100-llama-3-8b-padded' cannot meet"),
            ((*free, *data, "--profile-base", "b"), "--profile-base goes with --profile"),
            ((*free, *data, "--slo-tbt", "0.001"), "slo.tbt_p95_s: 0.001: an empty step takes"),
            ((*free, *data, "--slo-ttft", "nan"), "slo.ttft_p95_s: nan"),
            ((*free, *data, "--output", "0"), "mix.output: 0"),
        ]
        for arguments, told in cases:
            try:
                code: object = main([*map(str, arguments), "--log-level", "error"])
            except SystemExit as stopped:
                code = stopped.code
            errors = capfd.readouterr().err
            assert code == 2, (arguments, errors)
            assert errors.startswith("loraserve-controller: error: "), errors
            assert told in errors, (arguments, errors)
            assert len(errors.splitlines()) == 1, errors
