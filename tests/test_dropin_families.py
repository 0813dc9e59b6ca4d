"""Each family's own diffusers pipelines with the drop-in: all-`F` equals the untouched one, forecasts the oracle.

And the same loops without a pipeline, from the tensors that it passes: what `run` does.

Equal means bit for bit, but where a part of the model is traced in another form, equal in exact arithmetic (HiDream's
experts, Qwen-Image's rotation, FramePack's mask): there every call stays within the derived bound of the untouched
model on its inputs.
"""

import copy
from dataclasses import replace
from functools import cache, partial
from inspect import signature

import accelerate
import numpy as np
import oracle
import pytest
import torch
from diffusers import Flux2KleinKVPipeline, Flux2KleinPipeline, Kandinsky5I2VPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from harness import allowed, eager_denoiser
from oracle import assert_close
from PIL import Image
from recorder import Recorder
from tiny_models import tiny_hunyuan
from tiny_pipelines import (
    chroma_pipeline,
    cogvideox_image_pipeline,
    cogvideox_pipeline,
    flux2_base_pipeline,
    flux2_pipeline,
    framepack_pipeline,
    hidream_pipeline,
    hunyuan_15_image_pipeline,
    hunyuan_15_pipeline,
    hunyuan_image_pipeline,
    hunyuan_pipeline,
    kandinsky_5_pipeline,
    kontext_pipeline,
    krea_2_pipeline,
    longcat_image_pipeline,
    ovis_image_pipeline,
    pixart_pipeline,
    qwen_image_21_pipeline,
    qwen_image_edit_pipeline,
    qwen_image_pipeline,
    sana_pipeline,
    sd3_pipeline,
    wan_5b_image_pipeline,
    wan_animate_pipeline,
    wan_image_pipeline,
    wan_pipeline,
    wan_vace_pipeline,
    z_image_pipeline,
)

from taylorseer_export.bundle.shapes import match
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile import export
from taylorseer_export.errors import ConfigError, StepError
from taylorseer_export.families import FAMILIES
from taylorseer_export.families.whole import scaled
from taylorseer_export.runtime.calls import host_array
from taylorseer_export.runtime.sampling import sample
from taylorseer_export.runtime.schedulers import diffusers_scheduler
from taylorseer_export.runtime.tensors import CONDITION, NEGATIVE, channel_axis, condition_shape, tensor_request
from taylorseer_export.serve import contract

