"""Runs of a model on fake tensors, which cost no weights and little memory: how it is called, and what it tells.

Unknown widths are large primes. The first linear layer, convolution or norm that meets one has the width in its shape.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from taylorseer_export.bundle.shapes import is_linear, linear, names, resolve
from taylorseer_export.families.family import Input
from taylorseer_export.graph.untraceable import EveryTokenCounts, dense_attention, unchanged

SECOND_TIME = re.compile(r"r_timestep|timestep_r|target_timestep")  # the same as the first: no step is skipped
PER_FRAME = "timestep of each frame"  # made where a model has one for each: all the same
PER_FRAME_OF_ONE = "timestep of each frame of one"  # the same, with a dimension of size 1 between
SHAPES = re.compile(r"img_shapes|shape_list")  # of the picture of each sample, in tokens
TOKENS = "rows*columns"  # of a packed latent whose sides the model is told
COMPLEX = "complex"
# Several tensors, here one tensor of them all: of each block, or sine and cosine.
LISTS = re.compile(r"text_encoder_layers|.*rotary_emb")
# How torch says that two last dimensions do not fit.
_LENGTHS = (
    r"dimension of length (\d+) at -1|broadcastable to \[(?:\d+, )*(\d+)\]"
    r"|size of tensor a \((\d+)\)|size of tensor b \((\d+)\)"
)
UNKNOWN = -1  # a width that no config tells; in a run, a prime that no model has
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


def ranges(inputs: Sequence[Input]) -> dict[str, tuple[int, int]]:
    """Dimension -> (smallest, largest) of every dimension that some input has."""
    named = dict.fromkeys(name for spec in inputs for entry in spec.shape for name in sorted(names(entry)))
    known = {name: span for name, span in RANGES.items() if name in named}
    return known | {name: _OF_OTHERS for name in named if name not in RANGES}


def call(
    model: Any,
    inputs: Mapping[str, Any],
    specs: Sequence[Input],
    made: Sequence[str],
    one: Mapping[str, int] | None = None,
) -> Any:
    """noise_pred of a model whose `forward` takes the inputs, and arguments that are made of them.

    Args:
        model: The transformer or its `forward`.
        inputs: Name -> tensor.
        specs: Their declarations, with every size that is open by name.
        made: The arguments that are none of them.
        one: Sizes that no input tells: dimension -> its one size.
    """
    first = next(iter(inputs.values()))
    sizes = {**(one or {}), **_sizes(inputs, specs)}
    given = {name: _as_taken(model, name, value) for name, value in inputs.items()}
    (step,) = (spec.name for spec in specs if spec.role == "step")
    given[step] = _of_frames(inputs[step], made, sizes)
    counts = EveryTokenCounts()
    with counts if isinstance(first, FakeTensor) or torch.compiler.is_exporting() else nullcontext():
        for name in made:
            if name not in (PER_FRAME, PER_FRAME_OF_ONE):
                given[name] = _made(name, given[step], sizes, counts)
        answer = model(**given, return_dict=False)
    answer = answer if isinstance(answer, torch.Tensor) else answer[0]
    return answer if isinstance(answer, torch.Tensor) else torch.stack(list(answer))


def _as_taken(model: Any, name: str, value: Any) -> Any:
    """One tensor as the model takes it: in a list of several, or of complex numbers."""
    kind = kind_of(model, name)
    if kind == COMPLEX and value.shape[-1] == 2:
        return torch.view_as_complex(value)
    return list(value.unbind(0)) if LISTS.fullmatch(name) or kind == "list" else value


def kind_of(model: Any, name: str) -> str | None:
    """What the annotation of an argument says: a `list` with a tensor of each sample, turns as `complex` numbers."""
    forward = model.forward if isinstance(model, nn.Module) else model
    parameter = inspect.signature(forward).parameters.get(name)
    said = "" if parameter is None else str(parameter.annotation)
    if re.match(r"(typing\.)?[Ll]ist\[torch\.Tensor", said):
        return "list"
    plain = parameter is not None and (parameter.annotation is torch.Tensor or said in ("torch.Tensor", "Tensor"))
    return COMPLEX if plain and name.endswith("rotary_emb") else None


def _of_frames(step: Any, made: Sequence[str], sizes: Mapping[str, Any]) -> Any:
    if PER_FRAME in made:
        return step[:, None].expand(-1, sizes["frames"])
    return step[:, None, None].expand(-1, 1, sizes["frames"]) if PER_FRAME_OF_ONE in made else step


def _sizes(inputs: Mapping[str, Any], specs: Sequence[Input]) -> dict[str, Any]:
    sizes = {}
    for spec in (spec for spec in specs if spec.role != "step"):
        for size, entry in zip(inputs[spec.name].shape, spec.shape, strict=True):
            if isinstance(entry, str) and is_linear(entry):
                of, factor, offset = linear(entry)
                sizes[of] = (size - offset) // factor
    return sizes


def _made(name: str, step: Any, sizes: Mapping[str, Any], counts: EveryTokenCounts) -> Any:
    device = step.device
    if "mask" in name:
        (ending,) = re.findall(r"(?:_t?\d+)?$", name)[:1]
        return counts.ones(sizes["batch"], sizes[f"text_tokens{ending}"], dtype=torch.int64, device=device)
    if SECOND_TIME.fullmatch(name):
        return step
    if SHAPES.fullmatch(name):
        return _Each([(1, sizes["rows"], sizes["columns"])], sizes["batch"])
    if name == "visual_rope_pos":
        return tuple(torch.arange(sizes[of], device=device) for of in ("frames", "rows", "columns"))
    if name == "text_rope_pos":
        return torch.arange(sizes["text_tokens"], device=device)
    if name == "chunk_partition":
        return [sizes["frames"]]
    return {} if name == "input_image_sizes" or name.endswith("_kwargs") else []


class _Each(list[Any]):
    """The same of each sample. A model that takes any batch looks at the first; asking for another fixes the batch."""

    def __init__(self, one: Any, count: Any) -> None:
        super().__init__([one] * (count if isinstance(count, int) else 1))
        self.samples = count

    def __getitem__(self, place: Any) -> Any:
        return super().__getitem__(0 if isinstance(place, int) and 0 < place < int(self.samples) else place)


class _ToldError(Exception):
    """A layer met an unknown width: which, and what it is."""

    def __init__(self, prime: int, width: int) -> None:
        super().__init__(prime, width)
        self.prime, self.width = prime, width


def run(
    model: nn.Module, specs: list[Input], made: Sequence[str], layers: list[int], side: int = 1
) -> tuple[list[Input], float]:
    """The inputs with all widths told, once the model took them, and the factor of its clock; counts the layers run.

    Sides of a picture are multiples of `side`.

    Raises:
        Exception: The model does not take them, or does not answer in the latent's shape; whatever it raised.
    """
    primes = iter(_PRIMES)
    marked = [replace(s, shape=tuple(next(primes) if e == UNKNOWN else e for e in s.shape)) for s in specs]
    sizes = {name: max(low, size) for (name, (low, _)), size in zip(ranges(marked).items(), _SIZES, strict=False)}
    sizes = {name: size * side if name in ("rows", "columns") else size for name, size in sizes.items()}
    weights = [p for p in model.parameters() if isinstance(p, FakeTensor)]
    fake = weights[0].fake_mode if weights else FakeTensorMode(allow_non_fake_inputs=True)
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    while True:
        with dense_attention(model), unchanged(model), fake, torch.no_grad(), _telling(layers), _listening() as heard:
            given = {
                s.name: torch.zeros(
                    resolve(s.shape, sizes), dtype=kind if s.dtype == "float" else getattr(torch, s.dtype)
                )
                for s in marked
            }
            try:
                answer = call(model, given, marked, made, sizes)
            except _ToldError as told:
                marked = [_with(s, told) for s in marked]
                continue
            except RuntimeError as error:  # a table of the model's own, which is no layer
                numbers = re.findall(_LENGTHS, str(error))
                lengths = {int(number) for found in numbers for number in found if number}
                if len(lengths) != 2 or len(lengths & set(_PRIMES)) != 1:
                    raise
                (prime,), (width,) = lengths & set(_PRIMES), lengths - set(_PRIMES)
                marked = [_with(s, _ToldError(prime, width)) for s in marked]
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
def _telling(layers: list[int]) -> Iterator[None]:
    """For the length of the block, the first layer that meets an unknown width raises what it is."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        layers[0] += 1
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

    layers[0] = 0
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
