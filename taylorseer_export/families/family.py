"""What a model family is: the few facts that the splitter, the command line and the runtime need about a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.whole import Whole

Role = Literal["latent", "step", "constant", "lora"]
Guidance = Literal["none", "embedded", "batched", "branches"]
_PACKING = 2
Fill = Literal["ones", "zeros", "grid", "line", "diagonal", "sides", "frames", "scales", "turns", "guidance", "next"]


@dataclass(frozen=True)
class Input:
    """One argument of the transformer's `forward`.

    Attributes:
        name: The diffusers argument name.
        shape: Sizes; a string names a dimension of the family, or is a multiple of one, like `2*rows`.
        role: When its value is known: `latent` changes with every step, `step` depends on the step alone,
            `constant` is fixed for the request. `lora` is of the low-rank pass alone, and no argument of a model.
        dtype: `float` follows the precision of the export; anything else is a fixed torch dtype name.
        values: (smallest, largest) value allowed, where the model looks something up by it.
        fill: What its values are where they follow from the sizes alone, so that a request may leave it out: `ones`
            and `zeros`; `grid`, a row of (first, row, column) for each token, with zeros behind where it is longer;
            `line`, zeros but for the last column, which counts the tokens; `diagonal`, the same but for the first;
            `sides`, (1, rows, columns) of each picture in tokens, the latent first; `frames`, first, first + 1 and so
            on; `scales`, what places in time and along both sides are divided by, as Kandinsky 5 has it: 1, and 2 for
            each side where both are 30 to 53 tokens, else 3.16; `turns`, cosines and sines `[2, frames, rows, columns,
            width]` of the angles by which places turn queries and keys; `guidance`, the guidance scale times
            `Pipeline.guidance_factor`; `next`, of a `step` input beside the timestep, that of the next step, which for
            the last is that of no noise.
        first: Where `grid` and `frames` begin.
        corner: (row, column) of the first token of `grid`, both the same.
        spacing: Between rows and columns of `grid`.
        within: (rows, columns) that the places of `turns` are stretched into, around its middle; whole numbers if None.
    """

    name: str
    shape: tuple[int | str, ...]
    role: Role
    dtype: str = "float"
    values: tuple[int, int] | None = None
    fill: Fill | None = None
    first: int = 0
    corner: int = 0
    spacing: float = 1.0
    within: tuple[int, int] | None = None


@dataclass(frozen=True)
class Derived:
    """A tensor that the graphs read in the place of a larger one of the checkpoint.

    Attributes:
        source: Name of that one.
        shape: Of this one.
        make: The tensor of the checkpoint -> this one; raises `CheckpointError` if it is of another kind.
    """

    source: str
    shape: tuple[int, ...]
    make: Callable[[Any], Any]


@dataclass(frozen=True)
class Pipeline:
    """What the family's pipeline in diffusers does around the transformer, where it is not what most of them do.

    It travels in the manifest under the same names, since the run side knows no family.

    Attributes:
        guidance_factor: What the guidance scale is multiplied by where it is an input, dimensionless.
        guidance_offset: What is added to the guidance scale of two predictions before they are weighed, dimensionless:
            1 where the pipeline counts from the conditional one, so that its scale of 0 is no guidance.
        guidance_keeps_norm: Whether a guided prediction is made as long as the conditional one, token by token.
        guidance_cuts_norm: Whether it is made no longer than that.
        prediction_sign: -1 where the model predicts the way to the picture; schedulers take the way to the noise.
        timestep_reversed: Whether the model takes how far a step is from the noise, 1 - t / timestep_divisor.
        flow_steps: What a flow-matching scheduler is given: evenly spaced `sigmas`, or a `count` of steps.
        noise: What a packed latent is drawn as: `latents`, which are then packed, or the `tokens` that they become,
            channels first, as a picture of as many places as there are tokens.
        shift: What the sigmas shift with, where they do: the number of `tokens`, `tokens-and-steps`, or a number of its
            own, with nothing.
        largest_shift: Of the sigmas, where they shift with the number of tokens; None has no limit.
        condition_share: Part of the condition in the noise that a loop begins with, dimensionless.
        arguments: How the transformer is called: `declared`, with the inputs as they are; `rows-behind`, with the rows
            of a conditioning picture behind those of the latent; `rows-ahead`, with them ahead at the first step, which
            returns what the others are told of them; `first-shape`, with a shape for each picture of
            which the model reads the first, and without a mask where every token counts; `pictures-behind`, like
            that, with the rows of pictures behind those of the latent and their shapes behind its shape; `noise-alone`,
            with channels of a picture behind those of the latent, which are zeros; `mask-of-all`, with a mask of the
            text and of the latent behind it, of which every token counts; `places-of-all`, with places of the text,
            which are zero, before those of the latent; `lists`, with latents `[C, 1, H, W]` and
            words `[T, D]` of each sample in lists, and so the answer; `first-frame`, with a timestep for each token,
            which is 0 in the first frame, that of a picture; `rotary`, with cosines and sines of places in two tables
            that have a row for each token of the latent `[N, F, C, H, W]`; `channels-last`, with the latent
            `[N, F, H, W, C]`.
        positional: Inputs that are passed by place behind the latent, in order; all others by name.
        cast_inputs: Constant inputs that are cast or joined anew at every call, so that only their numbers stay.
        ignored_inputs: Arguments that are passed and that the model does not look at, unless they are inputs.
        modules: Of the transformer, without weights, that the pipeline calls by itself.
    """

    guidance_factor: float = 1.0
    guidance_offset: float = 0.0
    guidance_keeps_norm: bool = False
    guidance_cuts_norm: bool = False
    prediction_sign: Literal[1, -1] = 1
    timestep_reversed: bool = False
    flow_steps: Literal["sigmas", "count"] = "sigmas"
    noise: Literal["latents", "tokens"] = "latents"
    shift: Literal["tokens", "tokens-and-steps"] | float = "tokens"
    largest_shift: float | None = None
    condition_share: float = 0.0
    arguments: Literal[
        "declared", "rows-behind", "rows-ahead", "first-shape", "pictures-behind", "noise-alone", "mask-of-all",
        "places-of-all", "lists", "first-frame", "rotary", "channels-last",
    ] = "declared"  # fmt: skip
    positional: tuple[str, ...] = ()
    cast_inputs: tuple[str, ...] = ()
    ignored_inputs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comfy:
    """ComfyUI's model of a family. It travels in the manifest under the same names.

    Attributes:
        model: Class in `comfy.supported_models`.
        inputs: Constant inputs of the transformer -> what ComfyUI calls them when it calls its network; those that are
            left out follow from the sizes.
        config: What that class is told of the network.
        ignored: Parts of a conditioning that ComfyUI passes and that the model does not look at.
        weights: Modules of the network -> the shape of their weights, where ComfyUI's class asks for it.
    """

    model: str
    inputs: Mapping[str, str]
    config: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Defaults:
    """The paper's schedule for a family. Units: `steps`, `interval`, `warmup` in denoising steps."""

    steps: int
    interval: int
    warmup: int
    order: int


