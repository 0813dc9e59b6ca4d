"""The images API: asked by the unmodified client of OpenAI, by malformed requests, and by clients that leave."""

import base64
import http.client
import io
import json
import os
import pkgutil
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openai
import pytest
from images_api import (
    CAPTION,
    GENERATIONS,
    LOOP,
    MALFORMED,
    SECONDS,
    Metered,
    alone,
    asked,
    client_of,
    got,
    malformed,
    models_over,
    picture_in,
    png_of,
    serving,
    until,
)
from PIL import Image
from profiles import made as made_profile
from profiles import weights_of

from taylorseer_export.bundle.profile import write_profile
from taylorseer_export.bundle.store import open_bundle
from taylorseer_export.cli import main
from taylorseer_export.embedded.edits import Given
from taylorseer_export.embedded.picture import opaque
from taylorseer_export.embedded.requests import label_request, pictures_of, prompt_request
from taylorseer_export.errors import BundleError, ConfigError, StepError, TaylorSeerError
from taylorseer_export.method import Plan, RequestOptions
from taylorseer_export.runtime import sampling
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.parts import Encoder
from taylorseer_export.runtime.sampling import sample
from taylorseer_export.runtime.share import Share
from taylorseer_export.runtime.slot import Slot
from taylorseer_export.serve.api import prompts
from taylorseer_export.serve.api.busy import Busy, chosen
from taylorseer_export.serve.api.loaded import Loaded, load_models
from taylorseer_export.serve.api.models import Models
from taylorseer_export.serve.api.problems import problem_of
from taylorseer_export.serve.api.process import bound, server_of
from taylorseer_export.serve.api.settings import KEYS, Settings, read_keys
from taylorseer_export.serve.refusals import Stopping
from taylorseer_export.serve.service import Limits, Service

ROOT = Path(__file__).resolve().parents[1]
KEY = "a-key-of-the-tests"


@pytest.fixture(scope="module")
def denoisers(embedded):
    held = {name: load(embedded(name), threads=1) for name in ("shapes", "digits")}
    yield held
    for denoiser in held.values():
        denoiser.close()


@pytest.fixture(scope="module")
def models(denoisers):
    with models_over(denoisers["shapes"], denoisers["digits"], slots=2, queue=8, workers=2) as made:
        yield made


@pytest.fixture(scope="module")
def port(models):
    with serving(models) as port:
        yield port


@pytest.fixture(scope="module")
def client(port):
    return client_of(port)


@pytest.fixture
def small(denoisers):
    """A server of one slot and no queue: (port, service)."""
    with models_over(denoisers["shapes"], slots=1, queue=0, batch=1, workers=1) as models:
        with serving(models) as port:
            yield port, next(iter(models)).service


@pytest.fixture
def held(monkeypatch):
    """While it is not set, no engine call ends; (reached, held): whether one was begun, and the event itself."""
    run, reached, event = Slot.run, threading.Event(), threading.Event()

    def waiting(slot):
        reached.set()
        assert event.wait(SECONDS)
        run(slot)

    monkeypatch.setattr(Slot, "run", waiting)
    yield reached, event
    event.set()


# Pictures


def test_the_openai_client_gets_what_a_solo_run_makes(client, denoisers):
    made = client.images.generate(
        prompt=CAPTION, model="flux-tiny", n=3, size="48x32", user="someone", extra_body={"seed": 7, "steps": 9}
    )
    assert (made.size, made.output_format, made.background) == ("48x32", "png", "opaque")
    pictures = made.model_extra["taylorseer"]["pictures"]
    assert [picture["seed"] for picture in pictures] == [7, 8, 9]
    for seed, file, told in zip((7, 8, 9), made.data, pictures, strict=True):
        request = prompt_request(denoisers["shapes"], [CAPTION], [seed], (32, 48))
        picture, executed = alone(denoisers["shapes"], request, steps=9)
        assert (picture_in(file.b64_json) == picture).all()
        assert told["executed"] == executed and told["planned"] == executed
        assert {"read", "queue", "prepare", "full_step", "forecast_step", "loop", "decode"} == told["times_ms"].keys()
        assert min(told["times_ms"].values()) >= 0
    assert (picture_in(made.data[0].b64_json) != picture_in(made.data[1].b64_json)).any()


@pytest.mark.parametrize(("room", "hits", "misses"), [(1 << 20, 2, 1), (0, 0, 0)])
def test_pictures_of_one_prompt_encode_it_once(denoisers, monkeypatch, room, hits, misses):
    seen, encode = [], Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda *given: (seen.append(given[1]), encode(*given))[1])
    with models_over(denoisers["shapes"], slots=3, conditioning_cache=room) as models, serving(models) as port:
        status, _, text = asked(port, GENERATIONS, {"prompt": CAPTION, "n": 3, "seed": 1, "steps": 4})
        assert status == 200 and len(seen) == (1 if room else 3)
        for seed, file in zip((1, 2, 3), json.loads(text)["data"], strict=True):
            request = prompt_request(denoisers["shapes"], [CAPTION], [seed])
            assert (picture_in(file["b64_json"]) == alone(denoisers["shapes"], request, steps=4)[0]).all()
        metered = Metered(port)
        assert metered.of("taylorseer_conditioning_total", "flux-tiny", "hit") == hits
        assert metered.of("taylorseer_conditioning_total", "flux-tiny", "miss") == misses
        assert (metered.of("taylorseer_conditioning_bytes", "flux-tiny") > 0) == (room > 0)


