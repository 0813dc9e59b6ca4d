"""The real tritonserver, started and stopped here: what it answers, what it refuses, and what it leaves behind."""

import base64
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import images_api
import numpy as np
import openai
import pytest
import torch
import triton_server
from diffusers import DiTTransformer2DModel
from images_api import GENERATIONS, MALFORMED, Metered, asked, client_of, got, models_over, picture_in, serving
from PIL import Image
from profiles import PLAN as PROFILE_PLAN
from profiles import made, weights_of
from test_lora_at_load import ASSETS, pairs, written
from triton_server import Server

from taylorseer_export.bundle.profile import write_profile
from taylorseer_export.bundle.store import open_bundle
from taylorseer_export.cli import main
from taylorseer_export.embedded.requests import label_request, pictures, prompt_request
from taylorseer_export.errors import ConfigError, ServeError
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.sampling import Request, sample
from taylorseer_export.serve import probe
from taylorseer_export.serve.api.fleet import open_models
from taylorseer_export.serve.client import infer
from taylorseer_export.serve.repository import Deployment, write_repository
from taylorseer_export.serve.server import HEADER, REGION, SHARED_MEMORY, abandoned_regions, sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(triton_server.missing()), reason=triton_server.missing() or "it runs"),
]

SECONDS = 120  # until a test gives up waiting; nothing is measured with it
PLAN = Plan(PROFILE_PLAN)
MODELS = (
    "flux-tiny",
    "flux-tiny-stream",
    "flux-tiny-denoiser",
    "dit-tiny",
    "dit-tiny-denoiser",
    "flux-whole",
)
BROKEN = "dit-tiny-denoiser"  # its copy of the weights is damaged


@pytest.fixture(scope="module")
def engines(embedded, tmp_path_factory):
    """Family -> folder of its embedded model's bundle, with a profile in it."""
    out = tmp_path_factory.mktemp("engines")
    for name, family in (("shapes", "flux"), ("adapted", "dit")):
        shutil.copytree(embedded(name), out / f"{family}-tiny")
        bundle = open_bundle(out / f"{family}-tiny")
        reuse = tuple((0.0, 1.0) if weights else () for weights in weights_of(PLAN, 1))
        write_profile(bundle, made(bundle.manifest, weights=reuse))
    return {family: out / f"{family}-tiny" for family in ("flux", "dit")}


@pytest.fixture(scope="module")
def denoisers(engines):
    """Family -> the same engines in this process."""
    return {family: load(folder, threads=1) for family, folder in engines.items()}


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """One of the embedded DiT."""
    model = DiTTransformer2DModel.from_pretrained(ASSETS / "dit/transformer")
    some = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][::3]
    return written(tmp_path_factory.mktemp("lora") / "red.safetensors", pairs(model, some), alpha=None)


@pytest.fixture(scope="module")
def repository(engines, whole_flux, lora, tmp_path_factory):
    out = tmp_path_factory.mktemp("models")
    write_repository(whole_flux, out, Deployment(slots=2, models=("picture",)))
    write_repository(engines["flux"], out, Deployment(slots=4, queue=64, memory_budget=100_000_000))
    write_repository(engines["dit"], out, Deployment(slots=2, queue=64, loras={"red": f"{lora}:0.5"}))
    weights = out / BROKEN / "1/bundle/weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.unlink()  # the other models link to the same file
    weights.write_bytes(data)
    return out


def shared_memory(server):
    """Files of shared memory that this server and its models, one session, have mapped; other tests have others."""
    mapped = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if os.getsid(int(process.name)) == server.process.pid:
                mapped.update(line.split(maxsplit=5)[-1] for line in (process / "maps").read_text().splitlines())
    return {path for path in SHARED_MEMORY.iterdir() if str(path) in mapped}


@pytest.fixture(scope="module")
def server(repository):
    # One of them is damaged. Of streams left as they end Triton 24.10 sometimes keeps one, see `serve/README.md`.
    with Server(repository, MODELS, ["--exit-on-error=false", "--exit-timeout-secs=20"]) as running:
        running.wait_ready()
        yield running
        used = shared_memory(running)
        assert {path.name.startswith(REGION) for path in used} == {True}
        code, said = running.stop(), running.said()
        kept = {name for name in MODELS if name != BROKEN and f"successfully unloaded '{name}'" not in said}
        assert (code, kept) in ((0, set()), (1, {"flux-tiny-stream"})), said
    left = {path for path in used if path.exists()}
    assert len(left) <= len(kept)
    sweep()
    assert not [path for path in left if path.exists()]


@pytest.fixture(scope="module")
def alone(denoisers):
    """(family, what, seed, size, plan, order) -> the picture made in this process, one request at a time."""

    @cache
    def make(family, what, seed, size, plan, order):
        denoiser = denoisers[family]
        request = (
            prompt_request(denoiser, [what], [seed], size)
            if family == "flux"
            else label_request(denoiser, [what], [seed])
        )
        return pictures(denoiser, request, sample(denoiser, request, denoiser.forecasts(plan=plan, order=order)))[0]

    one_at_a_time = threading.Lock()

    def ask(*request):
        with one_at_a_time:
            return make(*request)

    return ask


def metrics(server):
    """Name and labels -> value, of our own metrics."""
    text = urllib.request.urlopen(f"http://{server.metrics}/metrics").read().decode()
    return {key: float(value) for key, value in (x.rsplit(" ", 1) for x in text.splitlines() if x[:5] == "taylo")}


def wait_until(server, name, value, model=None):
    """Metrics are sent a few times per second; with a model its gauge of that name, of all instances."""

    def seen():
        found = metrics(server)
        own = [v for n, v in found.items() if n.startswith(f"{name}{{") and f'model="{model}"' in n]
        return found.get(name) if model is None else sum(own) if own else None

    until = time.monotonic() + SECONDS
    while seen() != value and time.monotonic() < until:
        time.sleep(0.1)
    assert seen() == value


