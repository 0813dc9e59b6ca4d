"""Replicas: several copies of a model behind one address, each answering as it does alone, and one that is lost."""

import json
import os
import shutil
import signal
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import triton_server
from images_api import GENERATIONS, asked, models_over, serving, until
from triton_server import Server

from taylorseer_export.runtime.denoiser import load
from taylorseer_export.serve.api.fleet import open_models
from taylorseer_export.serve.repository import Deployment, write_repository

pytestmark = pytest.mark.slow

NAME = "dit-tiny"
BODIES = [{"prompt": str(label), "seed": label, "model": NAME, "steps": 20} for label in range(4)]


def pictures(port, bodies=BODIES):
    """What all of these get, asked at once."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(lambda body: asked(port, GENERATIONS, body), bodies))
    assert {status for status, _, _ in answers} == {200}, answers[0][2]
    return [json.loads(text)["data"] for _, _, text in answers]


def served(server):
    """Pictures that a Triton server made."""
    text = urllib.request.urlopen(f"http://{server.metrics}/metrics").read().decode()
    return sum(
        float(line.split()[-1]) for line in text.splitlines() if line.startswith("nv_inference_request_success{")
    )


@pytest.mark.skipif(bool(triton_server.missing()), reason=triton_server.missing() or "it runs")
def test_two_triton_servers_share_the_work_and_one_is_enough(embedded, tmp_path):
    """One repository, two servers, a front over both: the recipe of `serve/README.md`."""
    shutil.copytree(embedded("digits"), tmp_path / NAME)
    write_repository(tmp_path / NAME, tmp_path / "models", Deployment(slots=2, models=("picture",)))
    with Server(tmp_path / "models") as first, Server(tmp_path / "models") as second:
        models = open_models([first.wait_ready().grpc, second.wait_ready().grpc], [NAME], every=0.2)
        with serving(models) as port:
            both = pictures(port)
            assert served(first) > 0 and served(second) > 0 and served(first) + served(second) == len(BODIES)
            os.killpg(first.process.pid, signal.SIGKILL)
            assert pictures(port) == both
        models.close()


def replicas(ray):
    """Names of the replicas that Ray keeps."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in named if actor["name"].startswith("SERVE_REPLICA")]


def test_two_replicas_of_ray_serve_answer_as_one_process_and_one_is_enough(embedded, tmp_path):
    """`tools/deploy/ray_serve.py`, with the options that `serve run` would give it."""
    reason = "ray[serve] is not installed, which is 400 MB and not of the `dev` extra"
    ray, serve = pytest.importorskip("ray", reason=reason), pytest.importorskip("ray.serve", reason=reason)
    from deploy.ray_serve import application

    shutil.copytree(embedded("digits"), tmp_path / NAME)
    with load(tmp_path / NAME, threads=1) as denoiser, models_over(denoiser) as models, serving(models) as port:
        alone = pictures(port)
    (port,) = triton_server.free_ports(1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application({"bundles": str(tmp_path / NAME), "replicas": "2"}))
        first, second = replicas(ray)
        assert pictures(port) == alone
        ray.kill(ray.get_actor(first, namespace="serve"))
        until(lambda: len(set(replicas(ray)) - {first}) == 2)  # another is started in its place
        assert second in replicas(ray) and pictures(port) == alone
    finally:
        serve.shutdown()
        ray.shutdown()