def test_a_model_of_classes_is_asked_with_their_numbers(client, denoisers):
    options = {"plan": "FFF..F..F", "order": 1}
    made = client.images.generate(
        prompt=" 7 ", model="dit-tiny", extra_body={"seed": 3, "guidance_scale": 2.0, **options}
    )
    picture, executed = alone(denoisers["digits"], label_request(denoisers["digits"], [7], [3], 2.0), **options)
    assert (picture_in(made.data[0].b64_json) == picture).all()
    assert made.model_extra["taylorseer"]["pictures"][0]["executed"] == executed == "FFF..F..F"


def test_a_profile_is_asked_for_by_its_name(denoisers):
    with models_over(denoisers["digits"], slots=1) as models, serving(models) as port:
        profile = made_profile(denoisers["digits"].manifest)
        next(iter(models)).profiles["fast"] = profile
        status, _, text = asked(port, GENERATIONS, {"prompt": "1", "profile": "fast", "seed": 0})
        assert status == 200
        assert json.loads(text)["taylorseer"]["pictures"][0]["executed"] == profile.plan


def test_without_a_seed_one_is_drawn_and_told(client):
    first, second = (client.images.generate(prompt=CAPTION, extra_body={"steps": 2}) for _ in range(2))
    seeds = [made.model_extra["taylorseer"]["pictures"][0]["seed"] for made in (first, second)]
    assert seeds[0] != seeds[1]
    again = client.images.generate(prompt=CAPTION, extra_body={"num_inference_steps": 2, "seed": seeds[0]})
    assert again.data[0].b64_json == first.data[0].b64_json


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_other_formats(client, form):
    how = {"seed": 1, "steps": 3}
    sizes = []
    for quality in (100, 10):
        made = client.images.generate(
            prompt=CAPTION, output_format=form, output_compression=quality, size="64x64", extra_body=how
        )
        data = base64.b64decode(made.data[0].b64_json)
        picture = Image.open(io.BytesIO(data))
        assert (made.output_format, picture.format, picture.size) == (form, form.upper(), (64, 64))
        sizes.append(len(data))
    assert sizes[0] > sizes[1]


def test_the_openai_client_streams(client, denoisers):
    how = {"seed": 5, "steps": 12}
    stream = client.images.generate(prompt=CAPTION, stream=True, partial_images=3, size="auto", extra_body=how)
    *previews, last = stream
    assert [type(event).__name__ for event in previews] == ["ImageGenPartialImageEvent"] * 3
    assert [event.partial_image_index for event in previews] == [0, 1, 2]
    assert type(last).__name__ == "ImageGenCompletedEvent" and last.usage.total_tokens == 0
    whole, executed = alone(denoisers["shapes"], prompt_request(denoisers["shapes"], [CAPTION], [5]), steps=12)
    assert (picture_in(last.b64_json) == whole).all()
    far = [np.abs(picture_in(event.b64_json).astype(float) - whole).mean() for event in previews]
    assert far[0] > far[-1]  # previews come nearer
    assert {(event.size, event.output_format, event.quality) for event in (*previews, last)} == {
        ("64x64", "png", "auto")
    }
    assert last.model_extra["taylorseer"]["executed"] == executed


def test_previews_are_those_of_the_command_line(client, embedded, tmp_path, monkeypatch):
    how = {"prompt": CAPTION, "stream": True, "partial_images": 3, "extra_body": {"seed": 5, "steps": 12}}
    streamed = list(client.images.generate(**how))
    asked_for = ["--prompt", CAPTION, "--seed", "5", "--steps", "12", "--previews", "3", "--threads", "1"]
    assert main(["run", str(embedded("shapes")), *asked_for, "--out", str(tmp_path / "a.png")]) == 0
    for event, name in zip(streamed, ("a-preview-1", "a-preview-2", "a-preview-3", "a"), strict=True):
        assert (np.asarray(Image.open(tmp_path / f"{name}.png")) == picture_in(event.b64_json)).all()

    def whole(*given, **more):
        result = sample(*given, **more)
        assert not [*tmp_path.glob("b*")]
        return result

    # Over ranks, where others would wait while one decodes, they come after the loop.
    monkeypatch.setattr(sampling, "sample", whole)
    monkeypatch.setattr(Share, "groups", property(lambda share: (None,)))
    assert main(["run", str(embedded("shapes")), *asked_for, "--out", str(tmp_path / "b.png")]) == 0
    for number in (1, 2, 3):
        a, b = (tmp_path / f"{name}-preview-{number}.png" for name in "ab")
        assert a.read_bytes() == b.read_bytes()


def test_a_stream_without_previews_is_one_picture(client):
    events = list(client.images.generate(prompt=CAPTION, stream=True, extra_body={"seed": 5, "steps": 4}))
    assert [event.type for event in events] == ["image_generation.completed"]