CAPTION = "a red circle left of a blue square"


@pytest.mark.parametrize("protocol", ["http", "grpc", "stream"])
def test_a_seed_gives_the_picture_it_gives_in_process(server, alone, protocol):
    plan = "FFF.....F.....F.."
    url, model = (server.http if protocol == "http" else server.grpc), "flux-tiny" + "-stream" * (protocol == "stream")
    seen, values = [], {"prompt": CAPTION, "seed": 5, "plan": plan, "order": 1, "height": 32, "width": 48}
    made = infer(url, model, values, protocol, on_step=lambda step, outputs: seen.append((step, outputs)))
    expected = alone("flux", CAPTION, 5, (32, 48), plan, 1)
    assert made["picture"].tobytes() == expected.tobytes() and made["picture"].shape == (32, 48, 3)
    assert made["executed"].tolist() == [plan.encode()] and made["step"].tolist() == [len(plan)]
    assert [step for step, _ in seen] == (list(range(1, len(plan) + 1)) if protocol == "stream" else [])
    # Previews come closer: the last one before the end is nearly the picture, the first is not.
    off = [np.abs(outputs["picture"].astype(int) - expected).mean() for _, outputs in seen]
    assert not off or (off[-2] < off[0] / 4 and off[-1] == 0)


def test_a_whole_pipeline_draws_what_it_draws_in_process(server, whole_flux):
    """From a prompt of any letters, by a server that has the run side alone to do it with."""
    values = {"prompt": "any words, 漢字", "seed": 2, "height": 32, "width": 48, "guidance_scale": 2.0, "plan": "FF.F"}
    made = infer(server.http, "flux-whole", values, "http")
    with load(whole_flux, threads=1) as denoiser:
        request = prompt_request(denoiser, ["any words, 漢字"], [2], (32, 48), 2.0)
        expected = pictures(denoiser, request, sample(denoiser, request, denoiser.forecasts(plan="FF.F")))[0]
    assert made["picture"].tobytes() == expected.tobytes() and made["executed"].tolist() == [b"FF.F"]


def test_a_prompt_that_comes_again_is_not_encoded_again(server, alone):
    caption, name = "a white cross above a red circle", "taylorseer_conditioning_total"
    hits, misses = (f'{name}{{model="flux-tiny",outcome="{outcome}"}}' for outcome in ("hit", "miss"))
    before = metrics(server)
    for seed in (1, 2, 3):
        made = infer(server.http, "flux-tiny", {"prompt": caption, "seed": seed, "plan": "FF.F", "order": 1}, "http")
        assert made["picture"].tobytes() == alone("flux", caption, seed, (64, 64), "FF.F", 1).tobytes()
    wait_until(server, hits, before[hits] + 2)
    assert metrics(server)[misses] == before[misses] + 1


def test_defaults_are_the_bundle_s(server, alone, denoisers):
    made = infer(server.http, "dit-tiny", {"label": 3}, "http")
    default = denoisers["dit"].manifest.plan
    assert made["picture"].tobytes() == alone("dit", 3, 0, None, default.text, None).tobytes()
    assert made["executed"].tolist() == [default.text.encode()]


def test_a_request_chooses_its_lora(server, front, denoisers, lora):
    """As in process with that file, from Triton's own client and through the front; the next one gets nothing of it."""
    denoiser = denoisers["dit"]
    request, forecasts = label_request(denoiser, [7], [1]), denoiser.forecasts(steps=4)
    adapted = replace(request, lora=denoiser.adapter(f"{lora}:-0.25"))
    plain, expected = (pictures(denoiser, own, sample(denoiser, own, forecasts))[0] for own in (request, adapted))
    assert (plain != expected).any()
    asks = {"label": 7, "seed": 1, "steps": 4}
    for more, picture in (({"lora": "red:-0.5"}, expected), ({}, plain)):
        assert infer(server.http, "dit-tiny", asks | more, "http")["picture"].tobytes() == picture.tobytes()
    body = {"model": "dit-tiny", "prompt": "7", "seed": 1, "steps": 4, "lora": "red:-0.5"}
    status, _, text = asked(front, GENERATIONS, body)
    assert status == 200 and (picture_in(json.loads(text)["data"][0]["b64_json"]) == expected).all()
    said = "lora is `blue` for dit-tiny, expected red, or one of them with a strength like red:0.8; choose one of"
    with pytest.raises(ServeError, match=said):
        infer(server.http, "dit-tiny", asks | {"lora": "blue"}, "http")
    status, _, text = asked(front, GENERATIONS, {**body, "lora": "blue"})
    assert status == 400 and said.encode() in text


def test_loras_are_refused_before_anything_is_written(engines, lora, tmp_path):
    with pytest.raises(ConfigError, match=r"--lora is given for flux-tiny, .* export it with --lora-rank"):
        write_repository(engines["flux"], tmp_path / "models", Deployment(loras={"red": str(lora)}))
    with pytest.raises(ConfigError, match=r"lora .*none.safetensors is missing"):
        write_repository(engines["dit"], tmp_path / "models", Deployment(loras={"red": "none.safetensors"}))
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("sigmas", [None, np.linspace(1, 0.05, 12, dtype=np.float32) ** 2])
def test_the_denoiser_takes_latents_and_conditioning(server, denoisers, sigmas):
    denoiser = denoisers["flux"]
    request = prompt_request(denoiser, [CAPTION], [1])
    values = {"latents": request.latents, **request.conditioning, "steps": 12, "interval": 4, "warmup": 2}
    made = infer(server.grpc, "flux-tiny-denoiser", values | ({} if sigmas is None else {"sigmas": sigmas}))
    asked = Request(request.latents, request.conditioning, False, 1.0, 0, 0, sigmas)
    expected = sample(denoiser, asked, denoiser.forecasts(steps=12, interval=4, warmup=2))
    assert made["denoised"].tobytes() == expected.latents.tobytes()
    assert made["executed"].tolist() == [expected.executed.encode()]


