"""Drafts: everything known about graphs before they are engines, and the options that they are made by."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from taylorseer_export.bundle.manifest import Dimension, Graph, LowRank, Parallel, PartName
from taylorseer_export.bundle.parallel import Mode, ranges_of_one
from taylorseer_export.checkpoint.checkpoint import Checkpoint
from taylorseer_export.compile.engines import Progress, builder
from taylorseer_export.compile.kept import kept
from taylorseer_export.compile.weights import WEIGHTS, Stored, write_weights
from taylorseer_export.errors import CheckpointError
from taylorseer_export.graph.cut import Cut
from taylorseer_export.graph.quantise import Part
from taylorseer_export.graph.split import Split
from taylorseer_export.method import Granularity, Layout, Plan
from taylorseer_export.method.guard import Rule
from taylorseer_export.method.plan import Dialect

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MOST_STEPS = 1000


@dataclass(frozen=True)
class Options:
    """What to export.

    Attributes:
        order: Highest order kept in the Taylor buffers and default order of the forecasts, dimensionless.
        interval, warmup, steps, dialect: The default plan; a request may bring its own.
        granularity: What is forecast: `module`, `residual` or `last`.
        layout: What the Taylor buffers hold: `snapshots` or `derivatives`.
        engine: Kind of engine.
        engine_options: Options that only some kinds of engine take, by their name on the command line.
        device: Kind of device that the engines are to run on, `cpu` or `cuda`; None takes what the kind of engine
            serves best.
        precision: `fp32`, `fp16` or `bf16`.
        state_dtype: The same for the Taylor buffers; None takes the precision. Arithmetic on them is float32.
        latent_size: (height, width) or (frames, height, width) of the latent; None accepts the family's range.
        batch: Samples per call of the transformer; None accepts the family's range.
        polygraphy: Whether the bundle gets example inputs and profiles for Polygraphy's command line.
        guards: The rules that a request may guard its forecasts by; each adds its part to the probe.
        parts: What of the pipeline the bundle holds besides the transformer, by name: see `PartName`.
        weights: Format of the weights of the blocks' linear layers: `fp8`, `nvfp4` or `int8`, or `keep` for the values
            and scales that the checkpoint has; None takes the precision.
        activations: How what these layers read is quantised: `none`, `token` or `static`; None takes what the engine
            does best.
        input_scales: Weight -> what a value that its layer reads counts, with `static`, in the place of the
            checkpoint's own; see `report/input_scales.py`.
        samples: Requests that they were found on; None where they come from elsewhere.
        keep_precision: Patterns of layers whose weights stay in the precision.
        lora_rank: Highest rank of the LoRA that a request may bring, dimensionless; None takes none.
        lora_targets: Regular expression found in the names of the layers that it may change; None takes all.
        parallel: What attentions become where the latent's rows are shared out over ranks; None shares nothing out.
        degree: Over how many.
    """

    order: int
    interval: int
    warmup: int
    steps: int = 50
    dialect: Dialect = "original"
    granularity: Granularity = "module"
    layout: Layout = "snapshots"
    engine: str = "onnxruntime"
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    precision: str = "fp32"
    state_dtype: str | None = None
    latent_size: tuple[int, ...] | None = None
    batch: int | None = None
    polygraphy: bool = False
    guards: tuple[Rule, ...] = ()
    parts: tuple[PartName, ...] = ()
    weights: str | None = None
    activations: str | None = None
    input_scales: Mapping[str, float] = field(default_factory=dict)
    samples: int | None = None
    keep_precision: tuple[str, ...] = ()
    lora_rank: int | None = None
    lora_targets: str | None = None
    parallel: Mode | None = None
    degree: int = 2

    def state_type(self) -> torch.dtype:
        """dtype of the Taylor buffers."""
        return PRECISIONS[self.state_dtype or self.precision]

    def plan(self) -> Plan:
        """The default plan."""
        return Plan.regular(self.steps, self.interval, self.warmup, self.dialect)


class BaseDraft(ABC):
    """Graphs that are built together, over one weights file: what a builder needs to know of them.

    Attributes:
        options: What they are made by.
        sizes: Dimension -> its one size, or None where the bundle accepts a range.
        typical: Dimension -> the size that estimates are quoted at.
        stored: Tensor name -> (dtype, shape) of every weight that some graph reads.
        buffers: Tensors that are computed when the model is built and are in no checkpoint.
        parallel: How they are shared out over ranks; sizes and ranges are those of one of them. None: they are not.
    """

    options: Options
    sizes: dict[str, int | None]
    typical: dict[str, int]
    stored: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    buffers: dict[str, torch.Tensor]
    parallel: Parallel | None = None

    @property
    @abstractmethod
    def graphs(self) -> tuple[Cut, ...]:
        """The graphs themselves."""

    @abstractmethod
    def ranges(self) -> dict[str, tuple[int, int]]:
        """(smallest, largest) of every size."""

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """A stored tensor of the checkpoint, in the dtype that it has there."""

    @abstractmethod
    def origin(self) -> str:
        """Where its weights come from, for the errors."""

    @property
    def graph_sizes(self) -> dict[str, int | None]:
        """Dimension -> size of the graphs: as `sizes`, and the number of steps is open in every bundle."""
        return {**self.sizes, "steps": None}

    def contract(self, cut: Cut) -> Graph:
        """The I/O contract of one graph, as the manifest holds it."""
        return Graph(
            file=builder(self.options.engine).graph_file(cut.name),
            inputs=cut.inputs,
            outputs=cut.outputs,
            weights_bytes=self.weights_bytes(cut),
        )

    def read(self, name: str) -> torch.Tensor:
        """A stored tensor as the model itself has it, or as the checkpoint does in the dtype that it is stored in.

        Raises:
            CheckpointError: It has numbers that are not finite there: damaged, or beyond the range of the precision.
        """
        if name in self.buffers:
            return self.buffers[name]
        return self.finite(name, self.stored[name][0])

    def finite(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the checkpoint in a dtype, refused as `read` says."""
        found = self.tensor(name)
        value = found.to(dtype)
        if value.is_floating_point() and (bad := _not_finite(value)):
            kind, whole = str(value.dtype).removeprefix("torch."), not _not_finite(found)
            raise CheckpointError(
                f"`{name}` of {self.origin()} has {bad} of {value.numel()} values that are "
                + (f"beyond the range of {kind}" if whole else "NaN or infinite")
                + ", expected finite numbers; "
                + ("export with --precision bf16" if whole else "check the checkpoint, and --lora if it is given")
            )
        return value

    def write_weights(self, folder: Path, progress: Progress) -> dict[str, Stored]:
        """Write every weight that some graph reads into the one weights file of the folder."""
        total, done = self.weights_bytes(), 0

        def count(size: int) -> None:
            nonlocal done
            done += size
            progress("weights", done, total)

        return write_weights(folder / WEIGHTS, self.stored, self.read, count)

    def dimensions(self) -> dict[str, Dimension]:
        """The ranges as the manifest holds them, with the sizes that estimates are quoted at."""
        return {
            name: Dimension(minimum=low, maximum=high, typical=self.typical[name])
            for name, (low, high) in self.ranges().items()
        }

    def weights_bytes(self, cut: Cut | None = None) -> int:
        """Bytes of the weights of one graph, or of all."""
        names = self.stored if cut is None else cut.parameters()
        return sum(self.stored[n][0].itemsize * math.prod(self.stored[n][1]) for n in names)


