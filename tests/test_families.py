"""Every family beyond FLUX and DiT, from one table: the numbers per step, and what a forecast step may read."""

# Shapes: S steps, B batch

from dataclasses import replace
from typing import NamedTuple

import oracle
import pytest
import torch
from diffusers.models.transformers import transformer_kandinsky
from harness import FLOAT32, TOY, allowed, as_arrays, begin, beside, eager_denoiser, open_slot, run, together
from oracle import assert_close

from taylorseer_export.bundle.shapes import names
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile import export
from taylorseer_export.errors import CheckpointError, ConfigError
from taylorseer_export.families import FAMILIES
from taylorseer_export.runtime.batch import SharedCalls, ids_of
from taylorseer_export.runtime.check import check_engines


class Row(NamedTuple):
    """What a test must know of a tiny model.

    Attributes:
        sizes: Sizes other than the usual ones: odd, another batch, more text than image tokens.
        dead: Inputs that must not reach a forecast step; all others must.
        light: Operators that are heavy elsewhere and serve moving rows here.
        fixed: Granularities whose forecast step reads something that a request fixes and no step changes.
    """

    sizes: tuple[dict, ...]
    dead: frozenset[str]
    light: frozenset[str] = frozenset()
    fixed: tuple[str, ...] = ()


PAST = ("latents_clean", "latents_history_2x", "latents_history_4x")
ROWS = {
    "hidream": Row(
        ({"batch": 1, "side": 2, "text_tokens": 9}, {"batch": 3, "side": 5}),
        frozenset({"encoder_hidden_states_t5", "encoder_hidden_states_llama3"}),
    ),
    "sd3": Row(
        ({"batch": 1, "height": 2, "width": 3, "text_tokens": 9}, {"batch": 3, "height": 5, "width": 7}),
        frozenset({"encoder_hidden_states"}),
    ),
    "qwen-image": Row(
        ({"batch": 1, "height": 2, "width": 3, "text_tokens": 9}, {"batch": 3, "height": 5, "width": 3}),
        frozenset({"encoder_hidden_states", "encoder_hidden_states_mask", "img_shapes"}),
    ),
    "flux2": Row(
        ({"batch": 1, "height": 2, "width": 3, "text_tokens": 9}, {"batch": 3, "height": 5, "width": 3}),
        frozenset({"encoder_hidden_states", "img_ids", "txt_ids"}),
    ),
    "flux2-base": Row(
        ({"batch": 1, "height": 3, "width": 2, "text_tokens": 9},),
        frozenset({"encoder_hidden_states", "img_ids", "txt_ids"}),
    ),
    "flux2-edit": Row(
        ({"batch": 1, "height": 2, "width": 3, "text_tokens": 9}, {"batch": 3, "pictures": ((5, 3),)}),
        frozenset({"encoder_hidden_states", "img_ids", "txt_ids", "image_latents", "image_ids"}),
    ),
    "flux2-kv": Row(
        ({"batch": 1, "height": 2, "width": 3, "text_tokens": 9}, {"batch": 3, "pictures": ((5, 3),)}),
        frozenset({"encoder_hidden_states", "img_ids", "txt_ids", "image_latents", "image_ids"}),
    ),
    "flux3": Row(
        ({"batch": 1, "height": 2, "width": 3, "text_tokens": 9}, {"batch": 3, "height": 5, "width": 3}),
        frozenset({"encoder_hidden_states", "img_ids", "txt_ids"}),
    ),
    "chroma": Row(
        ({"batch": 1, "height": 2, "width": 3, "text_tokens": 9}, {"batch": 3, "height": 5, "width": 3}),
        frozenset({"encoder_hidden_states", "attention_mask", "img_ids", "txt_ids"}),
    ),
    "pixart": Row(({"batch": 3, "text_tokens": 20},), frozenset({"encoder_hidden_states", "encoder_attention_mask"})),
    "sana": Row(
        ({"batch": 1, "height": 2, "width": 3, "text_tokens": 9}, {"batch": 3, "height": 5, "width": 3}),
        frozenset({"encoder_hidden_states", "encoder_attention_mask"}),
    ),
    # a multiple of 4 tokens
    "qwen-image-2.1": Row(
        ({"batch": 1, "height": 4, "width": 3, "text_tokens": 19}, {"batch": 3, "height": 2, "width": 10}),
        frozenset({"encoder_hidden_states", "encoder_hidden_states_mask", "img_shapes"}),
    ),
    "krea-2": Row(
        ({"batch": 1, "height": 2, "width": 3, "text_tokens": 9}, {"batch": 3, "height": 5, "width": 3}),
        frozenset({"encoder_hidden_states", "position_ids", "encoder_attention_mask"}),
        frozenset({"rms_norm"}),  # the final norm
    ),
    "ltx-2": Row(
        (
            {"batch": 1, "height": 2, "audio_tokens": 3, "text_tokens": 15},
            {"batch": 3, "frames": 3, "height": 1, "audio_tokens": 11},
        ),
        frozenset(f"{of}encoder_{it}" for of in ("", "audio_") for it in ("hidden_states", "attention_mask"))
        | {"video_coords", "audio_coords"},
    ),
    "ltx-2-image": Row(
        ({"batch": 3, "frames": 3, "height": 1, "audio_tokens": 11, "text_tokens": 15},),
        frozenset(f"{of}encoder_{it}" for of in ("", "audio_") for it in ("hidden_states", "attention_mask"))
        | {"audio_coords"},
        fixed=("module", "residual", "last"),  # which tokens are of the first frame, and what its timestep becomes
    ),
    **dict.fromkeys(
        ("longcat-image", "ovis-image"),
        Row(
            ({"batch": 1, "height": 2, "width": 3, "text_tokens": 9}, {"batch": 3, "height": 5, "width": 3}),
            frozenset({"encoder_hidden_states", "img_ids", "txt_ids"}),
        ),
    ),
    # 32 tokens, which need no padding, and more than 32 words
    "z-image": Row(
        ({"batch": 1, "height": 4, "width": 8, "text_tokens": 35}, {"batch": 3, "height": 5, "width": 3}),
        frozenset({"cap_feats", "cap_mask"}),
    ),
    **dict.fromkeys(
        ("qwen-image-edit", "qwen-image-edit-2511"),
        Row(
            (
                {"batch": 1, "height": 2, "width": 3, "text_tokens": 9, "pictures": ((2, 2),)},
                {"batch": 3, "height": 5, "width": 3, "pictures": ((3, 2), (4, 5), (2, 2))},
            ),
            frozenset({"encoder_hidden_states", "encoder_hidden_states_mask", "img_shapes", "image_latents"}),
        ),
    ),
    "kontext": Row(
        ({"batch": 1, "height": 2, "width": 3, "text_tokens": 9}, {"batch": 3, "height": 5, "width": 3}),
        frozenset({"encoder_hidden_states", "img_ids", "txt_ids", "image_latents", "image_ids"}),
    ),
    "framepack": Row(
        ({"batch": 1, "frames": 1, "height": 3}, {"width": 3, "text_tokens": 9}),
        frozenset({"encoder_hidden_states", "encoder_attention_mask", "image_embeds"})
        | {f"{index}{past}" for index in ("", "indices_") for past in PAST}
        | {"indices_latents"},
    ),
    "hunyuan": Row(
        ({"frames": 1, "height": 2, "width": 5, "text_tokens": 9}, {"batch": 3, "frames": 3, "height": 3}),
        frozenset({"encoder_hidden_states", "encoder_attention_mask"}),
    ),
    "hunyuan-channels": Row(({"frames": 3},), frozenset({"encoder_hidden_states", "encoder_attention_mask"})),
    "hunyuan-replace": Row(
        ({"frames": 1, "batch": 2}, {"frames": 4, "height": 2, "text_tokens": 9}),
        frozenset({"encoder_hidden_states", "encoder_attention_mask"}),
        frozenset({"cat"}),  # the first frame and the others have gates of their own
    ),
    "hunyuan-1.5": Row(
        (
            {"frames": 1, "height": 2, "width": 5, "text_tokens": 9, "glyph_tokens": 3},
            {"batch": 3, "frames": 3, "height": 4},
        ),
        frozenset({f"encoder_{it}{text}" for it in ("hidden_states", "attention_mask") for text in ("", "_2")}),
    ),
    "hunyuan-1.5-i2v": Row(
        ({"frames": 3},),
        frozenset({f"encoder_{it}{text}" for it in ("hidden_states", "attention_mask") for text in ("", "_2")})
        | {"image_embeds"},
    ),
    "wan": Row(
        ({"frames": 1, "height": 2, "width": 5, "text_tokens": 9}, {"batch": 3, "frames": 3, "height": 3}),
        frozenset({"encoder_hidden_states"}),
    ),
    "cogvideox": Row(
        (
            {"batch": 1, "frames": 1, "height": 3, "text_tokens": 9},
            {"batch": 3, "frames": 3, "height": 4, "width": 5, "text_tokens": 3},
        ),
        frozenset({"encoder_hidden_states", "image_rotary_emb"}),
    ),
    "kandinsky-5": Row(
        ({"frames": 1, "height": 2, "width": 5, "text_tokens": 9}, {"batch": 3, "frames": 3}),
        frozenset({"encoder_hidden_states", "scale_factor"}),
    ),
    "cogvideox-table": Row(({"batch": 3},), frozenset({"encoder_hidden_states"})),
    "cogvideox-image": Row(
        ({"batch": 3, "frames": 3, "text_tokens": 9},), frozenset({"encoder_hidden_states", "image_rotary_emb"})
    ),
    "wan-5b-image": Row(
        ({"batch": 3, "height": 2, "text_tokens": 9}, {"frames": 4, "height": 3, "width": 5}),
        frozenset({"encoder_hidden_states"}),
        frozenset({"cat"}),  # which tokens are of the first frame
        fixed=("module", "residual", "last"),  # what its timestep, 0, becomes
    ),
    "wan-vace": Row(
        ({"frames": 1, "height": 2, "width": 5, "text_tokens": 9}, {"batch": 3, "frames": 3, "height": 3}),
        frozenset({"encoder_hidden_states", "control_hidden_states"}),
        fixed=("module",),  # how strong the hints are
    ),
    "wan-animate": Row(
        ({"batch": 3, "height": 2}, {"frames": 5, "height": 3, "width": 5}),
        frozenset({"encoder_hidden_states", "encoder_hidden_states_image", "face_pixel_values"}),
        frozenset({"cat"}),  # the frame of the character, and the others with their pose
        fixed=("module", "residual"),  # the pose, as tokens
    ),
    "wan-image": Row(({"batch": 1, "frames": 3},), frozenset({"encoder_hidden_states", "encoder_hidden_states_image"})),
}
# Every granularity and every layout, not every pair of them: layouts differ behind the cut, granularities before it.
PAIRS = (("module", "snapshots"), ("module", "derivatives"), ("residual", "derivatives"), ("last", "snapshots"))
UNEVEN, ORDER = "FFF.F..F...F..", 2
HEAVY = frozenset(
    "scaled_dot_product_attention softmax topk gelu silu rms_norm sin cos cat embedding cumsum argsort".split()
)