@pytest.mark.parametrize("family", ["flux", "dit"])
def test_a_profile_is_asked_for_by_name(server, denoisers, family):
    denoiser, what = denoisers[family], {"prompt": CAPTION} if family == "flux" else {"label": 3}
    answer = infer(server.http, f"{family}-tiny", {**what, "seed": 1, "profile": "fast"}, "http")
    request = prompt_request(denoiser, [CAPTION], [1]) if family == "flux" else label_request(denoiser, [3], [1])
    profile = denoiser.profiles["fast"]
    calibrated = sample(denoiser, request, Forecasts(PLAN, 1, weights=profile.weights))
    assert answer["picture"].tobytes() == pictures(denoiser, request, calibrated)[0].tobytes()
    assert answer["executed"].tolist() == [str(PLAN).encode()]
    assert calibrated.latents.tobytes() != sample(denoiser, request, Forecasts(PLAN, 1)).latents.tobytes()


def malformed():
    """What is wrong -> (change of the values, words of the answer)."""
    return {
        "dtype": ({"seed": ("FP32", np.zeros(1, np.float32))}, "data-type"),
        "shape": ({"seed": ("INT64", np.zeros(2, np.int64))}, "shape"),
        "rank": ({"seed": ("INT64", np.zeros((1, 1), np.int64))}, "shape"),
        "missing": ({"prompt": None}, "input `prompt` is missing, expected BYTES [1]"),
        "extra": ({"mood": ("INT64", np.zeros(1, np.int64))}, "mood"),
        "no steps": ({"steps": ("INT32", np.array([0], np.int32))}, "steps is 0, expected 1 to 1000 (steps)"),
        "too many steps": ({"steps": ("INT32", np.array([10_000], np.int32))}, "steps is 10000, expected 1 to 1000"),
        "plan": ({"plan": ("BYTES", np.array([b"FF."], object))}, "plan FF. is 3 steps long, expected 12 (steps)"),
        "plan letters": ({"plan": ("BYTES", np.array([b"FFx........."], object))}, "plan has `x` at step 2"),
        "order": ({"order": ("INT32", np.array([4], np.int32))}, "order is 4, expected at most 1"),
        "long": ({"prompt": ("BYTES", np.array([b"a" * 100_000_000], object))}, "prompt is 100000000 bytes, expected"),
        "size": ({"height": ("INT32", np.array([33], np.int32))}, "height is 33, expected a multiple of 8 (pixels)"),
        "large": ({"height": ("INT32", np.array([8192], np.int32))}, "request needs"),
        "profile": (
            {"profile": ("BYTES", np.array([b"slow"], object))},
            "profile is `slow`, expected one of this bundle (fast)",
        ),
        "profile text": ({"profile": ("BYTES", np.array([b"\xff"], object))}, "profile is not readable"),
        "profile and steps": ({"profile": ("BYTES", np.array([b"fast"], object))}, "8 steps long, expected 12 (steps)"),
    }


def tensors(**values):
    """Inputs for tritonclient over gRPC."""
    import tritonclient.grpc as library

    made = []
    for name, value in values.items():
        kind = "BYTES" if isinstance(value, str) else "INT64" if name in ("seed", "label") else "INT32"
        array = np.array([value.encode()], object) if isinstance(value, str) else np.array([value], kind.lower())
        made.append(library.InferInput(name, [1], kind))
        made[-1].set_data_from_numpy(array)
    return made


def send_raw(server, model, change):
    """A plain request with some tensors replaced, typed and shaped as they are: no client corrects them."""
    import tritonclient.grpc as library

    values = {"prompt": ("BYTES", np.array([b"a red circle"], object)), "steps": ("INT32", np.array([12], np.int32))}
    client = library.InferenceServerClient(server.grpc)
    try:
        made = []
        for name, typed in (values | change).items():
            if typed is not None:
                made.append(library.InferInput(name, list(typed[1].shape), typed[0]))
                made[-1].set_data_from_numpy(typed[1])
        return client.infer(model, made)
    finally:
        client.close()


@pytest.mark.parametrize("what", malformed())
def test_a_malformed_request_is_the_caller_s_fault(server, what):
    from tritonclient.utils import InferenceServerException

    change, words = malformed()[what]
    with pytest.raises(InferenceServerException) as caught:
        send_raw(server, "flux-tiny", change)
    assert "INVALID_ARGUMENT" in str(caught.value.status()) and words in str(caught.value)
    assert infer(server.grpc, "flux-tiny", {"prompt": "a red circle", "steps": 3})["picture"].shape == (64, 64, 3)


def test_numbers_that_are_not_finite_are_refused(server, denoisers):
    request = prompt_request(denoisers["flux"], [CAPTION], [1])
    values = {"latents": np.full_like(request.latents, np.nan), **request.conditioning}
    with pytest.raises(ServeError, match="input `latents` has values that are NaN or infinite") as caught:
        infer(server.grpc, "flux-tiny-denoiser", values)
    assert "INVALID_ARGUMENT" in caught.value.status


def test_a_label_that_is_none_is_refused(server):
    with pytest.raises(ServeError, match="--label is 10, expected 0 to 9"):
        infer(server.grpc, "dit-tiny", {"label": 10})


def test_a_deadline_that_passes_is_said(server):
    with pytest.raises(ServeError, match="request is late after") as caught:
        infer(server.grpc, "flux-tiny", {"prompt": CAPTION, "steps": 250, "interval": 1}, timeout=0.02)
    assert "UNAVAILABLE" in caught.value.status


