"""Whole pipelines through every door: `run`, the images API and Triton draw what the untouched diffusers pipelines do.

One bundle for each family, all steps full. What the denoiser draws in this process is held to the pipeline; what each
door gives is the same bits. A DiT draws a class, so the doors are asked for one. Lengths of prompts are the pipelines'
own, since the servers take none.
"""

import json
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
import torch
import triton_server
from google.protobuf import text_format
from images_api import client_of, ended, frames_of, models_over, picture_in, serving
from PIL import Image
from pipelines_with_parts import CASES, OTHER, PROMPT, bound_of_picture, depth_and_length
from tiny_bundles import WHOLE
from tiny_models import MODELS
from triton_server import Server
from tritonclient.grpc.model_config_pb2 import ModelConfig

from taylorseer_export.cli import main
from taylorseer_export.embedded.requests import label_request, pictures_of, prompt_request, usual_size
from taylorseer_export.embedded.video import write_video
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.sampling import sample
from taylorseer_export.serve.api.fleet import open_models
from taylorseer_export.serve.client import infer
from taylorseer_export.serve.contract import sides_named
from taylorseer_export.serve.repository import Deployment, write_repository

# OpenAI itself no longer makes videos; its client and this form of jobs are what others go on with.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")]

PLAN, SEED, CLASS = "FF", 3, 3


class How(NamedTuple):
    """How the pipeline of a family is asked.

    Attributes:
        size: (height, width) in pixels, (frames, height, width) of a video; None where there is one.
        scale: Of guidance; the pipeline's own if None.
        negative: What guidance leads away from, in a second call.
        asked: What the pipeline is called with for these two.
    """

    size: tuple[int, ...] | None
    scale: float | None
    negative: str | None
    asked: dict[str, Any]


PICTURES = ("flux", "sd3", "qwen-image", "hidream")
HOW = {
    **{name: How(CASES[name].size, CASES[name].scale, CASES[name].asked.get("negative_prompt"), CASES[name].asked)
       for name in PICTURES},
    "wan": How((5, 32, 48), 4.0, OTHER, {"guidance_scale": 4.0, "negative_prompt": OTHER}),
    "hunyuan": How((5, 32, 48), 4.0, None, {"guidance_scale": 4.0}),
    "dit": How(None, 1.0, None, {"guidance_scale": 1.0}),  # the null class of its pipeline is 1000, whatever the model
}  # fmt: skip
VIDEOS = ("wan", "hunyuan")
BESIDE = ("chroma", "z-image", "flux2")  # what these draw in this process, `test_whole.py` holds to the pipelines
# FLUX takes all sizes here, and warms up at that of published models; `test_triton.py` serves it already.
SERVED = [name for name in HOW if name != "flux"]


@pytest.fixture(scope="module")
def denoisers(whole_bundles):
    """Name -> its bundle, loaded."""
    held = {name: load(whole_bundles(name), threads=1) for name in HOW}
    yield held
    for denoiser in held.values():
        denoiser.close()


@pytest.fixture(scope="module")
def port(denoisers):
    """One server over all of them."""
    with models_over(*denoisers.values(), slots=1, queue=1, workers=1) as models, serving(models) as port:
        yield port


@pytest.fixture(scope="module")
def triton(denoisers, whole_bundles, tmp_path_factory):
    """One server over all that are `SERVED`; videos also with answers after every step, by which jobs are followed."""
    if reason := triton_server.missing():
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("models")
    for name in SERVED:
        models = ("picture", "picture-stream") if name in VIDEOS else ("picture",)
        write_repository(whole_bundles(name), out, Deployment(slots=1, workers=1, models=models))
    with Server(out) as server:
        yield server.wait_ready()


def model_of(name):
    return f"{MODELS[name][0]}-whole"


@pytest.fixture(scope="module")
def request_of(denoisers):
    """Name -> its request in this process."""

    def make(name):
        how, denoiser = HOW[name], denoisers[name]
        if name == "dit":
            return label_request(denoiser, [CLASS], [SEED], how.scale)
        return prompt_request(denoiser, [PROMPT], [SEED], how.size, how.scale, how.negative)

    return cache(make)


@pytest.fixture(scope="module")
def drawn(denoisers, request_of):
    """Name -> what it draws in this process: `[height, width, 3]` uint8, of a video `[frames, height, width, 3]`."""

    def make(name):
        denoiser, request = denoisers[name], request_of(name)
        made = sample(denoiser, request, denoiser.forecasts(plan=PLAN))
        assert made.executed == PLAN
        return pictures_of(denoiser, request, made.latents)[0]

    return cache(make)


