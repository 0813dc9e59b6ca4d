"""The latents of a bundle: most models denoise one, some several at once, like a video and its sound.

The first is the latent that all others are counted beside, and tells the sizes of a request with the constant inputs:

    latent       hidden_states        its prediction    noise_pred
    another      audio_hidden_states                    noise_pred.audio_hidden_states
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from taylorseer_export.errors import ConfigError

if TYPE_CHECKING:
    from taylorseer_export.bundle.manifest import Graph, Manifest

NOISE_PRED = "noise_pred"


def endings(latents: Iterable[str]) -> tuple[str, ...]:
    """What names that belong to one latent end on: nothing for the first, a dot and its own name for any other."""
    _, *others = latents
    return ("", *(f".{name}" for name in others))


def latents_of(graph: Graph) -> tuple[str, ...]:
    """Names of the latents that a graph takes, in order."""
    return tuple(tensor.name for tensor in graph.inputs if tensor.role == "latent")


def predictions_of(manifest: Manifest) -> dict[str, str]:
    """Latent -> the name of its prediction."""
    latents = latents_of(manifest.graphs["full"])
    return {name: f"{NOISE_PRED}{end}" for name, end in zip(latents, endings(latents), strict=True)}


def refuse_several(manifest: Manifest, asked: str) -> None:
    """Refuse a bundle of several latents for what serves one.

    Args:
        manifest: Of the bundle.
        asked: What was asked for: a verb of the command line, or the name of a server.

    Raises:
        ConfigError: It has several.
    """
    latents = latents_of(manifest.graphs["full"])
    if len(latents) > 1:
        raise ConfigError(
            f"bundle {manifest.family}-{manifest.name} has {len(latents)} latents ({', '.join(latents)}), expected one "
            f"for {asked}; use it in its diffusers pipeline by as_transformer(), or with replay, verify and bench"
        )
