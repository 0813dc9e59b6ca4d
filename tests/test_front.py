"""The front of Triton servers, over servers that are played here; a real one answers in `test_triton.py`."""

import asyncio
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import openai
import pytest
from images_api import GENERATIONS, Metered, asked, client_of, got, picture_in, png_of, serving, until

from taylorseer_export.cli import main
from taylorseer_export.errors import ConfigError, ServeError
from taylorseer_export.serve.api.fleet import Fleet, Remote
from taylorseer_export.serve.api.models import Models
from taylorseer_export.serve.batcher import Batcher, Job
from taylorseer_export.serve.contract import TOLD_TIMES
from taylorseer_export.serve.fleet import Served, Server, served_of
from taylorseer_export.serve.reader import Reader
from taylorseer_export.serve.refusals import Late, NoServer, QueueFull, Stopping, unavailable

ROOT = Path(__file__).resolve().parents[1]
NAME = "flux-tiny"
INPUTS = dict.fromkeys(("prompt", "plan"), "BYTES") | dict.fromkeys(("seed", "height", "width", "steps"), "INT64")
STREAMED = {**INPUTS, "previews": "INT32", "progress": "BOOL"}
PLAIN = Served(NAME, False, INPUTS, frozenset({"prompt"}), {"classes": None, "frame_rate": None}, "one", 2, 3)
STREAM = replace(PLAIN, name=f"{NAME}-stream", streams=True, inputs=STREAMED)


TURNS = itertools.count(1)


def word(text):
    return np.array([text.encode()], object)


def answer(step, planned="FF.F", **more):
    return {
        "step": np.array([step], np.int32),
        "planned": word(planned),
        "step_ms": np.array([1.5], np.float32),
        **more,
    }


def last(shade, executed="FF.F"):
    times = np.arange(1, 1 + len(TOLD_TIMES), dtype=np.float32)
    return answer(4, executed=word(executed), times_ms=times, picture=np.full((4, 6, 3), shade, np.uint8))


class Played:
    """A server that does with a request what it is told to; `asked` has what it was sent."""

    def __init__(self, url, models, does):
        self.url, self.known, self._does = url, {one.name: one for one in models}, does
        self.ready, self.in_flight, self.last, self.asked = frozenset(self.known), 0, 0, []

    def look(self):
        pass

    async def ask(self, model, values, timeout, on_answer, request_id):
        assert request_id
        self.asked.append((model.name, values))
        self.in_flight, self.last = self.in_flight + 1, next(TURNS)
        try:
            return await self._does(on_answer)
        finally:
            self.in_flight -= 1

    async def close_requests(self):
        pass

    def close(self):
        pass


def drawing(shade):
    """What a server does that draws."""

    async def does(on_answer):
        return last(shade)

    return does


def failing(error):
    async def does(on_answer):
        raise error

    return does


@pytest.fixture
def over():
    """Servers -> the models of a front of them."""
    made = []

    def make(*servers):
        fleet = Fleet(servers)
        fleet.start()
        made.append(Models([Remote(NAME, fleet)]))
        return made[-1]

    yield make
    for models in made:
        models.close()


def drawn(port, **more):
    status, headers, text = asked(port, GENERATIONS, {"prompt": "a dog", "seed": 1, **more})
    return status, headers, json.loads(text)


AWAY = NoServer("no server answers at a:1 (connection refused), expected one that is ready; look at it")
FULL = QueueFull("queue is full (1 requests wait for 1 slots), expected room; try again later")


@pytest.mark.parametrize("error", [AWAY, FULL, Stopping("the server is stopping, expected a running one")])
def test_the_next_server_draws_what_one_does_not(over, error):
    first, second = Played("a:1", [PLAIN], failing(error)), Played("b:1", [PLAIN], drawing(9))
    with serving(over(first, second)) as port:
        status, _, made = drawn(port, n=2, plan="FF.F")
    assert status == 200 and [(picture_in(one["b64_json"]) == 9).all() for one in made["data"]] == [True, True]
    assert first.asked and [values["seed"] for _, values in second.asked] == [1, 2]