pytestmark = pytest.mark.slow

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
QWEN_21 = {"prompt_embeds_mask": MASK.bool(), "negative_prompt_embeds_mask": MASK.bool()}
FLUX2 = {"height": 16, "width": 24, "prompt": None, "prompt_embeds": text(6, 24)}
CHROMA = {
    "guidance_scale": 2.0,
    "prompt_attention_mask": MASK.float(),
    "negative_prompt_attention_mask": torch.ones(1, 6),
    **guided("prompt_embeds", prompt_embeds=text(6, 24)),
}
# The negative prompt is shorter, and each is a tensor in a list.
Z_IMAGE = {
    "height": 16,
    "width": 24,
    "prompt": None,
    "prompt_embeds": [text(6, 24)[0]],
    "negative_prompt_embeds": [-text(3, 24)[0]],
    "guidance_scale": 2.0,
}
EDIT_PLUS = partial(qwen_image_edit_pipeline, pipeline=QwenImageEditPlusPipeline)
KREA_2 = {
    "height": 32,
    "width": 48,
    "guidance_scale": 2.0,
    "prompt_embeds_mask": MASK.bool(),
    "negative_prompt_embeds_mask": torch.ones(1, 6).bool(),
    **guided("prompt_embeds", prompt_embeds=text(6, 3, 16)),
}
BINNED = {
    "guidance_scale": 2.0,
    "use_resolution_binning": False,
    "negative_prompt": None,
    "prompt_attention_mask": MASK,
    "negative_prompt_attention_mask": torch.ones(1, 6, dtype=torch.int64),
    **guided("prompt_embeds", prompt_embeds=text(6, 24)),
}
PICTURES = [PICTURE, PICTURE.resize((32, 16))]
SD3 = guided("prompt_embeds", "pooled_prompt_embeds", prompt_embeds=text(6, 24), pooled_prompt_embeds=text(20))
HIDREAM = guided(
    "prompt_embeds_t5",
    "prompt_embeds_llama3",
    "pooled_prompt_embeds",
    prompt_embeds_t5=text(3, 20),
    prompt_embeds_llama3=text(3, 24).repeat(3, 1, 1, 1),
    pooled_prompt_embeds=text(12),
)
HUNYUAN_15 = {
    "num_frames": 5,
    **{f"{sign}prompt_embeds_mask": MASK for sign in ("", "negative_")},
    "prompt_embeds_mask_2": torch.zeros(1, 4, dtype=torch.int64),  # nothing in quotes
    "negative_prompt_embeds_mask_2": torch.ones(1, 4, dtype=torch.int64),
    **guided("prompt_embeds", "prompt_embeds_2", prompt_embeds=text(6, 20), prompt_embeds_2=text(4, 16)),
}
PREDICTED = {"pred_cond", "pred_uncond"}
EMBEDDED_WAN = {"guidance_scale": 4.0, **guided("prompt_embeds", prompt_embeds=text(6, 20))}
KANDINSKY_5 = {"height": 32, "width": 48, "num_frames": 5, "prompt": None, "guidance_scale": 2.0}
KANDINSKY_5 |= {
    f"{sign}prompt_{name}": value
    for sign, by, words in (("", 1, 6), ("negative_", -1, 4))
    for name, value in (
        ("embeds_qwen", by * text(words, 20)),
        ("embeds_clip", by * text(12)),
        ("cu_seqlens", torch.tensor([0, words], dtype=torch.int32)),
    )
}
FRAMES = [PICTURE.rotate(10 * k).resize((48, 32)) for k in range(9)]
FRAMEPACK = {
    "height": 128,
    "width": 128,
    "num_frames": 5,
    "latent_window_size": 2,
    "image": PICTURE,
    "prompt": None,
    **EMBEDDED,
}

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
    "flux2": ("flux2", flux2_pipeline, FLUX2, {"0"}),
    "flux2-base": (
        "flux2-base",
        flux2_base_pipeline,
        FLUX2 | {"negative_prompt_embeds": -text(6, 24), "guidance_scale": 2.0},
        {"cond", "uncond"},
    ),
    "flux2-edit": (
        "flux2-edit",
        flux2_pipeline,
        FLUX2 | {"image": [PICTURE.resize((64, 64)), PICTURE.resize((96, 64))]},
        {"0"},
    ),
    "chroma": ("chroma", chroma_pipeline, SMALL | CHROMA, {"0", "1"}),
    "krea-2": ("krea-2", krea_2_pipeline, KREA_2, {"0", "1"}),
    "longcat-image": (
        "longcat-image",
        longcat_image_pipeline,
        SMALL | {"negative_prompt": "a dog", "guidance_scale": 2.0, "enable_prompt_rewrite": False},
        {"cond", "uncond"},
    ),
    "ovis-image": (
        "ovis-image",
        ovis_image_pipeline,
        SMALL | guided("prompt_embeds", prompt_embeds=text(6, 24)) | {"negative_prompt": None, "guidance_scale": 2.0},
        {"cond", "uncond"},
    ),
    "z-image": ("z-image", z_image_pipeline, Z_IMAGE, {"0"}),
    "z-image-two": ("z-image", z_image_pipeline, Z_IMAGE | {"num_images_per_prompt": 2, "guidance_scale": 0.0}, {"0"}),
    "kandinsky-5": ("kandinsky-5", kandinsky_5_pipeline, KANDINSKY_5, {"0", "1"}),
    "kandinsky-5-picture": (
        "kandinsky-5",
        partial(kandinsky_5_pipeline, pipeline=Kandinsky5I2VPipeline),
        KANDINSKY_5 | {"image": PICTURE, "width": 32, "num_frames": 17},  # it compares the first four with the rest
        {"0", "1"},
    ),
    "cogvideox": ("cogvideox", cogvideox_pipeline, VIDEO | {"width": 64} | EMBEDDED_WAN, {"cond_uncond"}),
    "cogvideox-table": ("cogvideox-table", cogvideox_pipeline, VIDEO | {"width": 64} | EMBEDDED_WAN, {"cond_uncond"}),
    "cogvideox-image": (
        "cogvideox-image",
        cogvideox_image_pipeline,
        VIDEO | {"image": PICTURE} | EMBEDDED_WAN,
        {"cond_uncond"},
    ),
    "wan": ("wan", wan_pipeline, VIDEO | GUIDED, {"cond", "uncond"}),
    "wan-picture": ("wan", wan_pipeline, VIDEO | {"num_frames": 1, "guidance_scale": 1.0}, {"cond"}),
    "wan-image": (
        "wan-image",
        wan_image_pipeline,
        VIDEO
        | {"image": PICTURE, "prompt": None, "prompt_embeds": text(512, 20), "guidance_scale": 4.0}
        | {"negative_prompt_embeds": -text(512, 20), "max_sequence_length": 512},
        {"cond", "uncond"},
    ),
    "wan-5b-image": (
        "wan-5b-image",
        wan_5b_image_pipeline,
        VIDEO | {"image": PICTURE} | EMBEDDED_WAN,
        {"cond", "uncond"},
    ),
    # A picture to go by is a latent frame more, in front.
    "wan-vace": (
        "wan-vace",
        wan_vace_pipeline,
        VIDEO
        | EMBEDDED_WAN
        | {"video": [PICTURE.resize((48, 32))] * 5, "mask": [PICTURE.resize((48, 32))] * 5}
        | {"reference_images": [PICTURE], "conditioning_scale": [1.0, 0.5]},
        {"cond", "uncond"},
    ),
    # Two segments of 5 frames, each a loop; the second begins with the last frame of the first.
    "wan-animate": (
        "wan-animate",
        wan_animate_pipeline,
        {"height": 32, "width": 48, "image": PICTURE, "segment_frame_length": 5, "prompt": None, "guidance_scale": 4.0}
        | {"prompt_embeds": text(512, 20), "negative_prompt_embeds": -text(512, 20)}
        | {"pose_video": FRAMES, "face_video": FRAMES[::-1]},
        {"cond", "uncond"},
    ),
    "qwen-image": ("qwen-image", qwen_image_pipeline, QWEN, {"cond", "uncond"}),
    "qwen-image-two": ("qwen-image", qwen_image_pipeline, QWEN | {"num_images_per_prompt": 2}, {"cond", "uncond"}),
    "qwen-image-edit": ("qwen-image-edit", qwen_image_edit_pipeline, QWEN | {"image": PICTURE}, {"cond", "uncond"}),
    "qwen-image-edit-plus": ("qwen-image-edit", EDIT_PLUS, QWEN | {"image": PICTURES}, {"cond", "uncond"}),
    "qwen-image-edit-2511": ("qwen-image-edit-2511", EDIT_PLUS, QWEN | {"image": PICTURES}, {"cond", "uncond"}),
    "qwen-image-2.1": ("qwen-image-2.1", qwen_image_21_pipeline, QWEN | {"width": 64, **QWEN_21}, {"cond", "uncond"}),
    "qwen-image-2.1-whole": (
        "qwen-image-2.1",
        qwen_image_21_pipeline,
        QWEN | {"height": 64, "prompt_embeds_mask": None, "true_cfg_scale": 1.0, "use_kv_cache": False, "width": 64},
        {"cond"},
    ),
    "pixart": ("pixart", pixart_pipeline, BINNED | {"height": 32, "width": 32}, {"0"}),
    "sana": ("sana", sana_pipeline, BINNED | {"height": 64, "width": 96}, {"0"}),
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
    "hunyuan-channels-away": (
        "hunyuan-channels",
        hunyuan_image_pipeline,
        {"height": 32, "width": 48, "num_frames": 5, "image": PICTURE, "prompt": None, **EMBEDDED}
        | {"negative_prompt_embeds": -text(6, 20), "negative_pooled_prompt_embeds": -text(16), "true_cfg_scale": 2.0}
        | {"negative_prompt_attention_mask": MASK},
        {"0", "1"},
    ),
    "hunyuan-replace": (
        "hunyuan-replace",
        hunyuan_image_pipeline,
        {"height": 32, "width": 48, "num_frames": 5, "image": PICTURE, "prompt": None, **EMBEDDED},
        {"0"},
    ),
    "hunyuan-1.5": ("hunyuan-1.5", hunyuan_15_pipeline, HUNYUAN_15 | {"height": 32, "width": 48}, PREDICTED),
    "hunyuan-1.5-i2v": ("hunyuan-1.5-i2v", hunyuan_15_image_pipeline, HUNYUAN_15 | {"image": PICTURE}, PREDICTED),
    "framepack": ("framepack", framepack_pipeline, FRAMEPACK, {"0"}),
    "framepack-guided": (
        "framepack",
        framepack_pipeline,
        FRAMEPACK
        | {"negative_prompt_embeds": -text(6, 20), "negative_pooled_prompt_embeds": -text(16), "true_cfg_scale": 2.0}
        | {"negative_prompt_attention_mask": MASK},
        {"0", "1"},
    ),
}


