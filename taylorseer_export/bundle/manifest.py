"""The manifest: what a bundle contains, how each graph is called, and the hash of every file.

It is one JSON file, `manifest.json`, in one canonical form (sorted keys, two spaces, ASCII, a final
newline), so a bundle has exactly one correct manifest and any other byte is noticed.
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from taylorseer_export.bundle.agreement import contradiction
from taylorseer_export.bundle.comfy import Comfy as Comfy
from taylorseer_export.bundle.command import command_of
from taylorseer_export.bundle.entries import BUNDLE_NAME as BUNDLE_NAME
from taylorseer_export.bundle.entries import (
    BundleName,
    ClassName,
    Config,
    Count,
    FamilyName,
    RelativePath,
    SchedulerName,
    Size,
    SizeName,
    Text,
    Whole,
)
from taylorseer_export.bundle.entries import Shape as Shape
from taylorseer_export.bundle.low_rank import LowRank as LowRank
from taylorseer_export.bundle.parallel import Parallel as Parallel
from taylorseer_export.bundle.part_entries import Controlled as Controlled
from taylorseer_export.bundle.part_entries import Driven as Driven
from taylorseer_export.bundle.part_entries import Filter as Filter
from taylorseer_export.bundle.part_entries import Fitted as Fitted
from taylorseer_export.bundle.part_entries import Patches as Patches
from taylorseer_export.bundle.part_entries import Sections as Sections
from taylorseer_export.bundle.part_entries import Shown as Shown
from taylorseer_export.bundle.part_entries import Tiles as Tiles
from taylorseer_export.bundle.part_entries import Tokens as Tokens
from taylorseer_export.bundle.quantised import Quantised
from taylorseer_export.bundle.sealed import Part, Sealed, Sha256
from taylorseer_export.errors import BundleError
from taylorseer_export.method.forecasts import Granularity, Layout
from taylorseer_export.method.guard import Rule
from taylorseer_export.method.plan import Dialect, Plan

MANIFEST = "manifest.json"
SCHEMA_VERSION = 4

GraphName = Literal["prepare", "full", "forecast", "probe", "rest"]
PartName = Literal["text", "encode", "decode"]
Role = Literal[
    "latent", "step", "constant", "weights", "taylor_in", "taylor_out", "noise_pred",
    "probe_in", "probe_out", "error", "carried", "tokens", "picture", "cache_in", "cache_out", "lora",
]  # fmt: skip
Fill = Literal["ones", "zeros", "grid", "line", "diagonal", "sides", "frames", "scales", "turns", "guidance", "next"]
Dtype = Literal["float32", "float16", "bfloat16", "float64", "int64", "int32", "bool"]


class Tensor(Part):
    """One input or output of a graph."""

    name: Text = Field(min_length=1, max_length=500, description="Name of the tensor in the graph file.")
    dtype: Dtype = Field(description="Element type.")
    shape: Shape = Field(
        description="Extent of each dimension in elements: a number, the name of a dimension, or "
        "an expression over them with + - * // and parentheses."
    )
    role: Role = Field(
        description="What it is for. latent: the noisy sample. step: changes with the step alone. "
        "constant: fixed for the request. weights: the forecast weights. taylor_in, taylor_out: "
        "the Taylor buffers read and written. noise_pred: the prediction for a latent. probe_in, "
        "probe_out: what the probe keeps, read and written. error: how far the probe's quantity is from what was "
        "expected. carried: from the probe to the rest of a full step. tokens: what a tokenizer makes of a prompt. "
        "picture: from 0 to 1. cache_in, cache_out: what the VAE of a video keeps of the latent frames before, "
        "read and written, in buffers of their own. lora: low-rank weights of the request."
    )
    values: tuple[Whole, Whole] | None = Field(
        default=None, description="Smallest and largest value accepted, where it is an index into a table."
    )
    site: str | None = Field(default=None, description="Of a Taylor buffer: the site whose features it holds.")
    rule: Rule | None = Field(default=None, description="Of the probe's own tensors: the guard's rule they serve.")
    fill: Fill | None = Field(
        default=None,
        description="What it holds where that follows from the sizes, so that a request may leave it out. ones, zeros. "
        "grid: (first, row, column) of each token, and zeros. line: zeros, and the number of each token. diagonal: a "
        "zero, and that number in all other places. sides: (1, rows, columns) of each picture in tokens, the latent "
        "first. frames: first, first + 1 and so on. scales: (1, 2, 2) where rows and columns are 30 to 53 each, else "
        "(1, 3.16, 3.16). turns: cosines and sines of the places of tokens. guidance: the scale times guidance_factor. "
        "next: of an input of role step, the timestep of the next step, that of no noise behind the last.",
    )
    first: int = Field(default=0, description="Where the fills grid and frames begin.")
    corner: int = Field(default=0, description="Row and column of the first token of the fill grid.")
    spacing: float = Field(default=1.0, description="Between rows and columns of the fill grid.")
    within: tuple[Size, Size] | None = Field(
        default=None, description="Sides that places of the fill turns are within."
    )


class Graph(Part):
    """One graph of the bundle and its I/O contract."""

    file: RelativePath = Field(description="Engine or ONNX file, relative posix path.")
    inputs: tuple[Tensor, ...] = Field(description="Inputs in the order of the graph.")
    outputs: tuple[Tensor, ...] = Field(description="Outputs in the order of the graph.")
    weights_bytes: Count = Field(description="Bytes of the weights it reads; graphs may share a weight.")

    def input_of(self, role: Role) -> Tensor:
        """The one input of a role; raises `BundleError` where there is none or several."""
        found = [t for t in self.inputs if t.role == role]
        if len(found) != 1:
            raise BundleError(f"manifest has {len(found)} inputs of role `{role}`, expected 1; export again")
        return found[0]


class Dimension(Part):
    """Accepted range of one symbolic size; equal ends make it static."""

    minimum: Size = Field(description="Smallest accepted size, in elements.")
    maximum: Size = Field(description="Largest accepted size, in elements.")
    typical: Size = Field(description="Size at which estimates and benchmarks are quoted, in elements.")

    @model_validator(mode="after")
    def _ordered(self) -> "Dimension":
        if not self.minimum <= self.typical <= self.maximum:
            raise ValueError(f"typical {self.typical} is not within {self.minimum} to {self.maximum}")
        return self


class Site(Part):
    """One tapped module output that is forecast on forecast steps, or the sum of those that share a gate."""

    name: Text = Field(
        min_length=1, max_length=400, description="Dotted module name in the transformer; of a sum, without numbers."
    )
    shape: Shape = Field(description="Shape of one snapshot, as in a tensor's shape.")


class State(Part):
    """How the Taylor buffers are laid out."""

    granularity: Granularity = Field(
        description="What is forecast. module: attention and MLP outputs. residual: the whole "
        "block stack's output minus its input. last: the hidden state before the final norm."
    )
    layout: Layout = Field(description="What the buffers hold: the last order + 1 features, or D0 to D_order.")
    order: int = Field(ge=0, le=4, description="Highest order kept, dimensionless.")
    dtype: Dtype = Field(description="Element type of the Taylor buffers.")
    guards: tuple[Rule, ...] = Field(default=(), description="The rules whose errors the probe computes.")


class PlanDefaults(Part):
    """The plan used when a request names none."""

    steps: Size = Field(description="Denoising steps.")
    interval: Size = Field(description="Steps from one full step to the next after warm-up.")
    warmup: Size = Field(description="Full steps at the start.")
    order: int = Field(ge=0, le=4, description="Order of the forecast, dimensionless.")
    dialect: Dialect = Field(description="Rule that places the full steps after warm-up.")
    text: str = Field(description="The plan printed: F for a full step, . for a forecast step.")

    @model_validator(mode="after")
    def _text_is_the_plan(self) -> "PlanDefaults":
        if len(self.text) != self.steps:
            raise ValueError(f"text is {len(self.text)} steps long, its own numbers give {self.steps}")
        plan = Plan.regular(self.steps, self.interval, self.warmup, self.dialect)
        if self.text != str(plan):
            raise ValueError(f"text is {self.text}, its own numbers give {plan}")
        return self


class Model(Part):
    """The model that was exported."""

    reference: Text = Field(description="Folder or hub id it was loaded from.")
    class_name: ClassName = Field(description="Class of the transformer in diffusers.")
    config: Config = Field(description="Config of the transformer, as diffusers stores it.")
    weights_sha256: Sha256 = Field(description="SHA-256 of its weights, hexadecimal.")
    embedded: bool = Field(description="Whether it is the tiny model shipped with this package.")
    variant: Text | None = Field(default=None, description="Which of several precisions of the weights, like fp16.")
    config_file: Text | None = Field(default=None, description="Where the config was read from, if not from there.")
    loras: tuple[Text, ...] = Field(default=(), description="What was added to the weights: file or file:scale.")
    lora_skip: tuple[Text, ...] = Field(default=(), description="What of those files was left out: text-encoder.")


class Sampling(Part):
    """How the denoiser is meant to be sampled."""

    scheduler: SchedulerName = Field(
        description="Class of the scheduler in diffusers; `none` where the denoiser is driven step by step."
    )
    config: Config = Field(description="Config of the scheduler, as diffusers stores it.")
    guidance: Literal["none", "embedded", "batched", "branches"] = Field(
        description="How guidance reaches the model: not at all, as an input, as a second half of the batch, or as a "
        "second call in every step."
    )
    guidance_scale: float = Field(ge=-1e6, le=1e6, description="Default guidance scale, dimensionless.")
    timestep_divisor: float = Field(
        default=1.0, gt=0, le=1e6, description="What the scheduler's timestep is divided by for the transformer."
    )
    source: Literal["labels", "prompts", "tensors"] = Field(
        default="tensors",
        description="What a request is made from. labels: classes. prompts: text, by the part `text`. tensors: the "
        "constant inputs, as the pipeline's own encoders make them.",
    )
    pictures: Literal["digits", "decoder"] | None = Field(
        default=None,
        description="What makes pictures of the latents, if anything does: a decoder of this package, or the part "
        "`decode`.",
    )
    latent_scale: int = Field(default=8, ge=1, description="Pixels per latent pixel along each side.")
    time_scale: int = Field(default=4, ge=1, description="Frames per latent frame; the first is one frame.")

    @model_validator(mode="after")
    def _timesteps_are_a_number(self) -> "Sampling":
        count = self.config.get("num_train_timesteps")
        if count is not None and (type(count) is not int or not 1 <= count <= 1_000_000):
            raise ValueError(f"num_train_timesteps is {str(count)[:40]!r}, no whole number from 1 to 1000000")
        return self


class Pipeline(Part):
    """What the family's pipeline in diffusers does around the transformer, where it is not what most of them do."""

    guidance_factor: float = Field(
        default=1.0, description="What the guidance scale is multiplied by where it is an input, dimensionless."
    )
    guidance_offset: float = Field(
        default=0.0, description="What is added to the guidance scale of two predictions, dimensionless; 1 is then off."
    )
    guidance_keeps_norm: bool = Field(
        default=False, description="Whether a guided prediction is as long as the conditional one, token by token."
    )
    guidance_cuts_norm: bool = Field(default=False, description="Whether it is at most as long as that.")
    prediction_sign: Literal[1, -1] = Field(
        default=1, description="-1 where the model predicts the way to the picture instead of that to the noise."
    )
    timestep_reversed: bool = Field(
        default=False, description="Whether the transformer takes 1 - timestep / timestep_divisor."
    )
    flow_steps: Literal["sigmas", "count"] = Field(
        default="sigmas", description="What a flow-matching scheduler is given: even sigmas, or a number of steps."
    )
    noise: Literal["latents", "tokens"] = Field(
        default="latents", description="What a packed latent is drawn as: latents, or tokens with channels first."
    )
    shift: Literal["tokens", "tokens-and-steps"] | float = Field(
        default="tokens", description="What the sigmas shift with, where they do; a number shifts all loops by itself."
    )
    largest_shift: float | None = Field(
        default=None, description="Of the sigmas, where they shift with the number of tokens; null has no limit."
    )
    condition_share: float = Field(
        default=0.0, ge=0, le=1, description="Part of the condition in the noise that a loop begins with."
    )
    arguments: Literal[
        "declared", "rows-behind", "rows-ahead", "first-shape", "pictures-behind", "noise-alone", "mask-of-all",
        "places-of-all", "lists", "first-frame", "rotary", "channels-last",
    ] = Field(
        default="declared",
        description="How the pipeline calls the transformer. declared: with the inputs of the graphs. rows-behind: "
        "the rows of a conditioning picture follow those of the latent. rows-ahead: they are ahead of them at the "
        "first step, which returns what the others are told of them. first-shape: a shape for each picture, of "
        "which the first holds for all, and no mask where every token counts. pictures-behind: the same, with the "
        "rows of pictures behind those of the latent, and their shapes behind its shape. noise-alone: with channels of "
        "a picture behind those of the latent, which are zeros. mask-of-all: the mask has a one for each "
        "token of the latent behind those of the text. places-of-all: places of the text, all zero, stand before those "
        "of the latent. lists: latents and words of each sample in lists. first-frame: a timestep for each token, 0 in "
        "the first frame, which is that of a picture. rotary: cosines and sines of places in two tables of rows. "
        "channels-last: the latent's channels behind its sides.",
    )  # fmt: skip
    positional: tuple[str, ...] = Field(
        default=(), description="Inputs that are passed by place behind the latent, in order."
    )
    cast_inputs: tuple[str, ...] = Field(
        default=(), description="Inputs that are cast anew at every call, so that only their numbers stay the same."
    )
    ignored_inputs: tuple[str, ...] = Field(
        default=(), description="Arguments that are passed and that the model does not look at."
    )
    modules: tuple[str, ...] = Field(
        default=(), description="Of the transformer, without weights, that the pipeline calls by itself."
    )
    packing: int = Field(
        default=1, ge=1, description="Side of the square of latent pixels that is packed into a token; 1 packs none."
    )
    attributes: dict[str, int | tuple[int, ...]] = Field(
        default_factory=dict, description="What the pipeline reads from the transformer besides its config."
    )


