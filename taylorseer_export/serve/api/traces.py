"""Spans of requests for OpenTelemetry, where it is configured: of the answer, of each picture, and of each stage.

It is configured as everywhere, by variables of the environment: `OTEL_EXPORTER_OTLP_ENDPOINT` or that of traces alone
says where spans go; `OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER` and others mean what the library says. Without an
endpoint nothing is imported and nothing measured. The span that a client names in `traceparent` is the answer's parent.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from taylorseer_export.errors import ConfigError

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_STAGES = ("read", "queue", "prepare", "loop", "decode")  # one after the other
_SERVER_FAULT = 500


class Traces:
    """The spans of one server.

    Args:
        provider: Of the library; shut down when this is closed.
    """

    def __init__(self, provider: Any) -> None:
        from opentelemetry import propagate, trace

        self._provider, self._trace, self._propagate = provider, trace, propagate
        self._tracer = provider.get_tracer("taylorseer_export.serve.api")

    @contextmanager
    def answer(self, method: str, path: str, request_id: str, headers: Mapping[str, str]) -> Iterator[Any]:
        """The span of an answer, for the length of the block; its status is told to what it gives.

        Args:
            method: Of HTTP.
            path: One of few.
            request_id: Of the request.
            headers: In lower case.
        """
        attributes = {"http.request.method": method, "http.route": path, "taylorseer.request_id": request_id}
        with self._tracer.start_as_current_span(
            f"{method} {path}",
            self._propagate.extract(headers),
            self._trace.SpanKind.SERVER,
            attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            yield span

    def answered(self, span: Any, status: int) -> None:
        """The answer of a span has begun, with this status."""
        span.set_attribute("http.response.status_code", status)
        if status >= _SERVER_FAULT:
            span.set_status(self._trace.StatusCode.ERROR)

    def drawn(self, model: str, times: Mapping[str, float | None]) -> None:
        """A picture has just been drawn, in so many milliseconds of each stage; its spans end now.

        Args:
            model: Who drew it.
            times: Of the stages; `full_step` and `forecast_step`, medians of one step, become attributes of the loop.
        """
        lengths = {stage: int(1e6 * (times.get(stage) or 0.0)) for stage in _STAGES}
        begun = time.time_ns() - sum(lengths.values())
        picture = self._tracer.start_span("picture", start_time=begun, attributes={"taylorseer.model": model})
        within = self._trace.set_span_in_context(picture)
        for stage, length in lengths.items():
            steps = ("full_step", "forecast_step") if stage == "loop" else ()
            found = {f"taylorseer.{name}_ms": value for name in steps if (value := times.get(name)) is not None}
            span = self._tracer.start_span(stage, within, start_time=begun, attributes=found)
            begun += length
            span.end(begun)
        picture.end(begun)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def traces_of(environment: Mapping[str, str] | None = None) -> Traces | None:
    """The traces that the environment configures; None where it configures none.

    Args:
        environment: Variables; those of the process if left out.

    Raises:
        ConfigError: They are configured, and the library is not installed.
    """
    given = os.environ if environment is None else environment
    if not any(given.get(name) for name in ENDPOINTS) or given.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        name = next(name for name in ENDPOINTS if given.get(name))
        raise ConfigError(
            f"{error.name} is not installed, expected it since {name} is set; pip install 'taylorseer-export[traces]', "
            "or unset it"
        ) from error
    name = given.get("OTEL_SERVICE_NAME") or "taylorseer-export"
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Traces(provider)