# Models that the pipelines want otherwise than the tests of graphs do.
MODELS = {
    "unguided": ("hunyuan-video", lambda: tiny_hunyuan(guidance=False, single=1)),
}


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """Pipelines that edit bring every picture to a megapixel; here to about 40 x 40 pixels."""
    for code in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        monkeypatch.setattr(code, "calculate_dimensions", partial(sides_of_area, code.calculate_dimensions))


def sides_of_area(original, area, ratio):
    return original(40 * 40, ratio)


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
    painted = pipe(num_inference_steps=steps, generator=generator, **options)[0]
    return painted[-1] if isinstance(painted, list) else painted  # FramePack: the frames so far, after every section


@pytest.mark.parametrize("case", CASES)
def test_all_full_is_the_untouched_pipeline(denoisers, case):
    name, build, options, branches = CASES[case]
    model, denoiser = denoisers(name)
    pipe = build(model)
    pipe.transformer = denoiser.as_transformer(interval=1)
    seen = Recorder(pipe.transformer)
    painted = paint(pipe, **options)
    with seen.retold_by(model):
        assert torch.equal(painted, paint(build(model), **options))
    seen.assert_plan(model, "FFFFF", 2)
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


# Without those that differ in a size alone; of FramePack each section is a loop.
@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith(("-picture", "-two"))])
def test_an_explicit_plan_is_executed(denoisers, case):
    """To its last step, in bfloat16 and with timesteps that a strong shift rounds to the first one; twice."""
    name, build, options, branches = CASES[case]
    model, denoiser = denoisers(name)
    plan = "F" * 2 + "." * 9 + "F"
    pipe = build(copy.deepcopy(model))
    pipe.transformer = denoiser.as_transformer(plan=plan)
    strong = {key: 60.0 for key in ("shift", "flow_shift") if key in pipe.scheduler.config}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **strong)
    pipe.to(torch.bfloat16)
    half = {n: v.bfloat16() if getattr(v, "dtype", None) == torch.float32 else v for n, v in options.items()}
    for seed in (0, 1):
        paint(pipe, len(plan), seed, **half)
        assert pipe.transformer.executed == dict.fromkeys(branches, plan)