class PipelinePart(Part):
    """A part of the pipeline besides the transformer: graphs in a folder of their own, with their own weights."""

    graph: Graph = Field(
        description="Its contract. text: tokens in, constant inputs of the transformer out. encode: a picture in, the "
        "same, or mean and deviation of latents that a loop begins with; of a video the first latent frame of what it "
        "has beside the noise, any other being zeros where there is no graph `later`, or with sections mean and "
        "deviation of the latents of that frame. decode: latents of a sample in, its picture out; of a video its first "
        "latent frame alone, as many as its shape says, or one tile."
    )
    later: Graph | None = Field(default=None, description="Of videos: any later ones, by caches.")
    tiles: Tiles | None = Field(default=None, description="Of decode of videos that are decoded in tiles.")
    frame_rate: Size | None = Field(default=None, description="Of decode of videos: frames per second.")
    dropped: Count = Field(default=0, description="Of decode of videos: leading frames that are left out of the video.")
    skipped: Count = Field(default=0, description="Of decode of videos: leading latent frames that it is not given.")
    dimensions: dict[SizeName, Dimension] = Field(description="Range of every symbolic size of its own, by name.")
    tokens: tuple[Tokens, ...] = Field(default=(), description="Of text: how a prompt becomes its inputs.")
    shown: Shown | None = Field(
        default=None,
        description="Of encode, where an image encoder sees the picture too. Of text, where its encoders see it beside "
        "the prompt; with a negative prompt it is black.",
    )
    patches: Patches | None = Field(default=None, description="Of text, where its encoders see pictures in patches.")
    sections: Sections | None = Field(default=None, description="Of encode, where a video is several loops.")
    driven: Driven | None = Field(default=None, description="Of encode, where others drive a video.")
    controlled: Controlled | None = Field(default=None, description="Of encode, where a video goes by another.")
    area: Size | None = Field(default=None, description="Of encode: pixels that a picture is brought to; see `sizes`.")
    sizes: tuple[tuple[Size, Size], ...] = Field(
        default=(),
        description="Of encode: (height, width) that a picture is brought to, the nearest shape; where there are none "
        "its own shape with `area` pixels, sides rounded to 32, or else its own size.",
    )
    cropped: Size | None = Field(
        default=None,
        description="Of encode of videos: side of the square whose pixels a video has where nobody asks for a size, if "
        "the picture keeps its shape and what is outside of the video is cut off; null: it is stretched.",
    )
    fitted: Fitted | None = Field(default=None, description="Of encode, where pictures keep their shapes.")
    negative: Text | None = Field(
        default=None,
        description="Of text: the negative prompt where a request brings none; null: guidance is off without.",
    )