@pytest.fixture(params=ROWS)
def name(request):
    return request.param


@pytest.mark.parametrize(("granularity", "layout"), PAIRS)
def test_parity_with_the_oracle(eager, tiny, name, granularity, layout):
    model, inputs = tiny(name).model, tiny(name).inputs(len(UNEVEN), batch=2)
    reference = oracle.replay(model, *inputs, UNEVEN, ORDER, granularity)
    seen = run(eager(name, granularity, layout), inputs, UNEVEN, ORDER)
    assert_close(f"{name} {granularity}", seen, reference, allowed(model, reference, UNEVEN, ORDER))


def test_onnx_runtime_equals_the_oracle(onnx, tiny, name):
    model, plan = tiny(name).model, "FF.F.."
    for sizes in ({"batch": 2}, *ROWS[name].sizes):
        inputs = tiny(name).inputs(len(plan), **sizes)
        reference = oracle.replay(model, *inputs, plan, ORDER)
        seen = run(onnx(name), inputs, plan, ORDER)
        assert_close(f"{name} {sizes}", seen, reference, allowed(model, reference, plan, ORDER))


def test_two_requests_share_their_calls(onnx, tiny, name):
    """As a server makes them: bit for bit what each gets alone, or not shared."""
    denoiser, plan, requests = onnx(name), "FF.F.", [tiny(name).inputs(5, seed=k) for k in range(2)]
    calls, slots = SharedCalls(denoiser), [open_slot(denoiser, inputs) for inputs in requests]
    for slot, inputs in zip(slots, requests, strict=True):
        begin(slot, inputs, plan, ORDER)
    assert len({ids_of(denoiser, as_arrays(inputs[2])) for inputs in requests}) == 1 and calls.most > 1
    seen, shared = [], 0
    for step in range(len(plan)):
        for slot, inputs in zip(slots, requests, strict=True):
            slot.stage(inputs[0][step].numpy(), others=beside(denoiser, inputs[2], step))
        done = calls.run(slots)
        shared += done
        if not done:
            for slot in slots:
                slot.run()
        seen.append([together(slot, slot.finish()) for slot in slots])
    assert shared + bool(calls.unequal) > 0
    for k, inputs in enumerate(requests):
        alone = run(denoiser, inputs, plan, ORDER).numpy()
        assert [both[k].tobytes() for both in seen] == [prediction.tobytes() for prediction in alone]