def test_pictures_whose_keys_and_values_the_pipeline_keeps(denoisers):
    """FLUX.2 klein KV: pictures are ahead of the latent at the first step, and later calls bring what that returned."""
    model, denoiser = denoisers("flux2-kv")
    build = partial(flux2_pipeline, pipeline=Flux2KleinKVPipeline)
    options = FLUX2 | {"image": [PICTURE.resize((64, 64)), PICTURE.resize((96, 64))]}
    pipe, calls = build(model), []
    dropin = pipe.transformer = denoiser.as_transformer(interval=3, warmup=2)
    predict = dropin._predict
    dropin._predict = lambda latents, inputs: calls.append((latents, inputs, predict(latents, inputs))) or calls[-1][2]
    paint(pipe, steps=6, **options)
    assert dropin.executed == {"0": "FF..F."}
    latents, inputs, seen = zip(*calls, strict=True)
    constants = {name: inputs[0][name] for name in denoiser.constants}
    assert constants["image_latents"].shape[1] == 16 * 16 + 24 * 16  # tokens of 4 x 4 pixels
    timestep = torch.stack([given["timestep"][0] for given in inputs])
    expected = oracle.replay(model, torch.stack(latents), timestep, constants, "FF..F.", 2)
    assert_close(
        "klein KV", torch.cat([torch.stack(made) for made in seen]), expected, allowed(model, expected, "FF..F.", 2)
    )
    pipe.transformer = denoiser.as_transformer(interval=1)
    painted, untouched = paint(pipe, **options)[None], paint(build(model), **options)[None]
    # Every step adds its part of the picture, whose latents the pipeline scales at the end.
    scale = (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt().max().item()
    assert_close("its picture", painted, untouched, 5 * max(scale, 1.0) * allowed(model, untouched, "F", 0))
    given = {"img_ids": constants["img_ids"], "timestep": timestep[:1], "kv_cache_mode": "cached", "kv_cache": object()}
    with pytest.raises(
        StepError, match=r"expected `extract` with such rows at the first step and `cached` with what th"
    ):
        dropin(hidden_states=latents[0], **given)


def test_a_list_that_offloading_makes_anew_is_the_same(denoisers, monkeypatch):
    """Qwen-Image passes the places of its tokens as a list, of which model offloading makes another at every call."""
    name, build, options, branches = CASES["qwen-image"]
    model, denoiser = denoisers(name)
    pipe = build(model)
    pipe.transformer = denoiser.as_transformer(plan="FF..F")
    monkeypatch.setattr(accelerate.hooks, "send_to_device", lambda value, device: rebuilt(value))
    pipe.enable_model_cpu_offload(device="cpu")
    paint(pipe, 5, **options)
    assert pipe.transformer.executed == dict.fromkeys(branches, "FF..F")


def rebuilt(value):
    """New containers with the same tensors, as moving them to where they are."""
    if isinstance(value, dict):
        return {key: rebuilt(inner) for key, inner in value.items()}
    return type(value)(rebuilt(inner) for inner in value) if isinstance(value, list | tuple) else value


def test_the_second_expert_begins_with_a_full_step(denoisers):
    """Wan 2.2: each expert has its own drop-in, and the switch is a request of its own."""
    model, denoiser = denoisers("wan")
    pipe = wan_pipeline(model, model, 0.8)
    pipe.transformer, pipe.transformer_2 = (denoiser.as_transformer(interval=1) for _ in range(2))
    seen, second = Recorder(pipe.transformer), Recorder(pipe.transformer_2)
    painted = paint(pipe, **VIDEO, **GUIDED)
    seen.told += second.told
    assert second.told
    with seen.retold_by(model):
        assert torch.equal(painted, paint(wan_pipeline(model, model, 0.8), **VIDEO, **GUIDED))
    pipe.transformer, pipe.transformer_2 = (denoiser.as_transformer(interval=3, warmup=1) for _ in range(2))
    paint(pipe, steps=9, **VIDEO, **GUIDED)
    first, second = pipe.transformer.executed["cond"], pipe.transformer_2.executed["cond"]
    assert len(first + second) == 9
    assert first == "F..F..F.."[: len(first)]
    assert second == "F..F..F.."[: len(second)]
    assert pipe.transformer_2.executed["uncond"] == second


def tensors_of(denoiser, calls):
    """What `run --inputs` takes, from the first step's calls of a pipeline: its latents and conditioning."""
    constants, guidance = denoiser.constants, denoiser.manifest.sampling.guidance
    given = [{name: host_array(value) for name, value in inputs.items() if name in constants} for _, inputs in calls]
    if guidance == "batched":  # unconditional first, as most pipelines of diffusers have it
        order = (0, 1) if denoiser.manifest.pipeline.guidance_offset else (1, 0)
        axes = {name: tensor.shape.index("batch") for name, tensor in constants.items() if "batch" in tensor.shape}
        halves = {n: np.split(v, 2, axes[n]) if n in axes else (v, v) for n, v in given[0].items()}
        given = [{name: half[k] for name, half in halves.items()} for k in order]
    tensors = {name: value for name, value in given[0].items() if name != "guidance"}
    if guidance in ("batched", "branches") and len(given) > 1:
        tensors |= {NEGATIVE + name: value for name, value in given[1].items()}
    latents = calls[0][0]
    beside = condition_shape(denoiser.manifest, tuple(latents.shape))
    if beside is not None:
        axis = channel_axis(denoiser.manifest)
        begin, axis = (-beside[axis], axis) if beside[axis] < latents.shape[axis] else (0, 2)
        tensors[CONDITION] = latents[:1].narrow(axis, begin, beside[axis]).numpy()
    return tensors


# Without those that differ in a size alone, and guidance by a second call of a model that has it as an input.
@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith(("-picture", "-two", "-guided"))])
def test_run_does_what_the_pipeline_does(denoisers, case):
    """Noise, packing, clock, guidance, and what is joined to the latents: all steps full, from the same tensors."""
    name, build, options, _ = CASES[case]
    model, denoiser = denoisers(name)
    pipe = build(model)
    pipe.scheduler = diffusers_scheduler(denoiser.manifest)
    pipe.transformer = denoiser.as_transformer(interval=1)
    form, calls = pipe.transformer._form, []
    pipe.transformer._form = lambda latents, inputs: calls.append(form(latents, inputs)) or calls[-1]
    scale = options.get("true_cfg_scale", options.get("guidance_scale", denoiser.manifest.sampling.guidance_scale))
    told = {"guidance_scale": scale} if "guidance_scale" in signature(pipe.__call__).parameters else {}
    told |= {name: frames[:5] for name, frames in options.items() if name.endswith("_video")}  # one segment
    painted = paint(pipe, steps=4, **options | told)
    latents = calls[0][0]
    sizes = match(denoiser.latent.shape, tuple(latents.shape), {}, "latents")
    tokens = "height" in options and (denoiser.manifest.pipeline.packing > 1 or name == "z-image")
    token = 16 if name.startswith(("qwen-image", "krea-2")) else 4  # pixels of its side
    sides = tuple(int(options[side]) // token for side in ("height", "width")) if tokens else None
    asked = None if denoiser.manifest.sampling.guidance == "none" else scale
    request = tensor_request(denoiser, tensors_of(denoiser, calls), [0], sizes, sides, asked)
    if case == "framepack":  # it draws from the same generator to encode the picture, and adds the picture at the end
        request, painted = replace(request, latents=latents.numpy()), painted[:, :, 1:]
    if case == "cogvideox-image":  # it encodes the picture by the same generator
        request = replace(request, latents=latents[:1, :, : request.latents.shape[2]].numpy())
    made = torch.from_numpy(sample(denoiser, request, denoiser.forecasts(plan="FFFF")).latents)
    if name == "hunyuan-channels":
        made = made[:, :, 1:]  # the pipeline drops the picture
    if case == "wan-animate":  # the pipeline scales them for its VAE
        painted = scaled(pipe.vae, painted)
    if case == "flux2-base":  # the pipeline unpacks them
        painted = Flux2KleinPipeline._pack_latents(Flux2KleinPipeline._patchify_latents(painted))
    # Only the tables differ, prepared step by step and all at once; every step adds its part, guidance magnifies it.
    bound = 4 * (2 * scale if request.guided else 1) * allowed(model, painted[None], "F", 0)
    assert_close(case, made[None], painted[None], bound)


def executed_at_every_step(transformer, steps, **options):
    """(what was painted, what had run after each step) of FramePack."""
    pipe, ran = framepack_pipeline(transformer), []

    def note(pipe, step, timestep, given):
        ran.append(transformer.executed["0"])
        return given

    return paint(pipe, steps, callback_on_step_end=note, **FRAMEPACK | options), ran


def test_framepack_goes_from_section_to_section(denoisers):
    """Each section is a loop over other frames of the past, so it is a request of its own."""
    _, denoiser = denoisers("framepack")
    painted, ran = executed_at_every_step(denoiser.as_transformer(interval=3, warmup=1), 4, num_frames=10)
    assert ran == ["F", "F.", "F..", "F..F"] * 2
    assert painted.shape[2] == 1 + 2 * 2  # the picture, then two latent frames of each section


def test_framepack_in_half_precision_casts_its_past_at_every_step(tiny, monkeypatch):
    """New tensors of equal numbers are one request; other numbers are another."""
    monkeypatch.setattr(export, "check_options", lambda options: None)  # no engine of this test runs bfloat16
    checkpoint = open_checkpoint(str(tiny("framepack").folder), FAMILIES["framepack"])
    made = eager_denoiser(export.draft(checkpoint, export.Options(1, 3, 1, steps=4, precision="bf16")))
    half = {name: value.bfloat16() for name, value in FRAMEPACK.items() if name.endswith("embeds")}
    painted, ran = executed_at_every_step(made.as_transformer(), 4, **half)
    assert ran == ["F", "F.", "F..", "F..F"]
    told, _ = executed_at_every_step(made.as_transformer(plan="F..F"), 4, **half)
    assert torch.equal(painted, told) and painted.isfinite().all()
    dropin = made.as_transformer()
    latents, timestep, conditioning = tiny("framepack").inputs(3)
    past = conditioning.pop("latents_clean")
    for step, other in enumerate((past, past.clone(), past + 1)):
        dropin(latents[step].bfloat16(), timestep=timestep[step].expand(1), latents_clean=other, **conditioning)
        assert len(dropin.executed["0"]) == (1, 2, 1)[step]


def test_guidance_that_the_model_leaves_alone(denoisers):
    """HunyuanVideo's pipeline always passes it; a model without its embedder does not look at it."""
    model, denoiser = denoisers("unguided")
    options = VIDEO | {"prompt_template": {"template": "{}", "crop_start": 0}}
    pipe = hunyuan_pipeline(model)
    pipe.transformer = denoiser.as_transformer(interval=1)
    seen = Recorder(pipe.transformer)
    painted = paint(pipe, **options)
    with seen.retold_by(model):
        assert torch.equal(painted, paint(hunyuan_pipeline(model), **options))
    seen.assert_plan(model, "FFFFF", 2)


def test_one_timestep_for_each_token_if_they_are_equal(denoisers):
    """As Wan 2.2's 5B model has them from text: the untouched model computes each, the bundle one for all."""
    model, denoiser = denoisers("wan")
    painted = []
    for transformer in (model, denoiser.as_transformer(interval=1)):
        pipe = wan_pipeline(model)
        pipe.transformer = transformer
        pipe.register_to_config(expand_timesteps=True)
        painted.append(paint(pipe, 4, **VIDEO, **GUIDED)[None])
    assert transformer.executed == {"cond": "FFFF", "uncond": "FFFF"}
    bound = (
        4 * 2 * GUIDED["guidance_scale"] * allowed(model, painted[0], "F", 0)
    )  # of every step, magnified by guidance
    assert_close("wan, a timestep for each token", painted[1], painted[0], bound)


def test_timesteps_of_single_tokens_are_refused(denoisers):
    """As Wan 2.2's 5B model has them from a picture, whose frame is without noise."""
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


@pytest.mark.parametrize(
    ("name", "build", "given", "message"),
    [
        (
            "qwen-image-edit",
            qwen_image_pipeline,
            {},
            r"`hidden_states` has 6 rows and `img_shapes` pictures of 6, expected those of the noise .*; "
            "pass image= to the pipeline",
        ),
        (
            "qwen-image",
            EDIT_PLUS,
            {"image": PICTURES},
            r"argument `img_shapes` has 3 pictures a sample, expected 1, .*; leave the others out, or use a",
        ),
        (
            "qwen-image-edit",
            EDIT_PLUS,
            {"image": [PICTURE] * 5},
            r"size `pictures` is 6, expected 2 to 5; use such a size",
        ),
    ],
)
def test_as_many_pictures_as_the_model_takes(denoisers, name, build, given, message):
    model, denoiser = denoisers(name)
    pipe = build(model)
    pipe.transformer = denoiser.as_transformer()
    with pytest.raises(StepError, match=message):
        paint(pipe, **QWEN, **given)


def test_a_picture_for_a_model_of_text_alone(denoisers):
    model, denoiser = denoisers("hunyuan-1.5")
    pipe = hunyuan_15_image_pipeline(model)
    pipe.transformer = denoiser.as_transformer()
    with pytest.raises(StepError, match=r"has a picture in its channels from 4 on, expected zeros there, .*; use a pi"):
        paint(pipe, **HUNYUAN_15, image=PICTURE)


def test_a_request_from_tensors_says_what_is_wrong(denoisers):
    """Halves of one batch have one length; what is joined to the noise has its shape, and the noise its own."""
    _, denoiser = denoisers("sd3")
    texts = {"encoder_hidden_states": text(6, 24).numpy(), "pooled_projections": text(20).numpy()}
    longer = {NEGATIVE + "encoder_hidden_states": text(7, 24).numpy()}
    message = r"`text_tokens` of the `negative_` inputs is 7, expected 6 as of the others, .*; pad the shorter ones"
    with pytest.raises(ConfigError, match=message):
        tensor_request(denoiser, texts | longer, [0], guidance_scale=2.0)
    _, denoiser = denoisers("hunyuan-replace")
    whole = (1, int(denoiser.latent.shape[1]), 3, 4, 6)
    first = condition_shape(denoiser.manifest, whole)
    values = {name: np.zeros(1, np.float32) for name in denoiser.constants} | {"latents": np.zeros(whole, np.float32)}
    with pytest.raises(ConfigError, match=r"input `condition` is missing, expected FP32 \[-1, 4, 1, -1, -1\]; send it"):
        contract.ask(denoiser, "denoiser", values)
    with pytest.raises(ConfigError, match=r"`condition` is \[1, 4, 3, 4, 6\], expected \[1, 4, 1, 4, 6\]; prepare"):
        contract.ask(denoiser, "denoiser", values | {CONDITION: np.zeros(whole, np.float32)})
    wider = {"latents": np.zeros((1, 5, *whole[2:]), np.float32), CONDITION: np.ones(first, np.float32)}
    with pytest.raises(ConfigError, match=r"`latents` is \[1, 5, 3, 4, 6\], expected \[1, 4, 3, 4, 6\]; send them so"):
        contract.ask(denoiser, "denoiser", values | wider)
    asked = contract.ask(denoiser, "denoiser", values | {CONDITION: np.ones(first, np.float32)})
    assert asked.request.joined.axis == 2 and asked.request.negative is None


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("sd3", "block_controlnet_hidden_states"),
        ("sd3", "joint_attention_kwargs"),  # with `ip_hidden_states`, as its pipeline passes an IP-Adapter
        ("sd3", "skip_layers"),
        ("qwen-image", "controlnet_block_samples"),
    ],
)
def test_what_controlnets_and_image_prompts_pass_is_refused_by_name(denoisers, name, argument):
    transformer = denoisers(name)[1].as_transformer()
    given = {"ip_hidden_states": torch.zeros(1)} if argument.endswith("kwargs") else [torch.zeros(1)]
    with pytest.raises(StepError, match=rf"argument `{argument}` is given, expected only timestep, .*; leave it out"):
        transformer(torch.zeros(1), timestep=torch.tensor([500.0]), **{argument: given})
