"""Each family's own diffusers pipelines with the drop-in: all-`F` equals the untouched one, forecasts the oracle.

Equal means bit for bit, but where a part of the model is traced in another form, equal in exact arithmetic (HiDream's
experts, Qwen-Image's rotation): there every call stays within the derived bound of the untouched model on its inputs.
"""

from functools import cache

import pytest
import torch
from harness import eager_denoiser
from PIL import Image
from tiny_models import tiny_hunyuan, tiny_wan
from tiny_pipelines import (
    Recorder,
    hidream_pipeline,
    hunyuan_image_pipeline,
    hunyuan_pipeline,
    kontext_pipeline,
    qwen_image_pipeline,
    sd3_pipeline,
    wan_image_pipeline,
    wan_pipeline,
)

from taylorseer_export.build import export
from taylorseer_export.errors import StepError
from taylorseer_export.families import FAMILIES
from taylorseer_export.graph.checkpoint import open_checkpoint

PICTURE = Image.linear_gradient("L").convert("RGB").resize((16, 16))
GUIDED = {"negative_prompt": "dog", "guidance_scale": 4.0}
VIDEO = {"height": 32, "width": 48, "num_frames": 5, "max_sequence_length": 6}


def text(*shape):
    """Embeddings of a prompt [1, *shape]."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))


def guided(*names, **given):
    """The prompt as embeddings, and their opposite as the negative prompt."""
    return {"prompt": None, **given, **{f"negative_{name}": -given[name] for name in names}}


SMALL = {"height": 16, "width": 16}
MASK = torch.tensor([[1, 1, 1, 1, 0, 0]])
EMBEDDED = {
    "prompt_embeds": text(6, 20),
    "pooled_prompt_embeds": text(16),
    "prompt_attention_mask": MASK,
}
QWEN = {
    "height": 32,
    "width": 48,
    "prompt_embeds_mask": MASK,
    "true_cfg_scale": 2.0,
    **guided("prompt_embeds", prompt_embeds=text(6, 24)),
}
SD3 = guided("prompt_embeds", "pooled_prompt_embeds", prompt_embeds=text(6, 24), pooled_prompt_embeds=text(20))
HIDREAM = guided(
    "prompt_embeds_t5",
    "prompt_embeds_llama3",
    "pooled_prompt_embeds",
    prompt_embeds_t5=text(3, 20),
    prompt_embeds_llama3=text(3, 24).repeat(3, 1, 1, 1),
    pooled_prompt_embeds=text(12),
)

# Case -> (model of conftest, pipeline around it, arguments of the pipeline, branches of guidance).
CASES = {
    "kontext": (
        "kontext",
        kontext_pipeline,
        {"image": PICTURE, "max_area": 256, "_auto_resize": False, "max_sequence_length": 6},
        {"0"},
    ),
    "kontext-guided": (
        "kontext",
        kontext_pipeline,
        {
            "image": PICTURE,
            "max_area": 256,
            "_auto_resize": False,
            "max_sequence_length": 6,
            "negative_prompt": "dog",
            "true_cfg_scale": 2.0,
        },
        {"0", "1"},
    ),
    "wan": ("wan", wan_pipeline, VIDEO | GUIDED, {"cond", "uncond"}),
    "wan-picture": ("wan", wan_pipeline, VIDEO | {"num_frames": 1, "guidance_scale": 1.0}, {"cond"}),
    "wan-image": (
        "wan-image-channels",
        wan_image_pipeline,
        VIDEO
        | {"image": PICTURE, "prompt": None, "prompt_embeds": text(512, 20), "guidance_scale": 4.0}
        | {"negative_prompt_embeds": -text(512, 20), "max_sequence_length": 512},
        {"cond", "uncond"},
    ),
    "qwen-image": ("qwen-image", qwen_image_pipeline, QWEN, {"cond", "uncond"}),
    "qwen-image-two": ("qwen-image", qwen_image_pipeline, QWEN | {"num_images_per_prompt": 2}, {"cond", "uncond"}),
    "sd3": ("sd3", sd3_pipeline, SMALL | SD3, {"0"}),
    "hidream": ("hidream", hidream_pipeline, SMALL | HIDREAM, {"0"}),
    "hunyuan": (
        "hunyuan",
        hunyuan_pipeline,
        VIDEO | {"prompt_template": {"template": "{}", "crop_start": 0}},
        {"cond"},
    ),
    "hunyuan-channels": (
        "hunyuan-channels",
        hunyuan_image_pipeline,
        {"height": 32, "width": 48, "num_frames": 5, "image": PICTURE, "prompt": None, **EMBEDDED},
        {"0"},
    ),
    "hunyuan-replace": (
        "hunyuan-replace",
        hunyuan_image_pipeline,
        {"height": 32, "width": 48, "num_frames": 5, "image": PICTURE, "prompt": None, **EMBEDDED},
        {"0"},
    ),
}

REWRITTEN = {"hidream", "qwen-image"}

# Models that the pipelines want otherwise than the tests of graphs do.
MODELS = {
    "wan-image-channels": ("wan", lambda: tiny_wan(seed=1, in_channels=12, image_dim=10)),
    "unguided": ("hunyuan-video", lambda: tiny_hunyuan(guidance=False, single=1)),
}


@pytest.fixture(scope="module")
def denoisers(tiny, eager, tmp_path_factory):
    """Name -> (untouched transformer, denoiser over it)."""

    @cache
    def make(name):
        if name not in MODELS:
            return tiny(name).model, eager(name)
        family, build = MODELS[name]
        model, folder = build(), tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        options = export.Options(order=2, interval=4, warmup=2, steps=20)
        return model, eager_denoiser(export.draft(open_checkpoint(str(folder), FAMILIES[family]), options))

    return make


def paint(pipe, steps=5, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    options = {"prompt": "cat", "output_type": "latent", "return_dict": False, **options}
    return pipe(num_inference_steps=steps, generator=generator, **options)[0]


@pytest.mark.parametrize("case", CASES)
def test_all_full_is_the_untouched_pipeline(denoisers, case):
    name, build, options, branches = CASES[case]
    model, denoiser = denoisers(name)
    expected = paint(build(model), **options)
    pipe = build(model)
    pipe.transformer = denoiser.as_transformer(interval=1)
    seen = Recorder(pipe.transformer)
    painted = paint(pipe, **options)
    if denoiser.manifest.family in REWRITTEN:
        seen.assert_plan(model, "FFFFF", 2)
    else:
        assert torch.equal(painted, expected)
    assert painted.shape == expected.shape
    assert pipe.transformer.executed == dict.fromkeys(branches, "FFFFF")


@pytest.mark.parametrize("case", CASES)
def test_forecasts_agree_with_the_oracle(denoisers, case):
    name, build, options, branches = CASES[case]
    model, denoiser = denoisers(name)
    pipe = build(model)
    pipe.transformer = denoiser.as_transformer(interval=3, warmup=2)
    seen = Recorder(pipe.transformer)
    paint(pipe, steps=6, **options)
    assert seen.calls.keys() == branches
    seen.assert_plan(model, "FF..F.", 2)


def test_the_second_expert_begins_with_a_full_step(denoisers):
    """Wan 2.2: each expert has its own drop-in, and the switch is a request of its own."""
    model, denoiser = denoisers("wan")
    untouched = paint(wan_pipeline(model, model, 0.8), **VIDEO, **GUIDED)
    pipe = wan_pipeline(model, model, 0.8)
    pipe.transformer, pipe.transformer_2 = (denoiser.as_transformer(interval=1) for _ in range(2))
    assert torch.equal(paint(pipe, **VIDEO, **GUIDED), untouched)
    pipe.transformer, pipe.transformer_2 = (denoiser.as_transformer(interval=3, warmup=1) for _ in range(2))
    paint(pipe, steps=9, **VIDEO, **GUIDED)
    first, second = pipe.transformer.executed["cond"], pipe.transformer_2.executed["cond"]
    assert len(first + second) == 9
    assert first == "F..F..F.."[: len(first)]
    assert second == "F..F..F.."[: len(second)]
    assert pipe.transformer_2.executed["uncond"] == second


def test_guidance_that_the_model_leaves_alone(denoisers):
    """HunyuanVideo's pipeline always passes it; a model without its embedder does not look at it."""
    model, denoiser = denoisers("unguided")
    options = VIDEO | {"prompt_template": {"template": "{}", "crop_start": 0}}
    untouched = paint(hunyuan_pipeline(model), **options)
    pipe = hunyuan_pipeline(model)
    pipe.transformer = denoiser.as_transformer(interval=1)
    assert torch.equal(paint(pipe, **options), untouched)


def test_timesteps_of_single_tokens_are_refused(denoisers):
    """As Wan 2.2's 5B model has them."""
    model, denoiser = denoisers("wan")
    pipe = wan_pipeline(model)
    pipe.register_to_config(expand_timesteps=True)
    pipe.transformer = denoiser.as_transformer()
    timestep = torch.tensor([[0.0, 500.0]])
    with pytest.raises(
        StepError, match=r"input `timestep` has 2 different values, expected one for all samples and to"
    ):
        pipe.transformer(torch.zeros(1, 4, 2, 6, 4), timestep=timestep, encoder_hidden_states=torch.zeros(1, 6, 20))


def test_kontext_without_a_picture(denoisers):
    model, denoiser = denoisers("kontext")
    pipe = kontext_pipeline(model)
    pipe.transformer = denoiser.as_transformer()
    with pytest.raises(StepError, match=r"input `hidden_states` has no rows of a picture to be edited, expected them"):
        paint(pipe, height=16, width=16, max_area=256, max_sequence_length=6)
