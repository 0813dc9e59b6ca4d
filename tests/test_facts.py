"""Facts of the families: what is declared is what the manifest says, and the run side needs no more than that."""

# Shapes: N pictures, C channels, H and W latent pixels, T tokens

import shutil
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from harness import run

from taylorseer_export.bundle import manifest as manifest_module
from taylorseer_export.bundle.manifest import Dimension, Graph, Manifest, Tensor
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile.export import describe, pipeline_of, sampling_of
from taylorseer_export.embedded.requests import prompt_request
from taylorseer_export.errors import ConfigError
from taylorseer_export.families import FAMILIES, family
from taylorseer_export.runtime.tensors import latent_sizes, tensor_request

# Embedded models: (what a request is made from, who makes pictures of the latents).
EMBEDDED = {"dit": ("labels", "digits")}


def described(name):
    """The manifest of a family's embedded model, as far as no graph is needed for it."""
    checkpoint = open_checkpoint(None, FAMILIES[name])
    specs = checkpoint.family.inputs(checkpoint.config)
    contract = tuple(
        Tensor(name=s.name, dtype="float32" if s.dtype == "float" else s.dtype, shape=s.shape, role=s.role)
        for s in specs
    )
    ranges = checkpoint.family.dimensions(checkpoint.config)
    return Manifest.model_construct(
        family=name,
        name="tiny",
        graphs={
            "full": Graph(file="full", inputs=tuple(map(Tensor.model_validate, contract)), outputs=(), weights_bytes=0)
        },
        dimensions={n: Dimension(minimum=low, maximum=high, typical=low) for n, (low, high) in ranges.items()},
        sampling=sampling_of(checkpoint),
        pipeline=pipeline_of(checkpoint),
        model=SimpleNamespace(config=checkpoint.config),
    )


def test_a_declaration_and_the_manifest_have_one_word_for_a_fact():
    declared = {field.name: field.default for field in fields(family.Pipeline)}
    travelling = {name: field.get_default() for name, field in manifest_module.Pipeline.model_fields.items()}
    assert declared.items() <= travelling.items()
    assert travelling.keys() - declared.keys() == {"packing", "attributes"}  # which follow from other entries
    assert set(family.Fill.__args__) == set(manifest_module.Fill.__args__)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_declared_travels(name):
    declared, made = FAMILIES[name], described(name)
    facts = {key: value for key, value in asdict(declared.pipeline).items() if key != "ignored_inputs"}
    assert facts.items() <= dict(made.pipeline).items()
    assert made.pipeline.attributes == dict(declared.attributes(made.model.config))
    assert (made.sampling.source, made.sampling.pictures) == EMBEDDED.get(name, ("tensors", None))
    inputs = {spec.name for spec in declared.inputs(made.model.config)}
    assert set(made.pipeline.ignored_inputs) == set(declared.pipeline.ignored_inputs) - inputs


def test_an_input_is_not_ignored_where_the_model_takes_it():
    family = FAMILIES["hunyuan-video"]
    checkpoint = open_checkpoint(None, family)
    seen = {
        embeds: pipeline_of(replace(checkpoint, config={**checkpoint.config, "guidance_embeds": embeds})).ignored_inputs
        for embeds in (True, False)
    }
    assert seen == {True: (), False: ("guidance",)}


def test_a_card_of_someone_else_promises_nothing(tmp_path):
    """Only the models of this package bring an encoder and a decoder, whatever a card says."""
    shutil.copytree(open_checkpoint(None, FAMILIES["dit"]).root, tmp_path / "copy")
    made = sampling_of(open_checkpoint(str(tmp_path / "copy"), FAMILIES["dit"]))
    assert (made.source, made.pictures) == ("labels", None)


@pytest.mark.parametrize("model", ["kontext", "hunyuan"])
def test_a_contract_says_what_inputs_hold_and_which_site_or_rule_a_tensor_is_of(drafts, model):
    """At granularity `module`, with guards: the fields say what the names spell."""
    made = describe(drafts(model, guards=("cg", "fbcache", "teacache")), "probed")
    tensors = [t for graph in made.graphs.values() for t in (*graph.inputs, *graph.outputs)]
    for role in ("taylor_in", "taylor_out"):
        assert [t.site for t in tensors if t.role == role][: len(made.sites)] == [site.name for site in made.sites]
        assert all(t.name == f"{role}.{t.site}" for t in tensors if t.role == role)
    for tensor in tensors:
        spelt = tensor.name.rpartition(".")[2]
        probes = tensor.role in ("probe_in", "probe_out", "error") or tensor.name.startswith("probe_weights.")
        assert tensor.rule == (spelt if probes else None)
        assert (tensor.site is not None) == tensor.role.startswith("taylor_")
    assert {t.rule for t in tensors} == {None, "cg", "fbcache", "teacache"}
    declared = {s.name: (s.fill, s.first) for s in FAMILIES[made.family].inputs(made.model.config)}
    seen = {t.name: (t.fill, t.first) for t in tensors if t.name in declared and t.role == "constant"}
    assert seen.items() <= declared.items() and any(fill for fill, _ in seen.values())


