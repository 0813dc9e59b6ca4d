"""Servers of the images API over denoisers that stay open, and clients of them."""

import base64
import http.client
import io
import json
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
from taylorseer_export.serve.api.models import Model, Models
from taylorseer_export.serve.api.process import bound
from taylorseer_export.serve.service import Limits

SECONDS = 60  # until a test gives up waiting; nothing is measured with it
LOOP = "event loop"  # name of the thread that a server runs in


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
def models_over(*denoisers, **limits):
    """Models over denoisers that stay open."""
    models = [Model(denoiser, Limits(**limits)) for denoiser in denoisers]
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
