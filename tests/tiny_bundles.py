"""Which tiny models the tests share, and with what options they are exported; every one is written by `conftest.once`.

Whatever decides the bytes of a kept bundle stands here or in `tools/tiny_models.py`, since both are part of its key.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tiny_models import MODELS, of_families
from tiny_pipelines import (
    LAYERS,
    dit_pipeline,
    flux_pipeline,
    kontext_pipeline,
    wan_animate_pipeline,
    wan_image_pipeline,
    wan_pipeline,
    wan_vace_pipeline,
    whole_chroma,
    whole_cogvideox,
    whole_cogvideox_image,
    whole_flux2,
    whole_flux2_base,
    whole_flux2_kv,
    whole_flux3,
    whole_framepack,
    whole_hidream,
    whole_hunyuan,
    whole_hunyuan_15,
    whole_hunyuan_15_image,
    whole_hunyuan_image,
    whole_kandinsky_5,
    whole_kandinsky_5_picture,
    whole_krea_2,
    whole_longcat_image,
    whole_ovis_image,
    whole_pixart,
    whole_qwen_image,
    whole_qwen_image_21,
    whole_qwen_image_edit,
    whole_qwen_image_edit_plus,
    whole_sana,
    whole_sd3,
    whole_wan_5b_image,
    whole_z_image,
)

from taylorseer_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from taylorseer_export.compile.export import Options, Traced, draft, trace_model, write_bundle
from taylorseer_export.compile.parts import parts_asked, parts_of
from taylorseer_export.families import FAMILIES

# The only ONNX exports of the graph and engine tests; each takes many seconds.
BUNDLES = {
    "flux": {"layout": "snapshots", "guards": ("cg", "fbcache", "teacache")},
    "dit": {"layout": "derivatives", "guards": ("cg",)},
    # Static but for the text.
    "plain": {"granularity": "last", "latent_size": (4, 6), "batch": 2, "guards": ("cg", "teacache")},
}

# The only packages compiled for the engine tests; each takes half a minute.
PACKAGES = {
    "plain": {"engine": "inductor", "guards": ("cg", "fbcache")},
    "dit": {"engine": "inductor", "granularity": "residual", "layout": "derivatives", "precision": "bf16", "batch": 2},
}

# What engine tests build where there is a GPU; `on_gpu` says what each of them needs.
ON_GPU = {
    ("inductor", "flux"): {},
    ("inductor", "dit"): {"granularity": "residual", "layout": "derivatives", "precision": "bf16", "batch": 2},
    ("onnxruntime", "flux"): {},
    ("onnxruntime", "dit"): {"layout": "derivatives"},
    ("tensorrt-rtx", "flux"): {},
    ("tensorrt-rtx", "dit"): {"layout": "derivatives", "precision": "bf16"},
    ("tensorrt", "flux"): {},
    ("tensorrt", "dit"): {"layout": "derivatives", "precision": "bf16"},
    ("torch-tensorrt", "flux"): {},
}

# Name -> (family, what its export changes), of the embedded models; as `taylorseer-export <family>` makes them.
EMBEDDED: dict[str, tuple[str, dict[str, Any]]] = {
    "digits": ("dit", {"order": 2}),
    "adapted": ("dit", {"order": 2, "lora_rank": 4}),
    "residual-digits": ("dit", {"order": 2, "granularity": "residual", "guards": ("cg",)}),
    "shapes": ("flux", {}),
    "fp8-shapes": ("flux", {"weights": "fp8", "granularity": "last", "parts": ()}),
    "videos": ("wan", {}),
}

# Name of `MODELS` -> its transformer -> the pipeline around it, of those that are exported whole.
WHOLE = {
    "flux": flux_pipeline,
    "kontext": kontext_pipeline,
    "flux2": whole_flux2,
    "flux2-base": whole_flux2_base,
    "flux2-kv": whole_flux2_kv,
    "flux3": whole_flux3,
    "sd3": whole_sd3,
    "chroma": whole_chroma,
    "z-image": whole_z_image,
    "qwen-image": whole_qwen_image,
    "qwen-image-edit": whole_qwen_image_edit,
    "qwen-image-edit-2511": whole_qwen_image_edit_plus,
    "hidream": whole_hidream,
    "longcat-image": whole_longcat_image,
    "ovis-image": whole_ovis_image,
    "krea-2": whole_krea_2,
    "qwen-image-2.1": whole_qwen_image_21,
    "pixart": whole_pixart,
    "sana": whole_sana,
    "dit": dit_pipeline,
    "wan": wan_pipeline,
    "wan-image": wan_image_pipeline,
    "wan-animate": wan_animate_pipeline,
    "wan-5b-image": whole_wan_5b_image,
    "wan-vace": wan_vace_pipeline,
    "cogvideox": whole_cogvideox,
    "cogvideox-image": whole_cogvideox_image,
    "hunyuan": whole_hunyuan,
    "hunyuan-channels": whole_hunyuan_image,
    "hunyuan-replace": whole_hunyuan_image,
    "framepack": whole_framepack,
    "kandinsky-5": whole_kandinsky_5,
    "kandinsky-5-t2i": whole_kandinsky_5_picture,
    "hunyuan-1.5": whole_hunyuan_15,
    "hunyuan-1.5-i2v": whole_hunyuan_15_image,
}

# Another family than that of the transformer alone: this one goes by pictures.
WHOLE_AS = {"flux2-base": "flux2-edit"}
# Latent pixels of whole bundles that have one size.
WHOLE_SIZES = {"qwen-image": (4, 6)}
# Pixels that pictures are brought to for the VAE and for the text encoder, where published models have a megapixel.
WHOLE_AREAS = {"qwen-image-edit": (160 * 192, 160 * 192), "qwen-image-edit-2511": (96 * 96, 160 * 192)}
# Latent pixels that others of any size are quoted at: servers warm up there, and that of published models' videos is
# gigabytes of attention even in a tiny transformer.
WHOLE_USUAL = {
    "flux2": (8, 12),
    "flux2-base": (32, 48),  # the pictures that it goes by are no smaller
    "flux2-kv": (32, 48),
    "flux3": (8, 12),
    "sd3": (8, 12),
    "chroma": (8, 12),
    "z-image": (8, 12),
    "hidream": (8, 8),
    "longcat-image": (8, 12),
    "ovis-image": (10, 14),
    "krea-2": (4, 6),
    "qwen-image-2.1": (8, 12),
    "pixart": (16, 16),
    "sana": (3, 5),
    "qwen-image-edit": (8, 12),
    "qwen-image-edit-2511": (8, 12),
    "wan": (2, 4, 6),
    "wan-image": (2, 4, 6),
    "wan-animate": (3, 4, 6),
    "wan-5b-image": (2, 4, 6),
    "wan-vace": (2, 4, 6),
    "cogvideox": (3, 4, 6),
    "cogvideox-image": (4, 4, 6),
    "hunyuan": (2, 4, 6),
    "hunyuan-channels": (3, 4, 6),
    "hunyuan-replace": (3, 4, 6),
    "framepack": (2, 16, 24),
    "kandinsky-5": (2, 4, 6),
    "kandinsky-5-t2i": (4, 6),
    "hunyuan-1.5": (2, 2, 3),
    "hunyuan-1.5-i2v": (2, 2, 3),
}


def _tensorrt_rtx() -> dict[tuple[str, str], dict[str, Any]]:
    """(name, precision) -> what TensorRT-RTX builds: every family's smallest model.

    A latent and a batch of one size that the tiny model takes, which is cheaper; the text, if any, and the steps stay
    ranges. FLUX's and the DiT's are built in float16 too, FLUX's there with every size symbolic. Both have a guard in
    bfloat16, and with it the graphs `probe` and `rest`: two kinds of blocks, and guidance in one call.

    Each is built for one generation of GPU and without a search for the fastest kernels, but for one that is built as
    the command line does by itself: what is parsed, typed and named is the same, and the builder's time falls. All but
    the DiT's hold nvfp4 where they are of bfloat16, and list their layers: their unquantised layers are typed as well.
    """
    names = of_families() | {"flux": "plain"}
    made: dict[tuple[str, str], dict[str, Any]] = {("plain", "fp16"): {}, ("dit", "fp16"): {}}
    for family, name in names.items():
        latent = {"latent_size": (16, 16) if len(FAMILIES[family].latent_size) == 2 else (5, 16, 16)}
        guards = {"guards": ("cg",)} if name in ("plain", "dit") else {}
        # The DiT knows no other size than its own.
        made[name, "bf16"] = {"batch": 2, **({} if name == "dit" else latent), **guards}
        if name != "dit":
            made[name, "bf16"]["weights"] = "nvfp4"
    quick = {"gpu-arch": "8.9", "builder-optimization-level": 0}
    listed = {**quick, "gpu-arch": "12.0", "profiling-verbosity": "detailed"}
    how = {case: listed if "weights" in more else quick for case, more in made.items()} | {("dit", "fp16"): {}}
    return {case: {**more, "engine_options": how[case]} for case, more in made.items()}


TENSORRT_RTX = _tensorrt_rtx()


def options_of(granularity="module", layout="snapshots", order=2, **changes) -> Options:
    """Options of a draft of a tiny model."""
    return Options(order=order, interval=4, warmup=2, steps=20, granularity=granularity, layout=layout, **changes)


def trace_of(name: str, folder: Path, options: Options) -> Traced:
    """The tiny model `name`, saved in `folder`, traced in the precision of `options`."""
    return trace_model(open_checkpoint(str(folder), FAMILIES[MODELS[name][0]]), options)


def embedded(name: str) -> tuple[Checkpoint, Options]:
    """The checkpoint and the options of an entry of `EMBEDDED`: the family's defaults, with its changes."""
    family, changes = EMBEDDED[name]
    checkpoint = open_checkpoint(None, FAMILIES[family])
    default, of_this = FAMILIES[family].defaults, checkpoint.family.defaults
    usual = {"order": default.order, "interval": default.interval, "warmup": default.warmup, "steps": of_this.steps}
    usual["parts"] = parts_asked(checkpoint, whole=False)
    return checkpoint, Options(**(usual | changes))


