"""A part of a pipeline, traced: what is built, and what the manifest says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from taylorseer_export.bundle.manifest import (
    Controlled,
    Driven,
    Fitted,
    Patches,
    PipelinePart,
    Sections,
    Shown,
    Tiles,
    Tokens,
)
from taylorseer_export.checkpoint.checkpoint import Checkpoint
from taylorseer_export.compile.draft import BaseDraft, Options
from taylorseer_export.graph.cut import Cut


@dataclass(frozen=True)
class PartDraft(BaseDraft):
    """A part of a pipeline, traced.

    Attributes:
        pipeline: Folder that its modules were loaded from.
        cuts: Its graph; where a video goes frame by frame that of the first latent frame, then that of any later one.
        spans: Dimension -> (smallest, largest) size.
        modules: Name in the pipeline -> the module, with its weights.
        tokens: How a prompt becomes its inputs.
        negative: See `Whole.negative`.
        tiles: Of the decoder of a video in tiles; None for any other part.
        frame_rate: Frames per second of videos; None where it decodes none.
        dropped, skipped: See `Whole`.
        shown_at: See `Whole.seen_at`.
        shown: How an image encoder is shown a picture; None where there is none.
        patches: How text encoders are shown any pictures; None where they are not.
        area: See `Whole.area`; None where it is none.
        fitted: See `Whole.fitted`.
        cropped: See `Whole.cropped`; None where it is 0.
        sections: How videos are made section by section; None where they are not.
        driven: How videos are driven by others; None where they are not.
        controlled: How videos go by others; None where they do not.
    """

    pipeline: Path
    options: Options
    cuts: tuple[Cut, ...]
    spans: dict[str, tuple[int, int]]
    sizes: dict[str, int | None]
    typical: dict[str, int]
    stored: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    buffers: dict[str, torch.Tensor]
    modules: Mapping[str, nn.Module]
    tokens: tuple[Tokens, ...] = ()
    negative: str | None = None
    tiles: Tiles | None = None
    frame_rate: int | None = None
    dropped: int = 0
    skipped: int = 0
    shown_at: tuple[tuple[int, int], ...] = ()
    shown: Shown | None = None
    patches: Patches | None = None
    area: int | None = None
    fitted: Fitted | None = None
    cropped: int | None = None
    sections: Sections | None = None
    driven: Driven | None = None
    controlled: Controlled | None = None

    @property
    def graphs(self) -> tuple[Cut, ...]:
        return self.cuts

    def origin(self) -> str:
        return str(self.pipeline)

    def ranges(self) -> dict[str, tuple[int, int]]:
        return self.spans

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return _tensors(self.modules)

    def described(self) -> PipelinePart:
        """As the manifest holds it; its files lie in the folder of its name."""
        within = self.graphs[0].name
        contracts = [self.contract(cut) for cut in self.graphs]
        graph, *later = [one.model_copy(update={"file": f"{within}/{one.file}"}) for one in contracts]
        return PipelinePart(
            graph=graph,
            later=later[0] if later else None,
            tiles=self.tiles,
            frame_rate=self.frame_rate,
            dropped=self.dropped,
            skipped=self.skipped,
            dimensions=self.dimensions(),
            tokens=self.tokens,
            shown=self.shown,
            patches=self.patches,
            area=self.area,
            fitted=self.fitted,
            cropped=self.cropped,
            sections=self.sections,
            driven=self.driven,
            controlled=self.controlled,
            sizes=self.shown_at,
            negative=self.negative,
        )


def drafted(
    checkpoint: Checkpoint,
    options: Options,
    modules: Mapping[str, nn.Module],
    graphs: tuple[Cut, ...],
    constants: dict[str, torch.Tensor],
    extents: tuple[dict[str, tuple[int, int]], dict[str, int]],
) -> PartDraft:
    """What was traced of some modules.

    Args:
        checkpoint: The transformer, in its pipeline folder.
        options: Of the bundle.
        modules: Name in the pipeline -> module.
        graphs: See `PartDraft.cuts`.
        constants: What the modules compute from nothing, by name.
        extents: Dimension -> (smallest, largest) size, and the size that estimates are quoted at.
    """
    ranges, typical = extents
    tensors = _tensors(modules) | constants
    read = {name: None for cut in graphs for name in cut.parameters()}
    return PartDraft(
        pipeline=checkpoint.root,
        options=options,
        cuts=graphs,
        spans=ranges,
        sizes={key: low if low == high else None for key, (low, high) in ranges.items()},
        typical=typical,
        stored={key: (tensors[key].dtype, tuple(tensors[key].shape)) for key in read},
        buffers=constants,
        modules=modules,
    )


def _tensors(modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Every tensor of the modules under each of its names: some are tied."""
    return {
        f"{part}.{name}": value.detach()
        for part, module in modules.items()
        for name, value in (*module.named_parameters(remove_duplicate=False), *module.named_buffers())
    }