@dataclass(frozen=True)
class Draft(BaseDraft):
    """A model traced and split, with everything known about the bundle before anything is written.

    Attributes:
        checkpoint: The model.
        split: Its graphs.
        quantised: Name of a stored tensor -> what it is of which quantised weight.
        lora: Its low-rank inputs.
    """

    checkpoint: Checkpoint
    options: Options
    split: Split
    sizes: dict[str, int | None]
    typical: dict[str, int]
    stored: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    buffers: dict[str, torch.Tensor]
    quantised: Mapping[str, Part] = field(default_factory=dict)
    lora: LowRank | None = None
    parallel: Parallel | None = None

    @property
    def graphs(self) -> tuple[Cut, ...]:
        return self.split.graphs

    def read(self, name: str) -> torch.Tensor:
        part = self.quantised.get(name)
        if part is None:
            return super().read(name)
        return kept(self.checkpoint, part) if part.kept else part.of(self.finite(part.weight, torch.float32))

    def origin(self) -> str:
        return self.checkpoint.reference

    def tensor(self, name: str) -> torch.Tensor:
        return self.checkpoint.tensor(name)

    def ranges(self) -> dict[str, tuple[int, int]]:
        ranges = ranges_of_one(self.parallel, self.checkpoint.family.dimensions(self.checkpoint.config))
        ranges |= {"steps": (1, MOST_STEPS)}
        return {n: (self.sizes.get(n) or low, self.sizes.get(n) or high) for n, (low, high) in ranges.items()}


def _not_finite(value: torch.Tensor) -> int:
    """How many numbers are NaN or infinite, read in pieces: a mask of a whole tensor would be as large as its bytes."""
    return sum(int((~part.isfinite()).sum()) for part in value.reshape(-1).split(1 << 18))