@pytest.mark.parametrize("how", ["cancel", "close", "give up"])
def test_who_leaves_a_plain_grpc_request_frees_its_slot(server, how):
    import tritonclient.grpc as library
    from tritonclient.utils import InferenceServerException

    left = 'taylorseer_requests_total{model="flux-tiny",outcome="cancelled"}'
    wait_until(server, "taylorseer_slots_in_use", 0, "flux-tiny")
    before, client = metrics(server)[left], library.InferenceServerClient(server.grpc)
    made = tensors(prompt=CAPTION, steps=1000, interval=1)
    if how == "give up":
        with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
            client.infer("flux-tiny", made, client_timeout=0.5)
    else:
        under_way = client.async_infer("flux-tiny", made, lambda result, error: None)
        wait_until(server, "taylorseer_slots_in_use", 1, "flux-tiny")
        under_way.cancel() if how == "cancel" else client.close()
    wait_until(server, left, before + 1)
    wait_until(server, "taylorseer_slots_in_use", 0, "flux-tiny")
    client.close()


def test_a_damaged_bundle_keeps_its_model_unavailable_and_no_other(server):
    import tritonclient.http as library

    client = library.InferenceServerClient(server.http)
    try:
        states = {entry["name"]: entry for entry in client.get_model_repository_index({HEADER: server.secret})}
    finally:
        client.close()
    assert states[BROKEN]["state"] == "UNAVAILABLE" and "weights.safetensors has SHA-256" in states[BROKEN]["reason"]
    assert all(states[name]["state"] == "READY" for name in MODELS if name != BROKEN)
    assert "weights.safetensors has SHA-256" in server.said()


def test_the_client_command_writes_the_picture(server, alone, tmp_path, capsys):
    from PIL import Image

    out = tmp_path / "circle.png"
    plan = "FFF.....F..."
    arguments = ["client", "flux-tiny-stream", "--url", server.grpc, "--prompt", CAPTION, "--seed", "2", "--plan", plan]
    assert main([*arguments, "--out", str(out)]) == 0
    assert f"plan      {plan} (4 of 12 steps full)" in capsys.readouterr().out
    drawn = np.asarray(Image.open(out))
    expected = alone("flux", CAPTION, 2, (64, 64), plan, None)
    scale = 256 // 64
    gap = (drawn.shape[0] - 256) // 2
    assert (drawn[gap : gap + 256 : scale, gap : gap + 256 : scale, :3] == expected).all()
    assert main([*arguments, "--label", "3", "--out", str(out)]) == 2  # not an input of this model
    assert "input is `label`, expected one that the model has" in capsys.readouterr().err


# The images API before it


@pytest.fixture(scope="module")
def front(server):
    """A server of the images API that holds no bundle: its port."""
    models = open_models([server.grpc], ["flux-tiny", "dit-tiny"], every=0.2)
    with serving(models) as port:
        yield port
    models.close()


@pytest.fixture(scope="module")
def inside(denoisers, lora):
    """One over the same bundles, in this process: its port."""
    loras = {"red": denoisers["dit"].adapter(f"{lora}:0.5")}
    with models_over(denoisers["flux"], denoisers["dit"], loras=loras) as models, serving(models) as port:
        yield port


def png_of(picture):
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


# What is asked beside a seed.
ASKED = {
    "several pictures of a size": {"n": 2, "size": "48x32", "steps": 9},
    "the bundle's defaults": {},
    "a guidance that binary fractions round": {"steps": 4, "model": "dit-tiny", "prompt": " 7 ", "guidance_scale": 2.3},
    "a profile": {"profile": "fast", "quality": "auto"},
    "a plan and another format": {"plan": "FF.F..F", "order": 1, "output_format": "webp", "output_compression": 80},
    "a prompt of more bytes than characters": {"prompt": "漢字" * 1500, "plan": "FF.F"},
    "its own size by name": {"model": "dit-tiny", "prompt": "3", "size": "16x16", "plan": "FF.F"},
}


@pytest.mark.parametrize("case", ASKED)
def test_the_front_answers_as_the_service_in_one_process_does(front, inside, case):
    body = {"prompt": CAPTION, "seed": 7, **ASKED[case]}
    (status, _, text), (expected, _, other) = (asked(port, GENERATIONS, body) for port in (front, inside))
    assert status == expected == 200, text
    seen, wanted = json.loads(text), json.loads(other)
    assert seen["data"] == wanted["data"] and len(seen["data"]) == body.get("n", 1)
    times = [picture.pop("times_ms") for answer in (seen, wanted) for picture in answer["taylorseer"]["pictures"]]
    assert {tuple(one) for one in times} == {tuple(times[0])} and min(v for one in times for v in one.values() if v) > 0
    for answer in (seen, wanted):
        del answer["created"], answer["taylorseer"]["request_id"]
    assert seen == wanted


@pytest.mark.parametrize("case", MALFORMED)
def test_the_front_refuses_in_the_same_words(front, inside, case):
    body, status, param = images_api.malformed(case)
    seen, expected = (asked(port, GENERATIONS, body) for port in (front, inside))
    assert seen[0] == expected[0] == status, seen[2]
    error, other = (json.loads(answer[2])["error"] for answer in (seen, expected))
    if status == 504:  # how far it came is chance
        error.pop("message"), other.pop("message")
    assert error == other and error["param"] == param


def test_the_openai_client_edits_through_the_front(front, inside):
    """Of ten steps the last six run; of a strength that was rounded to float32 it would be seven."""
    picture = np.random.default_rng(2).integers(0, 256, (32, 48, 4), dtype=np.uint8)
    how = {"seed": "3", "steps": "10", "strength": "0.6"}
    given = {"image": ("a.png", png_of(picture)), "prompt": CAPTION, "model": "flux-tiny", "extra_body": how}
    made, expected = (client_of(port).images.edit(**given) for port in (front, inside))
    assert made.data[0].b64_json == expected.data[0].b64_json and made.size == expected.size == "48x32"
    executed = [one.model_extra["taylorseer"]["pictures"][0]["executed"] for one in (made, expected)]
    assert executed[0] == executed[1] and len(executed[0]) == 6
    with pytest.raises(openai.BadRequestError, match="expected flux-tiny, which takes them; ask for"):
        client_of(front).images.edit(image=given["image"], prompt="3", model="dit-tiny")
    for more in ({"model": "dit-tiny", "prompt": "3"}, {"model": "flux-tiny", "prompt": CAPTION}):
        with pytest.raises(openai.BadRequestError) as caught:
            client_of(front).images.generate(**more, extra_body={"strength": 0.5})
        assert caught.value.param == "strength"


