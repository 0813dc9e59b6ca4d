"""Static activations: what quantised layers read is rounded by constants, found on samples or brought by a checkpoint.

The oracle of the constants is the untouched model with hooks on its linear layers, that of the engines the same model
with dequantised weights and hooks that round, and that of products in few bits their factors in float64.
"""

import re
from dataclasses import replace
from functools import cache, partial

import numpy as np
import onnx as onnx_library
import pytest
import torch
from harness import eager_denoiser
from safetensors.numpy import save_file
from tiny_bundles import options_of

from taylorseer_export import cli
from taylorseer_export.bundle.store import open_bundle
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile import export, products
from taylorseer_export.compile.eager import weighted
from taylorseer_export.compile.inductor import program_of
from taylorseer_export.errors import ConfigError
from taylorseer_export.families import FAMILIES
from taylorseer_export.graph.formats import dequantised, quantised
from taylorseer_export.graph.quantise import codes, constant_scale, is_marker, lowered, rounded
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.report import verify
from taylorseer_export.report.input_scales import check_samples, input_scales
from taylorseer_export.report.quantised import hold_quantised, round_inputs
from taylorseer_export.report.reuse import all_full
from taylorseer_export.report.samples import groups
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.sampling import Loop, Pool
from taylorseer_export.runtime.trajectory import random_conditioning, random_trajectory

STEPS, SAMPLES, SEED = 20, 2, 1_000_000
STATIC = {"granularity": "residual", "batch": 2, "activations": "static"}


@pytest.fixture(scope="module")
def scales(traced):
    """Format -> weight -> the constant of its layer, of the tiny DiT."""

    def find(form):
        options = options_of(weights=form, engine="inductor", **STATIC)
        found = input_scales(traced("dit"), options, SAMPLES)
        assert found.samples == SAMPLES
        return found.scales

    return cache(find)


@pytest.fixture(scope="module")
def made(drafts, scales):
    """(format, options) -> draft of the tiny DiT with these constants."""
    return lambda form, **more: drafts("dit", weights=form, **{"input_scales": scales(form), **STATIC, **more})


# Constants


def test_constants_are_those_of_the_largest_inputs_of_the_untouched_model(tiny, eager, scales):
    """Its own linear layers, over the latents and timesteps of the same loops."""
    model, denoiser, found = tiny("dit").model, eager("dit", "residual", batch=2), {}

    def see(name, module, args):
        found[name] = max(found.get(name, 0.0), float(args[0].abs().max()))

    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    hooks = [layer.register_forward_pre_hook(partial(see, f"{name}.weight")) for name, layer in layers.items()]
    for request in groups(denoiser, SAMPLES, SEED):
        run = all_full(denoiser, Pool(denoiser).of(request), request, STEPS, lambda: None)
        loop = Loop(denoiser, request, Forecasts(Plan.all_full(STEPS), 0))
        for latents, time in zip(run.latents, run.model_timesteps, strict=False):
            given = {"hidden_states": torch.as_tensor(loop.model_input(latents))}
            given |= {
                "timestep": torch.full((2,), int(time)),
                "class_labels": torch.tensor(request.conditioning["class_labels"]),
            }
            with torch.no_grad():
                FAMILIES["dit"].forward(model, given)
    for hook in hooks:
        hook.remove()
    assert len(scales("fp8")) == 18 and scales("fp8").keys() <= found.keys()
    for name, scale in scales("fp8").items():
        assert scale == constant_scale(found[name], "fp8", torch.float32) == 2 ** round(np.log2(scale))
        assert 0.5 < found[name] / (448 * scale) <= 1
        assert np.isclose(scales("int8")[name], found[name] / 127, rtol=1e-4)


@pytest.mark.parametrize(("form", "most"), [("fp8", 448), ("int8", 127)])
def test_what_is_beyond_saturates_and_the_rest_is_within_half_a_step(form, most):
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    scale = constant_scale(2.0, form, torch.float32)
    seen, size = rounded(x, form, scale), x.abs()
    half = scale / 2 if form == "int8" else torch.maximum(size / 16, torch.tensor(scale / 1024))
    inside = size <= most * scale
    assert ((seen - x).abs() <= half)[inside].all() and inside[size <= 2].all() and not inside.all()
    assert (seen[~inside].abs() >= most * scale).all() and (seen[~inside].abs() <= (most + 1) * scale).all()


# Refusals


@pytest.mark.parametrize(
    ("options", "samples", "problem"),
    [
        ({}, (None, None, "x"), r"--inputs is given without --activations static, expected it too, which finds"),
        ({"activations": "token"}, (3, None, None), r"--samples is given without --activations static"),
        ({"activations": "static"}, (3, None, None), r"--inputs is missing, expected the text encoders' outputs"),
        ({"activations": "static"}, (None, "p", "x"), r"--prompts is p for a model that takes no classes, expected"),
        ({"activations": "static", "parallel": "gather"}, (None, None, "x"), r"static with --parallel, expected one"),
    ],
)
def test_samples_that_are_missing_or_asked_for_by_nothing_are_refused(options, samples, problem):
    with pytest.raises(ConfigError, match=problem):
        check_samples(options_of(weights="fp8", **options), "tensors", *samples)