def test_a_request_goes_to_the_server_with_the_fewest(over):
    """And of several with as few to the one that was asked longest ago: other fronts may ask them too."""
    first, second = (Played(f"{name}:1", [PLAIN], drawing(9)) for name in "ab")
    with serving(over(first, second)) as port:
        for _ in range(4):
            assert drawn(port)[0] == 200
    assert len(first.asked) == len(second.asked) == 2
    first.asked.clear(), second.asked.clear()
    first.in_flight = 1
    with serving(over(first, second)) as port:
        assert drawn(port)[0] == 200 and (len(first.asked), len(second.asked)) == (0, 1)
        second.ready = frozenset()  # it has fewest, and is not ready
        assert drawn(port)[0] == 200 and (len(first.asked), len(second.asked)) == (1, 1)


def test_full_queues_and_servers_that_are_gone_are_told_apart(over):
    """Where one of them is full and the others are gone, there will be room."""
    servers = [Played("a:1", [PLAIN], failing(AWAY)), Played("b:1", [PLAIN], failing(FULL))]
    models = over(*servers)
    with serving(models) as port:
        for _ in range(2):
            status, headers, made = drawn(port)
            assert status == 429 and made["error"]["code"] == "rate_limit_exceeded" and "queue is full" in str(made)
            assert 1 <= int(headers["retry-after"]) <= 60
            servers.reverse()
        servers[1]._does = servers[0]._does = failing(AWAY)
        status, _, made = drawn(port)
        assert status == 503 and made["error"]["code"] == "server_unavailable"
        assert "a:1" not in made["error"]["message"]  # where servers are is not told to everybody
        assert got(port, "/health")[0] == 200
        for server in servers:
            server.ready = frozenset()
        status, _, text = got(port, "/health")
        assert status == 503 and json.loads(text)["models"][NAME]["servers_ready"] == 0
        metered = Metered(port)
        assert metered.of("taylorseer_requests_total", NAME, "refused") == 3
        assert metered.of("taylorseer_servers_ready", NAME) == 0


@pytest.mark.parametrize(
    ("error", "status", "outcome"),
    [
        (Late("request is late after 1 of 4 steps, expected to end in its time; give it more"), 504, "late"),
        (
            ServeError("the server failed at this request, expected an answer; its log says why", "INTERNAL"),
            500,
            "failed",
        ),
        (ConfigError("plan FF. is 3 steps long, expected 12 (steps); change it"), 400, None),
    ],
)
def test_what_else_a_server_answers_is_no_reason_to_ask_another(over, error, status, outcome):
    servers = [Played(f"{name}:1", [PLAIN], failing(error)) for name in "ab"]
    with serving(over(*servers)) as port:
        seen, _, made = drawn(port)
        assert seen == status and made["error"]["message"] == str(error)
        assert made["error"]["param"] == ("plan" if status == 400 else None)
        assert [len(server.asked) for server in servers] == [1, 0]
        for one in ("failed", "late", "refused", "done"):
            assert Metered(port).of("taylorseer_requests_total", NAME, one) == (one == outcome)


def test_a_stream_that_breaks_says_so_and_begins_nowhere_else(over):
    async def breaks(on_answer):
        on_answer(answer(0))
        on_answer(answer(1, picture=np.zeros((4, 6, 3), np.uint8)))
        raise AWAY

    first, second = Played("a:1", [STREAM], breaks), Played("b:1", [STREAM], drawing(9))
    with serving(over(first, second)) as port:
        events = client_of(port).images.generate(prompt="a dog", stream=True, partial_images=1)
        assert next(events).type == "image_generation.partial_image"
        with pytest.raises(openai.APIError, match="no server that is ready draws flux-tiny, expected one"):
            next(events)
    assert first.asked[0][1] | {"seed": 0} == {"prompt": "a dog", "seed": 0, "previews": 1, "progress": False}
    assert second.asked == []


