"""A FLUX-shaped diffusers checkpoint of any size with random weights, written tensor by tensor.

    python tools/make_asset.py random-checkpoint flux --parameters 4e9 --dtype bf16 --shards 5 --out DIR

Shapes come from the model built on the meta device, so a checkpoint far larger than the memory can be made: at no time
is there more than one tensor. For what depends on sizes and not on what a picture looks like: memory, time, disk.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import torch
from tqdm import tqdm

from taylorseer_export.compile.weights import write_weights

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
HEAD = 128  # channels of one attention head
DEVIATION = 0.02  # of the weights, dimensionless
FP8_DEVIATION = 64.0  # of the values that a scale multiplies
_FILE = "diffusion_pytorch_model"


def flux_config(double: int, single: int, heads: int = 24, text: int = 4096, pooled: int = 768) -> dict[str, object]:
    """The config.json of FLUX.1-dev with another number of blocks, and of heads where asked."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": HEAD,
        "axes_dims_rope": [16, 56, 56],
        "guidance_embeds": True,
        "in_channels": 64,
        "joint_attention_dim": text,
        "num_attention_heads": heads,
        "num_layers": double,
        "num_single_layers": single,
        "out_channels": None,
        "patch_size": 1,
        "pooled_projection_dim": pooled,
    }


def shapes_of(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, in the order of the model; allocates nothing."""
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel

    with init_empty_weights():
        model = FluxTransformer2DModel.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    """Parameters, dimensionless."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def blocks_for(parameters: float, heads: int = 24) -> tuple[int, int]:
    """(double, single) blocks whose model comes closest to `parameters`, with about two single per double as FLUX.1."""
    one, two, both = (count(shapes_of(flux_config(d, s, heads))) for d, s in ((1, 1), (2, 1), (1, 2)))
    per_double, per_single = two - one, both - one
    wanted = parameters - (one - per_double - per_single)
    usual = round(wanted / (per_double + 2 * per_single))
    choices = [
        (double, max(1, round((wanted - double * per_double) / per_single)))
        for double in range(max(1, usual - 1), max(1, usual + 1) + 1)
    ]
    return min(choices, key=lambda c: abs(c[0] * per_double + c[1] * per_single - wanted))


def write_checkpoint(
    folder: Path, config: dict[str, object], dtype: torch.dtype, shards: int = 1, seed: int = 0, quiet: bool = False
) -> int:
    """Write config.json, the shards and their index; returns the number of parameters.

    In float8 every matrix has one scale beside it, as ComfyUI publishes them, and what is no matrix is bfloat16.

    Args:
        folder: Where; made if missing.
        config: From `flux_config`.
        dtype: Of every tensor.
        shards: Safetensors files, of about equal size.
        seed: Of the weights; a tensor's values depend on it and on the tensor's name alone.
        quiet: Whether to leave out the progress bar.
    """
    shapes = shapes_of(config)
    total = count(shapes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    scaled = dtype == torch.float8_e4m3fn
    kinds = {n: dtype if len(shape) > 1 or not scaled else torch.bfloat16 for n, shape in shapes.items()}
    scales = {f"{n.removesuffix('.weight')}.scale_weight": n for n, kind in kinds.items() if scaled and kind == dtype}

    def read(name: str) -> torch.Tensor:
        if name in scales:
            return torch.tensor(DEVIATION / FP8_DEVIATION)
        if name.endswith(".bias"):
            return torch.zeros(shapes[name], dtype=kinds[name])
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name], dtype=kinds[name])
        generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
        made = torch.empty(shapes[name], dtype=torch.bfloat16 if scaled else dtype)
        made.normal_(0.0, FP8_DEVIATION if scaled else DEVIATION, generator=generator)
        return made.to(dtype)

    place: dict[str, int] = {}
    done = 0
    for name, shape in shapes.items():
        place[name] = min(shards - 1, done * shards // total)
        done += torch.Size(shape).numel()
    place |= {scale: place[name] for scale, name in scales.items()}
    stored = {n: (kinds[n], shape) for n, shape in shapes.items()} | dict.fromkeys(scales, (torch.float32, ()))
    names = [f"{_FILE}.safetensors"]
    if shards > 1:
        names = [f"{_FILE}-{k + 1:05d}-of-{shards:05d}.safetensors" for k in range(shards)]
        index = {
            "metadata": {"total_size": total * dtype.itemsize},
            "weight_map": {name: names[k] for name, k in place.items()},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{_FILE}.safetensors.index.json").write_text(text, encoding="utf-8")
    with tqdm(total=total * dtype.itemsize, desc="weights", unit="B", unit_scale=True, disable=quiet or None) as bar:
        for k, name in enumerate(names):
            own = {n: kind for n, kind in stored.items() if place[n] == k}
            write_weights(folder / name, own, read, bar.update)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=("flux",))
    parser.add_argument("--parameters", type=float, default=4e9, help="wanted, dimensionless (default: %(default).0e)")
    parser.add_argument("--double", type=int, help="double blocks (default: from --parameters)")
    parser.add_argument("--single", type=int, help="single blocks (default: from --parameters)")
    parser.add_argument("--heads", type=int, default=24, help="attention heads of 128 channels (default: %(default)s)")
    parser.add_argument("--text-channels", type=int, default=4096, help="of a text token (default: %(default)s)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="(default: %(default)s)")
    parser.add_argument("--shards", type=int, default=1, help="files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    if (args.double is None) != (args.single is None):
        parser.error("--double and --single go together, expected both or neither")
    double, single = (args.double, args.single) if args.double else blocks_for(args.parameters, args.heads)
    config = flux_config(double, single, args.heads, args.text_channels)
    total = write_checkpoint(args.out, config, DTYPES[args.dtype], args.shards, args.seed)
    print(
        f"wrote {args.out}/: {total / 1e9:.3f} B parameters, {double} double and {single} single blocks, {args.dtype}"
    )
    return 0