def test_a_checkpoint_brings_its_own_and_classes_need_no_file():
    options = options_of(weights="keep", activations="static")
    assert not check_samples(options, "tensors", None, None, None)
    assert check_samples(options, "tensors", None, None, "x")
    assert check_samples(replace(options, weights="fp8"), "labels", None, None, None)


def test_the_manifest_says_what_constants_rest_on(made):
    """How many samples; or the caller or the checkpoint, which say none."""
    found = export.describe(made("fp8", samples=SAMPLES), "x").quantised
    assert (found.samples, found.reads) == (2, "what they read by constants found on 2 samples")
    assert export.describe(made("fp8", samples=SAMPLES, activations="token"), "x").quantised.samples is None
    brought = found.model_copy(update={"samples": None})
    assert brought.reads == "what they read by constants of the caller"
    assert brought.model_copy(update={"kept": True}).reads == "what they read by constants of the checkpoint"


def test_a_layer_without_a_constant_is_named(made, scales, traced):
    name, layer = "transformer_blocks.1.ff.net.2.weight", "transformer_blocks.1.ff.net.2"
    without = {n: s for n, s in scales("fp8").items() if n != name}
    with pytest.raises(ConfigError, match=rf"`{layer}` has no scale for what it reads \(1 of 18 layers have none\), e"):
        made("fp8", input_scales=without)
    for bad, shown in ((0.0, "0"), (float("nan"), "nan"), (float("inf"), "inf")):
        changed = {**scales("fp8"), name: bad}
        with pytest.raises(
            ConfigError, match=rf"for what `{layer}` reads is {shown}, expected 1\.2e-38 to 3\.4e\+38 for"
        ):
            made("fp8", input_scales=changed)
        kept = made("fp8", input_scales=changed, keep_precision=(layer,))
        assert export.describe(kept, "x").quantised.input_scales == without
    checkpoint = replace(traced("dit").checkpoint, weightless=True)
    options = options_of(weights="fp8", **STATIC)
    with pytest.raises(ConfigError, match=r"--activations is static, and .* is a config without weights, expected a"):
        input_scales(replace(traced("dit"), checkpoint=checkpoint), options, SAMPLES)


def test_the_command_line_finds_them(tiny, eager, tmp_path, capsys):
    """By tensors of a model that reads text, and the card says that there are some."""
    file, denoiser = tmp_path / "samples.safetensors", eager("plain")
    sizes = {name: d.typical for name, d in denoiser.manifest.dimensions.items()} | {"batch": 2, "image_tokens": 6}
    save_file(random_conditioning(denoiser, sizes, guided=True), file)
    given = ["flux", "--model", str(tiny("plain").folder), "--weights", "fp8", "--activations", "static", "--dry-run"]
    given += ["--steps", "2", "--latent-size", "4x6"]
    assert cli.main([*given, "--inputs", str(file)]) == 0
    assert re.search(
        r"quantised .* of weights in fp8, \d+ layers, what they read by constants found on 2 samples;",
        capsys.readouterr().out,
    )
    assert cli.main([*given, "--inputs", str(tmp_path / "x.safetensors")]) == 2
    assert "x.safetensors is missing" in capsys.readouterr().err


# Engines


def kinds(path):
    """Of the nodes of a graph."""
    return [node.op_type for node in onnx_library.load(path, load_external_data=False).graph.node]


@pytest.mark.parametrize("engine", ["onnxruntime", "inductor"])
@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_engines_round_as_the_model_that_rounds(made, once, tiny, form, engine):
    """The bundle, and its graphs run eagerly, against the untouched model with dequantised weights that rounds by
    hooks; a model that does not round is farther away."""
    draft = made(form, engine=engine)
    folder = once(f"static-{form}-{engine}", lambda place: export.write_bundle(draft, place, f"static-{form}"))
    found = open_bundle(folder).manifest
    assert found.quantised.input_scales == dict(draft.options.input_scales) and found.quantised.activations == "static"
    assert f"--weights {form} --activations static" in found.command() and "--inputs" not in found.command()
    checkpoint, every = open_checkpoint(str(tiny("dit").folder), FAMILIES["dit"]), Forecasts(Plan.all_full(2), 0)
    model = verify.reference_model(checkpoint)
    hold_quantised(model, checkpoint, found)
    with load(folder, threads=1) as denoiser:
        data = random_trajectory(denoiser, 2)
        unrounded = verify.compare(model, denoiser, data, every)
        round_inputs(model, found)
        seen = [verify.compare(model, one, data, every) for one in (denoiser, eager_denoiser(draft))]
        assert all(one.ratio < 1 for one in seen)
        # One number on the other side of a step is 2**-3 / 32**0.5 of a layer, all of them 2**-3 / 12**0.5 off are what
        # a model that does not round is: twelve such numbers, each in another layer, would make half of that.
        assert max(max(one.seen) for one in seen) < max(unrounded.seen) / 2
    if engine == "onnxruntime":
        assert kinds(folder / "full.onnx").count("QuantizeLinear") == 12