def test_a_stream_tells_of_steps_where_that_is_asked_for(port):
    body = {"prompt": "3", "model": "dit-tiny", "n": 2, "seed": 1, "plan": "FF..F", "stream": True, "progress": True}
    status, headers, text = asked(port, GENERATIONS, body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in text.decode().strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [event["type"] for event in events]
    for number in (0, 1):
        own = [event for event in events if event["image_index"] == number]
        assert [event.get("step") for event in own] == [1, 2, 3, 4, None]
        assert {event["planned"] for event in own[:-1]} == {"FF..F"}
        assert own[-1]["type"] == "image_generation.completed" and own[-1]["taylorseer"]["seed"] == 1 + number


# Errors


def test_the_openai_client_raises_its_own_exceptions(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a green elephant", model="dit-tiny")
    assert (caught.value.param, caught.value.type) == ("prompt", "invalid_request_error")
    assert "prompt is `a green elephant`, expected a class of dit-tiny" in caught.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(prompt=CAPTION, model="dall-e-2")
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dall-e-2")


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_request_is_refused_in_one_sentence(port, case):
    body, status, param = malformed(case)
    seen, headers, text = asked(port, GENERATIONS, body)
    error = json.loads(text)["error"]
    assert (seen, error["param"]) == (status, param), error
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert re.search(r"expected .*; ", error["message"]) and headers["content-type"] == "application/json"


# What is sent -> status.
BROKEN = {
    "no body": (b"", {"content-type": "application/json"}, 400),
    "no JSON": (b"{", {"content-type": "application/json"}, 400),
    "no object": (b"[1]", {"content-type": "application/json"}, 400),
    "no text": (b"\xff\xfe", {"content-type": "application/json"}, 400),
    "too deep": (b"[" * 100_000, {"content-type": "application/json"}, 400),
    "a form": (b"a=1", {"content-type": "application/x-www-form-urlencoded"}, 400),
    "no type": (b"{}", {}, 400),
    "too long": (b"{}" + b" " * (1 << 20), {"content-type": "application/json"}, 413),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_body_that_is_none_is_refused(port, case):
    body, headers, status = BROKEN[case]
    seen, _, text = asked(port, GENERATIONS, body, headers)
    assert (seen, json.loads(text)["error"]["type"]) == (status, "invalid_request_error")


def test_a_body_that_does_not_say_how_long_it_is(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    parts = (b" " * (1 << 16) for _ in range(17))
    try:
        connection.request("POST", GENERATIONS, parts, {"content-type": "application/json"}, encode_chunked=False)
        assert connection.getresponse().status == 413
    finally:
        connection.close()


def test_the_server_goes_on_after_all_of_them(port, models):
    assert asked(port, GENERATIONS, {"prompt": CAPTION, "steps": 2})[0] == 200
    for model in models:
        until(lambda service=model.service: (service.slots_in_use, service.waiting) == (0, 0))


def test_paths_and_methods_that_are_none(port):
    for path, method, status in (("/v1/images/variations", "POST", 404), (GENERATIONS, "GET", 405), ("/x", "GET", 404)):
        seen, _, text = asked(port, path, method=method)
        assert seen == status and "is not answered here, expected one of" in json.loads(text)["error"]["message"]


def test_a_failure_of_the_server_tells_nothing_of_itself(port, monkeypatch, caplog):
    monkeypatch.setattr("taylorseer_export.serve.api.loaded.request_of", lambda *_: 1 / 0)
    status, _, text = asked(port, GENERATIONS, {"prompt": CAPTION})
    assert status == 500 and b"zero" not in text and json.loads(text)["error"]["type"] == "server_error"
    assert any(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in caplog.records)
    monkeypatch.undo()
    assert asked(port, GENERATIONS, {"prompt": CAPTION, "steps": 2})[0] == 200


@pytest.mark.parametrize(
    ("error", "status"),
    [(ConfigError("x"), 400), (StepError("x"), 400), (BundleError("x"), 500), (TimeoutError(), 504)],
)
def test_every_error_has_a_status(error, status):
    problem = problem_of(error)
    assert problem.status == status and problem.body["error"]["message"]


# Who leaves, who waits, who is late


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(small, held, stream, caplog):
    port, service = small
    reached, event = held
    body = json.dumps({"prompt": CAPTION, "plan": "F" * 200, "stream": stream, "seed": 1}).encode()
    head = f"POST {GENERATIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    with socket.create_connection(("127.0.0.1", port)) as leaving:
        leaving.sendall(head.encode() + b"\r\n\r\n" + body)
        assert reached.wait(SECONDS)
        if stream:
            assert leaving.recv(15) == b"HTTP/1.1 200 OK"
    done = Metered(port)
    until(lambda: done.of("taylorseer_http_requests_total", GENERATIONS) >= 1)  # the server has noticed
    event.set()
    until(lambda: service.snapshot().get("requests.cancelled"))
    until(lambda: service.slots_in_use == 0)
    assert service.snapshot()["steps.full"] <= 2
    assert asked(port, GENERATIONS, {"prompt": CAPTION, "steps": 2})[0] == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_full_queue_is_told_at_once(small, held):
    port, service = small
    reached, event = held
    answers = []
    first = threading.Thread(target=lambda: answers.append(asked(port, GENERATIONS, {"prompt": CAPTION, "steps": 2})))
    first.start()
    assert reached.wait(SECONDS)
    with pytest.raises(openai.RateLimitError) as caught:
        client_of(port).images.generate(prompt=CAPTION)
    assert caught.value.code == "rate_limit_exceeded" and "queue is full" in caught.value.message
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    event.set()
    first.join(SECONDS)
    assert answers[0][0] == 200 and service.snapshot()["requests.refused"] == 1


def test_of_several_pictures_none_is_drawn_where_one_has_no_place(denoisers, held):
    reached, event = held
    event.set()  # while it warms up
    with models_over(denoisers["digits"], slots=1, queue=1, batch=1, workers=1) as models, serving(models) as port:
        service = next(iter(models)).service
        event.clear()
        reached.clear()
        first = threading.Thread(target=asked, args=(port, GENERATIONS, {"prompt": "1", "steps": 2}))
        first.start()
        assert reached.wait(SECONDS)
        status, _, text = asked(port, GENERATIONS, {"prompt": "1", "n": 2, "plan": "F" * 300})
        assert status == 429 and json.loads(text)["error"]["code"] == "rate_limit_exceeded"
        status, _, text = asked(port, GENERATIONS, {"prompt": "1", "n": 3})
        assert status == 400 and json.loads(text)["error"]["param"] == "n"
        event.set()
        first.join(SECONDS)
        until(lambda: (service.slots_in_use, service.waiting) == (0, 0))
        counts = service.snapshot()
        assert (counts["requests.done"], counts["requests.cancelled"], counts["requests.refused"]) == (1, 1, 1)


def test_the_event_loop_neither_reads_prompts_nor_writes_pictures(port, monkeypatch):
    seen = {}
    for place in ("loaded.request_of", "loaded.picture_of", "images.encoded"):
        path = f"taylorseer_export.serve.api.{place}"
        work = pkgutil.resolve_name(path)

        def watched(*given, _place=place, _work=work):
            seen[_place] = threading.current_thread().name
            return _work(*given)

        monkeypatch.setattr(path, watched)
    assert asked(port, GENERATIONS, {"prompt": CAPTION, "steps": 2})[0] == 200
    assert len(seen) == 3 and LOOP not in seen.values()
    assert LOOP in {thread.name for thread in threading.enumerate()}


def test_a_late_request_is_given_up(small, held):
    """Its time passes while the engine is held, however long a step takes."""
    port, service = small
    reached, event = held
    answers = []
    body = {"prompt": CAPTION, "plan": "F" * 100, "timeout": 0.5}
    asking = threading.Thread(target=lambda: answers.append(asked(port, GENERATIONS, body)))
    asking.start()
    assert reached.wait(SECONDS)
    asking.join(SECONDS)  # the API does not wait for a service that hangs
    status, _, text = answers[0]
    assert (status, json.loads(text)["error"]["code"]) == (504, "timeout")
    event.set()
    until(lambda: service.slots_in_use == 0)
    assert service.snapshot()["steps.full"] <= 2


def test_a_stream_that_fails_says_so(small, held):
    port, _ = small
    stream = client_of(port).images.generate(
        prompt=CAPTION, stream=True, extra_body={"plan": "F" * 100, "timeout": 0.5}
    )
    with pytest.raises(openai.APIError, match="request is late"):
        list(stream)


def test_a_server_that_stops_says_so(denoisers):
    with models_over(denoisers["digits"], slots=1) as models, serving(models) as port:
        next(iter(models)).reader.close()
        status, _, text = asked(port, GENERATIONS, {"prompt": "1"})
        assert (status, json.loads(text)["error"]["code"]) == (503, "server_stopping")


def test_a_stop_finishes_what_is_under_way(embedded, held):
    reached, event = held
    event.set()  # while it warms up
    model = Loaded(load(embedded("digits"), threads=1), Limits(slots=1, batch=1, workers=1))
    event.clear()
    reached.clear()
    listener = bound("127.0.0.1", 0)
    server, answers = server_of(Models([model]), Settings()), []
    port = listener.getsockname()[1]
    listener.listen()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    body = {"prompt": "1", "steps": 3}
    asking = threading.Thread(target=lambda: answers.append(asked(port, GENERATIONS, body)))
    asking.start()
    assert reached.wait(SECONDS)
    server.should_exit = True
    until(lambda: not any(one.is_serving() for one in server.servers))
    with pytest.raises(OSError):
        asked(port, GENERATIONS, body)
    event.set()
    thread.join(SECONDS)
    asking.join(SECONDS)
    assert answers[0][0] == 200 and not thread.is_alive()
    refused = []
    model.reader.hand_over(lambda _: None, refused.append)
    assert [type(error) for error in refused] == [Stopping]  # the models are closed


# A busy server


@pytest.fixture(scope="module")
def with_profile(embedded, tmp_path_factory):
    """A bundle of digits that has a profile `fast`, and one `slow` of as many full steps as its own plan."""
    folder = tmp_path_factory.mktemp("profiled") / "dit-tiny"
    shutil.copytree(embedded("digits"), folder)
    bundle = open_bundle(folder)
    write_profile(bundle, made_profile(bundle.manifest))
    own = "F" * 50
    write_profile(bundle, made_profile(bundle.manifest, "slow", plan=own, weights=weights_of(Plan(own), 1)))
    return folder


def test_a_busy_server_draws_faster_what_leaves_it_the_choice(with_profile, held):
    """One slot, whose worker is held; what waits is counted, and no clock is read."""
    reached, event = held
    event.set()  # while it warms up
    with load(with_profile, threads=1) as denoiser:
        model = Loaded(denoiser, Limits(slots=1, queue=9, batch=1, workers=1), Busy(1, "fast"))
        event.clear()
        reached.clear()
        answers, threads = {}, []

        def send(name, **more):
            """Send a request, and wait until it waits; the first is in the slot."""
            before = model.service.waiting
            given = (port, GENERATIONS, {"prompt": "1", "seed": 4, **more})
            threads.append(threading.Thread(target=lambda: answers.update({name: asked(*given)})))
            threads[-1].start()
            until(reached.is_set if name == "first" else lambda: model.service.waiting > before)

        try:
            with serving(Models([model])) as port:
                send("first")
                send("second")
                send("third", quality="auto")  # one waits: not more than may
                send("fourth", quality="auto")
                send("left out")
                send("stream", stream=True)
                own = {"steps": {"steps": 4}, "plan": {"plan": "FF.F"}, "interval": {"interval": 2}}
                for name, options in own.items():
                    send(name, quality="auto", **options)
                event.set()
                for thread in threads:
                    thread.join(SECONDS)
                status, _, text = asked(
                    port, GENERATIONS, {"prompt": "1", "quality": "auto"}
                )  # the queue is short again
                answers["last"] = (status, None, text)
                asked(port, GENERATIONS, {"prompt": "1", "profile": "fast"})
                assert Metered(port).of("taylorseer_busy_requests_total", "dit-tiny") == model.hurried == 3
        finally:
            model.reader.close()
            model.service.close()
        assert {status for status, *_ in answers.values()} == {200}
        lines = answers.pop("stream")[2].decode().split("\n")
        (last,) = (line for line in lines if line.startswith("data: ") and "image_generation.completed" in line)
        told = {name: json.loads(text)["taylorseer"] for name, (_, _, text) in answers.items()}
        streamed = json.loads(last.removeprefix("data: "))["taylorseer"]
        plans = {name: one["pictures"][0]["planned"] for name, one in told.items()} | {"stream": streamed["planned"]}
        profiles = {name: one["profile"] for name, one in (told | {"stream": streamed}).items()}
        usual, fast = str(denoiser.forecasts().plan), denoiser.profiles["fast"].plan
        for name in ("first", "second", "third", "last"):
            assert plans[name] == usual and profiles[name] == {"requested": None, "used": None, "why": None}
        for number, name in enumerate(("fourth", "left out", "stream"), 2):
            why = f"{number} pictures waited, more than 1, and quality was auto"
            assert plans[name] == fast and profiles[name] == {"requested": None, "used": "fast", "why": why}
        for name in own:
            assert plans[name] != fast and profiles[name]["why"] is None
        request = label_request(denoiser, [1], [4])
        picture = alone(denoiser, request, profile="fast")[0]
        assert (picture_in(json.loads(answers["fourth"][2])["data"][0]["b64_json"]) == picture).all()


@pytest.mark.parametrize("options", [{"profile": "fast"}, {"guard": "cg"}, {"order": 1}, {"steps": 50}])
def test_who_says_anything_of_its_plan_keeps_it(options):
    asked_for = RequestOptions(**options)
    assert chosen(Busy(0, "faster"), asked_for, 99) == (asked_for.profile, asked_for.profile, None)
    assert chosen(Busy(0, "faster"), RequestOptions(), 99).used == "faster"
    assert chosen(None, RequestOptions(), 99).used is None


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("faster", r"is faster, expected a profile of dit-tiny \(fast, slow\); make it with"),
        (
            "slow",
            r"slow has 50 full steps for dit-tiny, expected fewer than the \d+ of its own plan; name a faster one",
        ),
    ],
)
def test_a_profile_that_would_not_help_is_refused_at_the_start(with_profile, name, problem):
    with pytest.raises(ConfigError, match=f"--busy-profile {problem}"):
        load_models([with_profile], busy=Busy(1, name))


@pytest.mark.parametrize("options", [["--busy-queue", "3"], ["--busy-profile", "fast"]])
def test_one_option_of_a_busy_server_needs_the_other(with_profile, monkeypatch, capsys, options):
    from taylorseer_export.cli import main

    monkeypatch.delenv(KEYS, raising=False)
    assert main(["serve", str(with_profile), "--port", "0", *options]) == 2
    assert re.search(r"alone, expected --busy-\w+ beside it; ", capsys.readouterr().err)


# Keys, ids, health, metrics


def test_keys(models, tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text(f"# of the tests\n{KEY}\n\n")
    monkeypatch.setenv(KEYS, "another-key, a-third-key")
    settings = Settings(keys=read_keys(file))
    assert len(settings.keys) == 3 and KEY.encode() not in b"".join(settings.keys)
    with serving(models, settings) as port:
        with pytest.raises(openai.AuthenticationError) as caught:
            client_of(port, "a-wrong-key").images.generate(prompt=CAPTION)
        assert caught.value.code == "invalid_api_key"
        for key in (KEY, "another-key", "a-third-key"):
            assert client_of(port, key).models.list().data
        for path, status in (("/v1/models", 401), ("/metrics", 401), ("/x", 401), ("/health", 200), ("/", 200)):
            assert got(port, path)[0] == status
        for value in (KEY, f"Basic {KEY}", "Bearer", f"Bearer {KEY}x", "Bearer \xff"):
            assert got(port, "/v1/models", headers={"authorization": value})[0] == 401


@pytest.mark.parametrize(("text", "fix"), [("\n", "write one"), ("short\n", "choose another"), (None, "mend it")])
def test_keys_that_are_none_are_refused(tmp_path, monkeypatch, text, fix):
    monkeypatch.delenv(KEYS, raising=False)
    file = tmp_path / "keys"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=fix):
        read_keys(file)
    assert read_keys(None) == ()


def test_a_request_has_an_id(port, caplog):
    caplog.set_level("INFO", "taylorseer_export.serve.api")
    _, headers, text = asked(
        port, GENERATIONS, {"prompt": "4", "model": "dit-tiny", "steps": 2}, {"x-request-id": "a-1"}
    )
    assert headers["x-request-id"] == "a-1" == json.loads(text)["taylorseer"]["request_id"]
    assert [got(port, "/v1/models", headers={"x-request-id": "a\t1"})[1]["x-request-id"] == "a\t1"] == [False]
    made = [got(port, "/x")[1]["x-request-id"] for _ in range(2)]
    assert made[0] != made[1] and all(re.fullmatch("[0-9a-f]{32}", one) for one in made)
    lines = [record.getMessage() for record in caplog.records]
    assert any(re.match(rf"a-1 POST {GENERATIONS} 200 \d+ ms dit-tiny n=1 seed=\d+$", line) for line in lines), lines


def test_health_says_when_a_worker_stalls(port, monkeypatch):
    status, _, text = got(port, "/health")
    assert status == 200 and json.loads(text)["status"] == "ok"
    assert json.loads(text)["models"]["flux-tiny"]["slots"] == 2
    monkeypatch.setattr(Service, "stalled", 301.0)
    status, _, text = got(port, "/health")
    assert status == 503 and json.loads(text)["models"]["dit-tiny"]["status"] == "stalled"


def test_models_are_listed(client, denoisers):
    listed = client.models.list().data
    assert [model.id for model in listed] == ["flux-tiny", "dit-tiny"]
    assert all(model.object == "model" and model.created > 0 for model in listed)
    shapes, digits = (model.model_extra["taylorseer"] for model in listed)
    assert (shapes["draws"], shapes["size"], shapes["multiple_of"]) == ("prompts", "64x64", 8)
    assert (digits["draws"], digits["size"], digits["classes"]) == ("labels", "16x16", 10)
    assert shapes["plan"] == str(denoisers["shapes"].forecasts().plan)
    assert client.models.retrieve("dit-tiny").id == "dit-tiny"


def test_metrics_are_those_of_the_services(denoisers):
    with models_over(denoisers["digits"], slots=3, queue=5) as models, serving(models) as port:
        assert asked(port, GENERATIONS, {"prompt": "4", "n": 2, "plan": "FF.F.F"})[0] == 200
        assert asked(port, GENERATIONS, {"prompt": "four"})[0] == 400
        metered, model = Metered(port), "dit-tiny"
        assert metered.of("taylorseer_requests_total", model, "done") == 2
        assert metered.of("taylorseer_steps_total", model, "full") == 8
        assert metered.of("taylorseer_steps_total", model, "forecast") == 4
        assert metered.of("taylorseer_full_steps_total", model, "executed") == 8
        assert metered.of("taylorseer_step_seconds_total", model) > 0
        assert metered.of("taylorseer_slots", model) == 3
        assert metered.of("taylorseer_slots_in_use", model) == metered.of("taylorseer_queue", model) == 0
        assert metered.of("taylorseer_stage_seconds_count", model, "loop") == 2
        assert metered.of("taylorseer_http_requests_total", GENERATIONS, "200") == 1
        assert metered.of("taylorseer_http_requests_total", GENERATIONS, "400") == 1
        asked(port, "/an/invention", method="GET")
        assert metered.of("taylorseer_http_requests_total", "other", "404") == 1


# Pictures that are sent


def test_edits_are_refused_where_no_model_takes_pictures(client, denoisers):
    with pytest.raises(openai.BadRequestError, match="expected flux-tiny, which takes them; ask for") as caught:
        client.images.edit(image=("a.png", png_of(8, 8)), prompt=CAPTION, model="dit-tiny")
    assert caught.value.param == "image"
    with models_over(denoisers["digits"], slots=1) as models, serving(models) as port:
        with pytest.raises(openai.BadRequestError, match="expected text alone, since no model here takes them"):
            client_of(port).images.edit(image=("a.png", png_of(8, 8)), prompt="3")


def test_a_picture_begins_a_loop(client, denoisers):
    """Of twelve steps the last six run, by their own plan."""
    picture = np.random.default_rng(2).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    how = {"seed": "3", "steps": "12", "strength": "0.5", "interval": "3", "warmup": "2"}
    made = client.images.edit(image=("a.png", stream.getvalue()), prompt=CAPTION, model="flux-tiny", extra_body=how)
    told = made.model_extra["taylorseer"]["pictures"][0]
    assert (made.size, told["executed"]) == ("48x32", "FF..F.")
    request = prompt_request(denoisers["shapes"], [CAPTION], [3], given=Given(picture, 0.5, 12))
    expected, _ = alone(denoisers["shapes"], request, plan="FF..F.")
    assert (picture_in(made.data[0].b64_json) == expected).all()
    for more, param in (({"strength": 2}, "strength"), ({"strength": 0.5}, "strength")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt=CAPTION, extra_body=more)
        assert caught.value.param == param


@pytest.fixture
def taker(monkeypatch):
    """Models are taken to be of those that are given pictures; the list gets what they were given."""
    given, request_of = [], prompts.request_of

    def watched(denoiser, wish, cache, _):
        return request_of(denoiser, wish, cache)

    monkeypatch.setattr("taylorseer_export.serve.api.loaded.request_of", watched)
    monkeypatch.setattr(
        "taylorseer_export.serve.api.loaded.picture_for",
        lambda denoiser, takes, wish, options: (given.append(wish), (options, None))[1],
    )
    return given


def test_a_model_that_takes_pictures_is_given_them(client, taker):
    images = [("a.png", png_of(8, 12)), ("b.png", png_of(4, 4))]
    how = {"seed": "3", "steps": "5", "timeout": "30.5"}
    made = client.images.edit(image=images, mask=("m.png", png_of(8, 12)), prompt=CAPTION, n=2, extra_body=how)
    assert [picture["seed"] for picture in made.model_extra["taylorseer"]["pictures"]] == [3, 4]
    assert [one.shape for one in taker[0].pictures] == [(8, 12, 4), (4, 4, 4)] and taker[0].mask.shape == (8, 12, 4)
    stream = client.images.edit(image=images[0], prompt=CAPTION, stream=True, partial_images=1, extra_body=how)
    assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.parametrize(
    ("images", "more", "said"),
    [
        ([], {}, "image is missing"),
        ([("a.png", b"GIF89a")], {}, "image is not readable"),
        ([("a.png", png_of(8, 8)[:40])], {}, "image is not readable"),
        ([("a.png", png_of(8, 8))], {"mask": ("m.png", png_of(4, 8))}, "mask is 8x4, expected 8x8"),
        ([("a.png", png_of(8, 8))] * 17, {}, "17 images|Too many files"),
        ([("a.png", png_of(8, 8))], {"n": "many"}, "n is 'many', expected a whole number"),
        ([("a.png", png_of(8, 8))], {"other": ("m.png", b"")}, "`other` is a file"),
    ],
)
def test_a_malformed_form_is_refused(port, taker, images, more, said):
    fields = [("prompt", CAPTION), *(("image", image) for image in images), *more.items()]
    body = b""
    for name, value in fields:
        file = f'; filename="{value[0]}"' if isinstance(value, tuple) else ""
        data = value[1] if isinstance(value, tuple) else value.encode()
        body += f'--xx\r\ncontent-disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + data + b"\r\n"
    headers = {"content-type": "multipart/form-data; boundary=xx"}
    status, _, text = asked(port, "/v1/images/edits", body + b"--xx--\r\n", headers)
    assert status == 400 and re.search(said, json.loads(text)["error"]["message"]), text
    assert not taker


def test_a_form_has_limits_too(models, taker):
    with serving(models, Settings(form=1000)) as port:
        headers = {"content-type": "multipart/form-data; boundary=xx"}
        assert asked(port, "/v1/images/edits", b"-" * 1001, headers)[0] == 413
        assert asked(port, "/v1/images/edits", b"nothing", headers)[0] == 400
        assert asked(port, "/v1/images/edits", {"prompt": "x"})[0] == 400


def test_a_picture_is_measured_before_room_for_it_is_made(monkeypatch):
    from taylorseer_export.serve.api import formats

    monkeypatch.setattr(formats, "MOST_PIXELS", 8 * 12 - 1)
    with pytest.raises(TaylorSeerError, match="image is 12x8, expected at most 95 pixels"):
        formats.decoded(png_of(8, 12), "image")


# The page, the process


def test_the_page_needs_nothing_from_elsewhere(port):
    status, headers, text = got(port, "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert not re.search(rb"https?://|<link|src=", text) and b'name="viewport"' in text
    assert b"prefers-color-scheme: dark" in text


def test_the_lines_of_the_page_draw(port, tmp_path, monkeypatch, capsys):
    """Those of the client, and those of curl by what it sends."""
    page = (ROOT / "taylorseer_export/serve/README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    monkeypatch.chdir(tmp_path)
    exec(lines.replace(":8000/", f":{port}/"), {})
    assert (tmp_path / "circle.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("partial_image") == 2
    path, body = re.search(
        r"curl -s 127\.0\.0\.1:8000(\S+) -H 'content-type: application/json' -d '(.*)'", page
    ).groups()
    assert asked(port, path, json.loads(body))[0] == 200


def test_a_whole_pipeline_draws_from_any_prompt(whole_flux):
    with load(whole_flux, threads=1) as denoiser:
        with models_over(denoiser, slots=2, queue=2, workers=1) as models, serving(models) as port:
            answer = client_of(port).images.generate(
                prompt="any words, 漢字", model="flux-whole", n=2, size="48x32", extra_body={"seed": 4, "plan": "FF.F"}
            )
        request = prompt_request(denoiser, ["any words, 漢字"] * 2, [4, 5], (32, 48))
        for k, image in enumerate(answer.data):
            one = prompt_request(denoiser, ["any words, 漢字"], [4 + k], (32, 48))
            made = sample(denoiser, one, denoiser.forecasts(plan="FF.F")).latents
            seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(image.b64_json))))
            assert np.array_equal(seen, pictures_of(denoiser, request, made)[0])


def test_the_openai_client_edits(whole_kontext):
    """A picture with transparency, which is on white; in a size of its own and in that of the picture."""
    given = np.random.default_rng(5).integers(0, 256, (26, 38, 4), np.uint8)
    given[:9, :9, 3] = 0
    stream = io.BytesIO()
    Image.fromarray(given).save(stream, "PNG")
    asked_for = {"image": ("a.png", stream.getvalue()), "prompt": "blue", "model": "flux-kontext-whole"}
    picture = opaque(given)
    assert (picture[:9, :9] == 255).all()
    with load(whole_kontext, threads=1) as denoiser:
        with models_over(denoiser, slots=2, queue=2, workers=1) as models, serving(models) as port:
            client = client_of(port)
            for size, shape in (("48x32", (32, 48)), ("auto", None)):
                made = client.images.edit(**asked_for, size=size, extra_body={"seed": "4", "plan": "FF.F"})
                request = prompt_request(denoiser, ["blue"], [4], shape, given=Given(picture))
                expected = pictures_of(
                    denoiser, request, sample(denoiser, request, denoiser.forecasts(plan="FF.F")).latents
                )[0]
                assert (picture_in(made.data[0].b64_json) == expected).all()
                assert expected.shape == (*(shape or (24, 36)), 3)
            assert client.models.retrieve("flux-kontext-whole").model_extra["taylorseer"]["takes_pictures"] is True
            for more, call, param in (
                ({}, client.images.generate, "image"),
                ({"image": [asked_for["image"]] * 2}, client.images.edit, "image"),
                ({"mask": ("m.png", stream.getvalue())}, client.images.edit, "mask"),
            ):
                values = {"prompt": "blue", "model": "flux-kontext-whole"} if not more else {**asked_for, **more}
                with pytest.raises(openai.BadRequestError, match="expected") as caught:
                    call(**values)
                assert caught.value.param == param


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_stop(embedded, tmp_path):
    command = [sys.executable, "-m", "taylorseer_export", "serve", embedded("digits"), "--port", "0", "--workers", "1"]
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        server = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True, env=os.environ | {KEYS: KEY}
        )
        try:
            line = server.stdout.readline()
            found = re.fullmatch(r"serving dit-tiny at http://127\.0\.0\.1:(\d+) \(1 keys\); Ctrl-C ends it\n", line)
            assert found, (line, errors.read_text())
            made = client_of(int(found[1]), KEY).images.generate(prompt="2", extra_body={"steps": 3})
            assert picture_in(made.data[0].b64_json).shape == (16, 16, 3)
            server.send_signal(signal.SIGTERM)
            assert server.wait(SECONDS) == 0
        finally:
            server.kill()
    assert "Traceback" not in errors.read_text() and f"POST {GENERATIONS} 200" in errors.read_text()


@pytest.mark.slow
def test_a_command_that_cannot_serve_says_why(embedded, capsys, monkeypatch):
    from taylorseer_export.cli import main

    monkeypatch.delenv(KEYS, raising=False)
    with bound("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", str(embedded("digits")), "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert f"--port {port} is not to be had (Address already in use), expected a free address" in said
    with pytest.raises(ConfigError, match="BUNDLE is dit-tiny twice, expected bundles of different names; leave one"):
        load_models([embedded("digits"), embedded("digits")])


def test_bundles_that_draw_nothing_are_refused():
    sampling = SimpleNamespace(pictures=None, source="tensors")
    graphs = {"full": SimpleNamespace(inputs=())}
    manifest = SimpleNamespace(family="dit", name="large", sampling=sampling, parts={}, graphs=graphs)
    with pytest.raises(ConfigError, match=r"dit-large makes latents of tensors, expected one that .*; serve it with"):
        prompts.check_draws(manifest)


def test_the_app_needs_neither_torch_nor_diffusers_to_be_imported():
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers'):\n    sys.modules[name] = None\n"
        "from taylorseer_export.serve.api.app import app_of\n"
        "from taylorseer_export.serve.api.models import Models\n"
        "from taylorseer_export.serve.api.process import server_of\n"
        "assert app_of(Models([])) and server_of\nprint('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("fine\n", "")