def test_the_parity_test_can_fail(eager, tiny, name):
    model, inputs = tiny(name).model, tiny(name).inputs(len(UNEVEN), batch=2)
    seen = run(eager(name), inputs, UNEVEN, ORDER)
    for other in ((UNEVEN, 1, "module"), (UNEVEN, ORDER, "residual")):
        reference = oracle.replay(model, *inputs, *other)
        with pytest.raises(AssertionError, match="differs by"):
            assert_close(str(other), seen, reference, allowed(model, reference, *other[:2]))


def test_other_sizes(eager, tiny, name):
    model = tiny(name).model
    for sizes in ROWS[name].sizes:
        inputs = tiny(name).inputs(5, **sizes)
        reference = oracle.replay(model, *inputs, "FF..F", 1)
        seen = run(eager(name), inputs, "FF..F", 1)
        assert_close(f"{name} {sizes}", seen, reference, allowed(model, reference, "FF..F", 1))


def test_all_full_is_the_untouched_model(eager, tiny, name):
    model, inputs = tiny(name).model, tiny(name).inputs(3, batch=2)
    latents, timestep, conditioning = inputs
    family = oracle.FAMILIES[type(model).__name__]
    given = [oracle.at(conditioning, step, dict(family.others)) for step in range(3)]
    with torch.no_grad():
        plain = [
            family.call(model, t.expand(2), hidden_states=x, **rest)
            for x, t, rest in zip(latents, timestep, given, strict=True)
        ]
    reference = torch.stack(plain)
    # Both are float32, so both may err by the bound.
    seen = run(eager(name), inputs, "FFF")
    assert_close(f"{name} all full", seen, reference, 2 * allowed(model, reference, "FFF", ORDER))