def of_diffusers(name, seed=SEED):
    """(what the pipeline draws, channels before rows, from 0 to 1; the pipeline)."""
    how, pipe = HOW[name], WHOLE[name](MODELS[name][1]())
    more = {"generator": torch.Generator().manual_seed(seed), "num_inference_steps": len(PLAN), **how.asked}
    with torch.no_grad():
        if name == "dit":
            return torch.from_numpy(pipe([CLASS], output_type="np", **more).images[0]).movedim(-1, 0), pipe
        *frames, height, width = how.size
        more |= {"height": height, "width": width, "output_type": "pt"}
        if frames:
            return pipe(PROMPT, num_frames=frames[0], **more).frames[0], pipe
        return pipe(PROMPT, **more).images[0], pipe


@pytest.mark.parametrize("name", HOW)
def test_in_process_it_is_the_pipelines(drawn, name):
    expected, pipe = of_diffusers(name)
    two_calls = HOW[name].negative is not None
    if name == "dit":  # it has no encoder
        extent = depth_and_length(*[pipe.transformer] * len(PLAN), pipe.vae)
        limit = oracle.bound(expected, 1.0, torch.float32, *extent) + 0.5 / 255
    else:
        scale = HOW[name].scale if two_calls else None
        limit = bound_of_picture(expected, pipe, len(PLAN) * (1 + two_calls), scale)
    seen = torch.from_numpy(drawn(name).copy()).movedim(-1, -3) / 255
    oracle.assert_close(name, seen, expected, limit)
    assert (of_diffusers(name, SEED + 1)[0] - seen).abs().max() > limit


@pytest.mark.parametrize("name", [name for name in SERVED if HOW[name].size is not None])
def test_a_bundle_is_quoted_at_its_size(denoisers, name):
    """Also where its latents are packed, whose number of tokens is that of other sizes as well."""
    assert usual_size(denoisers[name].manifest) == HOW[name].size


@pytest.mark.parametrize("name", HOW)
def test_run_draws_the_same(whole_bundles, denoisers, drawn, name, tmp_path):
    how, video = HOW[name], name in VIDEOS
    out = tmp_path / f"made.{'webp' if video else 'png'}"
    words = ["--label", CLASS] if name == "dit" else ["--prompt", PROMPT, "--size", "x".join(map(str, how.size))]
    words += [] if how.scale is None else ["--guidance-scale", how.scale]
    words += [] if how.negative is None else ["--negative-prompt", how.negative]
    command = ["run", whole_bundles(name), *words, "--seed", SEED, "--plan", PLAN, "--threads", 1, "--out", out]
    assert main([str(word) for word in command]) == 0
    if video:
        rate = denoisers[name].manifest.parts["decode"].frame_rate
        write_video(tmp_path / "expected.webp", drawn(name), rate)
        assert out.read_bytes() == (tmp_path / "expected.webp").read_bytes()
    else:
        assert np.array_equal(np.asarray(Image.open(out)), drawn(name))


@pytest.mark.parametrize("name", [name for name in HOW if name not in VIDEOS])
def test_the_images_api_draws_the_same(port, drawn, name):
    how, more = HOW[name], {"seed": SEED, "plan": PLAN, "guidance_scale": HOW[name].scale}
    more |= {} if how.size is None else {"size": f"{how.size[1]}x{how.size[0]}"}
    more |= {} if how.negative is None else {"negative_prompt": how.negative}
    size = more.pop("size", "auto")
    prompt = str(CLASS) if name == "dit" else PROMPT
    made = client_of(port).images.generate(prompt=prompt, model=model_of(name), size=size, extra_body=more)
    assert made.model_extra["taylorseer"]["pictures"][0]["executed"] == PLAN
    assert np.array_equal(picture_in(made.data[0].b64_json), drawn(name))