def test_who_leaves_cancels_the_request(over):
    ended = []

    async def waits(on_answer):
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            ended.append(1)
            raise

    server = Played("a:1", [PLAIN], waits)
    with serving(over(server)) as port:
        assert drawn(port, n=3, timeout=0.2)[0] == 504  # a server that never answers is not waited for
        until(lambda: len(ended) == 3)
        until(lambda: Metered(port).of("taylorseer_requests_total", NAME, "cancelled") == 3)
        assert Metered(port).of("taylorseer_in_flight", NAME) == 0


def test_each_request_goes_to_the_model_that_can_answer_it(over):
    """Of two models on a server one answers streams; where one is alone it answers all that it can."""
    both = Played("a:1", [PLAIN, STREAM], drawing(1))
    with serving(over(both)) as port:
        drawn(port)
        list(client_of(port).images.generate(prompt="a dog", stream=True))
        drawn(port, progress=True)
    assert [name for name, _ in both.asked] == [PLAIN.name, STREAM.name, PLAIN.name]
    alone = Played("a:1", [STREAM], drawing(1))
    with serving(over(alone)) as port:
        assert drawn(port, progress=True)[0] == 200
    assert alone.asked[0] == (STREAM.name, {"prompt": "a dog", "seed": 1, "previews": 0, "progress": False})
    mute = Played("a:1", [PLAIN], drawing(1))
    with serving(over(mute)) as port:
        status, _, made = drawn(port, stream=True, partial_images=2)
        assert (status, made["error"]["param"]) == (400, "partial_images") and "expected none" in str(made)
        assert [event.type for event in client_of(port).images.generate(prompt="a dog", stream=True)] == [
            "image_generation.completed"
        ]


def test_times_are_the_server_s_and_an_absent_kind_of_step_has_none(over):
    async def does(on_answer):
        return last(3, executed="FFFF")

    with serving(over(Played("a:1", [PLAIN], does))) as port:
        times = drawn(port)[2]["taylorseer"]["pictures"][0]["times_ms"]
    told = dict(zip(TOLD_TIMES, range(1, 1 + len(TOLD_TIMES)), strict=True))
    assert times.pop("decode") > told.pop("decode")  # writing the file comes on top
    assert times == {**told, "forecast_step": None}


def test_a_field_that_a_model_has_no_input_for_is_refused(over):
    server = Played("a:1", [PLAIN], drawing(1))
    with serving(over(server)) as port:
        for field, value in (("guidance_scale", 2.0), ("order", 1), ("negative_prompt", "a cat"), ("strength", 0.5)):
            status, _, made = drawn(port, **{field: value})
            assert (status, made["error"]["param"]) == (400, field) and "expected none" in made["error"]["message"]
    assert server.asked == []


def test_a_model_that_edits_gets_the_picture(over):
    """On white where it is transparent, and needs one."""
    inputs = {**INPUTS, "image": "UINT8"}
    server = Played("a:1", [replace(PLAIN, inputs=inputs, needed=frozenset({"prompt", "image"}))], drawing(1))
    with serving(over(server)) as port:
        status, _, made = drawn(port)
        assert (status, made["error"]["param"]) == (400, "image") and "image is missing for flux-tiny" in str(made)
        assert client_of(port).images.edit(image=("a.png", png_of(4, 6)), prompt="blue").data
        with pytest.raises(openai.BadRequestError, match="expected one picture, which changes as a whole"):
            client_of(port).images.edit(image=[("a.png", png_of(4, 6))] * 2, prompt="blue")
    ((_, values),) = server.asked
    assert values["image"].shape == (4, 6, 3) and (values["image"] == 200).all() and "height" not in values


