"""Traces: a client's trace goes on through the gateway and its attempts to the node."""

import contextlib
import http.server
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fake_node import BASE, FakeEngine, serving, until
from http_site import ask, gateway
from node_calls import answers, generate, run

from loraserve import otlp
from loraserve.errors import InvalidArgumentError
from loraserve.tracing import open_tracer

pytest.importorskip("opentelemetry.sdk")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from loraserve.otlp import OtlpTracer

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{CALLER}-01"
MARKER = "quixotry"
ASKED = {"model": BASE, "prompt": MARKER, "max_tokens": 3}


class Traced:
    """A gateway and a node that put their spans where a test reads them."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.gateway = ""
        self.channel: Any = None

    def tracer(self, service: str) -> OtlpTracer:
        return OtlpTracer(service, SimpleSpanProcessor(self.exporter))

    @property
    def spans(self) -> dict[str, Any]:
        """By service and name; those that are there once."""
        spans = self.exporter.get_finished_spans()
        found = {f"{s.resource.attributes['service.name']} {s.name}": s for s in spans}
        assert len(found) == len(spans)
        return found


@contextlib.asynccontextmanager
async def traced(engine: FakeEngine) -> AsyncIterator[Traced]:
    site = Traced()
    async with serving(engine, tracer=site.tracer("node")) as (node, channel):
        about = {"nodes": (node.address,), "base": BASE, "tracer": site.tracer("gateway")}
        async with gateway(**about) as server:
            site.gateway, site.channel = server.address, channel
            yield site


def ids(span: Any) -> tuple[str, str, str]:
    """Of its trace, its parent and itself."""
    parent = f"{span.parent.span_id:016x}" if span.parent else ""
    return f"{span.context.trace_id:032x}", parent, f"{span.context.span_id:016x}"


def test_a_trace_goes_from_the_client_to_the_node() -> None:
    async def test() -> None:
        async with traced(FakeEngine()) as site:
            answer = await ask(
                site.gateway, "/v1/completions", ASKED, headers={"traceparent": PARENT}
            )
            assert answer.status == 200
            await ask(site.gateway, "/health")
        spans = site.spans
        names = ["gateway POST /v1/completions", "gateway attempt", "node generate"]
        assert sorted(spans) == sorted(names)
        parent = CALLER
        for name in names:
            trace, above, parent_of_next = ids(spans[name])
            assert (trace, above) == (TRACE, parent), name
            parent = parent_of_next
        request, attempt, served = (spans[name].attributes for name in names)
        assert request["http.response.status_code"] == 200
        assert request["gen_ai.usage.output_tokens"] == 3
        assert request["loraserve.request"] == answer.headers["x-request-id"]
        assert attempt["loraserve.attempt"] == served["loraserve.attempt"] == 0
        assert served["loraserve.node"] == "n1"
        assert served["loraserve.completion_tokens"] == 3
        text = "".join(span.to_json() for span in spans.values())
        assert MARKER not in text

    run(test)


@pytest.mark.parametrize("header", [None, "", "00-zz", PARENT * 50, "00-" + "0" * 32])
def test_without_a_valid_parent_a_trace_begins(header: str | None) -> None:
    async def test() -> None:
        async with traced(FakeEngine()) as site:
            headers = {} if header is None else {"traceparent": header}
            answer = await ask(site.gateway, "/v1/completions", ASKED, headers=headers)
            assert answer.status == 200
        spans = site.spans
        trace, parent, _ = ids(spans["gateway POST /v1/completions"])
        assert parent == ""
        assert trace != TRACE
        assert {ids(span)[0] for span in spans.values()} == {trace}

    run(test)


def test_what_fails_is_an_error_and_what_the_client_leaves_is_cancelled() -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with traced(engine) as site:
            refused = await ask(
                site.gateway, "/v1/completions", ASKED | {"model": f"{BASE}:nobody"}
            )
            assert refused.status == 404
            failed = site.spans
            site.exporter.clear()
            engine.step_s = 0.01
            call = generate(site.channel, "r", sampling={"max_tokens": 100_000})
            await call.read()
            call.cancel()
            await until(lambda: bool(site.exporter.get_finished_spans()), "the span ends")
        assert failed["gateway POST /v1/completions"].attributes["error.type"] == "NOT_FOUND"
        assert failed["node generate"].attributes["error.type"] == "NOT_FOUND"
        assert site.spans["node generate"].attributes["error.type"] == "CANCELLED"

    run(test)


def test_what_http_refuses_is_an_error_that_names_the_part() -> None:
    async def test() -> None:
        async with traced(FakeEngine()) as site:
            plain = {"content-type": "text/plain"}
            answer = await ask(site.gateway, "/v1/completions", ASKED, headers=plain)
            assert answer.status == 415
        attributes = site.spans["gateway POST /v1/completions"].attributes
        assert attributes["error.type"] == "INVALID_ARGUMENT"
        assert attributes["loraserve.error_field"] == "Content-Type"

    run(test)


def test_one_request_of_an_rpc_may_bring_its_parent_as_metadata() -> None:
    async def test() -> None:
        async with traced(FakeEngine()) as site:
            await answers(site.channel, metadata=(("traceparent", PARENT),))
        trace, parent, _ = ids(site.spans["node generate"])
        assert (trace, parent) == (TRACE, CALLER)

    run(test)


def test_spans_reach_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "CLOSE_TIMEOUT_S", 60.0)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    bodies: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers["content-length"])
            body = self.rfile.read(size)
            if self.headers.get("content-encoding") != "gzip":
                bodies.append((self.path, body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        tracer = open_tracer(f"http://127.0.0.1:{server.server_port}", "loraserve-node")
        assert tracer is not None
        tracer.serve("generate", PARENT, {"loraserve.attempt": 1}).end(None, {})
        tracer.close()
        server.shutdown()
        thread.join()
    ((path, body),) = bodies
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    (span,) = resource.scope_spans[0].spans
    assert path == "/v1/traces"
    assert (span.name, span.trace_id.hex()) == ("generate", TRACE)


def test_a_collector_that_does_not_answer_delays_no_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "CLOSE_TIMEOUT_S", 0.2)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracer = open_tracer(f"http://127.0.0.1:{silent.getsockname()[1]}", "loraserve-node")
        assert tracer is not None
        tracer.serve("generate", PARENT, {}).end(None, {})
        closing = threading.Thread(target=tracer.close, daemon=True)
        closing.start()
        exporting, _ = silent.accept()  # it does ask the collector
        with exporting:
            # The exporter itself would wait for a minute.
            closing.join(30)
            assert not closing.is_alive()
            # Answered after all, it ends: where its request fails it tries again for a minute,
            # and draws its waits from the random state of the tests that come next.
            exporting.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            for thread in threading.enumerate():
                if thread.name.startswith("Otel"):
                    thread.join(30)
                    assert not thread.is_alive()


def test_nothing_is_traced_where_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert open_tracer(None, "loraserve-node") is None
    code = (
        "import sys, loraserve.node.main, loraserve.gateway.main;"
        "print(sorted(name for name in sys.modules if name.startswith('opentelemetry')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgumentError, match="otlp-endpoint: 'x' is no http"):
        open_tracer("x", "loraserve-node")
    monkeypatch.delitem(sys.modules, "loraserve.otlp")
    missing = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InvalidArgumentError, match=r"pip install loraserve\[otel\]"):
        open_tracer("http://127.0.0.1:1", "loraserve-node")
