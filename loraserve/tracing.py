"""Spans of requests, for OpenTelemetry where it is asked for and installed. Nothing of it is
imported else.

A gateway begins a span for each request, in the trace that its client's `traceparent` names; each
attempt on a node is a child of it, and what the node does is a child of the attempt.
"""

import os
from collections.abc import Mapping
from typing import Protocol

from loraserve.errors import InvalidArgumentError

Attributes = Mapping[str, str | int | float | bool]
# By the specification of OTLP's exporters.
_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
MAX_TRACEPARENT_CHARACTERS = 128


class Span(Protocol):
    """One piece of work. `end` it, once."""

    @property
    def traceparent(self) -> str:
        """W3C's header, by which another process goes on with the trace."""

    def child(self, name: str, attributes: Attributes) -> "Span":
        """Work that is asked of another process."""

    def end(self, error: str | None, attributes: Attributes) -> None:
        """`error`: a word for what went wrong, None where nothing did."""


class Tracer(Protocol):
    def serve(self, name: str, traceparent: str, attributes: Attributes) -> Span:
        """Work that another process asked for; one without a valid `traceparent` begins a
        trace."""

    def close(self) -> None:
        """Sends what is left. Blocks, for two seconds at most."""


def open_tracer(endpoint: str | None, service: str) -> Tracer | None:
    """None where neither `endpoint` (the base URL of an OTLP/HTTP collector) nor OpenTelemetry's
    environment variables ask for traces. Raises InvalidArgumentError where they cannot be had."""
    if endpoint is None and not any(os.environ.get(name) for name in _VARIABLES):
        return None
    try:
        from loraserve.otlp import OtlpTracer
    except ImportError as error:
        raise InvalidArgumentError(
            "otlp-endpoint", f"needs `pip install loraserve[otel]` ({error})"
        ) from None
    return OtlpTracer.to(endpoint, service)
