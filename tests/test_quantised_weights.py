"""Quantised weights: the formats within their bounds, which layers get them, and bundles that compute with them.

The oracle of the numbers is ml_dtypes, which rounds to e4m3 and e2m1 by itself; of the bundles the untouched model that
holds what the weights stand for.
"""

import json
import re
import shutil
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx as onnx_library
import oracle
import pytest
import readme
import torch
from harness import eager_denoiser
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_bundles import options_of

from taylorseer_export import cli
from taylorseer_export.bundle.store import open_bundle
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile import export
from taylorseer_export.compile.eager import eager_modules
from taylorseer_export.compile.kept import formats_of
from taylorseer_export.compile.weights import WEIGHTS
from taylorseer_export.errors import ConfigError
from taylorseer_export.families import FAMILIES
from taylorseer_export.graph.formats import FORMATS, dequantised, most_off, quantised, stored
from taylorseer_export.graph.quantise import dequantise_operator, is_marker, lowered
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.report import verify
from taylorseer_export.report.quantised import hold_quantised, round_inputs
from taylorseer_export.runtime.denoiser import Denoiser, load
from taylorseer_export.runtime.eager import EagerRunner
from taylorseer_export.runtime.lora import merged
from taylorseer_export.runtime.onnxruntime import open_runner
from taylorseer_export.runtime.trajectory import random_trajectory

ROWS, COLUMNS = 48, 64
STATIC = {"granularity": "last", "latent_size": (4, 6), "batch": 2}
# Of the tiny FLUX with one block of each kind: its attention and MLPs, of which the last block's text is not read.
LAYERS = r"(transformer_blocks\.0\.(attn\.|ff|ff_context)|single_transformer_blocks\.0\.(attn\.|proj_)).*\.?weight"


def weight(seed=0):
    """`[ROWS, COLUMNS]` float32, rows from 1e-4 to 10, one of zeros, and one with its numbers on edges of rounding."""
    made = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    made *= torch.logspace(-4, 1, ROWS)[:, None]
    made[3], made[7] = 0, torch.arange(COLUMNS) % 13 / 4
    return made


# Formats


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMATS)
def test_every_number_is_within_half_a_step(form, precision):
    """And the bound can fail: of weights that were quantised with other scales it is broken."""
    made = weight()
    parts = quantised(made, form, precision)
    assert [(part.dtype, tuple(part.shape)) for part in parts] == [
        s[1:] for s in stored(form, (ROWS, COLUMNS), precision)
    ]
    limit = most_off(made, form, parts)
    assert ((dequantised(*parts, dtype=torch.float64) - made).abs() <= limit * (1 + 1e-6)).all()
    values, scale, *whole = parts
    coarser = (values, scale, *whole[:-1], whole[-1] * 1.25) if whole else (values, scale * 1.25)
    assert ((dequantised(*coarser, dtype=torch.float64) - made).abs() > limit).any()
    assert (dequantised(*parts)[3] == 0).all()


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_values_are_those_of_another_library(form):
    made = weight(1)
    values, scale, *whole = quantised(made, form, torch.float32)
    if form == "fp8":
        expected = (made / scale[:, None]).numpy().astype(ml_dtypes.float8_e4m3fn)
        assert np.array_equal(values.view(torch.uint8).numpy(), expected.view(np.uint8))
        return
    step = (scale.float() * whole[0]).repeat_interleave(16, 1)
    expected = np.clip((made / step).numpy(), -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    seen = (dequantised(values, scale, *whole) / step).numpy()
    assert np.allclose(seen, expected, rtol=1e-6) and len(np.unique(np.abs(np.round(2 * seen)))) == 8


# Which layers


def read_by(cut):
    """Weight -> dtype, of all that a graph reads."""
    modules = dict(cut.module.named_buffers()) | dict(cut.module.named_parameters())
    return {name: modules[name].dtype for name in cut.parameters()}


@pytest.mark.parametrize("granularity", ["module", "residual", "last"])
def test_the_layers_of_the_blocks_are_quantised_and_nothing_else(drafts, tiny, granularity):
    """At every granularity the same, so that forecast and prepare graphs are those of the unquantised model."""
    plain, made = (drafts("plain", granularity, weights=form) for form in (None, "fp8"))
    linear = [f"{n}.weight" for n, m in tiny("plain").model.named_modules() if isinstance(m, torch.nn.Linear)]
    full = read_by(made.split.full)
    chosen = {name for name, dtype in full.items() if dtype == torch.float8_e4m3fn}
    assert chosen == {name for name in linear if re.fullmatch(LAYERS, name)} & full.keys() and len(chosen) == 17
    assert {name for name in full if name.endswith("_scale")} == {f"{name}_scale" for name in chosen}
    for cut, other in ((made.split.prepare, plain.split.prepare), (made.split.forecast, plain.split.forecast)):
        assert read_by(cut) == read_by(other) and not any(map(is_marker, cut.module.graph.nodes))
    assert read_by(plain.split.full).keys() == full.keys() - {f"{name}_scale" for name in chosen}


def test_what_several_layers_read_is_rounded_once_and_no_marker_is_lowered(drafts):
    """Queries, keys and values come from one tensor, and so does the MLP of a single block."""
    made = drafts("plain", "last", weights="fp8", activations="token")
    markers = [node for node in made.split.full.module.graph.nodes if is_marker(node)]
    weights = [node for node in markers if node.target is dequantise_operator()]
    assert (len(weights), len(markers) - len(weights)) == (17, 10)
    left = lowered(made.split.full).module.graph.nodes
    assert not any(map(is_marker, left)) and lowered(made.split.forecast) is made.split.forecast


# Refusals, before anything is read


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"weights": "fp4"}, r"--weights is fp4, expected fp8, int8, nvfp4 or keep; choose one, or leave it out"),
        (
            {"weights": "nvfp4"},
            r"nvfp4 with --engine onnxruntime, expected fp8 or int8; use --weights fp8",
        ),
        ({"activations": "token"}, r"--activations is token without --weights, expected it too; add --weights fp8"),
        ({"keep_precision": ("*.ff",)}, r"--keep-precision is \*\.ff without --weights, expected it too; add"),
        (
            {"weights": "nvfp4", "engine": "inductor", "activations": "token"},
            r"--activations is token with --engine inductor --weights nvfp4, expected none; change one of them",
        ),
    ],
)
def test_a_format_that_is_not_taken_is_refused_by_name(given, problem):
    with pytest.raises(ConfigError, match=problem):
        export.check_options(options_of(**given))