def test_the_openai_client_streams_through_the_front(front, inside):
    how = {"prompt": CAPTION, "stream": True, "partial_images": 3, "extra_body": {"seed": 5, "steps": 12}}
    (*previews, last), (*others, end) = (list(client_of(port).images.generate(**how)) for port in (front, inside))
    assert [event.b64_json for event in (*previews, last)] == [event.b64_json for event in (*others, end)]
    assert [event.partial_image_index for event in previews] == [0, 1, 2]
    told = [event.model_extra["taylorseer"] for event in (last, end)]
    assert told[0]["executed"] == told[1]["executed"] and told[0]["times_ms"].keys() == told[1]["times_ms"].keys()


def test_a_stream_of_the_front_tells_of_steps(front, inside):
    """And with a model that does not answer after every step, it refuses before it begins."""
    body = {"prompt": CAPTION, "n": 2, "seed": 1, "plan": "FF..F", "stream": True, "progress": True}
    events = []
    for port in (front, inside):
        status, _, text = asked(port, GENERATIONS, body)
        assert status == 200
        blocks = text.decode().strip().split("\n\n")
        told = [json.loads(block.partition("data: ")[2]) for block in blocks]
        events.append([[event for event in told if event["image_index"] == number] for number in (0, 1)])
    for one, other in zip(*events, strict=True):
        assert [event.get("step") for event in one] == [1, 2, 3, 4, None] == [event.get("step") for event in other]
        assert {event["planned"] for event in one[:-1]} == {"FF..F"} and min(e["milliseconds"] for e in one[:-1]) > 0
        assert one[-1]["b64_json"] == other[-1]["b64_json"]
    status, _, text = asked(front, GENERATIONS, {"prompt": "3", "model": "dit-tiny", "stream": True, "progress": True})
    assert status == 400 and json.loads(text)["error"]["param"] == "progress", text
    events = list(client_of(front).images.generate(prompt="3", model="dit-tiny", stream=True, extra_body={"steps": 2}))
    assert [event.type for event in events] == ["image_generation.completed"]


def test_a_stream_of_the_front_is_refused_before_it_begins(front):
    """As any request is: the model says when it has a place."""
    with pytest.raises(openai.BadRequestError) as caught:
        client_of(front).images.generate(prompt=CAPTION, stream=True, extra_body={"order": 4})
    assert caught.value.param == "order" and "order is 4, expected at most 1" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client_of(front).images.generate(prompt=CAPTION, model="flux-whole", stream=True)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_front_frees_the_slot_at_the_server(server, front, stream):
    model = "flux-tiny" + "-stream" * stream
    left = f'taylorseer_requests_total{{model="{model}",outcome="cancelled"}}'
    wait_until(server, "taylorseer_slots_in_use", 0, model)
    before, own = metrics(server)[left], Metered(front).of("taylorseer_requests_total", "flux-tiny", "cancelled")
    body = json.dumps({"prompt": CAPTION, "plan": "F" * 1000, "stream": stream, "seed": 1}).encode()
    head = f"POST {GENERATIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    with socket.create_connection(("127.0.0.1", int(front))) as leaving:
        leaving.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_until(server, "taylorseer_slots_in_use", 1, model)
        if stream:
            assert leaving.recv(15) == b"HTTP/1.1 200 OK"
    wait_until(server, left, before + 1)
    wait_until(server, "taylorseer_slots_in_use", 0, model)
    assert Metered(front).of("taylorseer_requests_total", "flux-tiny", "cancelled") == own + 1


def test_a_late_request_of_the_front_says_how_far_it_came(front):
    body = {"prompt": CAPTION, "plan": "F" * 1000, "timeout": 0.3}
    status, _, text = asked(front, GENERATIONS, body)
    error = json.loads(text)["error"]
    assert (status, error["code"]) == (504, "timeout") and error["message"].startswith("request is late after"), error


def test_the_front_knows_its_models_and_servers(server, front, inside):
    listed, expected = (json.loads(got(port, "/v1/models")[2])["data"] for port in (front, inside))
    for model in (*listed, *expected):
        assert model.pop("created") > 0
    assert listed == expected
    status, _, text = got(front, "/health")
    seen = json.loads(text)
    assert status == 200 and seen["status"] == "ok" and seen["models"].keys() == {"flux-tiny", "dit-tiny"}
    assert seen["models"]["flux-tiny"] == {"status": "ok", "servers": 1, "servers_ready": 1, "slots": 8, "in_flight": 0}
    assert asked(front, GENERATIONS, {"prompt": "1", "model": "dit-tiny", "plan": "FF.F"})[0] == 200
    metered = Metered(front)
    assert metered.of("taylorseer_requests_total", "dit-tiny", "done") >= 1
    assert metered.of("taylorseer_full_steps_total", "dit-tiny", "executed") >= 3
    assert metered.of("taylorseer_stage_seconds_count", "dit-tiny", "loop") >= 1
    assert metered.of("taylorseer_http_requests_total", GENERATIONS, "200") >= 1
    assert metered.of("taylorseer_servers_ready", "dit-tiny") == 1
    assert b"taylorseer_steps_total{" not in got(front, "/metrics")[2]  # those are the server's own


