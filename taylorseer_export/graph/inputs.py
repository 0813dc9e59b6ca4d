"""What `forward` takes, for a transformer that no family declares: names tell roles, and a run on fake tensors the rest.

Rules, in this order:

1. Where diffusers fixes the meaning of an argument and the config its width, that is its declaration.
2. Any other argument that is needed has the shape that its name stands for: a text, a picture's embedding, a mask.
3. Its width is that of the layer which takes it first. The model is run on fake tensors, unknown widths are large
   primes, and the first linear layer, convolution or norm that meets one has the width in its own shape.
4. What the names leave open is tried: the latent as tokens, a picture, frames of pictures; optional arguments left out,
   and given. The first that the model takes, with a result of the latent's own shape, is the one.

A run costs no weights and next to no memory. What no run takes is left as rule 1 and 2 say.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from taylorseer_export.bundle.shapes import names, resolve
from taylorseer_export.errors import first_line
from taylorseer_export.families.family import Input

# Arguments that change how `forward` runs and hold no tensor of the loop.
_CONTROL = re.compile(
    r"return_dict|.*_kwargs|.*controlnet.*|skip_layers|img_sizes|hidden_states_masks|training|kv_cache.*|sparse_params"
    r"|enable_.*|is_.*|.*_scale|.*_mode|isolate_.*|spatio_.*|use_.*|num_ref_tokens"
)
_TEXT_WIDTHS = ("caption_channels", "joint_attention_dim", "text_embed_dim", "text_dim", "cross_attention_dim")
_CHANNELS = ("in_channels", "in_visual_dim", "in_dim")
_UNKNOWN = -1  # a width that no config tells; in a run, a prime that no model has
_PRIMES = (10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079, 10091, 10093, 10099, 10103)
_SIZES = (2, 24, 5, 7, 11, 13, 17, 19, 23)  # of the dimensions in a run: small and distinct
RANGES = {
    "batch": (1, 16),
    "image_tokens": (4, 4096),
    "frames": (1, 64),
    "rows": (2, 64),
    "columns": (2, 64),
}
_OF_OTHERS = (2, 512)  # of the tokens of texts and pictures


@dataclass(frozen=True)
class Found:
    """What was told of the inputs.

    Attributes:
        inputs: Their declarations.
        skipped: `argument NAME` -> why it is none of them.
        trouble: What the model said of the last run; empty where it took one.
        clock: What the model itself multiplies its timestep by, 1 where by nothing.
    """

    inputs: tuple[Input, ...]
    skipped: Mapping[str, str]
    trouble: str = ""
    clock: float = 1.0


def ranges(inputs: Sequence[Input]) -> dict[str, tuple[int, int]]:
    """Dimension -> (smallest, largest) of every dimension that some input has."""
    named = dict.fromkeys(name for spec in inputs for entry in spec.shape for name in sorted(names(entry)))
    known = {name: span for name, span in RANGES.items() if name in named}
    return known | {name: _OF_OTHERS for name in named if name not in RANGES}


def find(model: nn.Module) -> Found:
    """Read off a transformer what its `forward` takes; no weight of it is used."""
    config = dict(model.config)  # type: ignore[arg-type]
    skipped: dict[str, str] = {}
    base, optional = _from_names(model, config, skipped)
    variants = [base] if not optional else [base, base + optional]
    trouble = ""
    for latent in _latents(model, config):
        for variant in variants:
            specs = [latent if spec.role == "latent" else spec for spec in variant]
            try:
                told, clock = _run(model, specs)
            except Exception as error:  # whatever a model makes of shapes that it was not written for
                trouble = trouble or first_line(error)
                continue
            ordered = tuple(spec for name in _arguments(model) for spec in told if spec.name == name)
            for spec in told:
                skipped.pop(f"argument {spec.name}", None)
            return Found(ordered, skipped, "", clock)
    return Found(tuple(spec for spec in base if _UNKNOWN not in spec.shape), skipped, trouble)


# Names ---------------------------------------------------------------------------------------------------------------


def _arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _from_names(
    model: nn.Module, config: Mapping[str, Any], skipped: dict[str, str]
) -> tuple[list[Input], list[Input]]:
    """The inputs that are known or needed, and those that may be left out; widths may be unknown."""
    known = _known(model, config)
    found, optional = [], []
    for name, parameter in _arguments(model).items():
        needed = parameter.default is inspect.Parameter.empty
        if name in known and (known[name] is not None or not needed):
            if (spec := known[name]) is not None:
                found.append(spec)
        elif not _CONTROL.fullmatch(name) or needed:
            guess = _guess(name, config)
            if guess is not None and needed:
                found.append(guess)
            else:
                optional += [] if guess is None else [guess]
                word = "needed" if needed else "optional"
                skipped[f"argument {name}"] = f"{word}, and its shape is not told by a convention; add it if you pass it"
    return found, optional


def _guess(name: str, config: Mapping[str, Any]) -> Input | None:
    """What an argument is by its name alone; its width may be unknown."""
    if re.search(r"mask", name):
        return Input(name, ("batch", f"text_tokens{_which(name)}"), "constant", "int64", fill="ones")
    if re.search(r"pooled", name):
        return Input(name, ("batch", _UNKNOWN), "constant")
    if re.fullmatch(r"(original|target)_size|crop_coords", name):
        return Input(name, ("batch", 2), "constant")
    if re.search(r"image_embeds|hidden_states_image", name):
        return Input(name, ("batch", "vision_tokens", _UNKNOWN), "constant")
    if re.match(r"encoder_hidden_states|text_|cap|prompt", name):
        return Input(name, ("batch", f"text_tokens{_which(name)}", _UNKNOWN), "constant")
    return None


def _which(name: str) -> str:
    """The ending by which several texts and their masks are told apart: `_2`, `_t5`."""
    (ending,) = re.findall(r"(_t?\d+)?$", name)[:1]
    return str(ending)


def _known(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Input | None]:
    """Argument -> its declaration; None where the config says that this variant does not take it."""
    text = next((config[key] for key in _TEXT_WIDTHS if isinstance(config.get(key), int)), None)
    pooled = config.get("pooled_projection_dim")
    image = config.get("image_dim")
    classes = config.get("num_embeds_ada_norm") if text is None else None
    # How many numbers say where a token is; 0 where the model does not take them.
    axes = [getattr(m, "axes_dim", None) for n, m in model.named_children() if "pos_embed" in n]
    axes += [config.get("axes_dims_rope")]
    places = next((len(of_each) for of_each in axes if isinstance(of_each, tuple | list)), 0)
    embeds = config.get("guidance_embeds")
    masks = {
        name: Input(name, ("batch", "text_tokens"), "constant", "int64", fill="ones")
        for name in ("encoder_attention_mask", "encoder_hidden_states_mask")
    }
    labels = Input("class_labels", ("batch",), "constant", "int64", values=(0, classes or 0))
    words = Input("encoder_hidden_states", ("batch", "text_tokens", text or 0), "constant")
    vision = Input("encoder_hidden_states_image", ("batch", 257, image or 0), "constant")
    return {
        "hidden_states": _latent(model, config),
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
    channels, picture = _channels(config), _picture(config)
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d))
    if isinstance(layer, nn.Conv3d):
        picture = ("frames", *picture)
    elif isinstance(layer, nn.Linear) and _embedder_width(model, channels):
        return Input("hidden_states", ("batch", "image_tokens", channels), "latent")
    elif isinstance(config.get("sample_size"), int) and "pos_embed_max_size" not in config:
        picture = (config["sample_size"], config["sample_size"])
    return Input("hidden_states", ("batch", channels, *picture), "latent")


def _latents(model: nn.Module, config: Mapping[str, Any]) -> Iterator[Input]:
    """What the latent may be: as the first embedder takes it, then every other order of its sizes."""
    first, picture, side = _latent(model, config), _picture(config), config.get("sample_size")
    yield first
    for channels in (_channels(config), _UNKNOWN):
        for shape in (
            ("image_tokens", channels),
            (channels, *picture),
            (channels, side, side),
            (channels, "frames", *picture),
            ("frames", channels, *picture),
            ("frames", *picture, channels),
        ):
            if ("batch", *shape) != first.shape and all(isinstance(entry, int | str) for entry in shape):
                yield replace(first, shape=("batch", *shape))


def _channels(config: Mapping[str, Any]) -> int:
    return next((config[key] for key in _CHANNELS if isinstance(config.get(key), int)), _UNKNOWN)


def _picture(config: Mapping[str, Any]) -> tuple[int | str, ...]:
    patch = config.get("patch_size") or 1
    side = patch[-1] if isinstance(patch, tuple | list) else patch
    return (f"{side}*rows", f"{side}*columns") if side > 1 else ("rows", "columns")


def _embedder_width(model: nn.Module, channels: int) -> bool:
    """Whether a linear layer of the model itself takes the channels as they come, already packed."""
    return any(isinstance(m, nn.Linear) and m.in_features == channels for _, m in model.named_children())


# Runs ----------------------------------------------------------------------------------------------------------------


class _ToldError(Exception):
    """A layer met an unknown width: which, and what it is."""

    def __init__(self, prime: int, width: int) -> None:
        super().__init__(prime, width)
        self.prime, self.width = prime, width


def _run(model: nn.Module, specs: list[Input]) -> tuple[list[Input], float]:
    """The inputs with all widths told, once the model took them, and the factor of its clock.

    Raises:
        Exception: The model does not take them, or does not answer in the latent's shape; whatever it raised.
    """
    primes = iter(_PRIMES)
    marked = [replace(s, shape=tuple(next(primes) if e == _UNKNOWN else e for e in s.shape)) for s in specs]
    sizes = {name: max(low, size) for (name, (low, _)), size in zip(ranges(marked).items(), _SIZES, strict=False)}
    weights = [p for p in model.parameters() if isinstance(p, FakeTensor)]
    fake = weights[0].fake_mode if weights else FakeTensorMode(allow_non_fake_inputs=True)
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    while True:
        with fake, torch.no_grad(), _telling(), _listening() as heard:
            given = {
                s.name: torch.zeros(resolve(s.shape, sizes), dtype=kind if s.dtype == "float" else getattr(torch, s.dtype))
                for s in marked
            }
            try:
                answer = model(**given, return_dict=False)[0]
            except _ToldError as told:
                marked = [_with(s, told) for s in marked]
                continue
        break
    left = [s.name for s in marked if set(s.shape) & set(_PRIMES)]
    if left:
        raise ValueError(f"no layer tells the width of `{left[0]}`")
    latent = next(given[s.name] for s in marked if s.role == "latent")
    same = sum(a == b for a, b in zip(answer.shape, latent.shape, strict=False))
    if answer.ndim != latent.ndim or same < latent.ndim - 1:
        raise ValueError(f"the answer is of shape {tuple(answer.shape)} for a latent of {tuple(latent.shape)}")
    return marked, heard.factor


def _with(spec: Input, told: _ToldError) -> Input:
    return replace(spec, shape=tuple(told.width if entry == told.prime else entry for entry in spec.shape))


@contextmanager
def _telling() -> Iterator[None]:
    """For the length of the block, the first layer that meets an unknown width raises what it is."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        wanted = _wanted(module)
        if wanted is None or not args or not isinstance(args[0], torch.Tensor):
            return
        width, dim = wanted
        seen = args[0].shape[dim] if args[0].ndim >= abs(dim) else 0
        for prime in _PRIMES:
            if isinstance(seen, int) and seen >= prime and seen % prime == 0 and width % (seen // prime) == 0:
                raise _ToldError(prime, width // (seen // prime))
            if isinstance(seen, int) and 0 < seen - prime < min(width, _PRIMES[0] // 2) and seen not in _PRIMES:
                raise _ToldError(prime, width - (seen - prime))  # joined with something else

    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    logging.disable(logging.CRITICAL)  # torch also logs what it raises
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        handle.remove()


def _wanted(module: nn.Module) -> tuple[int, int] | None:
    """(width, dimension) of what a layer takes."""
    if isinstance(module, nn.Linear):
        return module.in_features, -1
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.in_channels, 1
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1], -1
    weight = getattr(module, "weight", None)
    if "Norm" in type(module).__name__ and isinstance(weight, torch.Tensor) and weight.ndim == 1:
        return weight.shape[0], -1
    return None


class _Clock(torch.utils._python_dispatch.TorchDispatchMode):
    """Listens for a multiplication of one number per sample by 1000: the model's own scale of its timestep."""

    factor = 1.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mul.Tensor and isinstance(args[0], torch.Tensor):
            other = args[1]
            if isinstance(other, int | float) and other == 1000 and args[0].numel() == _SIZES[0]:
                self.factor = 1000.0
        return func(*args, **(kwargs or {}))


@contextmanager
def _listening() -> Iterator[_Clock]:
    with _Clock() as heard:
        yield heard