@pytest.mark.parametrize("name", BESIDE)
def test_of_others_the_images_api_draws_what_run_draws(whole_bundles, name, tmp_path):
    """And Triton is told what they take."""
    case, folder, out = CASES[name], whole_bundles(name), tmp_path / "made.png"
    words = ["--prompt", PROMPT, "--size", "x".join(map(str, case.size)), "--guidance-scale", 4.0]
    words += ["--negative-prompt", OTHER] if case.scale else []
    command = ["run", folder, *words, "--seed", SEED, "--plan", PLAN, "--threads", 1, "--out", out]
    assert main([str(word) for word in command]) == 0
    more = {"seed": SEED, "plan": PLAN, "guidance_scale": 4.0} | ({"negative_prompt": OTHER} if case.scale else {})
    size = f"{case.size[1]}x{case.size[0]}"
    with load(folder, threads=1) as denoiser:
        with models_over(denoiser, slots=1, queue=1, workers=1) as models, serving(models) as port:
            made = client_of(port).images.generate(prompt=PROMPT, model=model_of(name), size=size, extra_body=more)
    assert np.array_equal(picture_in(made.data[0].b64_json), np.asarray(Image.open(out)))
    (version,) = write_repository(folder, tmp_path / "models", Deployment(models=("picture",)))
    told = text_format.Parse((version.parent / "config.pbtxt").read_text(), ModelConfig())
    named = {entry.name for entry in told.input}
    assert {"prompt", "height", "width", "seed", "guidance_scale", "plan"} <= named and "image" not in named
    assert ("negative_prompt" in named) == bool(case.scale) and "picture" in {entry.name for entry in told.output}
    known = json.loads(told.parameters["description"].string_value)
    assert (known["draws"], known["size"], known["takes_pictures"]) == ("prompts", size, False)


@pytest.fixture(scope="module")
def front(triton):
    """A server of the images API before Triton's videos."""
    models = open_models([triton.grpc], [model_of(name) for name in VIDEOS])
    with serving(models) as port:
        yield port
    models.close()


@pytest.mark.parametrize("door", ["port", "front"])
@pytest.mark.parametrize("name", VIDEOS)
def test_the_videos_api_makes_the_same(request, door, denoisers, drawn, name, tmp_path):
    """As MP4, which loses something: what is in it is what is in that of the video made here."""
    how, client = HOW[name], client_of(request.getfixturevalue(door))
    frames, height, width = how.size
    more = {"seed": SEED, "plan": PLAN, "guidance_scale": how.scale, "frames": frames}
    more |= {} if how.negative is None else {"negative_prompt": how.negative}
    job = client.videos.create(prompt=PROMPT, model=model_of(name), size=f"{width}x{height}", extra_body=more)
    done = ended(client, job.id)
    assert (done.status, done.model_extra["taylorseer"]["executed"]) == ("completed", PLAN)
    write_video(tmp_path / "expected.mp4", drawn(name), denoisers[name].manifest.parts["decode"].frame_rate)
    seen = frames_of(client.videos.download_content(job.id).read())
    assert np.array_equal(seen, frames_of((tmp_path / "expected.mp4").read_bytes()))


@pytest.mark.parametrize("name", SERVED)
def test_triton_draws_the_same(triton, denoisers, drawn, name):
    how, more = HOW[name], {"plan": PLAN} | ({} if HOW[name].scale is None else {"guidance_scale": HOW[name].scale})
    what = {"label": CLASS} if name == "dit" else {"prompt": PROMPT}
    what |= {} if how.size is None else sides_named(how.size)
    what |= {} if how.negative is None else {"negative_prompt": how.negative}
    made = infer(triton.http, model_of(name), {**what, "seed": SEED, **more}, "http", timeout=120)
    assert made["executed"].tolist() == [PLAN.encode()]
    assert np.array_equal(made["video" if name in VIDEOS else "picture"], drawn(name))
    if name in VIDEOS:
        assert made["frame_rate"].tolist() == [denoisers[name].manifest.parts["decode"].frame_rate]


@pytest.mark.parametrize("name", VIDEOS)
def test_the_client_writes_the_video(triton, denoisers, drawn, name, tmp_path):
    how, out = HOW[name], tmp_path / "made.webp"
    words = ["--prompt", PROMPT, "--size", "x".join(map(str, how.size)), "--guidance-scale", how.scale]
    words += [] if how.negative is None else ["--negative-prompt", how.negative]
    words += ["--url", triton.http, "--protocol", "http", "--seed", SEED, "--plan", PLAN, "--out", out]
    assert main([str(word) for word in ("client", model_of(name), *words)]) == 0
    write_video(tmp_path / "expected.webp", drawn(name), denoisers[name].manifest.parts["decode"].frame_rate)
    assert out.read_bytes() == (tmp_path / "expected.webp").read_bytes()
