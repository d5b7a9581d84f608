"""Where the time of a request went, as OpenTelemetry spans: route, queue, load, patch, prefill, decode.

The packages come with the extra `otel`; nothing of them is imported unless an endpoint is configured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from server.engine.timing import Timing
from store.errors import InvalidRequestError

Attribute = str | int | float | bool


class Span(Protocol):
    """A request's span, while it is open."""

    def set(self, **attributes: Attribute) -> None: ...


class Tracing(Protocol):
    """Where spans go."""

    @property
    def is_on(self) -> bool: ...

    def request(self, name: str, headers: Mapping[str, str]) -> Any:
        """A context manager around one request; gives a `Span`. Goes on with the trace of a `traceparent` header."""
        ...

    def record(self, name: str, began: float, ended: float, **attributes: Attribute) -> None:
        """A part of the current request that is over, by `time.monotonic`."""
        ...

    def close(self) -> None:
        """Send what has not been sent yet."""
        ...


class NoTracing:
    """Nobody wants to know."""

    is_on = False

    @contextmanager
    def request(self, name: str, headers: Mapping[str, str]) -> Iterator[Span]:
        del name, headers
        yield _NoSpan()

    def record(self, name: str, began: float, ended: float, **attributes: Attribute) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class _NoSpan:
    def set(self, **attributes: Attribute) -> None:
        """Does nothing."""


class OpenTelemetry:
    """Spans to whatever an OpenTelemetry exporter leads to.

    Args:
        exporter: a `SpanExporter`.
        service: what the server is called there.
    """

    is_on = True

    def __init__(self, exporter: Any, service: str = "switchyard") -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # Not the process's global provider: two servers in one process never meet.
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("switchyard")
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def request(self, name: str, headers: Mapping[str, str]) -> Iterator[Span]:
        from opentelemetry.trace import SpanKind

        parent = self._propagator.extract(headers)
        with self._tracer.start_as_current_span(name, parent, SpanKind.SERVER, record_exception=False) as span:
            yield _OpenSpan(span)

    def record(self, name: str, began: float, ended: float, **attributes: Attribute) -> None:
        offset = time.time() - time.monotonic()
        span = self._tracer.start_span(name, start_time=int((began + offset) * 1e9), attributes=attributes)
        span.end(int((max(began, ended) + offset) * 1e9))

    def close(self) -> None:
        self._provider.shutdown()


class _OpenSpan:
    def __init__(self, span: Any) -> None:
        self._span = span

    def set(self, **attributes: Attribute) -> None:
        for name, value in attributes.items():
            if name == "name":
                self._span.update_name(value)
            else:
                self._span.set_attribute(name.replace("__", "."), value)


def tracing_to(endpoint: str | None) -> Tracing:
    """Tracing to an OTLP endpoint over HTTP; none without one.

    Raises:
        InvalidRequestError: the extra `otel` is not installed.
    """
    if endpoint is None:
        return NoTracing()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise InvalidRequestError(
            "traces need OpenTelemetry's packages: pip install 'switchyard[otel]'", param="otel_endpoint"
        ) from None
    return OpenTelemetry(OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces"))


def record_answer(tracing: Tracing, timing: Timing, ended: float, *, choice: int, tokens: int) -> None:
    """The spans of one answer inside the engine."""
    tracing.record("load", timing.arrived, timing.granted, choice=choice)
    tracing.record("queue", timing.granted, timing.scheduled, choice=choice)
    if timing.patching:
        tracing.record("patch", timing.scheduled, timing.scheduled + timing.patching, choice=choice)
    tracing.record("prefill", timing.scheduled + timing.patching, timing.answered, choice=choice)
    tracing.record("decode", timing.answered, ended, choice=choice, tokens=tokens)