@pytest.mark.parametrize(("granularity", "layout"), PAIRS)
def test_the_check_at_load_lets_it_pass(eager, name, granularity, layout):
    denoiser = eager(name, granularity, layout)
    assert check_engines(denoiser.contract, denoiser.runner) is None


def changed(value):
    """Another value of the same kind."""
    return 1 - value if value.dtype == torch.int64 else value * 0.7 + 0.2


def test_what_reaches_a_forecast_step(eager, tiny, name):
    """Invariant 4: tokens of text and conditioning change nothing; whatever drives the modulation does."""
    inputs = tiny(name).inputs(2, batch=2)
    latents, timestep, conditioning = inputs

    def forecast(latent=latents[1], time=timestep[1], other=conditioning):
        denoiser = eager(name)
        slot = open_slot(denoiser, inputs)
        begin(slot, inputs, "F.", ahead=False)
        slot.step(latents[0].numpy(), float(timestep[0]), beside(denoiser, conditioning, 0))
        for key, value in as_arrays(other, denoiser.others).items():
            slot.memory.buffers[key].write(value)  # timesteps come one by one, so each step prepares from these
        made = slot.step(latent.numpy(), float(time), beside(denoiser, other, 1))
        return torch.from_numpy(together(slot, made))

    base = forecast()
    for key, value in conditioning.items():
        same = torch.equal(forecast(other={**conditioning, key: changed(value)}), base)
        assert same == (key in ROWS[name].dead), key
    assert not torch.equal(forecast(time=timestep[1] * 0.7), base)
    assert not torch.equal(forecast(latent=latents[1] + 0.1), base)