def test_the_front_finds_models_by_the_index_or_is_told_them(server):
    (dead,) = triton_server.free_ports(1)
    with pytest.raises(ConfigError, match=r"repository index of .* is restricted, expected --models or the secret in"):
        open_models([server.grpc])
    with pytest.raises(ConfigError, match=r"--models has sdxl, expected models that .* is ready for"):
        open_models([server.grpc], ["flux-tiny", "sdxl"])
    with pytest.raises(ServeError, match=f"no server answers at 127.0.0.1:{dead} .*, expected one that is ready"):
        open_models([f"127.0.0.1:{dead}"], ["flux-tiny"])
    models = open_models([f"127.0.0.1:{dead}", server.grpc], secret=server.secret)
    with serving(models) as port:
        assert {model.name for model in models} == {"flux-tiny", "dit-tiny", "flux-whole"}
        body = {"prompt": "any words", "model": "flux-whole", "plan": "FF.F"}
        assert [asked(port, GENERATIONS, body)[0] for _ in range(2)] == [200, 200]
        assert json.loads(got(port, "/health")[2])["models"]["flux-whole"]["servers_ready"] == 1
    models.close()


def test_the_command_is_a_front_until_it_is_told_to_stop(server, inside, tmp_path):
    """Without a bundle, an engine, or anything but the servers."""
    command = [sys.executable, "-m", "taylorseer_export", "serve", "--triton", server.grpc, "--port", "0"]
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        running = subprocess.Popen(
            [*command, "--models", "dit-tiny"], cwd=triton_server.ROOT, stdout=subprocess.PIPE, stderr=file, text=True
        )
        try:
            line = running.stdout.readline()
            found = re.fullmatch(rf"serving dit-tiny of {server.grpc} at http://127\.0\.0\.1:(\d+) \(.*\n", line)
            assert found, (line, errors.read_text())
            body = {"prompt": "2", "model": "dit-tiny", "plan": "FF.F", "seed": 3}
            made, expected = (json.loads(asked(port, GENERATIONS, body)[2]) for port in (int(found[1]), inside))
            assert made["data"] == expected["data"]
            running.send_signal(signal.SIGTERM)
            assert running.wait(SECONDS) == 0
        finally:
            running.kill()
    assert "Traceback" not in errors.read_text() and f"POST {GENERATIONS} 200" in errors.read_text()


# Many at once


class Storm:
    """Requests of every kind at a time; `run` sends one and returns what was wrong with its answer, if anything."""

    def __init__(self, server, alone, denoisers):
        self.server, self.alone, self.denoisers = server, alone, denoisers

    def run(self, number):
        choose = random.Random(number)
        family = choose.choice(["flux", "flux", "flux", "dit"])
        steps = choose.randint(10, 50)
        plan = str(Plan.regular(steps, choose.choice([3, 5, 6]), choose.choice([1, 3])))
        order = choose.choice([0, 1])
        seed = choose.randrange(2)
        what = choose.choice(["a red circle", CAPTION]) if family == "flux" else choose.choice([3, 8])
        size = choose.choice([(32, 32), (32, 48), (48, 32)]) if family == "flux" else None
        values = {"prompt" if family == "flux" else "label": what, "seed": seed, "plan": plan, "order": order}
        if size:
            values |= {"height": size[0], "width": size[1]}
        if number % 20 == 7:
            wrong = choose.choice([{"steps": 7}, {"order": 9}, {"seed": -1}, {"profile": "fast"}, {"interval": 3}])
            return self._malformed(family, values | wrong)
        if number % 5 == 3:
            values = {name: value for name, value in values.items() if name != "label"} | {"prompt": CAPTION}
            return self._cancelled(values, choose.randrange(1, steps))
        http = choose.random() < 0.5
        url, protocol = (self.server.http, "http") if http else (self.server.grpc, "grpc")
        made = infer(url, f"{family}-tiny", values, protocol)
        expected = self.alone(family, what, seed, size, plan, order)
        return "" if made["picture"].tobytes() == expected.tobytes() else f"{values} differs from its solo run"

    def _malformed(self, family, values):
        try:
            infer(self.server.grpc, f"{family}-tiny", values)
        except ServeError as error:
            return "" if "INVALID_ARGUMENT" in error.status else f"{values}: {error}"
        return f"{values} was answered, expected INVALID_ARGUMENT"

    def _cancelled(self, values, step):
        """Stream until `step` steps are done, then leave."""
        import tritonclient.grpc as library

        reached, client = threading.Event(), library.InferenceServerClient(self.server.grpc)

        def hear(result, error):
            if error is not None or int(result.as_numpy("step")[0]) >= step:
                reached.set()

        client.start_stream(hear)
        client.async_stream_infer("flux-tiny-stream", tensors(**values))
        heard = reached.wait(SECONDS)
        client.stop_stream(cancel_requests=True)
        client.close()
        return "" if heard else f"{values} did not reach step {step}"


def stub_memory(server):
    """Resident memory of all model processes of a server. Unit: bytes."""
    import psutil

    children = psutil.Process(server.process.pid).children(recursive=True)
    return sum(child.memory_info().rss for child in children)


def test_two_hundred_mixed_requests_eight_at_a_time(server, alone, denoisers):
    storm, rounds, each = Storm(server, alone, denoisers), 3, 200
    memory, before = [], metrics(server)
    for _ in range(rounds):  # the same requests every time, so that the memory can be compared
        with ThreadPoolExecutor(8) as senders:
            wrong = [answer for answer in senders.map(storm.run, range(each)) if answer]
        assert wrong == []
        for model in ("flux-tiny", "flux-tiny-stream", "dit-tiny"):
            wait_until(server, "taylorseer_slots_in_use", 0, model)
            wait_until(server, "taylorseer_queue", 0, model)
        memory.append(stub_memory(server))
    # Flat, but for what allocators keep: a leak of one slot per request would be ten times as much.
    assert memory[2] - memory[1] <= 0.02 * memory[1], memory
    seen = {name: value - before.get(name, 0) for name, value in metrics(server).items()}
    assert seen['taylorseer_requests_total{model="flux-tiny-stream",outcome="cancelled"}'] >= 1
    assert seen['taylorseer_requests_total{model="flux-tiny",outcome="failed"}'] == 0
    for model in ("flux-tiny", "dit-tiny"):
        full = [seen[f'taylorseer_full_steps_total{{model="{model}",when="{w}"}}'] for w in ("planned", "executed")]
        assert full[0] == full[1] > 0
        assert all(
            seen[f'taylorseer_fallbacks_total{{kind="{k}",model="{model}"}}'] == 0 for k in ("shared", "cuda_graph")
        )
    # Calls were shared.
    steps, calls = (seen[f'taylorseer_{name}_total{{kind="full",model="flux-tiny"}}'] for name in ("steps", "calls"))
    assert calls < steps


