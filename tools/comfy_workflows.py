"""Write the example workflows of the ComfyUI nodes, one for each family that ComfyUI has a model of.

    python tools/comfy_workflows.py

A workflow is described as ComfyUI's API takes it, node by node; the file for its canvas is that with places and links.
`tests/test_comfy_workflows.py` holds the files to this description, and with `COMFYUI_PATH` to ComfyUI's own nodes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "taylorseer_export" / "comfy" / "example_workflows"

Prompt = dict[str, dict[str, Any]]

# Class -> its inputs that are connections, with their types; its widgets, in order; its outputs with their types.
# `*` among the widgets is what the canvas puts behind a seed.
NODES: dict[str, tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]] = {
    "TaylorSeerLoadBundle": ({}, ("bundle", "device"), ("MODEL",)),
    "TaylorSeerPlan": (
        {"model": "MODEL"},
        ("interval", "warmup", "order", "plan", "profile", "guard", "threshold"),
        ("MODEL",),
    ),
    "TaylorSeerReport": ({"model": "MODEL", "samples": "LATENT"}, (), ("LATENT", "STRING")),
    "PreviewAny": ({"source": "*"}, (), ()),
    "ModelSamplingAuraFlow": ({"model": "MODEL"}, ("shift",), ("MODEL",)),
    "ModelSamplingSD3": ({"model": "MODEL"}, ("shift",), ("MODEL",)),
    "CLIPLoader": ({}, ("clip_name", "type", "device"), ("CLIP",)),
    "DualCLIPLoader": ({}, ("clip_name1", "clip_name2", "type", "device"), ("CLIP",)),
    "TripleCLIPLoader": ({}, ("clip_name1", "clip_name2", "clip_name3"), ("CLIP",)),
    "CLIPTextEncode": ({"clip": "CLIP"}, ("text",), ("CONDITIONING",)),
    "FluxGuidance": ({"conditioning": "CONDITIONING"}, ("guidance",), ("CONDITIONING",)),
    "ConditioningZeroOut": ({"conditioning": "CONDITIONING"}, (), ("CONDITIONING",)),
    "EmptySD3LatentImage": ({}, ("width", "height", "batch_size"), ("LATENT",)),
    "EmptyHunyuanLatentVideo": ({}, ("width", "height", "length", "batch_size"), ("LATENT",)),
    "KSampler": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        ("seed", "*", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
        ("LATENT",),
    ),
    "VAELoader": ({}, ("vae_name",), ("VAE",)),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, (), ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE"}, ("filename_prefix",), ()),
    "SaveAnimatedWEBP": ({"images": "IMAGE"}, ("filename_prefix", "fps", "lossless", "quality", "method"), ()),
}

_PLAN = {"interval": -1, "warmup": -1, "order": -1, "plan": "", "profile": "", "guard": "none", "threshold": 0.0}
_CAT = "a red fox asleep on a mossy stone, morning light"
_SEA = "waves break on a dark beach at dusk, the camera moves slowly to the left"
_STILL = {"class_type": "SaveImage", "inputs": {"filename_prefix": "taylorseer", "images": ["decode", 0]}}
_VIDEO = {
    "class_type": "SaveAnimatedWEBP",
    "inputs": {
        "images": ["decode", 0],
        "filename_prefix": "taylorseer",
        "fps": 16.0,
        "lossless": False,
        "quality": 90,
        "method": "default",
    },
}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """One of a prompt."""
    return {"class_type": kind, "inputs": inputs}


def workflow(
    bundle: str,
    clip: dict[str, Any],
    vae: str,
    latent: dict[str, Any],
    save: dict[str, Any],
    steps: int,
    text: str,
    cfg: float = 1.0,
    negative: str | None = None,
    guidance: float | None = None,
    sampling: tuple[str, float] | None = None,
) -> Prompt:
    """From a bundle to a picture or video; without a negative text there is one branch."""
    prompt = {
        "load": node("TaylorSeerLoadBundle", bundle=bundle, device="default"),
        "plan": node("TaylorSeerPlan", model=["load", 0], **_PLAN),
        "clip": clip,
        "text": node("CLIPTextEncode", text=text, clip=["clip", 0]),
    }
    model, positive = "plan", "text"
    if sampling is not None:
        prompt["sigmas"] = node(sampling[0], shift=sampling[1], model=["plan", 0])
        model = "sigmas"
    if guidance is not None:
        prompt["guidance"] = node("FluxGuidance", guidance=guidance, conditioning=["text", 0])
        positive = "guidance"
    if negative is None:
        prompt["negative"] = node("ConditioningZeroOut", conditioning=["text", 0])
    else:
        prompt["negative"] = node("CLIPTextEncode", text=negative, clip=["clip", 0])
    prompt["latent"] = latent
    prompt["sampler"] = node(
        "KSampler",
        seed=1,
        steps=steps,
        cfg=cfg,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
        model=[model, 0],
        positive=[positive, 0],
        negative=["negative", 0],
        latent_image=["latent", 0],
    )
    prompt["report"] = node("TaylorSeerReport", model=[model, 0], samples=["sampler", 0])
    prompt["said"] = node("PreviewAny", source=["report", 1])
    prompt["vae"] = node("VAELoader", vae_name=vae)
    prompt["decode"] = node("VAEDecode", samples=["report", 0], vae=["vae", 0])
    prompt["save"] = save
    return prompt


def picture(width: int = 1024, height: int = 1024) -> dict[str, Any]:
    """Latents of a picture."""
    return node("EmptySD3LatentImage", width=width, height=height, batch_size=1)


def video(width: int, height: int, length: int) -> dict[str, Any]:
    """Latents of a video."""
    return node("EmptyHunyuanLatentVideo", width=width, height=height, length=length, batch_size=1)


def two(first: str, second: str, kind: str) -> dict[str, Any]:
    """Two text encoders."""
    return node("DualCLIPLoader", clip_name1=first, clip_name2=second, type=kind, device="default")


def one(name: str, kind: str) -> dict[str, Any]:
    """One text encoder."""
    return node("CLIPLoader", clip_name=name, type=kind, device="default")


def workflows() -> dict[str, Prompt]:
    """Family -> its workflow, with the file names of ComfyUI's own examples."""
    clips = ("clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors")
    three = node("TripleCLIPLoader", **{f"clip_name{k}": name for k, name in enumerate(clips, 1)})
    qwen = one("qwen_2.5_vl_7b_fp8_scaled.safetensors", "qwen_image")
    umt5 = one("umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan")
    llava = two("clip_l.safetensors", "llava_llama3_fp8_scaled.safetensors", "hunyuan_video")
    flux = two("clip_l.safetensors", "t5xxl_fp16.safetensors", "flux")
    ugly = "blurred, low quality"
    return {
        "flux": workflow(
            "flux.1-dev", flux, "ae.safetensors", picture(), _STILL, steps=50, text=_CAT, guidance=3.5
        ),
        "sd3": workflow(
            "stable-diffusion-3.5-large", three, "sd3_vae.safetensors", picture(), _STILL, 28, _CAT, 4.5, ugly
        ),
        "qwen-image": workflow(
            "qwen-image", qwen, "qwen_image_vae.safetensors", picture(1328, 1328), _STILL, 50, _CAT, 4.0, ugly,
            sampling=("ModelSamplingAuraFlow", 3.1),
        ),
        "wan": workflow(
            "wan2.1-t2v-14b", umt5, "wan_2.1_vae.safetensors", video(832, 480, 81), _VIDEO, 50, _SEA, 5.0, ugly,
            sampling=("ModelSamplingSD3", 3.0),
        ),
        "hunyuan-video": workflow(
            "hunyuanvideo", llava, "hunyuan_video_vae_bf16.safetensors", video(848, 480, 73), _VIDEO, 50, _SEA,
            guidance=6.0, sampling=("ModelSamplingSD3", 7.0),
        ),
    }  # fmt: skip


