"""What a LoRA costs: in the weights of a load, and as inputs of every request, against the bundle without it.

    python tools/lora.py                a FLUX of 1 + 2 blocks, 768 wide, rank 8, 16 and 64; ONNX Runtime

One process loads all of them and takes turns, so that a busy machine slows all alike: every round runs a full and a
forecast step of each, and what is filed are medians of the ratios to the plain bundle in the same round. Beside them:
how long a load takes, how long it takes to read a file for requests, to give a slot another LoRA, and what each takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from randomised import randomised
from record import circumstances, record_options, write_record
from safetensors.torch import save_file

from taylorseer_export.bundle.memory import lora_bytes
from taylorseer_export.compile.api import export
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.runtime.denoiser import Denoiser, load
from taylorseer_export.runtime.slot import Slot
from taylorseer_export.runtime.trajectory import random_trajectory

CONFIG = {
    "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 64, "num_attention_heads": 12, "in_channels": 64,
    "joint_attention_dim": 768, "pooled_projection_dim": 256, "guidance_embeds": True, "axes_dims_rope": (16, 24, 24),
}  # fmt: skip
SIZES = {"batch": 1, "image_tokens": 256, "text_tokens": 64}
RANK_OF_FILE = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[8, 16, 64], help="ranks of the inputs (default: 8 16 64)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds that are timed (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each engine (default: 1)")
    parser.add_argument("--file", action="store_true", help="write the record")
    record_options(parser)
    given = parser.parse_args()
    record: dict[str, Any] = circumstances(given.out if given.file else None, given.allow_dirty)
    with tempfile.TemporaryDirectory() as name:
        record["results"] = measured(Path(name), given.ranks, given.rounds, given.threads)
    record |= {"config": CONFIG, "sizes": SIZES, "rank_of_file": RANK_OF_FILE, "rounds": given.rounds}
    record["threads"] = given.threads
    print(json.dumps(record["results"], indent=1))
    if given.file:
        print(f"wrote {write_record('lora', record, given.out, given.allow_dirty)}")
    return 0


def measured(folder: Path, ranks: list[int], rounds: int, threads: int) -> dict[str, Any]:
    """Every way by its name: plain, fused, and each rank, with no LoRA and with one."""
    model = randomised(lambda: FluxTransformer2DModel(**CONFIG), 0)
    model.save_pretrained(folder / "model")
    files = [written(model, folder / f"{n}.safetensors", n) for n in range(2)]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    del model
    how: dict[str, Any] = {"family": "flux", "out": folder, "order": 1, "granularity": "residual"}
    bundles = {"plain": export(folder / "model", name="plain", **how)}
    bundles |= {f"rank {r}": export(folder / "model", name=f"rank{r}", lora_rank=r, **how) for r in ranks}
    found: dict[str, Any] = {"weights_bytes": weights}
    loaded: dict[str, Denoiser] = {}
    for way, bundle in [*bundles.items(), ("fused", bundles["plain"])]:
        lora = files[0] if way == "fused" else ()
        took, loaded[way] = timed(
            lambda bundle=bundle, lora=lora: load(bundle, threads=threads, lora=lora, check=False)
        )
        found[way] = {"load_ms": took}
        found[way]["lora_bytes"] = loaded[way].lora.bytes or lora_bytes(loaded[way].manifest)
    slots: dict[str, Slot] = {}
    trajectory = random_trajectory(loaded["plain"], 2, SIZES)
    for way, denoiser in loaded.items():
        slot = denoiser.slot(denoiser.sizes(trajectory.latents.shape[1:], trajectory.conditioning))
        lora = None
        if way.startswith("rank"):
            found[way]["read_ms"], lora = timed(lambda denoiser=denoiser: denoiser.adapter(files[0]))
            other = denoiser.adapter(files[1])
            switches = [timed(lambda one=one, slot=slot: slot.memory.adapt(one))[0] for one in [lora, other] * 5]
            found[way]["switch_ms"] = statistics.median(switches)
        slot.start(trajectory.conditioning, Forecasts(Plan("F."), 0), trajectory.timesteps, lora)
        slots[way] = slot
    for kind, number in (("full", 0), ("forecast", 1)):
        for slot in slots.values():
            slot.stage(trajectory.latents[number])
            slot.run()  # warm
        times: dict[str, list[float]] = {way: [] for way in slots}
        for k in range(rounds):
            for way in list(slots)[k % len(slots) :] + list(slots)[: k % len(slots)]:
                times[way].append(timed(slots[way].run)[0])
        for way, taken in times.items():
            ratios = [own / plain for own, plain in zip(taken, times["plain"], strict=True)]
            found[way] |= {f"{kind}_ms": statistics.median(taken), f"{kind}_ratio": statistics.median(ratios)}
        for slot in slots.values():
            slot.finish()
    for denoiser in loaded.values():
        denoiser.close()
    return found


def written(model: torch.nn.Module, path: Path, seed: int) -> Path:
    """A LoRA of every linear layer."""
    rng, tensors = torch.Generator().manual_seed(seed), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            out, into = module.weight.shape
            tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(RANK_OF_FILE, into, generator=rng) / into**0.5
            tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(out, RANK_OF_FILE, generator=rng) / 10
    save_file(tensors, path)
    return path


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """(milliseconds, what it returned)."""
    began = time.perf_counter()
    made = work()
    return round(1e3 * (time.perf_counter() - began), 3), made


if __name__ == "__main__":
    raise SystemExit(main())