def write_whole(name: str, folder: Path) -> Path:
    """The bundle of an entry of `WHOLE` with all its parts, and the pipeline beside it in `folder`."""
    family, build, _ = MODELS[name]
    family = WHOLE_AS.get(name, family)
    WHOLE[name](build()).save_pretrained(folder / "pipeline")
    if name in WHOLE_USUAL:
        (folder / "pipeline" / "card.json").write_text(json.dumps({"latent_size": WHOLE_USUAL[name]}))
    checkpoint = open_checkpoint(str(folder / "pipeline"), FAMILIES[family])
    whole = checkpoint.family.whole
    assert whole is not None
    # It sees pictures at their own size, since those of published models take minutes.
    changes: dict[str, Any] = {"seen_at": ()}
    if isinstance(whole.encode, partial) and whole.encode.args:  # of some layers
        changes["encode"] = partial(whole.encode.func, LAYERS)
    if name in WHOLE_AREAS:
        area, read = WHOLE_AREAS[name]
        changes |= {"area": area, "read": replace(whole.read, area=read)}
    if whole.cropped:
        changes["cropped"] = 64
    checkpoint = replace(checkpoint, family=replace(checkpoint.family, whole=replace(whole, **changes)))
    parts, latent = parts_of(checkpoint), WHOLE_SIZES.get(name)
    return write_bundle(draft(checkpoint, options_of(latent_size=latent, parts=parts)), folder, "whole")


def write_embedded(name: str, folder: Path) -> Path:
    """The bundle of an embedded model in `folder`, named as the command line names it."""
    checkpoint, options = embedded(name)
    return write_bundle(draft(checkpoint, options), folder, "tiny")