def canvas(prompt: Prompt) -> dict[str, Any]:
    """The file that ComfyUI's canvas opens, nodes in columns by how far they are from what has no input."""
    numbers = {name: k for k, name in enumerate(prompt, 1)}
    sources = {
        name: {key: value for key, value in entry["inputs"].items() if isinstance(value, list)}
        for name, entry in prompt.items()
    }
    depths: dict[str, int] = {}
    for name in prompt:
        depths[name] = 1 + max((depths[source] for source, _ in sources[name].values()), default=-1)
    links: list[list[Any]] = []
    made, heights = [], dict.fromkeys(depths.values(), 0)
    for name, entry in prompt.items():
        connections, widgets, outputs = NODES[entry["class_type"]]
        inputs = []
        for slot, (key, kind) in enumerate(connections.items()):
            source, index = sources[name][key]
            links.append([len(links) + 1, numbers[source], index, numbers[name], slot, kind])
            inputs.append({"name": key, "type": kind, "link": len(links)})
        values = ["fixed" if widget == "*" else entry["inputs"][widget] for widget in widgets]
        tall = (
            30
            + 24 * len(widgets)
            + 20 * max(len(inputs), len(outputs))
            + 90 * ("text" in widgets or entry["class_type"] == "PreviewAny")
        )
        column = depths[name]
        made.append(
            {
                "id": numbers[name],
                "type": entry["class_type"],
                "pos": [340 * column, heights[column]],
                "size": [310, tall],
                "flags": {},
                "order": numbers[name] - 1,
                "mode": 0,
                "inputs": inputs,
                "outputs": [{"name": kind, "type": kind, "links": []} for kind in outputs],
                "properties": {"Node name for S&R": entry["class_type"]},
                "widgets_values": values,
            }
        )
        heights[column] += tall + 70
    for number, start, index, *_ in links:
        made[start - 1]["outputs"][index]["links"].append(number)
    return {
        "last_node_id": len(made),
        "last_link_id": len(links),
        "nodes": made,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def text_of(prompt: Prompt) -> str:
    """A file."""
    return json.dumps(canvas(prompt), indent=1) + "\n"


def main() -> None:
    """Write them all."""
    FOLDER.mkdir(exist_ok=True)
    for family, prompt in workflows().items():
        (FOLDER / f"{family}.json").write_text(text_of(prompt))
        print(f"wrote {FOLDER / family}.json")


if __name__ == "__main__":
    main()