def test_a_model_that_goes_by_several_pictures_gets_them(over):
    inputs = {**INPUTS, "image": "UINT8", "image_2": "UINT8"}
    server = Played("a:1", [replace(PLAIN, inputs=inputs, needed=frozenset({"prompt", "image"}))], drawing(1))
    given = [("a.png", png_of(4, 6)), ("b.png", png_of(8, 2)), ("c.png", png_of(2, 2))]
    with serving(over(server)) as port:
        assert client_of(port).images.edit(image=given[:2], prompt="blue").data
        with pytest.raises(openai.BadRequestError, match="expected at most 2 pictures, without a mask; leave the rest"):
            client_of(port).images.edit(image=given, prompt="blue")
    ((_, values),) = server.asked
    assert (values["image"].shape, values["image_2"].shape) == ((4, 6, 3), (8, 2, 3))


def test_several_bundles_of_one_name_are_said(over, caplog):
    first, second = Played("a:1", [PLAIN], drawing(1)), Played("b:1", [replace(PLAIN, bundle="other")], drawing(1))
    fleet = Fleet([first, second])
    for _ in range(2):
        fleet.look()
    assert [r.getMessage() for r in caplog.records] == [
        "flux-tiny is of several bundles at its servers: a seed does not give one picture"
    ]


# What servers say


def test_every_reason_is_known_by_its_sentence():
    """Triton has one status for all of them."""
    seen = []
    batcher = Batcher(1, 0)
    batcher.offer(Job())
    for _ in range(2):
        try:
            batcher.offer(Job())
        except ServeError as error:
            seen.append(error)
        batcher.close()
    reader = Reader(1)
    reader.close()
    reader.hand_over(lambda _: None, seen.append)
    seen += [Late("request is late after 1 of 2 steps, expected to end in its time; give it more"), AWAY]
    assert {type(error) for error in seen} == {QueueFull, Stopping, Late, NoServer}
    assert [type(unavailable(str(error))) for error in seen] == [type(error) for error in seen]
    assert unavailable("Request for unknown model: 'a' is not found") is None