class Engine(Part):
    """What the engines were built with, and what they are tied to."""

    kind: Literal["onnxruntime", "inductor", "tensorrt", "tensorrt-rtx", "torch-tensorrt"] = Field(
        description="Kind of engine."
    )
    versions: dict[Text, Text] = Field(description="Exact version of each library, by its name.")
    device: dict[Text, Text] = Field(description="Limits of the device, such as its capability.")
    options: dict[Text, Text] = Field(
        default_factory=dict, description="Options of the build that only some kinds of engine take, by name."
    )


class File(Part):
    """Hash and size of one file of the bundle."""

    sha256: Sha256 = Field(description="SHA-256 of its bytes, hexadecimal.")
    size: Count = Field(description="Size in bytes.")


class Manifest(Sealed):
    """Everything needed to check, load and call a bundle."""

    model_config = ConfigDict(title="taylorseer-export manifest")
    KIND: ClassVar[str] = "a manifest"
    REMEDY: ClassVar[str] = "copy the bundle again, or rebuild it with `taylorseer-export <family> ... --out ...`"

    schema_version: int = Field(
        default=SCHEMA_VERSION, ge=1, description="Version of this schema; rises when it changes."
    )
    tool_version: Text = Field(description="Version of taylorseer-export that wrote it.")
    family: FamilyName = Field(description="Model family, as on the command line.")
    name: BundleName = Field(description="Name of the bundle within its family.")
    precision: Literal["fp32", "fp16", "bf16"] = Field(description="Precision of the engines.")
    model: Model = Field(description="The model that was exported.")
    dimensions: dict[SizeName, Dimension] = Field(description="Range of every symbolic size, by name.")
    sites: tuple[Site, ...] = Field(description="The tapped module outputs, in graph order.")
    state: State = Field(description="Layout of the Taylor buffers.")
    graphs: dict[GraphName, Graph] = Field(description="I/O contract of every graph, by name.")
    plan: PlanDefaults = Field(description="The plan used when a request names none.")
    sampling: Sampling = Field(description="How the denoiser is meant to be sampled.")
    pipeline: Pipeline = Field(
        default_factory=Pipeline, description="What the family's pipeline does around the transformer."
    )
    lora: LowRank | None = Field(default=None, description="Layers that take the LoRA of a request; null: none does.")
    comfy: Comfy | None = Field(default=None, description="ComfyUI's model of the family; null where it has none.")
    parallel: Parallel | None = Field(default=None, description="How it is shared out over ranks; null: it is not.")
    parts: dict[PartName, PipelinePart] = Field(
        default_factory=dict, description="What of the pipeline is here besides the transformer, by name."
    )
    quantised: Quantised | None = Field(default=None, description="How weights are quantised; null: they are not.")
    engine: Engine = Field(description="What the engines were built with and are tied to.")
    files: dict[RelativePath, File] = Field(
        description="Hash and size of every file but the manifest, by relative posix path."
    )
    cache_key: str = Field(
        pattern=r"^[A-Za-z0-9]{1,64}$",
        description="Hash of the inputs and options of the build; names a file of caches.",
    )

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "Manifest":
        if problem := contradiction(self):
            raise ValueError(problem)
        return self

    def guidance_of(self, scale: float | None = None) -> float:
        """What two predictions are guided with, where 1 is no guidance, for a scale as the family's pipeline counts."""
        return (self.sampling.guidance_scale if scale is None else scale) + self.pipeline.guidance_offset

    @property
    def replaces_first_frame(self) -> bool:
        """Whether a picture comes as the first latent frame, in the place of the noise's."""
        kind = self.model.config.get("image_condition_type")
        return kind == "token_replace" or self.pipeline.arguments == "first-frame"

    @classmethod
    def rebuild(cls, raw: Mapping[str, Any]) -> str:
        """The command that builds a bundle of an older schema again, as far as that is in its manifest."""
        try:
            parts: dict[str, Any] = {name: cls._part(name, raw[name]) for name in ("model", "state", "plan", "engine")}
            parts["parts"] = raw.get("parts") or {}
            command = cls.model_construct(**parts, family=raw["family"], precision=raw["precision"]).command()
        except (KeyError, TypeError, ValidationError):
            return cls.REMEDY
        return f"rebuild it with `{command}`" if command.isprintable() else cls.REMEDY

    @classmethod
    def _part(cls, name: str, raw: Any) -> Any:
        part: Any = cls.model_fields[name].annotation
        return part.model_validate(raw)

    def command(self, device: str | None = None, **changes: str) -> str:
        """The command that builds these engines again on the machine it is typed on; a fixed size is not repeated.

        Args:
            device: Where they are to run; as before if left out.
            changes: Options of the engine that are to be others, `gpu_arch="8.6"` for `--gpu-arch`.
        """
        return command_of(self, device, **changes)


def schema() -> dict[str, Any]:
    """The JSON schema of the manifest, as published in `manifest.schema.json`."""
    return Manifest.model_json_schema(mode="serialization")


def tool_version() -> str:
    """Version of the installed package."""
    try:
        return version("taylorseer-export")
    except PackageNotFoundError:
        return "0+source"
