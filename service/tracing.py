"""Spans for OpenTelemetry, sent by OTLP over HTTP; needs the extra `otel`.

Where to, what is sampled and what else they say is told by OpenTelemetry's own environment
variables (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME, ...).
"""

import time
from collections.abc import Iterable, Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from service.metrics import own_version
from service.trace_context import RequestContext


class Tracing:
    """A provider of its own: nothing else in the process begins to trace because of it."""

    def __init__(self) -> None:
        resource = Resource({"service.name": "mneme", "service.version": own_version()})
        self._provider = TracerProvider(
            resource=resource.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("mneme")

    def begin(self, context: RequestContext, name: str) -> tuple[Span, RequestContext]:
        """Return the span of a request, and its context with the span's ids."""
        above = Context()
        if context.parent_id is not None:
            parent = SpanContext(
                trace_id=int(context.trace_id, 16),
                span_id=int(context.parent_id, 16),
                is_remote=True,
                trace_flags=TraceFlags(int(context.is_sampled)),
                trace_state=TraceState.from_header([context.trace_state]),
            )
            above = set_span_in_context(NonRecordingSpan(parent), above)
        span = self._tracer.start_span(name, context=above, kind=SpanKind.SERVER)
        if not span.is_recording():
            return span, context._replace(is_sampled=False)
        own = span.get_span_context()
        return span, context._replace(
            trace_id=f"{own.trace_id:032x}",
            span_id=f"{own.span_id:016x}",
            is_sampled=own.trace_flags.sampled,
        )

    def end(
        self,
        span: Span,
        *,
        stages: Iterable[tuple[str, float, float]],
        attributes: Mapping[str, str | int | float],
        failed: bool,
    ) -> None:
        """End the span of a request, with a span below it for each stage.

        `stages`: name, begin and end, on the clock of `time.perf_counter`.
        """
        if not span.is_recording():
            return
        began_ns = time.time_ns() - time.perf_counter_ns()
        below = set_span_in_context(span, Context())
        for name, begin, end in stages:
            stage = self._tracer.start_span(
                name, context=below, start_time=began_ns + round(1e9 * begin)
            )
            stage.end(began_ns + round(1e9 * end))
        span.set_attributes(attributes)
        if failed:
            span.set_status(StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()
