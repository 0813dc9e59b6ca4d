"""What `forward` takes, where no family declares it: names tell roles, and a run on fake tensors the rest.

Rules, in this order:

1. Where diffusers fixes the meaning of an argument and the config its width, that is its declaration.
2. Any other argument that is needed has the shape that its name stands for: a text, a picture's embedding, a mask. What
   follows from sizes or from the timestep is no input: it is made of them at every call.
3. Its width is that of the layer which takes it first. The model is run on fake tensors, unknown widths are large
   primes, and the first linear layer, convolution or norm that meets one has the width in its own shape.
4. What the names leave open is tried: the latent as tokens, a picture, frames of pictures; the shapes that the model's
   own documentation says; optional arguments left out, and given. The first that the model takes, with a result of the
   latent's own shape, is the one.

A run costs no weights and next to no memory. What no run takes is left as rule 1 and 2 say.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from taylorseer_export.bundle.shapes import names
from taylorseer_export.errors import first_line
from taylorseer_export.families.family import Input
from taylorseer_export.graph.documented import arguments, channels_of, documentation, documented, sides_of
from taylorseer_export.graph.fakes import (
    COMPLEX,
    LISTS,
    PER_FRAME,
    PER_FRAME_OF_ONE,
    SECOND_TIME,
    SHAPES,
    TOKENS,
    UNKNOWN,
    kind_of,
    run,
)

# Arguments that change how `forward` runs and hold no tensor of the loop.
_CONTROL = re.compile(
    r"return_dict|.*_kwargs|.*controlnet.*|skip_layers|img_sizes|hidden_states_masks|training|kv_cache.*|sparse_params"
    r"|enable_.*|is_.*|.*_scale|.*_mode|isolate_.*|spatio_.*|use_.*|num_ref_tokens"
)
_TEXT_WIDTHS = ("caption_channels", "joint_attention_dim", "text_embed_dim", "text_dim", "cross_attention_dim")
# Arguments that follow from the sizes, and pictures to go by, of which there are none.
_MADE = re.compile(r"visual_rope_pos|text_rope_pos|chunk_partition|input_img_latents|input_image_sizes")
_BY_VALUES = (DataDependentOutputException, DynamicOutputShapeException)  # sizes that follow from values


@dataclass(frozen=True)
class Found:
    """What was told of the inputs.

    Attributes:
        inputs: Their declarations.
        skipped: `argument NAME` -> why it is none of them.
        trouble: What the model said of the last run; empty where it took one.
        clock: What the model itself multiplies its timestep by, 1 where by nothing.
        made: Arguments that are made of the inputs at every call; see `call`.
        size: Of the latent, where the config says one.
    """

    inputs: tuple[Input, ...]
    skipped: Mapping[str, str]
    trouble: str = ""
    clock: float = 1.0
    made: tuple[str, ...] = ()
    size: tuple[int, ...] | None = None


def find(model: nn.Module) -> Found:
    """Read off a transformer what its `forward` takes; no weight of it is used."""
    config = dict(model.config)  # type: ignore[arg-type]
    skipped: dict[str, str] = {}
    base, optional, always = _from_names(model, config, skipped)
    if untold := [name for name in arguments(model) if _needed(model, name) and not _is_told(name, base, always)]:
        said = f"it needs {' and '.join(untold[:3])}{' and more' * (len(untold) > 3)}, which no rule tells"
        return Found(tuple(spec for spec in base if UNKNOWN not in spec.shape), skipped, said, 1.0, always)
    told = documented(model, config)
    variants = _variants(model, config, base, optional, always, told)
    trouble, furthest, hopeless = "", -1, False
    for latent in _latents(model, config, told, always):
        tried: list[object] = []
        also = _clocks(told, latent)
        for (variant, shared), more in product(variants, also):
            made = (*shared, *more)
            specs = [replace(latent, name=spec.name) if spec.role == "latent" else spec for spec in variant]
            if (specs, made) in tried:
                continue
            tried.append((specs, made))
            layers = [0]
            try:
                try:
                    found, clock = run(model, specs, made, layers, 8 if "divisible" in trouble else 1)
                except TypeError as error:
                    if "must be a mapping, not NoneType" not in str(error):
                        raise
                    made = (*made, *(name for name in arguments(model) if name.endswith("_kwargs")))  # without options
                    found, clock = run(model, specs, made, layers)
            except Exception as error:  # whatever a model makes of shapes that it was not written for
                if layers[0] >= furthest:
                    trouble, furthest = first_line(error), layers[0]
                by_value = isinstance(error, _BY_VALUES) and variant is variants[-1][0]
                hopeless |= by_value or "required positional argument" in str(error)
                continue
            ordered = tuple(spec for name in arguments(model) for spec in found if spec.name == name)
            left = {key: why for key, why in skipped.items() if key not in {f"argument {s.name}" for s in found}}
            return Found(ordered, left, "", clock, made, _size(config))
        if hopeless:  # whatever the latent's shape
            break
    return Found(tuple(spec for spec in base if UNKNOWN not in spec.shape), skipped, _said(trouble), 1.0, always)


Variant = tuple[list[Input], tuple[str, ...]]  # inputs, and what is made of them


def _variants(
    model: nn.Module,
    config: Mapping[str, Any],
    base: list[Input],
    optional: list[Input],
    always: tuple[str, ...],
    told: Mapping[str, tuple[int | str, ...]],
) -> list[Variant]:
    """What the inputs may be beside the latent, the plainest first."""
    as_told = [replace(s, shape=s.shape if s.role == "step" else told.get(s.name, s.shape)) for s in base]
    bare = [spec for spec in base if "mask" not in spec.name or _needed(model, spec.name)]
    found = [(specs, always) for specs in (base, base + optional, *([*base, spec] for spec in optional), bare)]
    found += [(specs, always) for specs in (as_told, as_told + optional)]
    if any(spec.name == "position_ids" for spec in base):  # of the text and of the picture in one row
        tokens = TOKENS if _needed(model, "position_ids") else "image_tokens"
        for between in ("", "+1"):  # with a token of the time between them
            row = f"text_tokens{between}+{tokens}"
            shapes = {"position_ids": ("batch", row), "attention_mask": ("batch", row, row)}
            found += [([replace(spec, shape=shapes.get(spec.name, spec.shape)) for spec in base], always)]
    # The masks of texts of which every token counts, where the code looks at their values.
    counted = [spec for spec in base if "mask" not in spec.name]
    if masks := tuple(spec.name for spec in base if spec not in counted and "text_tokens" in spec.shape):
        found += [(counted, (*always, *masks))]
    return found


def _clocks(told: Mapping[str, tuple[int | str, ...]], latent: Input) -> list[tuple[str, ...]]:
    """How the timestep may be given: of a sample, or of each of its frames."""
    if not any("frames" in names(entry) for entry in latent.shape):
        return [()]
    return [(), (PER_FRAME,), (PER_FRAME_OF_ONE,)] if len(told.get("timestep", ())) == 3 else [(), (PER_FRAME,)]


def _is_told(name: str, specs: Sequence[Input], made: Sequence[str]) -> bool:
    return name in made or name in {spec.name for spec in specs}


def _said(trouble: str) -> str:
    """What a model said, where torch names an operator alone."""
    by_value = re.fullmatch(r"aten\.(\w+)\.\w+", trouble)
    if by_value:
        return f"it takes sizes from the values of a tensor, by `{by_value[1]}`"
    return re.sub(r"( and mode <.*|\.Hint: .*)", "", trouble)  # what torch says of its own parts, with addresses


# Names ---------------------------------------------------------------------------------------------------------------


def _needed(model: nn.Module, name: str) -> bool:
    return arguments(model)[name].default is inspect.Parameter.empty


def _from_names(
    model: nn.Module, config: Mapping[str, Any], skipped: dict[str, str]
) -> tuple[list[Input], list[Input], tuple[str, ...]]:
    """The inputs that are known or needed, those that may be left out, and what is made of them at every call."""
    known = _known(model, config)
    found, optional, made = [], [], []
    for name in arguments(model):
        needed = _needed(model, name)
        if name in known and (known[name] is not None or not needed):
            if (spec := known[name]) is not None:
                found.append(spec)
        elif SHAPES.fullmatch(name) or (needed and (_MADE.fullmatch(name) or SECOND_TIME.fullmatch(name))):
            made.append(name)
        elif not _CONTROL.fullmatch(name) or needed:
            guess = _guess(model, name, known["hidden_states"], config)
            if guess is not None and needed:
                found.append(guess)
            else:
                optional += [] if guess is None or name.endswith("rotary_emb") else [guess]
                word = "needed" if needed else "optional"
                skipped[f"argument {name}"] = (
                    f"{word}, and its shape is not told by a convention; add it if you pass it"
                )
    return found, optional, tuple(made)


def _guess(model: nn.Module, name: str, latent: Input | None, config: Mapping[str, Any]) -> Input | None:
    """What an argument is by its name alone; its width may be unknown."""
    tokens = _tokens(name, config)
    if re.search(r"token_ids?$|input_ids$", name):
        words = next((size for key, size in config.items() if re.search(r"vocab_size|codebook_size", key)), 2)
        many = "text_tokens" if name.endswith("s") else TOKENS  # a token of another model for each of the picture
        return Input(name, ("batch", many), "constant", "int64", values=(0, words - 1))
    if name.endswith("_token_drop"):
        return Input(name, ("batch", TOKENS), "constant", "bool", fill="zeros")
    if kind_of(model, name) == COMPLEX:
        side = int(re.sub(r"\D", "", str(sides_of(config)[0])) or 1)  # latent pixels along one of a token
        sides = latent.shape[-2:] if latent is not None else sides_of(config)
        of_tokens = [e // side if isinstance(e, int) else min(names(e)) for e in sides]
        return Input(name, (*of_tokens, UNKNOWN, 2), "constant", "float32")
    if name == "padding_mask":
        return Input(name, (1, 1, *sides_of(config)), "constant", fill="zeros")
    if latent is not None and re.match(r"(control|condition|inpaint|pose)_", name):
        channels = latent.shape.index(channels_of(config)) if channels_of(config) in latent.shape else 1
        shape = [UNKNOWN if place == channels else entry for place, entry in enumerate(latent.shape)]
        return Input(name, tuple(shape), "constant")
    if re.search(r"mask", name):
        return Input(name, ("batch", tokens), "constant", _of_mask(model, name), fill="ones")
    if re.search(r"pooled", name):
        return Input(name, ("batch", UNKNOWN), "constant")
    if re.fullmatch(r"(original|target)_size|crop_coords", name):
        return Input(name, ("batch", 2), "constant")
    if re.search(r"meta_size", name):  # height, width and crop of the original, and height and width of the target
        return Input(name, ("batch", 6), "constant")
    if name == "style":
        return Input(name, ("batch",), "constant", "int64", fill="zeros")
    if re.search(r"_lens?$", name):
        return Input(name, ("batch",), "constant", "int64", fill="ones")
    if re.search(r"_coords$", name):
        return Input(name, ("batch", 3, "image_tokens"), "constant", "float32")
    if name.endswith("indicator") and (words_for := _indicators(model)):
        return Input(name, ("batch", "image_tokens"), "constant", "int64", values=(min(words_for), max(words_for)))
    if re.search(r"(^|_)ids$|indicator$", name):
        return Input(name, ("batch", "image_tokens"), "constant", "int64", fill="ones")
    if re.search(r"image_embeds|hidden_states_image", name):
        return Input(name, ("batch", "vision_tokens", UNKNOWN), "constant")
    if name.endswith("rotary_emb"):
        return Input(name, (2, "batch", "image_tokens", UNKNOWN), "constant")
    if LISTS.fullmatch(name):
        blocks = sum(config.get(key) or 0 for key in ("num_layers", "num_single_layers"))
        return Input(name, (blocks, "batch", tokens, UNKNOWN), "constant")
    if re.match(r"encoder_hidden_states|text_|cap|prompt", name):
        return Input(name, ("batch", tokens, UNKNOWN), "constant")
    return None


def _indicators(model: nn.Module) -> list[int]:
    """What the model's code calls an indicator: the numbers that tell kinds of tokens apart, but for padding."""
    code = vars(sys.modules[type(model).__module__])
    return [value for name, value in code.items() if name.endswith("_INDICATOR") and type(value) is int and value >= 0]


