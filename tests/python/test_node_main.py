"""loraserve-node as a process, with the demo model: serves, drains, and fails in one line."""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from daemon_process import address_in, finish, start
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from node_calls import generate, refused, run

from loraserve.demo import MODEL_DIRECTORY, MODEL_NAME, adapter_directory
from loraserve.errors import UnavailableError
from loraserve.node.main import _model_options, main, parse_arguments
from loraserve.node.model import open_model
from loraserve.wire import channel_options, dial
from loraserve.wire_errors import from_rpc_error

MODULE = "loraserve.node.main"
MODEL = ("--model", MODEL_DIRECTORY, "--base", MODEL_NAME, "--memory-bytes", 64 << 20)
FREE = ("--listen", "127.0.0.1:0", "--threads", 1)
SERVICE = "loraserve.v1.InferenceService"
SERVING, NOT_SERVING = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path, Path]]:
    """A node with the adapter `upper`, and its port files."""
    port, metrics = tmp_path / "port", tmp_path / "metrics"
    process = start(
        *(MODULE, *MODEL, *FREE, "--port-file", port),
        *("--metrics-listen", "127.0.0.1:0", "--metrics-port-file", metrics),
        *("--adapter", f"upper={adapter_directory('upper')}", "--node-id", "n1"),
    )
    try:
        yield process, port, metrics
    finally:
        process.kill()
        process.wait()


async def text_of(call: Any) -> str:
    return "".join([message.text async for message in call])


async def rest_of(call: Any) -> list[Any]:
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def services(channel: Any) -> set[str]:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    wanted = reflection_pb2.ServerReflectionRequest(list_services="")
    async for answer in stub.ServerReflectionInfo(iter([wanted])):
        return {service.name for service in answer.list_services_response.service}
    return set()


def test_a_node_from_its_start_to_sigterm(node: tuple[subprocess.Popen[str], Path, Path]) -> None:
    process, port_file, metrics_file = node
    address = address_in(port_file, process)

    def metrics() -> dict[str, float]:
        url = f"http://{address_in(metrics_file, process)}/metrics"
        lines = urllib.request.urlopen(url, timeout=60).read().decode().splitlines()
        return {k: float(v) for k, _, v in (x.rpartition(" ") for x in lines if x[0] != "#")}

    async def test() -> None:
        async with dial(address) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            watching = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            assert (await watching.read()).status == SERVING
            for name in ("", "loraserve.v1.NodeService"):
                request = health_pb2.HealthCheckRequest(service=name)
                assert (await health.Check(request)).status == SERVING
            assert await services(channel) == {
                "loraserve.v1.InferenceService",
                "loraserve.v1.NodeService",
                "loraserve.v1.PeerService",
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
            }
            greedy = {"temperature": 0.0, "max_tokens": 12}
            upper = generate(
                channel, "r1", text="word=", adapter={"name": "upper"}, sampling=greedy
            )
            assert await text_of(upper) == "WORD"
            assert await text_of(generate(channel, "r2", text="word=", sampling=greedy)) == "word"

            seen = await asyncio.to_thread(metrics)
            assert seen['loraserve_requests_total{code="OK"}'] == 2
            assert seen["loraserve_ttft_seconds_count"] == 2
            assert seen["loraserve_queue_depth"] == 0
            assert seen['loraserve_pages{use="adapter"}'] > 0
            assert seen['loraserve_pages{use="free"}'] > 0
            assert seen["loraserve_adapter_installs_total"] > 0
            assert seen["loraserve_adapter_install_seconds_total"] > 0
            assert seen["loraserve_adapters_installing"] == 0
            assert seen['loraserve_adapter_resident{state="device"}'] == 1

            # What runs when the signal comes goes on to its end.
            async def begun(turn: int) -> list[tuple[Any, Any]]:
                """Twelve long answers, with the first message of each."""
                long = {"max_tokens": 200, "ignore_eos": True}
                calls = [
                    generate(channel, f"{turn}-{i}", sampling=long, adapter={"name": "upper"})
                    for i in range(12)
                ]
                return [(await call.read(), call) for call in calls]

            running: list[tuple[Any, Any]] = []
            for turn in itertools.count():  # where we are slow, they may have ended meanwhile
                running += await begun(turn)
                assert all(first.token_ids for first, _ in running)
                busy = await asyncio.to_thread(metrics)
                # A gap is between messages, and one message may bring the tokens of several steps.
                gaps = busy["loraserve_tbt_seconds_count"]
                if busy["loraserve_requests_running"] + busy["loraserve_queue_depth"] and gaps > 6:
                    break
            assert busy['loraserve_pages{use="kv"}'] > 0
            process.send_signal(signal.SIGTERM)
            assert (await watching.read()).status == NOT_SERVING
            late = await refused(text_of(generate(channel, "late")))
            assert isinstance(late, UnavailableError)
            for first, call in running:
                last = [first, *await rest_of(call)][-1]  # on a busy machine the first brings all
                assert last.usage.completion_tokens == 200
        code, errors = await asyncio.to_thread(finish, process)
        assert code == 0, errors
        assert errors.splitlines()[-1].endswith("stopped"), errors
        assert " ERROR " not in errors
        for said in (
            "no key file",
            f"node n1 serves on {address}",
            "between nodes over: ",
            "draining",
        ):
            assert said in errors

    run(test)
    assert not port_file.exists()
    assert not metrics_file.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_a_frozen_node_is_found_out_and_a_second_one_takes_nothing_from_it(
    node: tuple[subprocess.Popen[str], Path, Path],
) -> None:
    process, port_file, _ = node
    address = address_in(port_file, process)

    async def test() -> None:
        # The same command again, by mistake.
        second = start(MODULE, *MODEL, "--listen", address, "--port-file", port_file)
        code, errors = await asyncio.to_thread(finish, second)
        assert code == 2
        assert errors.splitlines()[-1].startswith("loraserve-node: error: --listen: cannot bind")
        assert port_file.read_text().strip() == address

        async with dial(address, options=channel_options(1000, 3000)) as channel:
            watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            await watching.read()
            long = {"max_tokens": 200, "ignore_eos": True}
            running = [generate(channel, f"r{i}", sampling=long) for i in range(20)]
            await running[0].read()
            os.kill(process.pid, signal.SIGSTOP)
            # By its pings; the calls' own time would end them otherwise, and by another error.
            assert isinstance(await refused(rest_of(watching)), UnavailableError)
            rests: list[Any] = await asyncio.gather(*map(rest_of, running), return_exceptions=True)
            for rest in rests:
                if isinstance(rest, grpc.aio.AioRpcError):
                    assert isinstance(from_rpc_error(rest), UnavailableError)
                else:  # all of it had come before
                    assert not rest or rest[-1].usage.completion_tokens == 200
            os.kill(process.pid, signal.SIGCONT)
            process.send_signal(signal.SIGINT)
            code, errors = await asyncio.to_thread(finish, process)
            assert code == 0, errors

    run(test)