@pytest.mark.parametrize("form", ["fp8", "nvfp4", "int8"])
def test_tensorrt_rtx_multiplies_in_few_bits_by_constants(made, tmp_path, form):
    """As `test_tensorrt` sees it for activations by token: the builder's own list of layers."""
    pytest.importorskip("tensorrt_rtx")
    import test_tensorrt

    def static(name, *how, **changes):
        changes |= {"activations": "static", **dict(zip(("granularity",), how, strict=True))}
        return made(changes.pop("weights"), **changes)

    test_tensorrt.test_quantised_layers_multiply_in_few_bits(static, tmp_path, "dit", form)
    found = kinds(tmp_path / "full.onnx")
    rounds = "TRT_FP4DynamicQuantize" if form == "nvfp4" else "QuantizeLinear"
    assert found.count(rounds) == 12 and "ReduceMax" not in found  # queries, keys and values read one tensor


# Products in few bits


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_a_product_in_few_bits_is_that_of_what_its_factors_stand_for(form, bias):
    """Products of two such numbers are exact in float32; what is left is the sum, in any order, scales and bias."""
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 5, 64, generator=rng), torch.randn(48, 64, generator=rng)
    added = torch.randn(48, generator=rng) if bias else None
    scale = constant_scale(float(x.abs().max()), form, torch.float32)
    values, each = quantised(weight, form, torch.float32)
    seen = products.product(codes(x, form, scale), values, each, added, scale)
    factors = rounded(x.double(), form, scale), dequantised(values, each, dtype=torch.float64)
    exact = torch.nn.functional.linear(*factors, None if added is None else added.double())
    sizes = torch.nn.functional.linear(*(f.abs() for f in factors), None if added is None else added.double().abs())
    assert seen.shape == exact.shape and seen.dtype == torch.float32
    assert ((seen - exact).abs() <= (64 + 4) * 2.0**-24 * sizes).all()
    coarser = torch.nn.functional.linear(x.double(), factors[1], None if added is None else added.double())
    assert ((coarser - exact).abs() > (64 + 4) * 2.0**-24 * sizes).any()


@pytest.mark.parametrize("activations", ["static", "token"])
@pytest.mark.parametrize(("form", "operator"), [("fp8", "_scaled_mm"), ("int8", "_int_mm")])
def test_all_quantised_layers_become_such_products(made, monkeypatch, form, operator, activations):
    """Where the rule says so: as the graph that is compiled, whose predictions are those of the graph that is not."""
    monkeypatch.setattr(products, "multiplies", lambda *_: True)
    draft = made(form, activations=activations, engine="inductor")
    cut = draft.split.full
    few = products.in_few_bits(cut, "cpu")
    assert (
        not any(map(is_marker, few.module.graph.nodes))
        and products.in_few_bits(draft.split.forecast, "cpu") is draft.split.forecast
    )
    weights = {name: draft.read(name) for name in draft.stored}
    program = program_of(draft, cut, weights, "cpu")
    assert sum(operator in str(node.target) for node in program.graph.nodes) == len(draft.options.input_scales)
    rng = torch.Generator().manual_seed(0)
    sizes = {n: d.minimum for n, d in draft.dimensions().items()}
    inputs = [
        torch.randn([sizes.get(s, s) for s in t.shape], generator=rng).to(getattr(torch, t.dtype)) for t in cut.inputs
    ]
    with torch.no_grad():
        seen, expected = (weighted(c, weights)(*inputs)[0] for c in (few, lowered(cut)))
    # Their sums differ by rounding alone; where one lies between two numbers of the format, by a step of one number.
    step = 2.0**-3 if form == "fp8" else 2.0**-5
    assert (seen - expected).abs().max() <= 18**0.5 * step / 32**0.5 * expected.abs().max()


def test_the_rule_says_where(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert products.multiplies("int8", "cpu", 3, 5) and not products.multiplies("fp8", "cpu", 16, 16)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert not products.multiplies("int8", "cpu", 3, 5)
    for capability, takes in (((8, 9), True), ((8, 6), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert products.multiplies("fp8", "cuda", 32, 16) is takes
        assert not products.multiplies("fp8", "cuda", 24, 16) and not products.multiplies("int8", "cuda", 32, 16)