def _tokens(name: str, config: Mapping[str, Any]) -> int | str:
    """How many tokens a text has: as many as the config says, or any number; an ending tells several texts apart."""
    (ending,) = re.findall(r"(?:_t?\d+)?$", name)[:1]
    known = (config.get(f"{key}{ending}") for key in ("text_len", "max_text_seq_length"))
    return next((count for count in known if isinstance(count, int)), f"text_tokens{ending}")


def _of_mask(model: nn.Module, name: str) -> str:
    """dtype of a mask, as the documentation says."""
    return "bool" if re.search(r"\b[Bb]ool", documentation(model).get(name, "")) else "int64"


def _known(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Input | None]:
    """Argument -> its declaration; None where the config says that this variant does not take it."""
    text = next((config[key] for key in _TEXT_WIDTHS if isinstance(config.get(key), int)), None)
    pooled = config.get("pooled_projection_dim")
    image = config.get("image_dim")
    classes = config.get("num_embeds_ada_norm") if text is None else None
    # How many numbers say where a token is; 0 where the model does not take them.
    axes = [getattr(m, "axes_dim", None) for n, m in model.named_children() if "pos_embed" in n]
    axes += [config.get("axes_dims_rope")] if "img_ids" in arguments(model) and _needed(model, "img_ids") else []
    places = next((len(of_each) for of_each in axes if isinstance(of_each, tuple | list)), 0)
    embeds = config.get("guidance_embeds")
    masks = {
        name: Input(name, ("batch", "text_tokens"), "constant", _of_mask(model, name), fill="ones")
        for name in ("encoder_attention_mask", "encoder_hidden_states_mask")
    }
    labels = Input("class_labels", ("batch",), "constant", "int64", values=(0, classes or 0))
    tokens = _tokens("encoder_hidden_states", config)
    words = Input("encoder_hidden_states", ("batch", tokens, text or 0), "constant")
    vision = Input("encoder_hidden_states_image", ("batch", 257, image or 0), "constant")
    latent = _latent(model, config)
    return {
        "hidden_states": latent,
        "x": replace(latent, name="x"),
        "t": Input("t", ("batch",), "step", "float32"),
        "timestep": Input("timestep", ("batch",), "step", "float32"),
        "timesteps": Input("timesteps", ("batch",), "step", "float32"),
        "guidance": Input("guidance", ("batch",), "constant", fill="guidance") if embeds else None,
        "encoder_hidden_states": words if text else None,
        "encoder_hidden_states_image": vision if image else None,
        "pooled_projections": Input("pooled_projections", ("batch", pooled), "constant") if pooled else None,
        "img_ids": Input("img_ids", ("image_tokens", places), "constant", "float32", fill="grid") if places else None,
        "txt_ids": Input("txt_ids", ("text_tokens", places), "constant", "float32", fill="zeros") if places else None,
        "class_labels": labels if classes else None,
        "added_cond_kwargs": None,
        "attention_mask": None,
        **{name: spec if text else None for name, spec in masks.items()},
    }


