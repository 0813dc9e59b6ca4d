"""The digit reader: a small classifier of handwritten digits, for judging what the embedded DiT draws.

It was trained by `tools/assets/train_reader.py` on scikit-learn's digits, enlarged to 16 x 16 and turned and moved a
little, and reads pictures averaged down to 8 x 8. Beside its weights stand sums of its features over those digits, from
which comes what a Fréchet distance compares with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

FEATURES = 32
SIDE = 8  # pixels


@dataclass(frozen=True)
class Real:
    """Features of the real digits: their number, sum `[32]`, and sum of outer products `[32, 32]`, in float64."""

    count: int
    sum: Any
    products: Any


def reader() -> Any:
    """A new reader: `[N, 1 or 3, 8 k, 8 k]` uint8 to features `[N, 32]`; its `head` makes the logits of ten classes."""
    from torch import Tensor, nn
    from torch.nn import functional

    class Reader(nn.Module):
        num_features = FEATURES  # a name that torchmetrics reads

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
                nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Flatten(), nn.Linear(32 * (SIDE // 2) ** 2, FEATURES), nn.ReLU(),
            )  # fmt: skip
            self.head = nn.Linear(FEATURES, 10)

        def forward(self, pictures: Tensor) -> Tensor:
            ink = pictures[:, :1].float() / 255
            features: Tensor = self.body(functional.avg_pool2d(ink, ink.shape[-1] // SIDE))
            return features

    return Reader().eval()


def trained_reader() -> tuple[Any, Real]:
    """The reader of this package, and what it saw of real digits."""
    from safetensors.torch import load_file

    found = load_file(Path(__file__).parent.parent / "assets" / "digits" / "reader.safetensors")
    real = Real(int(found.pop("real.count")), found.pop("real.sum"), found.pop("real.products"))
    made = reader()
    made.load_state_dict(found)
    return made, real
