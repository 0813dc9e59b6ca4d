"""Train the diffusion transformer of handwritten digits that ships with this package, from a seed, on a CPU.

    python tools/make_asset.py train-dit          digits by class, 16x16 grey; about 15 minutes on an idle core

The real diffusers class, small. Needs torch, diffusers, scikit-learn and tqdm; a C++ compiler makes it faster.

The same seed gives the same bits only on the same CPU type, torch version, thread count and compile setting: sums are
taken in another order otherwise, and training amplifies that. Every such run still gives an equally good model.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from assets.training import (
    Recipe,
    autocast,
    complete_card,
    stopped_politely,
    strata,
    train,
    write_component,
    write_json,
)
from diffusers import DDIMScheduler, DiTTransformer2DModel
from record import ROOT
from torch.nn import functional

from taylorseer_export.embedded.picture import grid, pictures_from_dit_latents

SAMPLING_STEPS = 50
NULL_CLASS = 10
DIT_GUIDANCE = 3.0
DIT_RECIPE = Recipe(steps=2000, batch=96, peak_rate=1e-3)


def new_dit() -> DiTTransformer2DModel:
    """The DiT/XL-2 configuration, made small; no learned sigma (out_channels = in_channels)."""
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=6,
        attention_bias=True,
        sample_size=16,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=NULL_CLASS,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        norm_eps=1e-5,
    )


def dit_scheduler() -> DDIMScheduler:
    """The scheduler of DiT/XL-2: 1000 training steps, linear betas, noise prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=0,
    )


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's digits: ink in [0, 1] as [1797, 1, 8, 8] float32, and labels [1797]."""
    from sklearn.datasets import load_digits as load

    digits = load()
    ink = torch.from_numpy(digits.images.astype(np.float32) / 16.0)[:, None]
    return ink, torch.from_numpy(digits.target.astype(np.int64))