# The latent ----------------------------------------------------------------------------------------------------------


def _latent(model: nn.Module, config: Mapping[str, Any]) -> Input:
    """The latent as the first embedder takes it: rows of tokens, a picture, or frames of pictures."""
    channels, picture = channels_of(config), sides_of(config)
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d))
    if isinstance(layer, nn.Conv3d):
        picture = ("frames", *picture)
    elif isinstance(layer, nn.Linear) and _embedder_width(model, channels):
        return Input("hidden_states", ("batch", "image_tokens", channels), "latent")
    elif isinstance(config.get("sample_size"), int) and "pos_embed_max_size" not in config:
        picture = (config["sample_size"], config["sample_size"])
    return Input("hidden_states", ("batch", channels, *picture), "latent")


def _latents(
    model: nn.Module, config: Mapping[str, Any], told: Mapping[str, tuple[int | str, ...]], made: Sequence[str]
) -> Iterator[Input]:
    """What the latent may be: as the first embedder takes it, as the documentation says, then every other order."""
    for latent in _every_latent(model, config, told):
        sided = any(map(SHAPES.fullmatch, made))  # tokens of a picture whose sides the model is told
        yield replace(latent, shape=tuple(TOKENS if sided and e == "image_tokens" else e for e in latent.shape))


def _every_latent(
    model: nn.Module, config: Mapping[str, Any], told: Mapping[str, tuple[int | str, ...]]
) -> Iterator[Input]:
    first, picture, side = _latent(model, config), sides_of(config), config.get("sample_size")
    seen = [first]
    yield first
    shapes = [told[first.name]] if first.name in told else []
    frames: list[Any] = ["frames", *(n for n in (config.get("video_length"), _frames(config)) if isinstance(n, int))]
    fixed: tuple[Any, ...] = (
        (side, side) if isinstance(side, int) else (config.get("sample_height"), config.get("sample_width"))
    )
    for channels in (channels_of(config), UNKNOWN):
        shapes += [("batch", "image_tokens", channels)]
        both: list[tuple[Any, ...]] = [picture, fixed]
        for sides in both:
            shapes += [("batch", channels, *sides)]
            shapes += [("batch", channels, count, *sides) for count in frames]
            shapes += [("batch", count, channels, *sides) for count in frames]
            shapes += [("batch", count, *sides, channels) for count in frames]
    for shape in shapes:
        candidate = replace(first, shape=shape)
        if candidate not in seen and all(isinstance(entry, int | str) for entry in shape):
            seen.append(candidate)
            yield candidate


def _frames(config: Mapping[str, Any]) -> int | None:
    """Latent frames of a video, where the config says how many frames it has."""
    count, ratio = config.get("sample_frames"), config.get("temporal_compression_ratio", 1)
    return (count - 1) // ratio + 1 if isinstance(count, int) else None


def _size(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """(height, width) or (frames, height, width) of the latent that the config speaks of."""
    sides = (config.get("sample_height"), config.get("sample_width"))
    if not all(isinstance(side, int) for side in sides):
        return None
    frames = _frames(config)
    return sides if frames is None else (frames, *sides)  # type: ignore[return-value]


def _embedder_width(model: nn.Module, channels: int) -> bool:
    """Whether a linear layer of the model itself takes the channels as they come, already packed."""
    return any(isinstance(m, nn.Linear) and m.in_features == channels for _, m in model.named_children())
