"""LoRAs that are added while a bundle is loaded: the bundle of the updated model, without its export."""

import copy
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from diffusers import FluxTransformer2DModel
from harness import allowed, run
from safetensors.torch import load_file, save_file

import taylorseer_export
from taylorseer_export import cli
from taylorseer_export.bundle.external import initializers
from taylorseer_export.bundle.store import open_bundle
from taylorseer_export.errors import ConfigError
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.lora import merged
from taylorseer_export.serve.api.loaded import load_models

PLAN, ORDER, RANK, ALPHA = "FF..F.", 2, 3, 6.0
# Weights of prepare (modulation), of full (attention, MLP), and one that all three could read.
FLUX = ("transformer_blocks.0.norm1.linear", "transformer_blocks.1.attn.to_q", "x_embedder", "norm_out.linear")
ASSETS = Path(taylorseer_export.__file__).parent / "assets"
QWEN = ("transformer_blocks.0.attn.to_add_out", "transformer_blocks.1.attn.to_add_out")


def pairs(model, modules, seed=0):
    """Module -> (B, A) in float32, of a size that shows."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {module: model.get_submodule(module).weight.shape for module in modules}
    return {
        module: (torch.randn(out, RANK, generator=rng) / 8, torch.randn(RANK, into, generator=rng) / 8)
        for module, (out, into) in shapes.items()
    }


def written(path, given, dtype=torch.float32, alpha=ALPHA, prefix="transformer."):
    tensors = {}
    for module, (up, down) in given.items():
        tensors |= {f"{prefix}{module}.lora_A.weight": down.to(dtype), f"{prefix}{module}.lora_B.weight": up.to(dtype)}
        if alpha is not None:
            tensors[f"{prefix}{module}.alpha"] = torch.tensor(alpha)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def updated(model, given, factor):
    """The untouched model with W + factor B A, summed in float64."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for module, (up, down) in given.items():
            weight = changed.get_submodule(module).weight
            weight.copy_(weight.double() + factor * up.double() @ down.double())
    return changed


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 0.5), (torch.bfloat16, 1.0)])
def test_a_bundle_with_a_lora_is_the_updated_model(tiny, bundles, tmp_path, dtype, scale):
    """Full and forecast steps, against the model that was updated before the oracle replays it."""
    one = tiny("flux")
    given = {module: tuple(v.to(dtype) for v in pair) for module, pair in pairs(one.model, FLUX).items()}
    path = written(tmp_path / "lora.safetensors", given, dtype)
    inputs, model = one.inputs(len(PLAN)), updated(one.model, given, scale * ALPHA / RANK)
    with load(bundles("flux"), threads=1, lora=f"{path}:{scale}") as denoiser:
        assert denoiser.lora.weights.keys() == {f"{module}.weight" for module in FLUX} and not denoiser.lora.unread
        seen = run(denoiser, inputs, PLAN, ORDER)
    expected = oracle.replay(model, *inputs, PLAN, ORDER)
    limit = allowed(model, expected, PLAN, ORDER)
    oracle.assert_close("lora", seen, expected, limit)
    with pytest.raises(AssertionError, match="differs by"):  # and it is not the model without it
        oracle.assert_close("plain", seen, oracle.replay(one.model, *inputs, PLAN, ORDER), limit)


def test_a_scale_of_nothing_and_two_that_cancel_leave_the_bundle_as_it_is(tiny, onnx, bundles, tmp_path):
    one, given = tiny("flux"), pairs(tiny("flux").model, FLUX)
    path, inputs = written(tmp_path / "lora.safetensors", given), one.inputs(len(PLAN))
    plain = run(onnx("flux"), inputs, PLAN, ORDER)
    with load(bundles("flux"), threads=1, lora=[f"{path}:0"], check=False) as denoiser:
        assert torch.equal(run(denoiser, inputs, PLAN, ORDER), plain)
    assert torch.equal(run(onnx("flux"), inputs, PLAN, ORDER), plain)  # the other load is as it was
    with load(bundles("flux"), threads=1, lora=[path, f"{path}:-1"], check=False) as denoiser:
        expected = oracle.replay(one.model, *inputs, PLAN, ORDER)
        seen = run(denoiser, inputs, PLAN, ORDER)
        oracle.assert_close("cancelled", seen, expected, allowed(one.model, expected, PLAN, ORDER))


