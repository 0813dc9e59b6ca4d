"""Polygraphy: its command line on the files of a bundle, and its Comparator behind `verify --polygraphy`."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("polygraphy")
from polygraphy.json import load_json

from taylorseer_export import cli
from taylorseer_export.bundle.manifest import Graph, Tensor
from taylorseer_export.bundle.store import open_bundle
from taylorseer_export.bundle.tensorrt import extents
from taylorseer_export.compile import export, onnxruntime, polygraphy
from taylorseer_export.errors import ConfigError, ParityError
from taylorseer_export.report import polygraphy as comparing
from taylorseer_export.report.verify import checkpoint_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(bundles, tmp_path_factory):
    """The ONNX bundle of the tiny DiT with what `--polygraphy` adds."""
    copy = shutil.copytree(bundles("dit"), tmp_path_factory.mktemp("polygraphy") / "dit")
    manifest = open_bundle(copy).manifest
    polygraphy.write_examples(copy, manifest.graphs, manifest.dimensions)
    return copy


def command(*words, **environment) -> str:
    """What Polygraphy says; it must exit with 0."""
    tool = Path(sys.executable).with_name("polygraphy")
    done = subprocess.run(
        [tool, *map(str, words)], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_command_line_runs_a_graph_on_our_inputs(folder):
    inputs = folder / "polygraphy" / "forecast.inputs.json"
    assert "PASSED" in command("run", folder / "forecast.onnx", "--onnxrt", "--load-inputs", inputs)


def test_its_command_line_builds_with_our_profile(folder, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    profile = (folder / "polygraphy" / "forecast.profile").read_text().split()
    words = ["--convert-to", "trt", "-o", tmp_path / "x.plan", "--compute-capabilities", "8.9", *profile]
    command("convert", folder / "forecast.onnx", *words, POLYGRAPHY_USE_TENSORRT_RTX="1")
    assert (tmp_path / "x.plan").stat().st_size > 0


def test_inputs_are_the_contract_at_its_smallest(folder):
    manifest = open_bundle(folder).manifest
    for name, graph in manifest.graphs.items():
        (feed,) = load_json(str(folder / "polygraphy" / f"{name}.inputs.json"))
        assert list(feed) == [t.name for t in graph.inputs]
        for tensor in graph.inputs:
            assert tuple(feed[tensor.name].shape) == extents(tensor, manifest.dimensions)[0]
            assert str(feed[tensor.name].dtype) == tensor.dtype


def test_inputs_of_every_dtype_stay_in_their_range():
    tensors = (
        Tensor(name="narrow", dtype="bfloat16", shape=(3,), role="latent"),
        Tensor(name="label", dtype="int64", shape=(50,), role="constant", values=(4, 6)),
        Tensor(name="mask", dtype="bool", shape=(50,), role="constant"),
    )
    graph = Graph(file="g", inputs=tensors, outputs=tensors[:1], weights_bytes=0)
    feed = polygraphy.example_inputs(graph, {})
    assert feed["narrow"].dtype == torch.bfloat16
    assert set(feed["label"]) == {4, 5, 6}
    assert set(feed["mask"]) == {False, True}


def test_an_export_adds_them_where_they_are_small(drafts, tmp_path, monkeypatch):
    """The builder is left out: what it writes is not looked at."""
    monkeypatch.setattr(onnxruntime, "build", lambda d, f, p: [(f / f"{c.name}.onnx").touch() for c in d.split.graphs])
    draft = drafts("dit")
    draft = replace(draft, options=replace(draft.options, polygraphy=True))
    manifest = open_bundle(export.write_bundle(draft, tmp_path, "x")).manifest
    assert {f"polygraphy/{name}.{kind}" for name in manifest.graphs for kind in ("inputs.json", "profile")} <= set(
        manifest.files
    )
    monkeypatch.setattr(polygraphy, "_LARGEST", 100)
    with pytest.raises(
        ConfigError, match=r"inputs of graph `\w+` are \d+ bytes, expected at most 100 for --polygraphy"
    ):
        export.write_bundle(draft, tmp_path, "y")
    assert [p.name for p in tmp_path.iterdir()] == ["dit-x"]


def test_verify_compares_every_graph(folder, capsys):
    assert cli.main(["verify", str(folder), "--polygraphy", "--steps", "2", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    for graph in ("prepare", "full", "forecast"):
        assert f"{graph:<9} differs by" in said


def test_a_graph_that_differs_is_named(onnx, monkeypatch):
    """A hundredth added to every output of the eager graphs."""
    plain = comparing._eagerly
    monkeypatch.setattr(comparing, "_eagerly", lambda *a: {n: v + 1e-2 for n, v in plain(*a).items()})
    denoiser = onnx("dit")
    with pytest.raises(
        ParityError, match=r"output `.*` of graph `\w+` differs by 0.01 between engine and eager, expected"
    ):
        comparing.compare_graphs(denoiser, checkpoint_of(denoiser), lambda *_: None)