LOADING = """
import sys, time
import loraserve.node.main as node
from loraserve.node import server

bind = server.bind

def told(*about):
    address = bind(*about)
    print(address, flush=True)
    return address

server.bind = told
node.open_model = lambda options: time.sleep(3600)
sys.exit(node.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("wanted", [None, "bfloat16"])
def test_options_of_the_model_reach_the_engine(wanted: str | None) -> None:
    words = [*map(str, MODEL), "--max-batch-tokens", "96"]
    words += ["--activation-dtype", wanted] if wanted else []
    with contextlib.closing(open_model(_model_options(parse_arguments(words))).engine) as engine:
        assert engine.config.max_batch_tokens == 96
        assert engine.backend_name.endswith("activations bfloat16") == bool(wanted)


def test_a_node_that_loads_says_so_and_can_be_stopped(tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    words = [sys.executable, "-c", LOADING, *map(str, MODEL), "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(
        [*words, "--port-file", str(port_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    async def test() -> None:
        assert process.stdout is not None
        address = (await asyncio.to_thread(process.stdout.readline)).strip()
        async with dial(address) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=SERVICE)
            answer = await health.Check(request, wait_for_ready=True, timeout=60)
            assert answer.status == NOT_SERVING
            error = await refused(text_of(generate(channel)))
            assert (error.code, error.field) == ("UNAVAILABLE", "node")
            assert "is loading its model" in error.message
            assert not port_file.exists()
            process.send_signal(signal.SIGTERM)
            code, errors = await asyncio.to_thread(finish, process)
            assert code == 0, errors
            assert "stopped while starting" in errors

    try:
        run(test)
    finally:
        process.kill()
        process.communicate()


def test_what_keeps_a_node_from_starting_is_one_line_and_code_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    empty = tmp_path / "empty"
    empty.mkdir()
    upper, large = adapter_directory("upper"), adapter_directory("reverse")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases: list[tuple[tuple[object, ...], str]] = [
            (("--model", tmp_path / "none", *FREE), "model: "),
            (("--model", empty, *FREE), "config.json"),
            ((*FREE,), "--model"),
            ((*MODEL, "--listen", f"127.0.0.1:{port}"), f"listen: cannot bind 127.0.0.1:{port}"),
            ((*MODEL, "--listen", "192.0.2.1:70", "--keys", tmp_path / "k"), "keys: "),
            ((*MODEL, "--listen", "nonsense"), "listen: 'nonsense' is not host:port"),
            ((*MODEL, "--listen", "0.0.0.0:0"), "keys: listening on 0.0.0.0:0"),
            ((*MODEL, "--listen", "[::]:0"), "keys: listening on [::]:0"),
            ((*MODEL, *FREE, "--keys", tmp_path / "file"), f"keys: {tmp_path / 'file'}: line 1: "),
            ((*MODEL, *FREE, "--keys", tmp_path / "none"), "keys: "),
            ((*MODEL, *FREE, "--tls-cert", tmp_path / "file"), "tls: "),
            (
                (*MODEL, *FREE, "--tls-cert", tmp_path / "file", "--tls-key", tmp_path / "file"),
                "tls-cert: ",
            ),
            ((*MODEL, *FREE, "--metrics-listen", f"127.0.0.1:{port}"), "metrics-listen: "),
            ((*MODEL, *FREE, "--metrics-listen", "0.0.0.0:0"), "metrics-listen: "),
            ((*MODEL, *FREE, "--metrics-listen", "x"), "metrics-listen: "),
            ((*MODEL, *FREE, "--metrics-port-file", tmp_path / "p"), "--metrics-port-file"),
            ((*MODEL, *FREE, "--port-file", tmp_path / "none" / "p"), "port-file: "),
            ((*MODEL, *FREE, "--adapter", "upper"), "--adapter"),
            ((*MODEL, *FREE, "--adapter", f"UP={upper}"), "adapter: 'UP' is not a name"),
            ((*MODEL, *FREE, "--adapter", f"u={tmp_path / 'none'}"), "adapter u: "),
            ((*MODEL, *FREE, "--adapter", f"u={empty}"), "adapter u: "),
            ((*MODEL, *FREE, "--adapter", f"u={upper}", "--adapter", f"u={upper}"), "--adapter"),
            (
                (*MODEL, *FREE, "--adapter", f"u={large}", "--host-pool-bytes", 1 << 20),
                "adapter u: host_pool_bytes: ",
            ),
            (
                (*MODEL, *FREE, "--host-pool-bytes", (1 << 20) - 1),
                "--host-pool-bytes: 1048575 is under the least of use, 1048576 (1 MiB)",
            ),
            ((*MODEL, *FREE, "--host-pool-bytes", 0), "--host-pool-bytes: 0 is under the least"),
            ((*MODEL, *FREE, "--host-pool-bytes", 1 << 50), "host-pool-bytes: 1125899906842624"),
            ((*MODEL, *FREE, "--disk-cache", upper / "adapter_config.json"), "disk-cache: "),
            ((*MODEL, *FREE, "--min-fetch-bandwidth", 0), "--min-fetch-bandwidth: at least 1"),
            ((*MODEL, *FREE, "--controller", "nowhere"), "controller: 'nowhere' is not host:port"),
            (
                (*MODEL, *FREE, "--controller", "a:1", "--controller-key", tmp_path / "none"),
                "controller-key: ",
            ),
            ((*MODEL, "--listen", "127.0.0.1:0", "--controller-key", "k"), "--controller-key"),
            (
                (*MODEL, *FREE, "--controller", "a:1", "--advertise", "0.0.0.0:7"),
                "advertise: ",
            ),
            ((*MODEL, *FREE, "--store", "nonsense://x"), "store: "),
            ((*MODEL, *FREE, "--store", tmp_path / "file"), "store: "),
            ((*MODEL, *FREE, "--node-id", "No 1"), "node-id: "),
            ((*MODEL, *FREE, "--base", "../x"), "base: "),
            ((*MODEL, *FREE, "--device", "abacus"), "device: "),
            (("--model", MODEL_DIRECTORY, *FREE, "--memory-bytes", 1000), "memory"),
            ((*MODEL, *FREE, "--threads", -1), "--threads"),
            ((*MODEL, *FREE, "--drain-timeout-s", "nan"), "--drain-timeout-s"),
            ((*MODEL, *FREE, "--stall-timeout-s", 0), "--stall-timeout-s"),
        ]
        for arguments, told in cases:
            try:
                code: object = main([*map(str, arguments), "--log-level", "error"])
            except SystemExit as stopped:
                code = stopped.code
            errors = capfd.readouterr().err
            assert code == 2, (arguments, errors)
            assert errors.startswith("loraserve-node: error: "), errors
            assert told in errors, (arguments, errors)
            assert len(errors.splitlines()) == 1, errors
