"""Train the two diffusion transformers that ship with this package, from a seed, on a CPU.

    python tools/make_asset.py train-tiny dit     # handwritten digits by class, 16x16 grey
    python tools/make_asset.py train-tiny flux    # coloured shapes by caption, 32x32 RGB

Both are the real diffusers classes, small. Each run needs one core; on an idle one about 15 and 45 minutes, so
the two can run side by side. Needs torch, diffusers, scikit-learn and tqdm; a C++ compiler makes it
faster.

The same seed gives the same bits only on the same CPU type, torch version, thread count and
compile setting: sums are taken in another order otherwise, and training amplifies that. Every such
run still gives an equally good model.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
)
from record import ROOT
from safetensors.numpy import save_file
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from taylorseer_export.embedded.caption import CaptionEncoder
from taylorseer_export.embedded.picture import (
    flux_latents_from_pictures,
    grid,
    pictures_from_dit_latents,
    pictures_from_flux_latents,
)

SAMPLING_STEPS = 50

# ------------------------------------------------------------------------------ training, shared


@dataclass(frozen=True)
class Recipe:
    """What a training run is made of, apart from model and data."""

    steps: int
    batch: int
    peak_rate: float
    warmup: int = 200
    # The cosine ends far beyond `steps`, so the rate is nearly constant and the average does what
    # a decay would. In return a run can be stopped at any checkpoint: the first steps of a longer
    # run are the same as a shorter run's.
    cosine_steps: int = 20000
    ema_half_life: int = 150
    save_every: int = 500


class Average:
    """Exponential moving average of a model's weights; what is shipped and sampled from."""

    def __init__(self, model: torch.nn.Module, half_life: int):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = 0.5 ** (1 / half_life)

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        # The cap keeps the random initial weights out of the average of a young run.
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), weight=1 - decay)