@pytest.mark.parametrize("granularity", ["module", "residual", "last"])
def test_forecast_has_no_attention_no_mlp_no_text(drafts, tiny, name, granularity):
    """Invariant 9, counted from the graph: the embedder and the head are the only products with weights."""
    pieces = drafts(name, granularity).split
    found = pieces.forecast.operators()
    assert {op: found[op] for op in HEAVY - ROWS[name].light if found[op]} == {}
    latents = sum(tensor.role == "latent" for tensor in pieces.forecast.inputs)
    assert found["linear"] + found["conv2d"] + found["conv3d"] == latents * (1 + (granularity != "last"))
    assert found["matmul"] == len(pieces.sites)
    fixed = {"constant"} if granularity in ROWS[name].fixed else set()
    assert {t.role for t in pieces.forecast.inputs} == {"latent", "step", "weights", "taylor_in"} | fixed
    kept = {size for t in pieces.forecast.inputs for entry in t.shape for size in names(entry)}
    assert not kept & {"text_tokens", "condition_tokens", "pictures", "glyph_tokens"}
    assert pieces.full.operators()["scaled_dot_product_attention"] > 0


def test_a_family_without_an_embedded_model_asks_for_one():
    with pytest.raises(CheckpointError, match=r"toy has no embedded model, expected --model; pass a diffusers folder"):
        open_checkpoint(None, TOY)


def test_cfg_in_one_batch_is_both_halves_alone(eager, tiny, name):
    """Invariant 7: a batch of two requests equals each of them alone; nothing crosses the batch."""
    inputs = tiny(name).inputs(6, batch=2)
    latents, timestep, conditioning = inputs
    both = run(eager(name), inputs, "FF..F.", 1)
    axes = {n: t.shape.index("batch") for n, t in eager(name).constants.items() if "batch" in t.shape}
    axes |= dict.fromkeys(eager(name).others, 1)
    for k in range(2):
        alone = {n: v.narrow(axes[n], k, 1) if n in axes else v for n, v in conditioning.items()}
        seen = run(eager(name), (latents[:, k : k + 1], timestep, alone), "FF..F.", 1)
        bound = 2 * allowed(tiny(name).model, both, "FF..F.", 1)
        assert_close(f"{name} half {k}", seen, both[:, k : k + 1], bound)
    assert FLOAT32 == both.dtype


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["snapshots", "derivatives"])
@pytest.mark.parametrize("granularity", ["module", "residual", "last"])
def test_bfloat16_with_parts_kept_in_float32(tiny, traced, monkeypatch, granularity, layout):
    """Wan gates in float32, casts its residual after every addition, and hands it to the final norm in float32."""
    monkeypatch.setattr(export, "check_options", lambda options: None)  # no engine of this test runs bfloat16
    options = export.Options(
        order=1,
        interval=4,
        warmup=2,
        precision="bf16",
        granularity=granularity,
        layout=layout,
        guards=("cg", "fbcache"),
    )
    made = export.draft(traced("wan", options), options)
    assert made.stored["blocks.0.scale_shift_table"][0] == torch.float32
    assert made.stored["blocks.0.ffn.net.2.weight"][0] == torch.bfloat16
    sites = ["blocks.attn1", "blocks.ffn", "ungated"]
    assert list(made.split.sites) == (sites if granularity == "module" else [granularity])
    model, inputs = tiny("wan").model, tiny("wan").inputs(8, batch=2)
    reference = oracle.replay(model, *inputs, "FFF..F..", 1, granularity)
    limit = oracle.bound(reference, oracle.gains("FFF..F..", 1), torch.bfloat16, *oracle.extent(model))
    seen = run(eager_denoiser(made), inputs, "FFF..F..", 1)
    assert 0.01 < assert_close("bfloat16", seen, reference, limit)