# Pixels to sizes: the run side solves the contract, the make side asks the declaration -------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_give_the_sizes_that_the_declaration_gives(name):
    declared, made = FAMILIES[name], described(name)
    scale = made.sampling.latent_scale
    for rows, columns in ((16, 16), (16, 24), (8, 16)):
        video = len(declared.latent_size) == 3
        latent = (*((3,) if video else ()), rows, columns)
        pixels = (*((9,) if video else ()), rows * scale, columns * scale)
        if declared.others:
            with pytest.raises(ConfigError, match=r"has 2 latents \(.*\), expected one for --size"):
                latent_sizes(made, pixels)
            continue
        try:
            expected = declared.latent_sizes(made.model.config, *latent)
        except ConfigError:
            with pytest.raises(ConfigError, match=r"--size is .*, a latent of .*, expected \["):
                latent_sizes(made, pixels)
            continue
        if any(not made.dimensions[n].minimum <= size <= made.dimensions[n].maximum for n, size in expected.items()):
            with pytest.raises(ConfigError, match=r"--size is .*, of `.*` .*, expected .* to .*; change it"):
                latent_sizes(made, pixels)
            continue
        sizes, sides = latent_sizes(made, pixels)
        assert sizes == expected
        assert sides == ((rows // 2, columns // 2) if declared.packing == 2 else None)


@pytest.mark.parametrize(
    ("name", "pixels", "sentence"),
    [
        ("flux", (32, 36), r"--size width is 36, expected a multiple of 8 \(pixels\); change it"),
        ("flux", (0, 32), r"--size height is 0, expected a multiple of 8"),
        ("flux", (1000000, 1000000), r"of `image_tokens` 15625000000, expected 4 to 16384; change it, or export"),
        ("flux", (5, 32, 32), r"--size is 5x32x32, expected HxW for family flux; write it so"),
        ("wan", (32, 48), r"--size is 32x48, expected FxHxW \(frames first\) for family wan"),
        ("wan", (6, 32, 48), r"frames is 6, expected a multiple of 4 and 1, like 81"),
        ("dit", (32, 32), r"--size is 32x32, a latent of 32x32, expected \[16, 16\] \(latent pixels\)"),
        ("hidream", (64, 128), r"a latent of 8x16, expected \[2\*side, 2\*side\]"),
    ],
)
def test_pixels_that_no_latent_has(name, pixels, sentence):
    with pytest.raises(ConfigError, match=sentence):
        latent_sizes(described(name), pixels)


# Requests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(4, 6), (6, 4), (3, 3)])
def test_a_request_from_tensors_is_what_the_pipeline_makes(eager, sides):
    """Noise and ids of a FLUX request against diffusers' own functions: the same whoever encoded the text."""
    rows, columns = sides
    denoiser = eager("flux")
    width = int(denoiser.latent.shape[-1])
    text = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).numpy()
    shapes = denoiser.constants
    values = {
        "encoder_hidden_states": text[..., : int(shapes["encoder_hidden_states"].shape[-1])],
        "pooled_projections": text[:, 0, : int(shapes["pooled_projections"].shape[-1])],
    }
    made = tensor_request(denoiser, values, (3, 4), {"image_tokens": rows * columns}, sides, 2.5)
    for k, seed in enumerate((3, 4)):
        shape = (1, width // 4, 2 * rows, 2 * columns)
        noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
        expected = FluxPipeline._pack_latents(noise, *shape)
        # Torch's normal numbers are within a bound of ours, see `runtime/noise.py`; none is longer than by 2^-24.
        bound = (4 * np.pi + 6) * 2.0**-24 * np.sqrt(48 * np.log(2))
        assert abs(made.latents[k : k + 1] - expected.numpy()).max() <= bound
    ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, torch.device("cpu"), torch.float32)
    assert np.array_equal(made.conditioning["img_ids"], ids.numpy())
    assert not made.conditioning["txt_ids"].any() and made.conditioning["txt_ids"].shape == (5, 3)
    assert made.conditioning["guidance"].tolist() == [2.5, 2.5]
    assert not np.array_equal(made.latents[0], made.latents[1])
    assert np.array_equal(made.conditioning["encoder_hidden_states"], values["encoder_hidden_states"])
    drawn = prompt_request(denoiser, values, (3, 4), (16 * rows, 16 * columns), 2.5)
    assert np.array_equal(drawn.latents, made.latents) and (drawn.height, drawn.width) == (16 * rows, 16 * columns)
    assert drawn.conditioning.keys() == made.conditioning.keys()
    assert all(np.array_equal(value, made.conditioning[name]) for name, value in drawn.conditioning.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.uint8, torch.float64])
def test_a_mask_of_another_kind_gives_the_same_prediction(eager, tiny, kind):
    """A mask as encoders make it, where the contract is float32; one that is cut off gives another."""
    latents, timestep, conditioning = tiny("hunyuan").inputs(3)
    mask = torch.ones_like(conditioning["encoder_attention_mask"])
    mask[:, -1] = 0
    expected, seen = (
        run(eager("hunyuan"), (latents, timestep, {**conditioning, "encoder_attention_mask": value}), "FF.")
        for value in (mask, mask.to(kind))
    )
    whole = run(eager("hunyuan"), (latents, timestep, {**conditioning, "encoder_attention_mask": mask * 0 + 1}), "FF.")
    assert torch.equal(seen, expected) and not torch.equal(seen, whole)
