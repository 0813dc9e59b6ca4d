"""Metrics of pictures that ask a network, through torchmetrics and the like.

No network but the digit reader comes with this package. A metric is computed where its weights lie in the folder that
is given, under the names of those who publish them; where they do not, it is named with what it needs. Nothing is
fetched.

Pictures are `[N, H, W, 3]` uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

ALEXNET = "alexnet-owt-7be5be79.pth"
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
CLIP = "clip-vit-base-patch16"
IMAGE_REWARD = "ImageReward.pt"
_SEEN_BY_ALEXNET = 64  # pixels of a side that its five layers need
_SPATIAL = 7  # channels of sFID, 17 x 17 each


@dataclass(frozen=True)
class Shown:
    """What a way drew, and what it should have drawn.

    Attributes:
        pictures, exact: Of this way and of all-full.
        captions: Of each picture; none where the model has no prompts.
        labels: Class of each picture, `[N]`; none where it has no classes.
    """

    pictures: np.ndarray
    exact: np.ndarray
    captions: Sequence[str] = ()
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Metric:
    """One column: its name, whether more of it is better, and how it is measured."""

    name: str
    higher: bool
    measure: Callable[[Shown], float]


def metrics(weights: Path | None, captions: bool, digits: bool) -> tuple[list[Metric], dict[str, str]]:
    """The metrics that can be computed, and for each other its name and what it would need.

    Args:
        weights: Folder with weights, if any.
        captions: Whether pictures come with prompts.
        digits: Whether they are those of the embedded DiT.
    """
    found: list[Metric] = []
    missing: dict[str, str] = {}
    library = find_spec("torchmetrics") is not None
    networks = library and find_spec("torchvision") is not None and find_spec("torch_fidelity") is not None

    def offer(name: str, file: str, what: str, make: Callable[[Path], list[Metric]], ready: bool = networks) -> None:
        if weights is None or not (weights / file).exists():
            missing[name] = f"{what}: {file} in the folder of --metric-weights"
        elif not ready:
            missing[name] = "a library; pip install 'taylorseer-export[evaluate]'"
        else:
            found.extend(make(weights / file))

    if digits and library:
        found += _digits()
    elif digits:
        missing["digit FID, label accuracy"] = "torchmetrics; pip install 'taylorseer-export[evaluate]'"
    offer("LPIPS", ALEXNET, "AlexNet of torchvision", _lpips)
    offer("FID, sFID, IS", INCEPTION, "Inception v3 of torch-fidelity", _inception)
    if captions:
        offer("CLIP score", CLIP, "openai/clip-vit-base-patch16", _clip, library)
        ready = find_spec("ImageReward") is not None
        offer("ImageReward", IMAGE_REWARD, "ImageReward-v1.0 and its package image-reward", _image_reward, ready)
    else:
        missing["CLIP score, ImageReward"] = "prompts, which this model has none of"
    return found, missing


def _tensor(pictures: np.ndarray) -> Any:
    """`[N, 3, H, W]` uint8."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))


def _lpips(file: Path) -> list[Metric]:
    import torch
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    before = torch.hub.get_dir()
    with TemporaryDirectory() as folder:  # laid out as torchvision looks for it
        (Path(folder) / "checkpoints").mkdir()
        (Path(folder) / "checkpoints" / ALEXNET).symlink_to(file.resolve())
        torch.hub.set_dir(folder)
        try:
            network = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)
        finally:
            torch.hub.set_dir(before)

    def measure(shown: Shown) -> float:
        times = -(-_SEEN_BY_ALEXNET // min(shown.pictures.shape[1:3]))
        seen, exact = (
            _tensor(x).repeat_interleave(times, 2).repeat_interleave(times, 3) / 255
            for x in (shown.pictures, shown.exact)
        )
        network.reset()
        network.update(seen, exact)
        return float(network.compute())

    return [Metric("LPIPS", False, measure)]


def _frechet(features: Any, seen: Any, exact: Any) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    distance = FrechetInceptionDistance(features)
    distance.update(exact, real=True)
    distance.update(seen, real=False)
    return float(distance.compute())


def _inception(file: Path) -> list[Metric]:
    import torch
    from torch import nn
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchmetrics.image.inception import InceptionScore

    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(file))

    class Output(nn.Module):
        """One output of the network: its pooled features, the logits, or the spatial features of sFID."""

        def __init__(self, which: int | None, num_features: int) -> None:
            super().__init__()
            self.which, self.num_features = which, num_features

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            kept = []
            convolution = network.Mixed_6d.branch1x1.conv
            hook = convolution.register_forward_hook(lambda module, inputs, output: kept.append(output))
            try:
                with torch.no_grad():
                    outputs = network(pictures)
            finally:
                hook.remove()
            if self.which is not None:
                return outputs[self.which]
            return kept[0][:, :_SPATIAL].flatten(1)

    pooled, logits, spatial = Output(0, 2048), Output(1, 1008), Output(None, _SPATIAL * 17 * 17)

    def score(shown: Shown) -> float:
        measured = InceptionScore(logits, splits=1)
        measured.update(_tensor(shown.pictures))
        return float(measured.compute()[0])

    return [
        Metric("FID", False, lambda s: _frechet(pooled, _tensor(s.pictures), _tensor(s.exact))),
        Metric("sFID", False, lambda s: _frechet(spatial, _tensor(s.pictures), _tensor(s.exact))),
        Metric("IS", True, score),
    ]


def _clip(folder: Path) -> list[Metric]:
    from torchmetrics.multimodal.clip_score import CLIPScore
    from transformers import CLIPModel, CLIPProcessor

    class Model(CLIPModel):
        """Embeddings as torchmetrics expects them; transformers 5 returns them inside of an output."""

        def get_image_features(self, *args: Any, **options: Any) -> Any:
            found = super().get_image_features(*args, **options)
            return getattr(found, "pooler_output", found)

        def get_text_features(self, *args: Any, **options: Any) -> Any:
            found = super().get_text_features(*args, **options)
            return getattr(found, "pooler_output", found)

    score = CLIPScore(lambda: (Model.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)))

    def measure(shown: Shown) -> float:
        score.reset()
        score.update(list(_tensor(shown.pictures)), list(shown.captions))
        return float(score.compute())

    return [Metric("CLIP score", True, measure)]


def _image_reward(file: Path) -> list[Metric]:
    import ImageReward
    from PIL import Image

    network = ImageReward.load(str(file))

    def measure(shown: Shown) -> float:
        pairs = zip(shown.captions, shown.pictures, strict=True)
        return float(np.mean([network.score(caption, Image.fromarray(picture)) for caption, picture in pairs]))

    return [Metric("ImageReward", True, measure)]


def _digits() -> list[Metric]:
    """Against the real digits, not against all-full: what a perfect generator would get is in these numbers too."""
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    from taylorseer_export.embedded.digits import trained_reader

    network, real = trained_reader()

    def distance(shown: Shown) -> float:
        measured: Any = FrechetInceptionDistance(network)
        measured.real_features_num_samples += real.count
        measured.real_features_sum += real.sum
        measured.real_features_cov_sum += real.products
        with torch.no_grad():
            measured.update(_tensor(shown.pictures), real=False)
        return float(measured.compute())

    def accuracy(shown: Shown) -> float:
        with torch.no_grad():
            read = network.head(network(_tensor(shown.pictures))).argmax(1).numpy()
        return float(np.mean(read == shown.labels))

    return [Metric("digit FID", False, distance), Metric("label accuracy", True, accuracy)]