@pytest.mark.parametrize(
    ("form", "arch", "problem"),
    [
        (
            "fp8",
            "8.6,12.0",
            r"fp8 for compute capability 8\.6, expected 8\.9 or later; add --gpu-arch 8\.9,12\.0,12\.1, or",
        ),
        (
            "nvfp4",
            "8.9",
            r"nvfp4 for compute capability 8\.9, expected 12\.0 or later; .*12\.1, or use --weights fp8",
        ),
        ("fp8", None, r"fp8 for compute capability 8\.0, 8\.6, expected 8\.9 or later; .* --weights int8"),
    ],
)
def test_a_gpu_without_the_format_is_refused_before_the_build(form, arch, problem):
    pytest.importorskip("tensorrt_rtx")
    chosen = {} if arch is None else {"gpu-arch": arch}
    with pytest.raises(ConfigError, match=problem):
        export.check_options(options_of(weights=form, engine="tensorrt-rtx", precision="bf16", engine_options=chosen))


def test_a_pattern_that_keeps_nothing_or_all_is_refused(drafts):
    kept = drafts("plain", "last", weights="fp8", keep_precision=("*.attn.*",))
    assert len(export.describe(kept, "x").quantised.layers) == 6
    assert "--keep-precision '*.attn.*'" in export.describe(kept, "x").command()
    with pytest.raises(ConfigError, match=r"--keep-precision is \*\.atn, expected a pattern of layers that"):
        drafts("plain", "last", weights="fp8", keep_precision=("*.atn",))
    with pytest.raises(ConfigError, match=r"fp8 with 17 layers .* and 1 patterns .* expected one layer at least"):
        drafts("plain", "last", weights="fp8", keep_precision=("*",))


