"""Train the digit reader, by which `evaluate` judges what the embedded DiT draws.

    python tools/make_asset.py train-reader            under a minute on one core

A fifth of scikit-learn's digits takes no part and gives the accuracy that is printed. The file holds the weights, and
sums of the features of all digits, enlarged to 16 x 16 as the DiT saw them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from assets.train_dit import augmented, load_digits
from record import ROOT
from safetensors.torch import save_file
from torch.nn import functional

from taylorseer_export.embedded.digits import reader

STEPS, BATCH, RATE = 3000, 128, 2e-3


def as_pictures(latents: torch.Tensor) -> torch.Tensor:
    """`[N, 1, H, W]` in [-1, 1] as uint8 pictures."""
    return ((latents + 1) / 2).clamp(0, 1).mul(255).round().byte()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = ROOT / "taylorseer_export" / "assets" / "digits"
    parser.add_argument("--out", type=Path, default=folder / "reader.safetensors", help="(default: the asset)")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    ink, target = load_digits()
    mixed = torch.randperm(len(ink), generator=generator)
    unseen, seen = mixed[: len(ink) // 5], mixed[len(ink) // 5 :]
    model = reader().train()
    optimiser = torch.optim.AdamW(model.parameters(), RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        rows = seen[torch.randint(len(seen), (BATCH,), generator=generator)]
        logits = model.head(model(as_pictures(augmented(ink[rows], generator))))
        loss = functional.cross_entropy(logits, target[rows], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()
    large = functional.interpolate(ink, size=(16, 16), mode="bicubic").clamp(0, 1) * 2 - 1
    with torch.no_grad():
        features = model(as_pictures(large))
        right = model.head(features).argmax(1) == target
    print(f"accuracy on {len(unseen)} unseen digits {right[unseen].double().mean():.4f}")
    exact = features.double()
    real = {
        "real.count": torch.tensor(len(exact)), "real.sum": exact.sum(0), "real.products": exact.t() @ exact
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in (model.state_dict() | real).items()}, args.out)
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e3:.0f} KB)")
    return 0