def test_updates_of_what_no_graph_reads_are_said(tiny, bundles, tmp_path, capsys):
    """The text of the last block never reaches the picture: its weights are in the model and not in the bundle."""
    path = written(tmp_path / "lora.safetensors", pairs(tiny("qwen-image").model, QWEN), alpha=None)
    folder = bundles("qwen-image")
    with load(folder, threads=1, lora=path, check=False) as denoiser:
        assert denoiser.lora.unread == (f"{QWEN[1]}.weight",)
        assert denoiser.lora.weights.keys() == {f"{QWEN[0]}.weight"}
        held = denoiser.lora.bytes
    assert held == 4 * tiny("qwen-image").model.get_submodule(QWEN[0]).weight.numel()
    arguments = ["--steps", "3", "--repeats", "1", "--threads", "1", "--json"]
    assert cli.main(["bench", str(folder), *arguments, "--lora", str(path)]) == 0
    lora, left, *_ = capsys.readouterr().out.splitlines()
    assert lora.startswith("lora: 1 weights changed, ") and lora.endswith(" of memory, no operation added")
    assert left == f"left out: updates of 1 weights that no graph reads, {QWEN[1]}.weight first"


def test_names_with_underscores_for_dots(tiny, bundles, tmp_path):
    given, bundle = pairs(tiny("flux").model, FLUX), open_bundle(bundles("flux"))
    tensors = {}
    for module, (up, down) in given.items():
        name = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(ALPHA),
        }
    save_file(tensors, tmp_path / "kohya.safetensors")
    expected = merged([written(tmp_path / "peft.safetensors", given)], bundle).weights
    seen = merged([tmp_path / "kohya.safetensors"], bundle).weights
    assert seen.keys() == expected.keys() and all(np.array_equal(seen[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_inductor_takes_them_too(tiny, packages, tmp_path):
    one = tiny("plain")
    given = pairs(one.model, [module.replace(".1.", ".0.") for module in FLUX])
    path = written(tmp_path / "lora.safetensors", given, alpha=None)
    inputs, model = one.inputs(len(PLAN)), updated(one.model, given, 1.0)
    with load(packages("plain"), threads=1, lora=path) as denoiser:
        seen = run(denoiser, inputs, PLAN, ORDER)
    expected = oracle.replay(model, *inputs, PLAN, ORDER)
    oracle.assert_close("lora", seen, expected, allowed(model, expected, PLAN, ORDER))


def edited(**changes):
    """Names and tensors of a file with one pair of FLUX, changed."""
    rng = np.random.default_rng(0)
    module = "transformer.x_embedder"
    tensors = {
        f"{module}.lora_A.weight": torch.from_numpy(rng.standard_normal((RANK, 16), np.float32)),
        f"{module}.lora_B.weight": torch.from_numpy(rng.standard_normal((32, RANK), np.float32)),
    }
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in tensors.items() if value is not None}


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (edited(transformer__no_such__lora_A__weight=torch.ones(3, 4)), "no_such: half a pair"),
        (
            edited(**{f"double__lora_{s}__weight": torch.ones(3, 3) for s in "AB"}),
            "`double.weight` is not known), expected `<module>.lora_A.weight`",
        ),
        (edited(transformer__x_embedder__dora_scale=torch.ones(32)), "(transformer.x_embedder.dora_scale), expected"),
        (edited(lora_te1_x__alpha=torch.tensor(1.0)), "lora_te1_x: half a pair"),
        (
            edited(transformer__x_embedder__lora_B__weight=torch.ones(31, RANK)),
            "(`x_embedder.weight` is [32, 16], its pair [31, 3] x [3, 16]), expected pairs for its weights",
        ),
        (
            edited(transformer__x_embedder__lora_B__weight=torch.full((32, RANK), torch.nan)),
            "`x_embedder.weight` gets numbers that are NaN or infinite",
        ),
        ({}, "has 0 tensors that are no low-rank pair"),
    ],
    ids=("half", "unknown", "dora", "text", "shape", "nan", "empty"),
)
def test_what_does_not_fit_is_one_sentence_and_exit_code_2(bundles, tmp_path, capsys, tensors, expected):
    save_file(tensors, tmp_path / "lora.safetensors")
    assert cli.main(["bench", str(bundles("flux")), "--lora", str(tmp_path / "lora.safetensors")]) == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "content", "expected"),
    [
        ("missing.safetensors", None, "missing.safetensors is missing, expected a safetensors file; check the path"),
        ("lora.safetensors:nan", b"", "has scale nan, expected a finite number; write FILE:0.8"),
        ("lora.safetensors", b"\xff" * 64, "is not readable (its header is cut off), expected a complete"),
        ("lora.safetensors", b"", "is not readable ("),
    ],
)
def test_files_that_cannot_be_read(bundles, tmp_path, given, content, expected):
    if content is not None:
        (tmp_path / "lora.safetensors").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load(bundles("flux"), lora=tmp_path / given)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_engines_that_hold_their_weights_refuse(bundles, tmp_path, monkeypatch):
    """TensorRT's, in the manifest alone: nothing of them is needed to say so."""
    from taylorseer_export.runtime.engines import open_runner

    bundle = open_bundle(bundles("flux"))
    engine = bundle.manifest.engine.model_copy(update={"kind": "tensorrt-rtx"})
    manifest = bundle.manifest.model_copy(update={"engine": engine})
    monkeypatch.setattr(type(bundle), "manifest", property(lambda self: manifest), raising=False)
    with pytest.raises(ConfigError, match=r"engines of kind tensorrt-rtx, which hold their weights.*with --lora FILE"):
        open_runner(bundle, weights={"x_embedder.weight": np.zeros((32, 16), np.float32)})