def train(
    model: torch.nn.Module,
    loss_of_step: Callable[[Callable, int], torch.Tensor],
    recipe: Recipe,
    save: Callable[[torch.nn.Module, dict], None],
    seed: int,
    compiled: bool,
) -> None:
    """Minimise a loss with AdamW, warm-up and cosine decay, in bfloat16 autocast.

    Args:
        model: The model to train, in place.
        loss_of_step: Maps (callable model, step number) to a scalar loss.
        recipe: Steps, batch size and rates.
        save: Called with the averaged model and a record of how it was trained, every
            `save_every` steps and at the end.
        seed: The seed of the run, for the record.
        compiled: Whether to run the model through `torch.compile`.
    """
    model.train()
    average = Average(model, recipe.ema_half_life)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.peak_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )

    def rate(step: int) -> float:
        progress = (step - recipe.warmup) / (recipe.cosine_steps - recipe.warmup)
        return min((step + 1) / recipe.warmup, 0.5 * (1 + math.cos(math.pi * max(0.0, progress))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    call = torch.compile(model, dynamic=False) if compiled else model
    shown = None
    start = time.monotonic()
    bar = tqdm(range(recipe.steps), unit="step", smoothing=0.05, mininterval=5)
    # For 64 tokens, the backward of the CPU's flash attention took half of a whole training step;
    # plain matrix products cost a fraction of it.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    with sdpa_kernel(SDPBackend.MATH):
        for step in bar:
            loss = loss_of_step(call, step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(model, step)
            shown = loss.item() if shown is None else 0.98 * shown + 0.02 * loss.item()
            bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
            if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
                minutes = (time.monotonic() - start) / 60
                save(average.model, how_trained(seed, recipe, step + 1, minutes, compiled))


def how_trained(seed: int, recipe: Recipe, steps: int, minutes: float, compiled: bool) -> dict:
    """The part of a card that says how to get the same weights again."""
    return {
        "seed": seed,
        "training_steps": steps,
        "batch": recipe.batch,
        "peak_learning_rate": recipe.peak_rate,
        "training_minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "compiled": compiled,
        "torch": torch.__version__,
        "weights": "float16, exponential moving average",
        "tool": "tools/assets/train_tiny.py",
    }


def save_checkpoint(model: torch.nn.Module, training: dict, out: Path) -> None:
    """Write `transformer/` with float16 weights and a card that knows only the training so far."""
    folder = out / "transformer"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and moved, so that a reader never meets a half-written file.
    aside = folder.with_name(folder.name + ".partial")
    copy.deepcopy(model).half().save_pretrained(aside, safe_serialization=True)
    folder.mkdir(exist_ok=True)
    for file in aside.iterdir():
        file.chmod(0o644)
        file.replace(folder / file.name)
    shutil.rmtree(aside)
    # diffusers records where a model was loaded from; a shipped config has no use for it.
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    write_json(folder / "config.json", config)
    write_json(out / "card.json", {"training": training})


def write_json(path: Path, content: dict) -> None:
    """Write JSON with a final newline, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def autocast() -> torch.autocast:
    """Matrix products in bfloat16, for which recent CPUs have AMX units; the rest in float32."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


def strata(count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` uniform numbers in [0, 1), one in each equal slice: less noise in the loss."""
    return (torch.arange(count) + torch.rand(count, generator=generator)) / count


def complete_card(folder: Path, measured: dict) -> None:
    """Put what was measured before the training record that the checkpoint's card holds."""
    card = json.loads((folder / "card.json").read_text())
    write_json(folder / "card.json", {**measured, "training": card["training"]})


# -------------------------------------------------------------------------------------- DiT

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

    dit_scheduler().save_pretrained(folder / "scheduler")
    train(model, loss_of_step, recipe, partial(save_checkpoint, out=folder), seed, compiled)


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


# -------------------------------------------------------------------------------------- FLUX

COLOURS = {
    "red": (225, 45, 45),
    "green": (40, 175, 75),
    "blue": (50, 95, 235),
    "yellow": (250, 215, 45),
    "purple": (150, 60, 190),
    "orange": (250, 135, 25),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUND = (26, 28, 38)
FLUX_SHIFT = 1.0
FLUX_RECIPE = Recipe(steps=6500, batch=64, peak_rate=1.5e-3)
CAPTION_WORDS, TEXT_WIDTH = 12, 64
PADDING = "<pad>"


def new_flux() -> FluxTransformer2DModel:
    """FLUX.1 made small: 64 tokens of 48 channels are one 32x32 RGB picture, without a VAE."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=48,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


def flux_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Flow matching with Euler steps; a constant shift, as all pictures have a similar size."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=FLUX_SHIFT, use_dynamic_shifting=False)


def write_text_tables(folder: Path, seed: int) -> None:
    """Write vocabulary and word/position tables: rows of one random orthogonal matrix, times 8."""
    relation_words = sorted({word for relation in RELATIONS for word in relation.split()})
    words = [PADDING, "a", "an", *COLOURS, *SHAPES, *relation_words]
    square = np.random.default_rng(seed).standard_normal((TEXT_WIDTH, TEXT_WIDTH))
    # Eight is sqrt(64): every row then has entries of unit size, as a trained encoder's would.
    rows = (np.linalg.qr(square)[0] * np.sqrt(TEXT_WIDTH)).astype(np.float32)
    write_json(folder / "vocabulary.json", {"words": words})
    tables = {
        "word": rows[: len(words)].copy(),
        "position": rows[len(words) : len(words) + CAPTION_WORDS].copy(),
    }
    save_file(tables, str(folder / "text_embedding.safetensors"))


def image_ids(height: int, width: int) -> torch.Tensor:
    """(0, row, column) of every token, as `FluxPipeline._prepare_latent_image_ids`."""
    rows, columns = height // 4, width // 4
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None]
    return ids.reshape(-1, 3)


@dataclass(frozen=True)
class Thing:
    """One coloured shape of a picture; position and radius in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float

    def __str__(self) -> str:
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape}"


def distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels from a shape's edge, negative inside; (0, 0) is its centre."""
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) - 0.88 * radius
    if shape == "triangle":
        side = 0.894 * abs(dx) - 0.447 * (dy + 1.1 * radius)
        return np.maximum(side, dy - 0.9 * radius)
    arm, reach = 0.34 * radius, 1.02 * radius
    upright = np.maximum(abs(dx) - arm, abs(dy) - reach)
    return np.minimum(upright, np.maximum(abs(dx) - reach, abs(dy) - arm))


def coverage(thing: Thing, height: int, width: int) -> np.ndarray:
    """Share of every pixel that a shape covers, [height, width] in [0, 1]: the antialiasing."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    return np.clip(0.5 - distance(thing.shape, x - thing.x, y - thing.y, thing.radius), 0, 1)


def render(things: list[Thing], height: int, width: int) -> np.ndarray:
    """Draw shapes on the background: [height, width, 3] float in [0, 255]."""
    picture = np.empty((height, width, 3))
    picture[:] = BACKGROUND
    for thing in things:
        share = coverage(thing, height, width)[..., None]
        picture += share * (np.array(COLOURS[thing.colour]) - picture)
    return picture


def random_scene(rng: np.random.Generator, height: int, width: int) -> tuple[str, list[Thing]]:
    """A caption and a picture's shapes: one shape in three pictures of ten, else a related pair.

    The two colours of a pair differ, so that a drawn pair can be told apart by colour.
    """
    colours = rng.choice(list(COLOURS), size=2, replace=False)
    shapes = rng.choice(SHAPES, size=2)
    short = min(height, width)
    if rng.random() < 0.3:
        x, y = width / 2 + rng.uniform(-2.5, 2.5), height / 2 + rng.uniform(-2.5, 2.5)
        thing = Thing(colours[0], shapes[0], x, y, short * rng.uniform(0.25, 0.36))
        return str(thing), [thing]
    relation = RELATIONS[rng.integers(len(RELATIONS))]
    sideways = relation in ("left of", "right of")
    things = []
    for place, colour, shape in zip((-1, 1), colours, shapes, strict=True):
        if relation in ("right of", "below"):
            place = -place
        along, across = place * 0.25 + rng.uniform(-0.03, 0.03), rng.uniform(-0.09, 0.09)
        dx, dy = (along, across) if sideways else (across, along)
        radius = short * rng.uniform(0.165, 0.215)
        things.append(Thing(colour, shape, width * (0.5 + dx), height * (0.5 + dy), radius))
    return f"{things[0]} {relation} {things[1]}", things


@torch.no_grad()
def sample_flux(
    model: FluxTransformer2DModel,
    encoder: CaptionEncoder,
    captions: list[str],
    seed: int,
    height: int = 32,
    width: int = 32,
) -> np.ndarray:
    """Draw captions as `FluxPipeline` does: no classifier-free guidance, Euler steps.

    Returns:
        [B, height, width, 3] uint8.
    """
    scheduler = flux_scheduler()
    # FluxPipeline hands these sigmas over itself; the scheduler's own would start elsewhere.
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / SAMPLING_STEPS, SAMPLING_STEPS))
    generator = torch.Generator().manual_seed(seed)
    ids = image_ids(height, width)
    latents = torch.randn((len(captions), len(ids), 48), generator=generator)
    text = {name: torch.from_numpy(value) for name, value in encoder.encode(captions).items()}
    for timestep in scheduler.timesteps:
        with autocast():
            velocity = model(
                latents,
                **text,
                timestep=timestep.expand(len(captions)) / 1000,
                img_ids=ids,
                txt_ids=torch.zeros(encoder.length, 3),
                return_dict=False,
            )[0].float()
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return pictures_from_flux_latents(latents.numpy(), height, width)


def found_in(picture: np.ndarray) -> dict[str, Thing]:
    """The shapes a picture shows, by colour: read from the pixels, without the caption.

    Pixels go to the nearest colour or background; a colour with at least 12 pixels is a shape, and
    the kind is the one whose rendering at the same place overlaps most (at least 0.6).
    """
    names = list(COLOURS)
    palette = np.array([BACKGROUND, *COLOURS.values()], dtype=np.float64)
    away = ((picture[:, :, None].astype(np.float64) - palette) ** 2).sum(axis=3)
    nearest = away.argmin(axis=2)
    # Edge pixels of white and yellow pass through other colours; only clear pixels count.
    nearest[away.min(axis=2) > 45**2] = 0
    found = {}
    height, width = nearest.shape
    for row, colour in enumerate(names, start=1):
        mask = nearest == row
        if mask.sum() < 12:
            continue
        ys, xs = np.nonzero(mask)
        middle_x, middle_y = (xs.min() + xs.max() + 1) / 2, (ys.min() + ys.max() + 1) / 2
        spread = max(np.ptp(xs), np.ptp(ys)) / 2 + 0.5
        best = (0.6, "")
        for shape in SHAPES:
            for radius in spread * np.linspace(0.85, 1.3, 7):
                # The triangle's centre is lower than the middle of its box.
                lower = 0.1 * radius if shape == "triangle" else 0.0
                thing = Thing(colour, shape, middle_x, middle_y + lower, radius)
                drawn = coverage(thing, height, width) > 0.7
                overlap = (drawn & mask).sum() / (drawn | mask).sum()
                best = max(best, (overlap, shape))
        found[colour] = Thing(colour, best[1], middle_x, middle_y, spread)
    return found


def agrees(picture: np.ndarray, things: list[Thing], caption: str) -> dict[str, bool]:
    """Whether a picture shows the right colours, those in the right shapes, rightly arranged."""
    found = found_in(picture)
    colours = set(found) == {thing.colour for thing in things}
    shapes = colours and all(found[thing.colour].shape == thing.shape for thing in things)
    relation = colours
    if colours and len(things) == 2:
        first, second = (found[thing.colour] for thing in things)
        gap_x, gap_y = second.x - first.x, second.y - first.y
        gap = {"left": gap_x, "right": -gap_x, "above": gap_y, "below": -gap_y}
        relation = next(value for word, value in gap.items() if word in caption.split()) > 6
    return {"colours": colours, "shapes": shapes, "relation": relation, "all": shapes and relation}


def caption_accuracy(
    model: FluxTransformer2DModel | None, encoder: CaptionEncoder, seed: int, count: int = 200
) -> dict[str, float]:
    """Share of random captions drawn with the right colours, shapes and arrangement.

    With `model` None the training renderer draws: what a perfect generator would get.
    """
    # Another stream than training's, so that these are fresh captions and scenes.
    rng = np.random.default_rng((seed, 1))
    scenes = [random_scene(rng, 32, 32) for _ in range(count)]
    if model is None:
        pictures = [np.rint(render(things, 32, 32)) for _, things in scenes]
    else:
        pictures = sample_flux(model, encoder, [caption for caption, _ in scenes], seed)
    results = [agrees(picture, things, caption) for picture, (caption, things) in zip(pictures, scenes, strict=True)]
    return {name: float(np.mean([r[name] for r in results])) for name in results[0]}


def train_flux(seed: int, folder: Path, recipe: Recipe, compiled: bool) -> None:
    """Train and save the FLUX of coloured shapes, with its text tables."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    (folder / "text").mkdir(parents=True, exist_ok=True)
    write_text_tables(folder / "text", seed)
    encoder = CaptionEncoder.load(folder / "text")
    model = new_flux()
    text_ids = torch.zeros(encoder.length, 3)

    def loss_of_step(call: Callable, step: int) -> torch.Tensor:
        # Some oblong batches keep the model usable at other sizes than its own.
        height, width = ((48, 32) if step % 16 == 7 else (32, 48)) if step % 8 == 7 else (32, 32)
        scenes = [random_scene(rng, height, width) for _ in range(recipe.batch)]
        pictures = np.stack([render(things, height, width) for _, things in scenes])
        clean = torch.from_numpy(flux_latents_from_pictures(pictures))
        encoded = encoder.encode([caption for caption, _ in scenes])
        text = {name: torch.from_numpy(value) for name, value in encoded.items()}
        # Logit-normal: most of the work is at middle noise, as in the training of FLUX.
        sigma = torch.special.ndtri(strata(recipe.batch, generator).clamp(1e-4, 1 - 1e-4)).sigmoid()
        noise = torch.randn(clean.shape, generator=generator)
        share = sigma.view(-1, 1, 1)
        noisy = (1 - share) * clean + share * noise
        with autocast():
            velocity = call(
                noisy,
                **text,
                timestep=sigma,
                img_ids=image_ids(height, width),
                txt_ids=text_ids,
                return_dict=False,
            )[0]
        return functional.mse_loss(velocity.float(), noise - clean)

    flux_scheduler().save_pretrained(folder / "scheduler")
    train(model, loss_of_step, recipe, partial(save_checkpoint, out=folder), seed, compiled)


def measure_flux(folder: Path, seed: int, preview: Path | None) -> None:
    """Measure a saved FLUX of coloured shapes and complete its card."""
    encoder = CaptionEncoder.load(folder / "text")
    shipped = FluxTransformer2DModel.from_pretrained(folder / "transformer").float().eval()
    accuracy = caption_accuracy(shipped, encoder, seed)
    ceiling = caption_accuracy(None, encoder, seed)
    print(f"caption accuracy {accuracy} (same reader on rendered scenes: {ceiling})")
    if preview:
        preview_flux(shipped, encoder, preview)
    complete_card(
        folder,
        {
            "name": "shapes FLUX",
            "model": "FluxTransformer2DModel",
            "parameters": sum(p.numel() for p in shipped.parameters()),
            "trained_on": "rendered pictures of one or two coloured shapes with captions, 32x32; "
            "one batch in eight 48x32 or 32x48",
            "input": "caption: '<thing>' or '<thing> left of|right of|above|below <thing>', a "
            "<thing> being 'a <colour> circle|square|triangle|cross'; two colours differ",
            "output": "height/4 * width/4 tokens of 48 channels: RGB in [-1, 1], pixel-unshuffled by 2 and packed 2x2",
            "guidance_scale": None,
            "num_inference_steps": SAMPLING_STEPS,
            "source": "captions",
            "pictures": "shapes",
            "latent_scale": 2,
            "latent_size": [16, 16],
            "text_tokens": 12,
            "caption_accuracy": accuracy,
            "caption_accuracy_samples": 200,
            "caption_accuracy_of_renderer": ceiling,
        },
    )


def preview_flux(model: FluxTransformer2DModel, encoder: CaptionEncoder, folder: Path) -> None:
    """Write picture tables: chosen captions at 32x32, and some at oblong sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = [
        "a red circle",
        "a blue square left of a yellow triangle",
        "a green circle above a red square",
        "an orange cross right of a white circle",
        "a purple triangle below a green cross",
        "a white square above a blue circle",
    ]
    seeds = range(5)
    for height, width in ((32, 32), (48, 32), (32, 48)):
        rows = [list(sample_flux(model, encoder, captions, s, height, width)) for s in seeds]
        labels = [f"seed {seed}" for seed in seeds]
        grid(rows, 4, labels, captions).save(folder / f"flux_{height}x{width}.png")


# ------------------------------------------------------------------------------ command line


@contextlib.contextmanager
def stopped_politely() -> Iterator[None]:
    """Turn Ctrl-C into one sentence, on a line of its own below the progress bar."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the last checkpoint stays, finish its card with --measure-only")


def main() -> None:
    """Parse the command line and train one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("dit", "flux"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "taylorseer_export" / "assets")
    parser.add_argument("--steps", type=int, help="training steps (default: the shipped recipe)")
    parser.add_argument("--threads", type=int, default=1, help="more than 1 gains little")
    parser.add_argument("--no-compile", action="store_true", help="where no C++ compiler is")
    parser.add_argument("--measure-only", action="store_true", help="measure the saved model; no training")
    parser.add_argument("--preview", type=Path, help="folder for sample pictures (PNG)")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    recipe, train_model, measure_model = {
        "dit": (DIT_RECIPE, train_dit, measure_dit),
        "flux": (FLUX_RECIPE, train_flux, measure_flux),
    }[arguments.model]
    if arguments.steps is not None:
        recipe = replace(recipe, steps=arguments.steps)
    folder = arguments.out / arguments.model
    with stopped_politely():
        if not arguments.measure_only:
            train_model(arguments.seed, folder, recipe, not arguments.no_compile)
        measure_model(folder, arguments.seed, arguments.preview)
    print((folder / "card.json").read_text(), end="")