def augmented(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Enlarge digits to 16x16 by bicubic sampling under a small random rotation, size and shift.

    One resampling does both, so that augmenting costs no sharpness. Returns values in [-1, 1].
    """
    count = len(ink)

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    angle, size = uniform(math.radians(7)), 1.0 + uniform(0.05)
    # grid_sample measures in half pictures: 0.08 is a third of a pixel of the 8x8 original.
    theta = torch.stack(
        (
            torch.stack((angle.cos() * size, -angle.sin() * size, uniform(0.08)), dim=1),
            torch.stack((angle.sin() * size, angle.cos() * size, uniform(0.08)), dim=1),
        ),
        dim=1,
    )
    places = functional.affine_grid(theta, [count, 1, 16, 16], align_corners=False)
    large = functional.grid_sample(ink, places, mode="bicubic", align_corners=False)
    return large.clamp(0, 1) * 2 - 1


@torch.no_grad()
def sample_dit(model: DiTTransformer2DModel, labels: torch.Tensor, guidance: float, seed: int) -> torch.Tensor:
    """Draw digits with DDIM and classifier-free guidance, as `DiTPipeline` does.

    Returns:
        [B, 1, 16, 16] float32.
    """
    scheduler = dit_scheduler()
    scheduler.set_timesteps(SAMPLING_STEPS)
    latents = torch.randn((len(labels), 1, 16, 16), generator=torch.Generator().manual_seed(seed))
    both = torch.cat((labels, torch.full_like(labels, NULL_CLASS)))
    for timestep in scheduler.timesteps:
        with autocast():
            noise = model(torch.cat((latents, latents)), timestep.expand(len(both)), both, return_dict=False)[0].float()
        with_label, without = noise.chunk(2)
        guided = without + guidance * (with_label - without)
        latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
    return latents


def label_accuracy(drawn: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """How often a support vector machine reads the label the digit was drawn for.

    The machine learns from the real 8x8 digits; drawn digits are averaged down to 8x8.

    Returns:
        Accuracy on the drawn digits, and the machine's own accuracy on real digits it has not
        seen (5-fold): what a perfect generator would get.
    """
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import SVC

    ink, target = load_digits()
    # The real ones go through the same enlargement, so that blur cannot give the drawn ones away.
    large = functional.interpolate(ink, size=(16, 16), mode="bicubic").clamp(0, 1)
    real = functional.avg_pool2d(large, 2).flatten(1).numpy()
    machine = SVC(C=10.0, gamma=0.1)
    ceiling = cross_val_score(machine, real, target.numpy(), cv=5).mean()
    machine.fit(real, target.numpy())
    small = functional.avg_pool2d((drawn.clamp(-1, 1) + 1) / 2, 2).flatten(1).numpy()
    return float(machine.score(small, labels.numpy())), float(ceiling)


def train_dit(seed: int, folder: Path, recipe: Recipe, compiled: bool) -> None:
    """Train and save the digit DiT."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = new_dit()
    for module in model.modules():
        # diffusers drops labels in every block by itself; guidance needs one choice for all.
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    ink, target = load_digits()
    kept = dit_scheduler().alphas_cumprod

    def loss_of_step(call: Callable, step: int) -> torch.Tensor:
        rows = torch.randint(len(ink), (recipe.batch,), generator=generator)
        clean = augmented(ink[rows], generator)
        drop = torch.rand(recipe.batch, generator=generator) < 0.1
        labels = target[rows].masked_fill(drop, NULL_CLASS)
        timesteps = (strata(recipe.batch, generator) * 1000).long()
        noise = torch.randn(clean.shape, generator=generator)
        share = kept[timesteps].view(-1, 1, 1, 1)
        noisy = share.sqrt() * clean + (1 - share).sqrt() * noise
        with autocast():
            predicted = call(noisy, timesteps, labels, return_dict=False)[0]
        return functional.mse_loss(predicted.float(), noise)

    def save(average: torch.nn.Module, training: dict) -> None:
        write_component(average, folder / "transformer")
        write_json(folder / "card.json", {"training": {**training, "tool": "tools/assets/train_dit.py"}})

    dit_scheduler().save_pretrained(folder / "scheduler")
    train(model, loss_of_step, recipe, save, seed, compiled)


def measure_dit(folder: Path, seed: int, preview: Path | None) -> None:
    """Measure a saved digit DiT and complete its card."""
    # Measured on what ships: the float16 file, read back.
    shipped = DiTTransformer2DModel.from_pretrained(folder / "transformer").float().eval()
    labels = torch.arange(10).repeat(40)
    accuracy, ceiling = label_accuracy(sample_dit(shipped, labels, DIT_GUIDANCE, seed), labels)
    print(f"label accuracy {accuracy:.4f} (same classifier on unseen real digits: {ceiling:.4f})")
    if preview:
        preview_dit(shipped, preview)
    complete_card(
        folder,
        {
            "name": "digits DiT",
            "model": "DiTTransformer2DModel",
            "parameters": sum(p.numel() for p in shipped.parameters()),
            "trained_on": "scikit-learn load_digits (1797 handwritten digits), bicubic to 16x16",
            "input": "class label 0-9; 10 is the null class of classifier-free guidance",
            "output": "1 channel 16x16, values in [-1, 1] (white ink on black)",
            "guidance_scale": DIT_GUIDANCE,
            "num_inference_steps": SAMPLING_STEPS,
            "pictures": "digits",
            "latent_scale": 1,
            "label_accuracy": round(accuracy, 4),
            "label_accuracy_samples": len(labels),
            "label_accuracy_of_real_digits": round(ceiling, 4),
        },
    )


def preview_dit(model: DiTTransformer2DModel, folder: Path) -> None:
    """Write one picture table of digits for each of some guidance scales."""
    folder.mkdir(parents=True, exist_ok=True)
    for guidance in (1.0, 1.5, 2.0, 3.0, 4.0):
        rows = []
        for seed in range(6):
            drawn = sample_dit(model, torch.arange(10), guidance, seed)
            rows.append(list(pictures_from_dit_latents(drawn.numpy())))
        labels = [f"seed {seed}" for seed in range(6)]
        grid(rows, 5, labels, [str(n) for n in range(10)]).save(folder / f"dit_{guidance}.png")


def main() -> None:
    """Parse the command line, train and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "taylorseer_export" / "assets" / "dit")
    parser.add_argument("--steps", type=int, help="training steps (default: the shipped recipe)")
    parser.add_argument("--threads", type=int, default=1, help="more than 1 gains little")
    parser.add_argument("--no-compile", action="store_true", help="where no C++ compiler is")
    parser.add_argument("--measure-only", action="store_true", help="measure the saved model; no training")
    parser.add_argument("--preview", type=Path, help="folder for sample pictures (PNG)")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    recipe = DIT_RECIPE if arguments.steps is None else replace(DIT_RECIPE, steps=arguments.steps)
    with stopped_politely():
        if not arguments.measure_only:
            train_dit(arguments.seed, arguments.out, recipe, not arguments.no_compile)
        measure_dit(arguments.out, arguments.seed, arguments.preview)
    print((arguments.out / "card.json").read_text(), end="")