def test_the_initializers_of_a_graph_are_its_weights(bundles):
    folder = bundles("flux")
    stored = load_file(folder / "weights.safetensors").keys()
    named = {
        name
        for graph in ("prepare", "full", "forecast")
        for name in initializers((folder / f"{graph}.onnx").read_bytes())
    }
    assert stored <= named


def test_a_server_has_a_model_for_each_lora(embedded, tmp_path):
    """By name: a request chooses it as its `model`; the plain one stays. Of one size, at which servers warm up."""
    folder, model = embedded("shapes"), FluxTransformer2DModel.from_pretrained(ASSETS / "flux" / "transformer")
    path = written(tmp_path / "lora.safetensors", pairs(model, FLUX))
    models = load_models([folder], loras={"red": str(path)})
    try:
        plain, red = models
        assert red.name == f"{plain.name}+red" and len(red.denoiser.lora.weights) == len(FLUX)
        assert not plain.denoiser.lora.weights
    finally:
        models.close()
    with pytest.raises(ConfigError, match=r"--lora is given with 2 bundles, expected one; serve each by itself"):
        load_models([folder, folder], loras={"red": str(path)})


@pytest.mark.parametrize("given", ["file.safetensors", "=file.safetensors", "Red=file.safetensors", "red="])
def test_a_server_s_loras_have_names(bundles, capsys, given):
    assert cli.main(["serve", str(bundles("flux")), "--port", "0", "--lora", given]) == 2
    assert f"--lora is {given}, expected NAME=FILE or NAME=FILE:SCALE" in capsys.readouterr().err
