"""Spans of requests: what a collector gets of an answer, its pictures and their stages."""

import json
from itertools import pairwise

import pytest
from images_api import asked, got, models_over, until
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from taylorseer_export.errors import ConfigError
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.serve.api import process, traces
from taylorseer_export.serve.api.settings import Settings
from taylorseer_export.serve.api.traces import Traces, traces_of

GENERATIONS = "/v1/images/generations"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def digits(embedded):
    with load(embedded("digits"), threads=1) as denoiser:
        yield denoiser


@pytest.fixture
def traced(digits, serving_traces):
    with models_over(digits, slots=1, queue=2, workers=1) as models:
        with serving_traces(models) as (port, exporter):
            yield port, exporter


@pytest.fixture
def serving_traces():
    """Models -> a server over them whose spans are kept here: (port, exporter)."""
    from contextlib import contextmanager

    from images_api import serving

    @contextmanager
    def serve(models):
        exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        with serving(models, traces=Traces(provider)) as port:
            yield port, exporter

    return serve


def spans_of(exporter, count):
    until(lambda: len(exporter.get_finished_spans()) >= count)
    found = exporter.get_finished_spans()
    assert len(found) == count
    return found


def test_an_answer_has_its_pictures_and_they_their_stages(traced):
    port, exporter = traced
    body = {"prompt": "3", "n": 2, "seed": 1, "plan": "FFF..F", "order": 1}
    status, headers, text = asked(port, GENERATIONS, body, {"traceparent": PARENT})
    assert status == 200
    spans = spans_of(exporter, 1 + 2 * 6)
    (answer,) = [span for span in spans if span.name == f"POST {GENERATIONS}"]
    assert format(answer.context.trace_id, "032x") == PARENT.split("-")[1]
    assert format(answer.parent.span_id, "016x") == PARENT.split("-")[2]
    assert answer.attributes["http.response.status_code"] == 200
    assert answer.attributes["taylorseer.request_id"] == headers["x-request-id"]
    pictures = [span for span in spans if span.name == "picture"]
    assert [span.parent.span_id for span in pictures] == [answer.context.span_id] * 2
    told = json.loads(text)["taylorseer"]["pictures"]
    for picture in pictures:
        stages = [span for span in spans if span.parent and span.parent.span_id == picture.context.span_id]
        assert [span.name for span in stages] == ["read", "queue", "prepare", "loop", "decode"]
        for before, after in pairwise(stages):  # one begins where the other ends
            assert before.end_time == after.start_time
        assert (picture.start_time, picture.end_time) == (stages[0].start_time, stages[-1].end_time)
        lengths = [round((span.end_time - span.start_time) / 1e6, 3) for span in stages]
        assert lengths in [[one["times_ms"][span.name] for span in stages] for one in told]
        loop = stages[3].attributes
        assert loop["taylorseer.full_step_ms"] > 0 and loop["taylorseer.forecast_step_ms"] > 0
        assert picture.attributes["taylorseer.model"] == "dit-tiny"


def test_errors_have_a_status(traced, monkeypatch):
    port, exporter = traced
    assert asked(port, GENERATIONS, {"prompt": "x"})[0] == 400
    assert got(port, "/nowhere/at/all")[0] == 404
    first, second = spans_of(exporter, 2)
    assert first.attributes["http.response.status_code"] == 400 and first.status.is_unset
    assert (second.name, second.attributes["http.response.status_code"]) == ("GET other", 404)


def test_nothing_is_traced_where_nothing_is_configured():
    assert traces_of({}) is None
    assert traces_of({traces.ENDPOINTS[0]: "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"}) is None


@pytest.mark.parametrize("name", traces.ENDPOINTS)
def test_an_endpoint_configures_it(name, monkeypatch):
    made = traces_of({name: "http://127.0.0.1:1", "OTEL_SERVICE_NAME": "mine"})
    assert made._provider.resource.attributes["service.name"] == "mine"
    made.close()
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=rf"sdk.trace is not installed, expected it since {name} is set"):
        traces_of({name: "http://127.0.0.1:1"})


def test_the_server_closes_them(digits):
    closed = []

    class Watched(Traces):
        def close(self):
            closed.append(True)

    with models_over(digits, slots=1, workers=1) as models:
        models.close = lambda: None
        server = process.server_of(models, Settings(), Watched(TracerProvider()))
        _lifespan(server.config.app)
    assert closed == [True]


def _lifespan(app):
    """Start and stop an app as a server does."""
    import asyncio

    async def run():
        messages = asyncio.Queue()
        for kind in ("startup", "shutdown"):
            messages.put_nowait({"type": f"lifespan.{kind}"})
        sent = []

        async def send(message):
            sent.append(message["type"])

        await app({"type": "lifespan", "state": {}}, messages.get, send)
        return sent

    assert asyncio.run(run()) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
