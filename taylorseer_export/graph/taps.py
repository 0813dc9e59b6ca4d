"""Taps: names placed on the tensors that TaylorSeer forecasts, while the model is traced.

A tap is an identity operator with a name. It survives `torch.export` as a node of the graph, so the places where
the graph is cut later are found by name and not by the shape of the code around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from taylorseer_export.errors import ExportError
from taylorseer_export.families.family import Family

STACK_INPUT = "stack.input"
STACK_OUTPUT = "stack.output"
FIRST_INPUT = "first.input"
FIRST_OUTPUT = "first.output"
_MARKS = (STACK_INPUT, STACK_OUTPUT, FIRST_INPUT, FIRST_OUTPUT)


def is_mark(name: str) -> bool:
    """Whether a tap of this name marks a place, of whatever stream, and is no site."""
    return any(name == mark or name.startswith(f"{mark}.") for mark in _MARKS)


@cache
def tap_operator() -> Any:
    """The marker operator `taylorseer::tap(x, name) -> x`, defined once per process on first use."""

    @torch.library.custom_op("taylorseer::tap", mutates_args=())
    def tap(x: Tensor, name: str) -> Tensor:
        return x.clone()

    @tap.register_fake
    def _(x: Tensor, name: str) -> Tensor:
        return torch.empty_like(x)

    return torch.ops.taylorseer.tap.default


@contextmanager
def tapped(model: nn.Module, family: Family) -> Iterator[tuple[str, ...]]:
    """Place the family's taps on `model` for the length of the block; yields the site names in block order.

    A site is the output of a module before its gate and before the residual add. Two more taps mark where the
    hidden state enters the first block and where it leaves for the final norm, two for each further latent; the coarser
    granularities use them.
    Two are for guards: the modulated input of the first site, and the hidden state behind the first block.

    Args:
        model: An unmodified diffusers transformer.
        family: The declaration whose `sites` are matched against the module names.

    Raises:
        ExportError: There is no site pattern, or one matches no module, so nothing would be forecast.
    """
    if not family.sites:
        raise ExportError(
            f"family {family.name} has no `sites`, expected patterns of {type(model).__name__}'s attention and MLP "
            "modules; see families/README.md"
        )
    tap = tap_operator()
    modules = dict(model.named_modules())
    sites = []
    with ExitStack() as hooks:
        for pattern in family.sites:
            names = [name for name in modules if re.fullmatch(pattern, name)]
            if not names:
                raise ExportError(
                    f"site pattern is `{pattern}`, expected it to match a module of {type(model).__name__}; "
                    f"compare it with model.named_modules() and mend families/{family.name}.py"
                )
            for name in names:
                hooks.callback(modules[name].register_forward_hook(_output_hook(tap, name)).remove)
            sites += names
        streams = {"": (family.stack_input, family.stack_output)}
        streams |= {f".{latent}": stack for latent, stack in family.others.items()}
        for (name, argument), label in (
            (place, mark + end)
            for end, stack in streams.items()
            for place, mark in zip(stack, (STACK_INPUT, STACK_OUTPUT), strict=True)
        ):
            hook = _argument_hook(tap, argument, label)
            hooks.callback(modules[name].register_forward_pre_hook(hook, with_kwargs=True).remove)
        block, argument = family.stack_input
        kept = _kept_output_hook(tap, argument, FIRST_OUTPUT)
        hooks.callback(modules[block].register_forward_hook(kept, with_kwargs=True).remove)
        sites.sort(key=list(modules).index)
        module, argument = family.first_input or (sites[0], "hidden_states")
        hook = _argument_hook(tap, argument, FIRST_INPUT)
        hooks.callback(modules[module].register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield tuple(sites)


def _output_hook(tap: Any, name: str) -> Any:
    """Tap the first output: image rows come first in every diffusers attention that returns a tuple."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (tap(output[0], name), *output[1:])
        return tap(output, name)

    return hook


def _argument_hook(tap: Any, argument: str, label: str) -> Any:
    """Tap the argument called `argument`, or the first positional one."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if argument in kwargs:
            return args, {**kwargs, argument: tap(kwargs[argument], label)}
        return (tap(args[0], label), *args[1:]), kwargs

    return hook


def _kept_output_hook(tap: Any, argument: str, label: str) -> Any:
    """Tap the output that goes on what `argument` brought: of several, the one of its shape.

    Some blocks return the text first, some the image; sizes are symbols here, so no two of them are equal by chance.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not isinstance(output, tuple):
            return tap(output, label)
        shape = (kwargs[argument] if argument in kwargs else args[0]).shape
        (kept,) = (k for k, value in enumerate(output) if value is not None and _same_shape(value.shape, shape))
        return tuple(tap(value, label) if k == kept else value for k, value in enumerate(output))

    return hook


def _same_shape(one: Any, other: Any) -> bool:
    """Whether two shapes are equal for all sizes, without fixing any of them."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return len(one) == len(other) and all(statically_known_true(a == b) for a, b in zip(one, other, strict=True))