def test_what_the_help_says_of_time_on_a_cpu_is_what_was_measured(capsys):
    """By the newest record of each engine; the pages say it in a sentence of `tools/readme.py`."""
    won = {
        name: readme.faster(json.loads(readme.newest(name).read_text()))
        for name in ("quantised-cost", "quantised-cost-inductor")
    }
    assert list(won.values()) == [["int8 by token"]] * 2
    with pytest.raises(SystemExit):
        cli.main(["dit", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "On a CPU this is for memory: only int8 with --activations token is faster too" in said


# Checkpoints that are quantised already


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_the_values_of_a_checkpoint_are_kept_as_they_are(drafts, tiny, tmp_path, form):
    """Bit for bit, and the graphs over them compute what the model with the dequantised weights does."""
    names = export.describe(drafts("plain", weights="fp8"), "x").quantised.layers
    folder = tmp_path / "plain"
    shutil.copytree(tiny("plain").folder, folder)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    for name in names:
        values, scale, *whole = quantised(tensors[name], form, torch.float32)
        tensors |= {name: values, f"{name}_scale": scale, **{f"{name}_scale_2": second for second in whole}}
        tensors[name.replace("weight", "input_scale")] = torch.ones(())  # which nvfp4 has beside scales in plain order
    save_file(tensors, path)
    checkpoint = open_checkpoint(str(folder), FAMILIES["flux"])
    options = options_of(weights="keep", engine="inductor")
    traced = export.trace_model(checkpoint, options)
    made = export.draft(traced, options)
    described = export.describe(made, "x")
    assert (described.quantised.weights, described.quantised.kept) == (form, True)
    assert described.quantised.layers == names and "--weights keep" in described.command()
    for name in names:
        assert torch.equal(made.read(name).view(torch.uint8), tensors[name].view(torch.uint8))
        assert torch.equal(made.read(f"{name}_scale").float(), tensors[f"{name}_scale"].float())
    denoiser = eager_denoiser(made)
    data, every = random_trajectory(denoiser, 2), Forecasts(Plan.all_full(2), 0)
    assert verify.compare(verify.reference_model(checkpoint), denoiser, data, every).ratio < 1
    lost = verify.verify(denoiser, checkpoint, random_trajectory(denoiser, 4), lambda _: None)
    assert (lost.against, lost.quantisation, lost.both) == (None, None, None) and lost.forecast > 0
    if form == "fp8":
        assert_errors_are_of_activations_alone(export.draft(traced, replace(options, activations="token")), checkpoint)
        static = replace(options, activations="static")
        rounding, model = eager_denoiser(export.draft(traced, static)), verify.reference_model(checkpoint)
        assert rounding.manifest.quantised.input_scales == dict.fromkeys(names, 1.0)
        round_inputs(model, rounding.manifest)
        seen = verify.compare(model, rounding, data, every)
        assert seen.ratio < 1 and max(seen.seen) < max(verify.compare(model, denoiser, data, every).seen) / 2
        layer = names[0].removesuffix(".weight")
        del tensors[f"{layer}.input_scale"]
        save_file(tensors, path)
        lacking = replace(traced, checkpoint=open_checkpoint(str(folder), FAMILIES["flux"]))
        with pytest.raises(ConfigError, match=rf"`{layer}` has no scale for what it reads \(1 of \d+ layers have none"):
            export.draft(lacking, static)
    plain = open_checkpoint(str(tiny("plain").folder), FAMILIES["flux"])
    with pytest.raises(ConfigError, match=r"--weights is keep, and the blocks of .* are in no format, expected one of"):
        export.draft(plain, options)
    with pytest.raises(ConfigError, match=r"--weights is keep, and .* is a config without weights, expected"):
        formats_of(replace(plain, weightless=True), names)


def assert_errors_are_of_activations_alone(draft, checkpoint):
    """As the untouched model that holds the checkpoint's values, dequantised, says by itself."""
    denoiser, steps = eager_denoiser(draft), 4
    data = random_trajectory(denoiser, steps)
    lost = verify.verify(denoiser, checkpoint, data, lambda _: None)
    assert lost.against == "the model with the checkpoint's weights dequantised"
    assert str(lost).startswith("quantisation error of activations alone ")
    slot = denoiser.slot(denoiser.sizes(data.latents.shape[1:], data.conditioning))
    slot.start(data.conditioning, Forecasts(Plan.all_full(steps), 0), data.timesteps)
    seen = np.stack([slot.step(latent) for latent in data.latents])
    given = {name: torch.as_tensor(value) for name, value in data.conditioning.items()}
    times = oracle.seen_by(torch.as_tensor(data.timesteps), torch.float32)
    model = checkpoint.load(torch.float32).double()
    plain = oracle.replay(model, torch.as_tensor(data.latents), times, given, "F" * steps, 1).numpy()
    assert lost.quantisation == pytest.approx(np.linalg.norm(seen - plain) / np.linalg.norm(plain), rel=1e-3)
    assert lost.quantisation > 2.0**-10 and 0 < lost.both <= lost.quantisation + lost.forecast


# Bundles


@pytest.fixture(scope="module")
def written(drafts, once):
    """Format -> folder of the bundle of the tiny FLUX in ONNX Runtime."""

    def make(form):
        write = lambda folder: export.write_bundle(drafts("plain", weights=form, **STATIC), folder, form)  # noqa: E731
        return once(f"quantised-{form}", write)

    return make


def test_the_bundle_holds_the_format_and_says_so(written, drafts, capsys):
    folder = written("fp8")
    found = open_bundle(folder).manifest
    with safe_open(folder / WEIGHTS, "pt") as file:
        types = {name: file.get_slice(name).get_dtype() for name in file.keys()}
    assert {types[name] for name in found.quantised.layers} == {"F8_E4M3"} and len(found.quantised.layers) == 17
    plain = drafts("plain", **STATIC)
    saved = found.quantised.unquantised_bytes - found.quantised.bytes
    assert found.graphs["full"].weights_bytes == plain.weights_bytes(plain.split.full) - saved > 0
    assert "--weights fp8 --activations none" in found.command()
    for graph in ("prepare", "full", "forecast"):
        model = onnx_library.load(folder / f"{graph}.onnx", load_external_data=False)
        onnx_library.checker.check_model(str(folder / f"{graph}.onnx"), full_check=True)
        assert sum(n.op_type == "DequantizeLinear" for n in model.graph.node) == (17 if graph == "full" else 0)
    assert cli.main(["inspect", str(folder)]) == 0
    assert re.search(
        r"quantised +40\.\d\d KB of weights in fp8, 17 layers; 147\.46 KB in fp32", capsys.readouterr().out
    )


def test_verify_tells_the_two_errors_apart(written, tiny, capsys):
    """The bundle equals the model with what its weights stand for, not the one without; errors add up at most."""
    folder, steps = written("fp8"), 8
    assert cli.main(["verify", str(folder), "--steps", str(steps)]) == 0
    said = capsys.readouterr().out
    shown = re.search(r"quantisation error (\S+), forecast error (\S+), both (\S+):", said)
    quantisation, forecast, both = map(float, shown.groups())
    assert 2.0**-10 < quantisation < 2.0**-4 and 0 < both < 1.1 * (quantisation + forecast)  # two digits are shown
    assert "equals the eager model with its fp8 weights within its bounds" in said
    checkpoint = open_checkpoint(str(tiny("plain").folder), FAMILIES["flux"])
    with load(folder, threads=1) as denoiser:
        data, every = random_trajectory(denoiser, 2), Forecasts(Plan.all_full(2), 0)
        model = verify.reference_model(checkpoint)
        assert verify.compare(model, denoiser, data, every).ratio > 1
        hold_quantised(model, checkpoint, denoiser.manifest)
        assert verify.compare(model, denoiser, data, every).ratio < 1


def test_int8_products_are_rounded_where_that_is_asked_for_alone(written, drafts, tiny):
    """Left alone, ONNX Runtime multiplies int8 weights with int8 activations, which nothing in the graph says."""
    folder = written("int8")
    bundle, every = open_bundle(folder), Forecasts(Plan.all_full(2), 0)
    checkpoint = open_checkpoint(str(tiny("plain").folder), FAMILIES["flux"])
    model = verify.reference_model(checkpoint)
    hold_quantised(model, checkpoint, bundle.manifest)
    with load(folder, threads=1) as denoiser:
        data = random_trajectory(denoiser, 2)
        assert verify.compare(model, denoiser, data, every).ratio < 1
        limit = verify.roundoff_of(model, denoiser.manifest)
    rounded = bundle.manifest.quantised.model_copy(update={"activations": "token"})
    by_token = bundle.manifest.model_copy(update={"quantised": rounded})
    with Denoiser(by_token, open_runner(replace(bundle, manifest=by_token), denoiser.device, 1)) as denoiser:
        found = verify.compare(model, denoiser, data, every)
        assert found.ratio < 1 and max(found.seen) > max(found.bound) * limit / verify.roundoff_of(model, by_token)


def test_a_lora_at_load_is_refused_on_quantised_weights(written, tmp_path):
    module = "transformer_blocks.0.attn.to_q"
    bundle = open_bundle(written("fp8"))
    rows, columns = 32, 32
    pair = {f"{module}.lora_A.weight": torch.ones(2, columns), f"{module}.lora_B.weight": torch.ones(rows, 2)}
    save_file(pair, tmp_path / "lora.safetensors")
    with pytest.raises(ConfigError, match=r"updates 1 weights that this bundle holds quantised \(transf"):
        merged([tmp_path / "lora.safetensors"], bundle)


def test_activations_by_token_in_onnx_are_those_of_the_graph(drafts, once):
    """The same arithmetic in ONNX Runtime and eagerly: where one rounds to e4m3, so does the other."""
    made = drafts("plain", "last", weights="fp8", activations="token", latent_size=(4, 6), batch=2)
    folder = once("quantised-token", lambda place: export.write_bundle(made, place, "token"))
    steps = 3
    with load(folder, threads=1) as denoiser:
        data = random_trajectory(denoiser, steps)
        eagerly = Denoiser(denoiser.manifest, EagerRunner(eager_modules(made), denoiser.manifest.graphs))
        found = []
        for one in (denoiser, eagerly):
            slot = one.slot(one.sizes(data.latents.shape[1:], data.conditioning))
            slot.start(data.conditioning, Forecasts(Plan.all_full(steps), 0), data.timesteps)
            found.append(np.stack([slot.step(latent) for latent in data.latents]))
        # A number that lies between two of e4m3 by less than float32 tells may go either way: a step of one number.
        limit = 17**0.5 * 2.0**-3 / 32**0.5 * np.abs(found[1]).max()
        assert 0 < np.abs(found[0]).max() and np.abs(found[0] - found[1]).max() < limit