@pytest.mark.parametrize(
    ("status", "message", "kind", "told"),
    [
        ("UNAVAILABLE", str(FULL), QueueFull, str(FULL)),
        ("UNAVAILABLE", "failed to connect to all addresses", NoServer, "no server answers at 127.0.0.1:9"),
        ("NOT_FOUND", "Request for unknown model: 'a' is not found", NoServer, "no server answers at 127.0.0.1:9"),
        ("INVALID_ARGUMENT", "plan has `x` at step 2", ConfigError, "plan has `x` at step 2"),
        (None, "plan has `x` at step 2, expected F or .", ConfigError, "plan has `x` at step 2"),
        (None, "what is that", ServeError, "the server failed at this request"),
        (None, "the server failed: latents are NaN, expected numbers", ServeError, "the server failed: latents"),
        (None, "Request for unknown model: 'a' is not found", NoServer, "no server answers at 127.0.0.1:9"),
        ("INTERNAL", "Stub process 'a_0_0' is not healthy.", NoServer, "no server answers at 127.0.0.1:9"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", Late, "request is late"),
        ("CANCELLED", "request is cancelled", ServeError, "request is cancelled"),
        (
            "INTERNAL",
            "latents are NaN, expected numbers",
            ServeError,
            "latents are NaN, expected numbers",
        ),
        ("INTERNAL", "/models/a/1/model.py: division by zero", ServeError, "the server failed at this request"),
    ],
)
def test_what_triton_says_is_an_error_of_ours(monkeypatch, status, message, kind, told):
    from tritonclient.utils import InferenceServerException

    class Requests:
        async def infer(self, **asked):
            raise InferenceServerException(message, status and f"StatusCode.{status}")

    server = Server("127.0.0.1:9", ["a"])
    monkeypatch.setattr(server, "_requests", Requests)
    with pytest.raises(kind) as caught:
        asyncio.run(server.ask(PLAIN, {"prompt": "a dog", "seed": 1}, 1.0, lambda _: None))
    assert str(caught.value).startswith(told) and type(caught.value) is kind and server.in_flight == 0
    server.close()


def test_a_model_whose_process_died_is_not_ready_until_it_draws(monkeypatch):
    """Triton goes on to say that it is."""
    from tritonclient.utils import InferenceServerException

    class Requests:
        dead = True

        async def infer(self, **asked):
            if self.dead:
                raise InferenceServerException("Stub process 'a_0_0' is not healthy.", "StatusCode.INTERNAL")
            return Made()

    class Made:
        def get_response(self):
            return {"outputs": []}

    server = Server("127.0.0.1:9", [NAME])
    monkeypatch.setattr(server, "_requests", Requests)
    monkeypatch.setattr(server, "_listed", lambda: [NAME])
    monkeypatch.setattr("taylorseer_export.serve.fleet.served_of", lambda _: PLAIN)
    monkeypatch.setattr(server, "_config", lambda _: {})
    server.look()
    assert server.ready == {NAME}
    with pytest.raises(NoServer):
        asyncio.run(server.ask(PLAIN, {"prompt": "a dog"}, 1.0, print))
    assert server.ready == frozenset()
    server.look()
    assert server.ready == frozenset()
    Requests.dead = False
    asyncio.run(server.ask(PLAIN, {"prompt": "a dog"}, 1.0, print))
    server.look()
    assert server.ready == {NAME}
    server.close()


def test_a_configuration_says_what_a_model_is():
    told = {
        "role": "picture",
        "slots": "2",
        "queue": "3",
        "description": '{"classes": 10, "frame_rate": null}',
        "bundle": "one",
        "warm": None,
    }
    parameters = {name: {} if value is None else {"string_value": value} for name, value in told.items()}
    config = {
        "name": "dit-tiny-stream",
        "model_transaction_policy": {"decoupled": True},
        "instance_group": [{"count": 2, "gpus": [0, 1]}],
        "input": [
            {"name": "label", "data_type": "TYPE_INT64"},
            {"name": "plan", "data_type": "TYPE_STRING", "optional": 1},
        ],
        "parameters": parameters,
    }
    served = served_of(config)
    assert (served.base, served.streams, served.slots, served.places) == ("dit-tiny", True, 8, 20)
    assert served.inputs == {"label": "INT64", "plan": "BYTES"} and served.needed == {"label"}
    assert served_of({"name": "of others"}) is None
    assert served_of({**config, "parameters": {**parameters, "role": {"string_value": "denoiser"}}}) is None
    del parameters["description"]
    with pytest.raises(ConfigError, match="model dit-tiny-stream has no parameter `description`, expected"):
        served_of(config)


# The command, the environment


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "BUNDLE is missing, expected bundles or --triton HOST:PORT"),
        (["a-bundle", "--triton", "a:1"], "BUNDLE is a-bundle beside --triton, expected"),
        (["a-bundle", "--models", "flux-tiny"], "--models is flux-tiny without --triton, expected it beside that"),
        (["--triton", "a:1", "--slots", "2"], "--slots is given beside --triton, expected none, since it belongs to"),
        (
            ["--triton", "a:1", "--busy-queue", "2"],
            "--busy-queue is given beside --triton, expected none, since how",
        ),
        (["--triton", "http://a:1", "--port", "0"], "--triton is http://a:1, expected host:port without a scheme"),
        (["--triton", "a:1", "--port", "0", "--models", "x", "x"], "--models has x twice, expected every name once"),
    ],
)
def test_what_does_not_go_together_is_refused(capsys, arguments, said):
    assert main(["serve", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_front_needs_no_engine_and_no_library_of_models():
    code = (
        "import sys\n"
        "for name in 'torch diffusers transformers onnxruntime tokenizers av tensorrt'.split():\n"
        "    sys.modules[name] = None\n"
        "from taylorseer_export.errors import ServeError\n"
        "from taylorseer_export.serve.api.app import app_of\n"
        "from taylorseer_export.serve.api.fleet import open_models\n"
        "from taylorseer_export.serve.api.models import Models\n"
        "app_of(Models([]))\n"
        "try:\n    open_models(['127.0.0.1:9'], ['flux-tiny'])\nexcept ServeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("no server answers at 127.0.0.1:9 (") and done.returncode == 0, done.stderr