def test_a_server_that_was_killed_serves_again_at_once(repository, alone):
    """What it could not give back is swept by the next one; what a living one uses is not."""
    plan = "FF..F"
    with Server(repository, ["dit-tiny"]) as first:
        first.wait_ready()
        left = shared_memory(first)
        assert left and not left & set(abandoned_regions())
        with ThreadPoolExecutor(1) as sender:
            asked = {"label": 3, "steps": 350, "interval": 1}
            under_way = sender.submit(infer, first.grpc, "dit-tiny", asked)
            wait_until(first, "taylorseer_slots_in_use", 1, "dit-tiny")
            first.stop(signal.SIGKILL)
            with pytest.raises(ServeError, match="answered `"):
                under_way.result(SECONDS)
    until = time.monotonic() + SECONDS
    while not {path for path in left if path.exists()} <= set(abandoned_regions()) and time.monotonic() < until:
        time.sleep(0.1)  # its models, killed with it, are still ending
    with Server(repository, ["dit-tiny"]) as second:
        assert not [path for path in left if path.exists()]
        second.wait_ready()
        made = infer(second.grpc, "dit-tiny", {"label": 8, "seed": 1, "plan": plan})
        assert made["picture"].tobytes() == alone("dit", 8, 1, None, plan, None).tobytes()
        used = shared_memory(second)
        assert second.stop() == 0
    assert used and not [path for path in used if path.exists()]


# What a peer may try


def over_http(server, path, body=None, header=None):
    """(status, text) of one call; a body makes it a POST."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{server.http}{path}", data, {} if header is None else header)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


INTRUDER = b"""
import pathlib
class TritonPythonModel:
    def initialize(self, args):
        pathlib.Path("TRACE").touch()
    def execute(self, requests):
        return []
