"""Traces by OpenTelemetry's SDK. Only imported where traces are asked for."""

import threading

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from loraserve.errors import InvalidArgumentError
from loraserve.tracing import MAX_TRACEPARENT_CHARACTERS, Attributes

_PROPAGATOR = TraceContextTextMapPropagator()
# What a daemon that stops gives a collector to take the last spans.
CLOSE_TIMEOUT_S = 2.0


class OtlpSpan:
    def __init__(self, tracer: "OtlpTracer", span: OtelSpan) -> None:
        self._tracer = tracer
        self._span = span

    @property
    def traceparent(self) -> str:
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, set_span_in_context(self._span))
        return carrier.get("traceparent", "")

    def child(self, name: str, attributes: Attributes) -> "OtlpSpan":
        parent = set_span_in_context(self._span)
        made = self._tracer.tracer.start_span(
            name, parent, SpanKind.CLIENT, attributes=dict(attributes)
        )
        return OtlpSpan(self._tracer, made)

    def end(self, error: str | None, attributes: Attributes) -> None:
        self._span.set_attributes(dict(attributes))
        if error is not None:
            self._span.set_status(StatusCode.ERROR, error)
            self._span.set_attribute("error.type", error)
        self._span.end()


class OtlpTracer:
    """Sampling is OpenTelemetry's to configure (OTEL_TRACES_SAMPLER), as is how spans are sent."""

    def __init__(self, service: str, processor: SpanProcessor) -> None:
        resource = Resource.create({"service.name": service})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self.tracer = self._provider.get_tracer("loraserve")

    @classmethod
    def to(cls, endpoint: str | None, service: str) -> "OtlpTracer":
        """`endpoint`: None for that of the environment. Raises InvalidArgumentError."""
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise InvalidArgumentError("otlp-endpoint", f"{endpoint!r} is no http(s) URL")
        url = None if endpoint is None else endpoint.rstrip("/") + "/v1/traces"
        return cls(service, BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))

    def serve(self, name: str, traceparent: str, attributes: Attributes) -> OtlpSpan:
        carrier = {"traceparent": traceparent[:MAX_TRACEPARENT_CHARACTERS]} if traceparent else {}
        parent = _PROPAGATOR.extract(carrier)
        made = self.tracer.start_span(name, parent, SpanKind.SERVER, attributes=dict(attributes))
        return OtlpSpan(self, made)

    def close(self) -> None:
        """Sends what is left. What a collector has not taken in CLOSE_TIMEOUT_S is lost."""
        # A daemon thread: one that still waits for the collector ends with the process.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)