@pytest.mark.slow
def test_without_its_rounding_kandinsky_5_is_as_exact_as_any(tiny, monkeypatch):
    """What its code rounds to bfloat16, queries and keys, is all that its bound is wider for."""
    monkeypatch.setattr(transformer_kandinsky, "torch", Unrounded())
    family, model, inputs = FAMILIES["kandinsky-5"], tiny("kandinsky-5").model, tiny("kandinsky-5").inputs(8, batch=2)
    made = export.draft(open_checkpoint(str(tiny("kandinsky-5").folder), family), export.Options(ORDER, 4, 2))
    reference = oracle.replay(model, *inputs, "FFF..F..", ORDER)
    depth, length, rounded = oracle.extent(model)
    limit = oracle.bound(reference, oracle.gains("FFF..F..", ORDER), FLOAT32, depth, length)
    assert rounded and assert_close("unrounded", run(eager_denoiser(made), inputs, "FFF..F..", ORDER), reference, limit)


class Unrounded:
    """torch, where bfloat16 is float32."""

    def __getattr__(self, name):
        return torch.float32 if name == "bfloat16" else getattr(torch, name)


@pytest.mark.slow
def test_two_experts_begin_with_a_full_step_each(eager, tiny):
    """Wan 2.2: `transformer` and `transformer_2` are two bundles, so the switch forces a full step."""
    latents, timestep, conditioning = tiny("wan").inputs(9)
    experts = [eager("wan").as_transformer() for _ in range(2)]
    seen = []
    for step, (x, t) in enumerate(zip(latents, timestep, strict=True)):
        expert = experts[step >= 4]
        for branch in ("cond", "uncond"):
            with expert.cache_context(branch):
                seen.append(expert(hidden_states=x, timestep=t.expand(1), return_dict=False, **conditioning)[0])
    assert [set(expert.executed.values()) for expert in experts] == [{"FF.."}, {"FF..."}]
    alone = run(eager("wan"), (latents[4:], timestep[4:], conditioning), "FF...")
    limit = 2 * allowed(tiny("wan").model, alone, "FF...", ORDER)  # prepared step by step, and all at once
    for branch in (0, 1):
        assert_close(f"branch {branch}", torch.stack(seen[8 + branch :: 2]), alone, limit)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"task_type": "sr"}, r"`task_type` is sr, expected t2v or i2v; pass another model"),
        (
            {"use_meanflow": True},
            r"`use_meanflow` is true, expected false; this family covers no model that is told the time",
        ),
    ],
)
def test_a_video_model_of_another_kind_is_refused(config, sentence):
    with pytest.raises(ConfigError, match=sentence):
        FAMILIES["hunyuan-video-1.5"].inputs({"task_type": "t2v", "patch_size": 1, **config})


@pytest.mark.parametrize(
    ("task", "size", "shift", "latent"),
    [("t2v", 640, 5.0, 30), ("i2v", 640, 5.0, 30), ("t2v", 960, 9.0, 45), ("i2v", 960, 7.0, 45)],
)
def test_the_config_says_which_video_model_it_is(task, size, shift, latent):
    """The shifts of diffusers' conversion script; from text the latent is the noise alone."""
    family = FAMILIES["hunyuan-video-1.5"]
    family = replace(family, **family.by_config({"task_type": task, "target_size": size}))
    assert (family.scheduler_config["shift"], family.latent_size[1]) == (shift, latent)
    assert family.pipeline.arguments == ("noise-alone" if task == "t2v" else "declared")
