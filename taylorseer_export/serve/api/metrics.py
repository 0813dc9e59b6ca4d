"""Metrics for Prometheus: what the models count, and how requests were answered, in a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.serve.api.models import Models

_STAGES = ("read", "queue", "prepare", "loop", "decode")
_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # seconds
# Group of a model's counts -> (metric, label, what it says).
_COUNTS = {
    "requests": ("taylorseer_requests", "outcome", "Pictures, by outcome"),
    "steps": ("taylorseer_steps", "kind", "Denoising steps, by kind"),
    "calls": ("taylorseer_calls", "kind", "Engine calls of denoising steps, by kind"),
    "seconds": ("taylorseer_step_seconds", "kind", "Time in engine calls, by kind (seconds)"),
    "fallbacks": ("taylorseer_fallbacks", "kind", "Engine calls not shared, or no CUDA graph, as asked"),
    "conditioning": ("taylorseer_conditioning", "outcome", "Prompts, by whether what they become was kept (hit, miss)"),
    "prepared": (
        "taylorseer_prepared",
        "outcome",
        "Pictures, by whether their slot was prepared for it (hit, miss)",
    ),
    "full": ("taylorseer_full_steps", "when", "Full steps of finished pictures, planned and executed"),
}
_ALWAYS = {
    "requests": ("done", "failed", "cancelled", "late", "refused"),
    "steps": ("full", "forecast"),
    "calls": ("full", "forecast"),
    "seconds": ("full", "forecast"),
    "fallbacks": ("shared", "cuda_graph"),
    "conditioning": ("hit", "miss"),
    "prepared": ("hit", "miss"),
    "full": ("planned", "executed"),
}


class Metrics:
    """The metrics of one server.

    Args:
        models: Who are asked whenever the metrics are.

    Raises:
        ConfigError: prometheus-client is not installed.
    """

    def __init__(self, models: Models) -> None:
        library = _library()
        self._library, self._models = library, models
        self._registry = library.CollectorRegistry()
        self._registry.register(self)
        self._answers = library.Counter(
            "taylorseer_http_requests", "Requests, by path and status", ("path", "status"), registry=self._registry
        )
        self._times = library.Histogram(
            "taylorseer_stage_seconds",
            "Time of the stages of a picture (seconds)",
            ("model", "stage"),
            buckets=_BUCKETS,
            registry=self._registry,
        )

    def answered(self, path: str, status: int) -> None:
        """A request was answered; `path` is one of few."""
        self._answers.labels(path, str(status)).inc()

    def drawn(self, model: str, times: dict[str, float | None]) -> None:
        """A picture was drawn, in so many milliseconds of each stage."""
        for stage in _STAGES:
            if (value := times.get(stage)) is not None:
                self._times.labels(model, stage).observe(1e-3 * value)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        made: bytes = self._library.generate_latest(self._registry)
        return made

    @property
    def content_type(self) -> str:
        """Of `text`."""
        return str(self._library.CONTENT_TYPE_PLAIN_0_0_4)

    def collect(self) -> Iterator[Any]:
        """What the models say now; the registry asks for it."""
        core = self._library.metrics_core
        families = {
            group: core.CounterMetricFamily(name, text, labels=("model", label))
            for group, (name, label, text) in _COUNTS.items()
        }
        gauges = {
            name: core.GaugeMetricFamily(f"taylorseer_{name}", text, labels=("model",))
            for name, text in (
                ("slots", "Slots"),
                ("slots_in_use", "Slots that hold a picture"),
                ("queue", "Pictures that wait for a slot"),
                ("conditioning_bytes", "Memory of what is kept of prompts (bytes)"),
                ("in_flight", "Pictures that a front waits for"),
                ("servers_ready", "Triton servers of a front that are ready for the model"),
                ("stalled_seconds", "Time of the longest turn of work under way (seconds)"),
            )
        }
        hurried = core.CounterMetricFamily(
            "taylorseer_busy_requests", "Requests that took the faster profile of a busy server", labels=("model",)
        )
        for model in self._models:
            hurried.add_metric((model.name,), model.hurried)
            counts = _regrouped(model.counts())
            for group in model.counted:
                for name in _ALWAYS[group]:
                    families[group].add_metric((model.name, name), counts.get((group, name), 0.0))
            for name, value in model.gauges().items():
                gauges[name].add_metric((model.name,), value)
        yield from families.values()
        yield hurried
        yield from gauges.values()


def _regrouped(counts: Mapping[str, float]) -> dict[tuple[str, str], float]:
    """`steps.full` as (steps, full); `planned.full` as (full, planned)."""
    made = {}
    for name, value in counts.items():
        group, _, kind = name.partition(".")
        made[(kind, group) if group in ("planned", "executed") else (group, kind)] = value
    return made


def _library() -> Any:
    try:
        import prometheus_client
    except ImportError as error:
        raise ConfigError(
            "prometheus-client is not installed, expected it for metrics; pip install 'taylorseer-export[serve]'"
        ) from error
    return prometheus_client