"""
REGISTER = {"key": "/intruder", "offset": 0, "byte_size": 8}
CUDA = {"raw_handle": {"b64": ""}, "device_id": 0, "byte_size": 8}


@pytest.fixture(scope="module")
def hardened(repository, tmp_path_factory):
    """A server with the arguments of the Kubernetes manifest, but for addresses and places of this machine."""
    import yaml

    text = (triton_server.ROOT / "tools/deploy/kubernetes.yaml").read_text(encoding="utf-8")
    (deployment,) = (doc for doc in yaml.safe_load_all(text) if doc["kind"] == "Deployment")
    arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[0] == "--model-repository=/models"
    secret = "known to the operator"
    arguments = [argument.replace("$(TAYLORSEER_ADMIN)", secret) for argument in arguments[1:]]
    with Server(repository, ["flux-tiny", "flux-tiny-denoiser"], arguments) as running:
        running.wait_ready()
        running.secret = secret
        yield running


def attacks():
    """What is tried -> (path, body) of the call over HTTP."""
    config = json.dumps({"backend": "python", "max_batch_size": 0})
    load = {"parameters": {"config": config, "file:1/model.py": base64.b64encode(INTRUDER).decode()}}
    return {
        "load code": ("/v2/repository/models/flux-tiny/load", load),
        "load a new model": ("/v2/repository/models/intruder/load", load),
        "load": ("/v2/repository/models/flux-tiny/load", {}),
        "unload": ("/v2/repository/models/flux-tiny/unload", {}),
        "index": ("/v2/repository/index", {}),
        "logging": ("/v2/logging", {"log_verbose_level": 9}),
        "read logging": ("/v2/logging", None),
        "trace": ("/v2/trace/setting", {"trace_level": ["TENSORS"], "trace_rate": "1"}),
        "read trace": ("/v2/trace/setting", None),
        "trace of a model": ("/v2/models/flux-tiny/trace/setting", {"trace_level": ["TENSORS"], "trace_rate": "1"}),
        "shared memory": ("/v2/systemsharedmemory/region/mine/register", REGISTER),
        "read shared memory": ("/v2/systemsharedmemory/status", None),
        "drop shared memory": ("/v2/systemsharedmemory/unregister", {}),
        "CUDA memory": ("/v2/cudasharedmemory/region/mine/register", CUDA),
        "read CUDA memory": ("/v2/cudasharedmemory/status", None),
        "drop CUDA memory": ("/v2/cudasharedmemory/unregister", {}),
    }


def still_serves(server):
    made = infer(server.http, "flux-tiny", {"prompt": "a red circle", "steps": 3}, "http")
    return over_http(server, "/v2/health/ready")[0] == 200 and made["picture"].shape == (64, 64, 3)


@pytest.mark.parametrize("what", attacks())
def test_no_peer_can_change_the_server_over_http(hardened, what):
    path, body = attacks()[what]
    status, text = over_http(hardened, path, body)
    assert status == 403 and "restricted" in text, (status, text)
    for wrong in ("", "$(TAYLORSEER_ADMIN)"):  # the header alone opens nothing
        assert over_http(hardened, path, body, {HEADER: wrong})[0] == 403
    assert still_serves(hardened)


@pytest.mark.parametrize("what", ["load code", "load a new model", "load", "unload"])
def test_models_stay_as_they_are_even_for_who_knows_the_secret(hardened, what):
    path, body = attacks()[what]
    status, text = over_http(hardened, path, body, {HEADER: hardened.secret})
    assert status >= 400 and "not allowed" in text, (status, text)
    assert still_serves(hardened)


def test_the_secret_opens_what_it_is_for(hardened):
    status, text = over_http(hardened, "/v2/repository/index", {}, {HEADER: hardened.secret})
    assert status == 200 and {e["name"] for e in json.loads(text)} == {"flux-tiny", "flux-tiny-denoiser"}


@pytest.mark.parametrize("what", attacks())
def test_no_peer_can_change_the_server_over_grpc(hardened, what):
    import tritonclient.grpc as library
    from tritonclient.utils import InferenceServerException

    client = library.InferenceServerClient(hardened.grpc)
    _, body = attacks()[what]
    calls = {
        "load code": lambda: client.load_model(
            "flux-tiny", config=json.dumps({"backend": "python"}), files={"file:1/model.py": INTRUDER}
        ),
        "load a new model": lambda: client.load_model(
            "intruder", config=json.dumps({"backend": "python"}), files={"file:1/model.py": INTRUDER}
        ),
        "load": lambda: client.load_model("flux-tiny"),
        "unload": lambda: client.unload_model("flux-tiny"),
        "index": client.get_model_repository_index,
        "logging": lambda: client.update_log_settings(body),
        "read logging": client.get_log_settings,
        "trace": lambda: client.update_trace_settings(settings=body),
        "read trace": client.get_trace_settings,
        "trace of a model": lambda: client.update_trace_settings("flux-tiny", body),
        "shared memory": lambda: client.register_system_shared_memory("mine", "/intruder", 8),
        "read shared memory": client.get_system_shared_memory_status,
        "drop shared memory": client.unregister_system_shared_memory,
        "CUDA memory": lambda: client.register_cuda_shared_memory("mine", b"", 0, 8),
        "read CUDA memory": client.get_cuda_shared_memory_status,
        "drop CUDA memory": client.unregister_cuda_shared_memory,
    }
    assert calls.keys() == attacks().keys()
    try:
        with pytest.raises(InferenceServerException, match="restricted"):
            calls[what]()
    finally:
        client.close()
    assert still_serves(hardened)


def test_one_request_does_not_stop_another(hardened):
    """Sizes that are refused are refused by their numbers: nothing of 8000 x 8000 is made."""
    for side in (8000, 2147483640):
        with pytest.raises(ServeError, match=r"`image_tokens`\D*\d+, expected 4 to 16384") as caught:
            infer(hardened.grpc, "flux-tiny", {"prompt": CAPTION, "height": side, "width": side})
        assert "INVALID_ARGUMENT" in caught.value.status
    assert still_serves(hardened)


# A model's process that dies


def test_a_model_that_died_is_found_by_the_probe_and_keeps_no_client_waiting(repository):
    """And the front of a server that is gone says so, at once."""
    import psutil

    with Server(repository, ["dit-tiny"]) as server:
        server.wait_ready()
        models = open_models([server.grpc], ["dit-tiny"], every=0.2)
        watch = ["--url", server.metrics, "--oldest", "5", "--timeout", "5", "dit-tiny"]
        assert probe.main(watch) == 0
        assert probe.main([*watch, "other"]) == 1
        (stub,) = (
            process for process in psutil.Process(server.process.pid).children(recursive=True)
            if any("dit-tiny" in word for word in process.cmdline())
        )  # fmt: skip
        with ThreadPoolExecutor(6) as senders:
            values = {"label": 3, "steps": 350, "interval": 1}
            protocols = [(server.grpc, "grpc"), (server.http, "http")] * 3
            under_way = [senders.submit(infer, url, "dit-tiny", values, p, timeout=5) for url, p in protocols]
            wait_until(server, "taylorseer_slots_in_use", 2, "dit-tiny")
            stub.kill()
            for answer in under_way:
                with pytest.raises(ServeError):
                    answer.result(SECONDS)  # its deadline, not the test's: nobody would answer
        until = time.monotonic() + SECONDS
        while probe.main(watch) == 0 and time.monotonic() < until:
            time.sleep(0.2)
        assert probe.main(watch) == 1
        assert over_http(server, "/v2/health/ready")[0] == over_http(server, "/v2/health/live")[0] == 200
        with serving(models) as port:
            status, _, text = asked(port, GENERATIONS, {"prompt": "3"})
            assert (status, json.loads(text)["error"]["code"]) == (503, "server_unavailable"), text
            assert got(port, "/health")[0] == 503  # though the server says that the model is ready
            server.stop(signal.SIGKILL)  # asked politely it would wait for the answers of the dead one
            with pytest.raises(openai.InternalServerError, match="no server that is ready draws dit-tiny") as caught:
                client_of(port).images.generate(prompt="3")
            assert (caught.value.status_code, caught.value.code) == (503, "server_unavailable")
            images_api.until(lambda: got(port, "/health")[0] == 503)
            assert json.loads(got(port, "/health")[2])["models"]["dit-tiny"]["status"] == "unavailable"
            assert Metered(port).of("taylorseer_requests_total", "dit-tiny", "refused") == 2
        models.close()
    sweep()


def test_a_server_that_is_not_there_is_said(tmp_path):
    (port,) = triton_server.free_ports(1)
    with pytest.raises(ServeError, match=f"127.0.0.1:{port} answered"):
        infer(f"127.0.0.1:{port}", "flux-tiny", {})
    assert main(["client", "m", "--url", f"127.0.0.1:{port}", "--out", str(tmp_path / "x.png")]) == 1


def test_an_unknown_input_is_said_before_it_is_sent(server):
    with pytest.raises(ConfigError, match="input is `colour`, expected one that the model has"):
        infer(server.grpc, "flux-tiny", {"colour": 3})
