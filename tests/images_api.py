"""Servers of the images API over denoisers that stay open, and clients of them."""

import base64
import http.client
import io
import json
import re
import threading
import time
from contextlib import contextmanager

import av
import numpy as np
import openai
import uvicorn
from PIL import Image

from taylorseer_export.embedded.requests import pictures_of
from taylorseer_export.runtime.sampling import sample
from taylorseer_export.serve.api.app import app_of
from taylorseer_export.serve.api.loaded import Loaded
from taylorseer_export.serve.api.models import Models
from taylorseer_export.serve.api.process import bound
from taylorseer_export.serve.service import Limits

SECONDS = 60  # until a test gives up waiting; nothing is measured with it
LOOP = "event loop"  # name of the thread that a server runs in
CAPTION = "a red circle left of a blue square"
GENERATIONS = "/v1/images/generations"
# What is changed of a good body -> (status, param).
MALFORMED = {
    "no prompt": ({"prompt": None}, 400, "prompt"),
    "an empty prompt": ({"prompt": "  "}, 400, "prompt"),
    "a prompt that is a list": ({"prompt": ["a"]}, 400, "prompt"),
    "a prompt that is too long": ({"prompt": "a " * 3000}, 400, "prompt"),
    "half of a character": ({"prompt": "\ud800"}, 400, "prompt"),
    "a model that is not there": ({"model": "sdxl"}, 404, "model"),
    "a model that is a number": ({"model": 3}, 400, "model"),
    "n of 0": ({"n": 0}, 400, "n"),
    "n of a million": ({"n": 10**6}, 400, "n"),
    "n as text": ({"n": "2"}, 400, "n"),
    "n as a truth value": ({"n": True}, 400, "n"),
    "a size that is none": ({"size": "big"}, 400, "size"),
    "a size out of range": ({"size": "99996x99996"}, 400, "size"),
    "a size that does not divide": ({"size": "33x32"}, 400, "size"),
    "a url": ({"response_format": "url"}, 400, "response_format"),
    "a format": ({"output_format": "gif"}, 400, "output_format"),
    "a compression of png": ({"output_compression": 50}, 400, "output_compression"),
    "too many previews": ({"stream": True, "partial_images": 4}, 400, "partial_images"),
    "a stream that is text": ({"stream": "yes"}, 400, "stream"),
    "an unknown field": ({"sampler": "euler"}, 400, "sampler"),
    "transparency": ({"background": "transparent"}, 400, "background"),
    "too many steps": ({"steps": 10**6}, 400, "steps"),
    "steps twice": ({"steps": 4, "num_inference_steps": 4}, 400, "num_inference_steps"),
    "a plan of other letters": ({"plan": "FxF"}, 400, "plan"),
    "a plan beside an interval": ({"plan": "FF.F", "interval": 3}, 400, "interval"),
    "an order that is too high": ({"order": 4}, 400, "order"),
    "a profile that is not there": ({"profile": "unheard of"}, 400, "profile"),
    "a guard that is not there": ({"guard": "cg", "threshold": 0.1}, 400, "guard"),
    "a threshold alone": ({"threshold": 0.1}, 400, "threshold"),
    "a seed below 0": ({"seed": -1}, 400, "seed"),
    "a seed that is too high": ({"seed": 1 << 63}, 400, "seed"),
    "a negative prompt": ({"negative_prompt": "a dog"}, 400, "negative_prompt"),
    "guidance that is no number": ({"guidance_scale": "high"}, 400, "guidance_scale"),
    "guidance of a model without": ({"guidance_scale": 3.0}, 400, "guidance_scale"),
    "a class that is a word": ({"model": "dit-tiny", "prompt": "seven"}, 400, "prompt"),
    "a class that is not there": ({"model": "dit-tiny", "prompt": "10"}, 400, "prompt"),
    "a size of a model with one": ({"model": "dit-tiny", "prompt": "1", "size": "64x64"}, 400, "size"),
    "no time": ({"timeout": 0}, 400, "timeout"),
    "more time than there is": ({"timeout": 1e9}, 400, "timeout"),
    "time that has passed": ({"timeout": 1e-9}, 504, None),
}


@contextmanager
def serving(models, settings=None, traces=None):
    """A server over models that it leaves open; gives its port."""
    listener = bound("127.0.0.1", 0)
    listener.listen()
    port = listener.getsockname()[1]
    config = uvicorn.Config(app_of(models, settings, traces), lifespan="off", log_level="error", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name=LOOP, daemon=True)
    thread.start()
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


@contextmanager
def models_over(*denoisers, loras=None, **limits):
    """Models over denoisers that stay open; those that take LoRAs with requests are given these."""
    models = [
        Loaded(denoiser, Limits(**limits), loras=None if denoiser.manifest.lora is None else loras)
        for denoiser in denoisers
    ]
    try:
        yield Models(models)
    finally:
        for model in models:
            model.reader.close()
            model.service.close()


def client_of(port, key="none"):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=SECONDS)


def asked(port, path, body=None, headers=None, method="POST"):
    """(status, headers, body) of one request; a body that is no bytes goes as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"content-type": "application/json", **(headers or {})}
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def got(port, path, **more):
    return asked(port, path, method="GET", **more)


def until(true):
    """Wait for something that comes by itself."""
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def picture_in(file):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(file))))


def frames_of(data):
    """`[F, height, width, 3]` of the bytes of an MP4."""
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def ended(client, name):
    """A job of a video once it has ended."""
    until(lambda: client.videos.retrieve(name).status in ("completed", "failed"))
    return client.videos.retrieve(name)


def alone(denoiser, request, **options):
    """(picture, plan) of a request that runs alone."""
    made = sample(denoiser, request, denoiser.forecasts(**options))
    return pictures_of(denoiser, request, made.latents)[0], made.executed


def malformed(case):
    """(body, status, param) of a case of `MALFORMED`."""
    change, status, param = MALFORMED[case]
    body = {"prompt": CAPTION, "steps": 4, **change}
    if change.keys() & {"plan", "profile"}:
        body.pop("steps")
    return body, status, param


def png_of(height, width):
    stream = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 200, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


class Metered:
    """The metrics of a server."""

    def __init__(self, port):
        self._port = port

    def of(self, name, *labels):
        """The sum of the samples of this name whose labels have all of these values."""
        text = got(self._port, "/metrics")[2].decode()
        lines = [line for line in text.splitlines() if re.match(rf"{name}[{{ ]", line)]
        return sum(float(line.split()[-1]) for line in lines if all(f'"{label}"' in line for label in labels))
