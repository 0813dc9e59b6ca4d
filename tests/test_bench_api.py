"""The study of the images API: it runs, and it stops where an answer is not what a run alone gives."""

import asyncio
import shutil
from argparse import Namespace

import numpy as np
import pytest
from profiles import made as made_profile

from taylorseer_export.bundle.profile import write_profile
from taylorseer_export.bundle.store import open_bundle
from taylorseer_export.runtime.denoiser import load

bench_api = pytest.importorskip("bench_api")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(embedded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / bench_api.MODEL
    shutil.copytree(embedded("shapes"), folder)
    opened = open_bundle(folder)
    write_profile(opened, made_profile(opened.manifest))
    return folder


def test_a_mix_of_requests_is_what_runs_alone_give(bundle):
    with bench_api.Server(bundle, "--queue", "100") as server:
        seen = asyncio.run(bench_api._mixed(server, bundle, Namespace(requests=20, flight=4)))
        alone = asyncio.run(bench_api.closed(server, 3))
    with bench_api.Server(bundle, "--queue", "100", *bench_api.BUSY) as server:
        point = asyncio.run(bench_api.opened(server, 1000.0, 12))  # at once: more than may wait before it hurries
    assert seen["equal"] + seen["left"] == 20 and seen["equal"] >= 16
    assert (seen["slots_in_use"], seen["queue"]) == (0, 0) and seen["files_after"] <= seen["files_before"]
    assert alone["requests"] == 3 and point["requests"] == 12 and 0 < point["hurried"] < 12
    assert {"read", "loop", "decode"} <= alone["stages_ms"].keys()
    record = {"mixed": seen, "alone": {"kept": alone}, "points": {"kept": [{"share": 1.0, **point}]}}
    assert "one by one" in bench_api.table(record) and "1000.0 per s" in bench_api.table(record)


def test_another_picture_ends_the_study(bundle):
    body = {"prompt": "a red circle", "seed": 1, "size": "64x64"}
    with load(bundle, threads=1) as denoiser:
        with pytest.raises(SystemExit, match="the server draws another picture for"):
            bench_api.check_alone(denoiser, [(body, np.zeros((64, 64, 3), np.uint8))])