def packed(config: Mapping[str, Any], height: int, width: int) -> dict[str, int]:
    """`latent_sizes` of a model whose pipeline packs 2 x 2 latent pixels into a token."""
    sides = patches({"patch_size": _PACKING}, height, width)
    return {"image_tokens": sides["rows"] * sides["columns"]}


def patches(config: Mapping[str, Any], height: int, width: int) -> dict[str, int]:
    """`latent_sizes` of a model that cuts the latent image into square patches itself."""
    patch = config["patch_size"]
    patch = patch if isinstance(patch, int) else patch[-1]  # of frames, rows and columns
    for label, size in (("height", height), ("width", width)):
        if size % patch:
            raise ConfigError(
                f"latent {label} is {size}, expected a multiple of {patch} (latent pixels), which {patch} x {patch} "
                "make one token; change --size or --latent-size"
            )
    return {"rows": height // patch, "columns": width // patch}


def video_patches(config: Mapping[str, Any], frames: int, height: int, width: int) -> dict[str, int]:
    """The same of a video, whose latent frames are as many as there are."""
    return {"frames": frames, **patches(config, height, width)}


def fixed(config: Mapping[str, Any], height: int, width: int) -> dict[str, int]:
    """`latent_sizes` of a model that knows one picture size, that of its position table."""
    size = config["sample_size"]
    if (height, width) != (size, size):
        raise ConfigError(
            f"latent size is {height}x{width}, expected {size}x{size} (latent pixels), the one size of this model's "
            "position table; leave --size out or choose another model"
        )
    return {}


def call(model: Any, inputs: dict[str, Any]) -> Any:
    """noise_pred of a model whose `forward` takes the declared inputs as they are."""
    return model(**inputs, return_dict=False)[0]


def unless_traced(forward: Callable[[Any, dict[str, Any]], Any]) -> Callable[[Any, dict[str, Any]], Any]:
    """`forward` of a family whose model is traced as `instead` has it, which takes the declared inputs as they are."""

    def called(model: Any, inputs: dict[str, Any]) -> Any:
        import torch

        return (call if torch.compiler.is_exporting() else forward)(model, inputs)

    return called


def uncut(tokens: Any, counts: Sequence[Any], patch: Sequence[int], channels_last: bool = False) -> Any:
    """What a model has cut into patches, together again: `[B, C, *counts * patch]` of its tokens.

    Args:
        tokens: `[B, product of counts, C * product of patch]`.
        counts: Patches along each side.
        patch: Its sides.
        channels_last: Whether a token's channels stand behind the sides of its patch, or before them.
    """
    sides = len(counts)
    pixels = tokens.reshape(tokens.shape[0], *counts, *((*patch, -1) if channels_last else (-1, *patch)))
    first, channels = (sides + 1, 2 * sides + 1) if channels_last else (sides + 2, sides + 1)
    made = pixels.permute(0, channels, *(axis for k in range(sides) for axis in (1 + k, first + k)))
    for k in reversed(range(sides)):
        made = made.flatten(2 + 2 * k, 3 + 2 * k)
    return made


def no_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """For a model whose tensors are read as they are."""
    return {}


def no_counterpart(config: Mapping[str, Any]) -> Comfy | None:
    """For a model that ComfyUI has not, or of which nothing is declared."""
    return None


def as_it_is(_: Any) -> AbstractContextManager[object]:
    """For a model that is built, or traced, without a change."""
    return nullcontext()


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Other attributes of a module of Python or of torch, for the length of the block."""
    own = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    vars(owner).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(owner)[name]
        vars(owner).update(own)


def instead(forward: Callable[..., Any]) -> Callable[[Any], AbstractContextManager[None]]:
    """`patched` of a model that is traced by `forward(model, ...)` in the place of its own."""
    return lambda model: replaced(model, forward=partial(forward, model))


@contextmanager
def unhooked(model: Any) -> Iterator[None]:
    """For the length of the block, no hook of a module is called: what runs inside is no step, and nothing in it is
    tapped, recorded or forecast."""
    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(replaced(module, _forward_hooks={}, _forward_pre_hooks={}))
        yield


@dataclass(frozen=True)
class Family:
    """A short declaration from which graphs, engines and the command line of one model family follow.

    Attributes:
        name: The word on the command line.
        title: The published models that it covers.
        model_class: Class name in `diffusers`.
        reference: Hub id of the model most users mean.
        sites: Regular expressions over module names. What matches is forecast at granularity `module`: the
            attention and MLP outputs before their gate.
        stack_input: (module, argument) through which the hidden state enters the first block.
        stack_output: (module, argument) through which it leaves the last block.
        others: Further latent -> the same two of its stream, where a model denoises several at once, in the order of
            `inputs`; `forward` then returns a prediction for each.
        first_input: (module, argument) of the first attention, which a guard may read; the first site's if left out.
        inputs: `config -> inputs` of the transformer.
        dimensions: `config -> {dimension: (smallest, largest)}` that a bundle without a fixed size accepts.
        latent_sizes: `(config, *latent size) -> {dimension: size}` for one latent, before packing.
        defaults: The paper's plan and order.
        scheduler: Class name of the diffusers scheduler that the family's pipeline uses.
        scheduler_config: What the published checkpoints set of it, for a checkpoint that brings no scheduler.
        guidance: How classifier-free guidance reaches the model: not at all, `embedded` as an input, `batched` as
            two halves of a batch, or as two `branches`, called one after the other in every step.
        guidance_scale: The pipeline's default, dimensionless.
        latent_size: (height, width) of the latent, or (frames, height, width), at the model's usual resolution.
        latent_scale: Pixels per latent pixel along each side.
        time_scale: Frames per latent frame; the first latent frame is one frame.
        typical: Dimension -> size that estimates are quoted at, where the size of the latent does not give it.
        timestep_divisor: What the scheduler's timestep is divided by before the transformer takes it, dimensionless.
        pipeline: What else the family's pipeline does around the transformer.
        pipelines: Class names in `diffusers` of its pipelines, where models of the same class are of other families
            too: a folder of another pipeline is refused, and one of these by the others. Empty takes what is left.
        comfy: `config -> ComfyUI's model`; None where there is none that the engines could stand in for.
        whole: What else of the pipeline a bundle may hold; None where that is the transformer alone.
        source: What a request is made from: class `labels`, or the `tensors` that the pipeline's encoders make.
        attributes: `config -> {name: value}` that the pipeline reads from the transformer besides its config.
        lora_loader: Class in `diffusers.loaders` that knows how the LoRAs of the pipeline are named; none if empty.
        forward: `(model, inputs) -> noise_pred`, or one for each latent: how the declared inputs become a call of the
            model, where they are not its arguments one by one. The trace and the eager reference of `verify` both
            call it this way.
        rounded: Regular expressions over modules whose code rounds two tensors to bfloat16 in any precision, so that
            what is off by less than float32's roundoff before may be off by bfloat16's behind.
        retired: Entries of published configs that the class no longer has, and that never changed what it computes.
        variants: Word of a model's name -> what of this declaration is different for it.
        distilled: That of `variants` which a pipeline means by the entry `is_distilled` of its index; empty where none
            has that entry.
        by_config: `config -> what of this declaration is different for it`; a config has the entries of its pipeline's
            too, where it lies in a folder of one.
        by_pipeline: Class name in `diffusers` of a pipeline -> what of this declaration is different in its folder.
        shared: What of this declaration is different where the latent's rows are shared out over ranks, which then is
            at one size alone; empty where nothing is.
        undivided: Sizes of the latent that ranks do not share out, since the model tells their entries apart.
        derived: `config -> {name: tensor}` that the model gets for the length of the trace, to be used by `patched`.
        built: `model class -> context manager` in which a model is built that only is to be traced, without tables
            that would cost memory.
        patched: `model -> context manager` that puts parts of the model into a form that exports, equal to the
            original, for the length of the trace.
    """

    name: str
    title: str
    model_class: str
    reference: str
    sites: tuple[str, ...]
    stack_input: tuple[str, str]
    stack_output: tuple[str, str]
    inputs: Callable[[Mapping[str, Any]], tuple[Input, ...]]
    dimensions: Callable[[Mapping[str, Any]], dict[str, tuple[int, int]]]
    latent_sizes: Callable[..., dict[str, int]]
    defaults: Defaults
    guidance: Guidance
    guidance_scale: float
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    latent_size: tuple[int, ...] = (128, 128)
    latent_scale: int = 8
    time_scale: int = 4
    typical: Mapping[str, int] = field(default_factory=lambda: {"text_tokens": 512})
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)
    timestep_divisor: float = 1.0
    pipeline: Pipeline = Pipeline()
    pipelines: tuple[str, ...] = ()
    comfy: Callable[[Mapping[str, Any]], Comfy | None] = no_counterpart
    whole: Whole | None = None
    source: Literal["labels", "tensors"] = "tensors"
    attributes: Callable[[Mapping[str, Any]], Mapping[str, int | tuple[int, ...]]] = no_entries
    first_input: tuple[str, str] | None = None
    others: Mapping[str, tuple[tuple[str, str], tuple[str, str]]] = field(default_factory=dict)
    lora_loader: str = ""
    forward: Callable[[Any, dict[str, Any]], Any] = call
    rounded: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    distilled: str = ""
    by_config: Callable[[Mapping[str, Any]], Mapping[str, Any]] = no_entries
    by_pipeline: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    undivided: tuple[str, ...] = ()
    derived: Callable[[Mapping[str, Any]], Mapping[str, Derived]] = no_entries
    built: Callable[[Any], AbstractContextManager[object]] = as_it_is
    patched: Callable[[Any], AbstractContextManager[object]] = as_it_is

    @property
    def packing(self) -> int:
        """Side of the square of latent pixels that the pipeline makes one token; 1 where it packs none."""
        return _PACKING if self.latent_sizes is packed else 1

    def variant(self, reference: str, distilled: bool | None = None) -> Family:
        """The declaration for a hub id, folder or file: `FLUX.1-schnell` has the word `schnell`.

        Args:
            reference: It.
            distilled: What the index of its pipeline says, which counts more than a name; None where it says nothing.
        """
        if self.distilled and distilled is not None:
            return replace(self, **self.variants[self.distilled]) if distilled else self
        parts = [part for part in reference.split("/") if part not in ("", "transformer", "config.json")]
        words = re.findall(r"[a-z0-9]+", parts[-1].lower()) if parts else []
        changes = [change for word, change in self.variants.items() if word in words]
        return replace(self, **changes[0]) if changes else self


AUTO = "auto"  # the name of what no family declares


def unknown(model_class: str) -> Family:
    """A family of which nothing is known but its class, to be filled in."""
    return Family(
        name=AUTO,
        title=model_class,
        model_class=model_class,
        reference="",
        sites=(),
        stack_input=("", ""),
        stack_output=("", ""),
        inputs=lambda config: (),
        dimensions=lambda config: {},
        latent_sizes=lambda config, *size: {},
        defaults=Defaults(steps=50, interval=5, warmup=1, order=1),
        guidance="none",
        guidance_scale=1.0,
    )
