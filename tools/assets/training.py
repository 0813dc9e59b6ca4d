"""What the makers of trained models share: the loop of training, and how weights and cards are written."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm


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
    """Minimise a loss with AdamW, warm-up and cosine decay.

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
    }


def write_component(model: Any, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a model of diffusers or transformers, its weights in `dtype`, file by file whole or not at all."""
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    copy.deepcopy(model).to(dtype).save_pretrained(aside, safe_serialization=True)
    folder.mkdir(parents=True, exist_ok=True)
    for file in aside.iterdir():
        file.chmod(0o644)
        file.replace(folder / file.name)
    shutil.rmtree(aside)
    renamed(folder / "config.json")


def renamed(path: Path, **entries: Any) -> None:
    """Set entries of a JSON file, and take out where it was loaded from."""
    content = {**json.loads(path.read_text()), **entries}
    content.pop("_name_or_path", None)
    write_json(path, content)


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
    """Put what was measured before the records of training that the checkpoint's card holds."""
    card = json.loads((folder / "card.json").read_text())
    write_json(folder / "card.json", measured | {key: card[key] for key in card if key.endswith("training")})


@contextlib.contextmanager
def stopped_politely() -> Iterator[None]:
    """Turn Ctrl-C into one sentence, on a line of its own below the progress bar."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the last checkpoint stays, finish its card with --measure-only")
