"""A proposal of a declaration for a transformer that no family covers, read off its module tree.

Rules, in the names and shapes that diffusers' transformers share:

1. A stack is a list of modules of the model itself whose blocks hold an attention.
2. A block's sites are its attentions and its MLPs for image rows. A block without an MLP of its own joins both in its
   last linear layer, which is the site instead; one that has no such layer either has an attention that holds the MLP.
   Where each has a norm of its own behind it, `..._norm2` beside `..._norm1`, those norms are the sites.
3. The hidden state enters the first block of the first stack, and leaves into the first norm or head behind the last,
   or into one that is called final, wherever it is defined.
4. The inputs are told by `inputs.py`, from names and from runs on fake tensors.
5. Sizes are open where the model can be traced so; those that its code turns into numbers are fixed.

A proposal is a draft: the rules read names. `check` traces and splits the model with it, which proves the rest.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from taylorseer_export.bundle.shapes import evaluate, in_products, linear, names
from taylorseer_export.errors import ConfigError, ExportError
from taylorseer_export.families.family import Family, Input, packed, patches, unknown
from taylorseer_export.graph import fakes, inputs
from taylorseer_export.graph.fakes import TOKENS
from taylorseer_export.graph.split import Split, split
from taylorseer_export.graph.trace import Trace, trace

_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
_MLP = re.compile(r"feedforward|feed_forward|ffn|mlp|swiglu|moe|glumb", re.IGNORECASE)
_TEXT = re.compile(r"(^|_)(context|txt|text|encoder|t)($|_)")
BATCH = "batch"
_OF_TEXT = "text rows: they have no path to the output of a forecast"


@dataclass(frozen=True)
class Proposal:
    """What a declaration of the model would say.

    Attributes:
        sites: Regular expressions over module names.
        stack_input, stack_output: (module, argument), as in a family.
        inputs: The arguments whose shape could be told.
        skipped: Module or argument -> why it is not in the declaration.
        dimensions: Dimension -> (smallest, largest); equal where the size is fixed.
        clock: What the model multiplies its timestep by, dimensionless.
        trouble: What the model said of the inputs that were tried; empty where it took them.
        made: Arguments that are made of the inputs at every call.
        size: Of the latent, where the config says one.
    """

    model_class: str
    sites: tuple[str, ...]
    stack_input: tuple[str, str]
    stack_output: tuple[str, str]
    inputs: tuple[Input, ...]
    skipped: dict[str, str]
    dimensions: Mapping[str, tuple[int, int]]
    clock: float = 1.0
    trouble: str = ""
    made: tuple[str, ...] = ()
    size: tuple[int, ...] | None = None

    def family(self) -> Family:
        """The proposal as a family: all that a trace, an export and a comparison with the model need."""
        latent = next((spec for spec in self.inputs if spec.role == "latent"), None)
        video = latent is not None and "frames" in latent.shape
        one = {name: low for name, (low, high) in self.dimensions.items() if low == high}
        kept = {BATCH, *self.products()}  # by name, so that a bundle says how large they are
        fixed = {name: size for name, size in one.items() if name not in kept}
        return replace(
            unknown(self.model_class),
            sites=self.sites,
            stack_input=self.stack_input,
            stack_output=self.stack_output,
            inputs=lambda config: tuple(_at(spec, fixed) for spec in self.inputs),
            dimensions=lambda config: {name: span for name, span in self.dimensions.items() if name not in fixed},
            latent_sizes=self._latent_sizes_of(latent),
            latent_size=self.size or ((21, 60, 104) if video else (128, 128)),
            timestep_divisor=self.clock,
            forward=lambda model, given: fakes.call(model, given, self.inputs, self.made, one),
        )

    def products(self) -> set[str]:
        """The dimensions that stand in a product, such as the tokens of a picture: it has no other form at a trace."""
        return in_products(spec.shape for spec in self.inputs)

    def fixed(self, names: Collection[str], sizes: Mapping[str, int]) -> Proposal:
        """The proposal with these dimensions fixed, at the given sizes or at the smallest."""
        pinned = {name: sizes.get(name, self.dimensions[name][0]) for name in names if name in self.dimensions}
        return replace(self, dimensions={**self.dimensions, **{name: (size, size) for name, size in pinned.items()}})

    def _latent_sizes_of(self, latent: Input | None) -> Callable[..., dict[str, int]]:
        if latent is not None and TOKENS in latent.shape:
            return lambda config, *size: patches({"patch_size": 2}, *size)
        return packed if latent is not None and "image_tokens" in latent.shape else self._latent_sizes

    def _latent_sizes(self, config: Mapping[str, Any], *size: int) -> dict[str, int]:
        (latent,) = (spec for spec in self.inputs if spec.role == "latent")
        named = [linear(entry) for entry in latent.shape if isinstance(entry, str) and entry != "batch"]
        for (name, factor, _), pixels in zip(named, size, strict=False):
            if pixels % factor:
                raise ConfigError(
                    f"latent size is {'x'.join(map(str, size))}, expected {name} in multiples of {factor} (latent "
                    "pixels); change --size or --latent-size"
                )
        return {name: pixels // factor for (name, factor, _), pixels in zip(named, size, strict=False)}


def propose(model: nn.Module) -> Proposal:
    """Read a proposal off a transformer; no weight of it is used.

    Raises:
        ExportError: The model has no list of blocks with attention.
    """
    skipped: dict[str, str] = {}
    stacks = _stacks(model, skipped)
    if not stacks:
        raise ExportError(
            f"{type(model).__name__} has no list of blocks with an attention, expected a diffusion transformer's; "
            "declare it by hand, see families/README.md"
        )
    sites = tuple(dict.fromkeys(pattern for stack in stacks for pattern in _sites(model, stack, skipped)))
    first = f"{stacks[0]}.0"
    leaving = _behind(model, stacks[-1])
    found = inputs.find(model)
    return Proposal(
        type(model).__name__,
        sites,
        (first, _first_argument(model.get_submodule(first))),
        (leaving, _first_argument(model.get_submodule(leaving))),
        found.inputs,
        {**skipped, **found.skipped},
        fakes.ranges(found.inputs),
        found.clock,
        found.trouble,
        found.made,
        found.size,
    )


def settled(
    model: nn.Module, proposal: Proposal, sizes: Mapping[str, int], any_size: bool = True
) -> tuple[Proposal, Trace]:
    """The proposal with as many sizes open as the model can be traced with, and its trace.

    Args:
        model: The transformer.
        proposal: Read off it.
        sizes: What a dimension is fixed at where it has to be. The batch is fixed only if it is among them.
        any_size: Whether the latent's sizes are left open if they can be.

    Raises:
        ExportError: It cannot be traced even with every size but the batch fixed; says why.
    """
    if proposal.trouble:
        raise ExportError(
            f"{proposal.model_class} does not take the inputs that could be told ({proposal.trouble}), expected its "
            f"`forward` to be called with {', '.join(s.name for s in proposal.inputs) or 'them'} alone; "
            "declare it by hand, see families/README.md"
        )
    latent = next(spec for spec in proposal.inputs if spec.role == "latent")
    products = proposal.products()
    in_latent = {name for entry in latent.shape for name in names(entry)} - {BATCH} | products
    others = set(proposal.dimensions) - {BATCH}
    last: ExportError | ConfigError | None = None
    tried: set[frozenset[str]] = set()
    waiting: list[set[str]] = [products, in_latent, others] if any_size else [in_latent, others]
    if not any(BATCH in spec.shape for spec in proposal.inputs if spec.role == "constant"):
        if BATCH not in sizes:
            raise ExportError(
                f"{proposal.model_class} takes no input that is constant for a request, expected one that tells the "
                "batch; add --batch 1, or declare it by hand, see families/README.md"
            )
        waiting = [dims | {BATCH} for dims in waiting]
    logging.disable(logging.CRITICAL)  # torch.export also logs what it raises
    try:
        while waiting:
            dims = waiting.pop(0)
            if frozenset(dims) in tried:
                continue
            tried.add(frozenset(dims))
            candidate = proposal.fixed(dims, sizes)
            try:
                return candidate, trace(model, candidate.family(), torch.float32)
            except (ExportError, ConfigError) as error:  # the latter of a size that is no multiple of one dimension
                last = error
                violated = re.search(r"Constraints violated \((.*?)\)", str(error))
                of_these = set(re.findall(r"\w+", violated[1])) if violated else set()
                if more := of_these & others - dims:
                    waiting.insert(0, dims | more)
                elif of_these == {BATCH} and BATCH in sizes:  # it costs the table of what depends on the step alone
                    waiting = [wanted | {BATCH} for wanted in (dims, *waiting)]
                elif of_these == {BATCH}:
                    raise ExportError(
                        f"{proposal.model_class} takes the samples of a batch one by one, expected a batch of one "
                        "size; add --batch 1, or declare it by hand, see families/README.md"
                    ) from error
    finally:
        logging.disable(logging.NOTSET)
    assert last is not None
    raise last


def check(model: nn.Module, proposal: Proposal) -> Split:
    """Trace and split the model with the proposal, at granularity `module`, all sizes open.

    Raises:
        ExportError: It cannot be traced so, or its sites are not complete; the message says why.
    """
    logging.disable(logging.CRITICAL)  # torch.export also logs what it raises
    try:
        return split(trace(model, proposal.family(), torch.float32), "module", "snapshots", 1)
    finally:
        logging.disable(logging.NOTSET)


def declaration(proposal: Proposal, name: str) -> str:
    """Python source of the declaration, to be completed where it says so."""
    dimensions = dict(proposal.dimensions)
    lines = [
        f"{name.upper().replace('-', '_')} = Family(",
        f'    name="{name}",',
        f'    title="{name}",',
        f'    model_class="{proposal.model_class}",',
        '    reference="...",  # hub id',
        "    sites=(",
        *(f'        r"{pattern}",' for pattern in proposal.sites),
        "    ),",
        f"    stack_input={_quoted(proposal.stack_input)},",
        f"    stack_output={_quoted(proposal.stack_output)},",
        "    inputs=lambda config: (",
        *(f"        {_source(spec)}," for spec in proposal.inputs),
        "    ),",
        f"    dimensions=lambda config: {str(dimensions).replace(chr(39), chr(34))},",
        "    latent_sizes=packed,  # or patches, or your own: latent size -> dimensions",
        "    defaults=Defaults(steps=50, interval=5, warmup=1, order=1),",
        '    scheduler="FlowMatchEulerDiscreteScheduler",  # what the pipeline uses',
        '    guidance="none",  # none, embedded, batched or branches',
        "    guidance_scale=1.0,",
        "    latent_size=(128, 128),",
        ")",
    ]
    return "\n".join(lines)


def _at(spec: Input, fixed: Mapping[str, int]) -> Input:
    """An input with the sizes that are fixed as numbers, alone or in a sum with one that is open."""

    def at(entry: int | str) -> int | str:
        if isinstance(entry, int) or not names(entry) & fixed.keys():
            return entry
        if names(entry) <= fixed.keys():
            return evaluate(entry, fixed)
        return re.sub(r"\w+", lambda name: str(fixed.get(name[0], name[0])), entry)

    return replace(spec, shape=tuple(at(entry) for entry in spec.shape))


# Modules -------------------------------------------------------------------------------------------------------------


def _stacks(model: nn.Module, skipped: dict[str, str]) -> list[str]:
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or not _has(module[0], _ATTENTION):
            continue
        if "." not in name and _TEXT.search(name):
            skipped[name] = _OF_TEXT
        elif "." not in name:
            found.append(name)
        elif not any(name.startswith(f"{stack}.") for stack in found):
            skipped[name] = "blocks inside another part, which prepares an input of the blocks"
    return found


def _has(block: nn.Module, kind: re.Pattern[str]) -> bool:
    return any(kind.search(type(m).__name__) or (hasattr(m, "to_q") and kind is _ATTENTION) for m in block.modules())


def _sites(model: nn.Module, stack: str, skipped: dict[str, str]) -> list[str]:
    """Patterns of one stack; blocks of one list may differ, so all of them are read."""
    found: dict[str, None] = {}
    for number, entry in model.get_submodule(stack).named_children():
        block, prefix = entry, ""
        while len(children := list(block.named_children())) == 1:  # a wrapper
            prefix, block = f"{prefix}{children[0][0]}.", children[0][1]
        attention = [name for name, child in children if _ATTENTION.search(type(child).__name__)]
        mlps = [name for name, child in children if _MLP.search(type(child).__name__)]
        chosen = [name for name in attention + mlps if not _TEXT.search(name)]
        for name in {*attention, *mlps} - set(chosen):
            skipped[f"{stack}.{number}.{prefix}{name}"] = _OF_TEXT
        linear = [name for name, child in children if isinstance(child, nn.Linear)]
        if not mlps and linear:
            for name in attention:
                skipped[f"{stack}.{number}.{prefix}{name}"] = f"joined with the MLP in {linear[-1]}, which is the site"
            chosen = linear[-1:]
        behind = [name for name, _ in children if name.endswith("norm2") and f"{name[:-1]}1" in dict(children)]
        behind = [name for name in behind if not _TEXT.search(name)]
        if 1 < len(chosen) == len(behind):
            for name, norm in zip(chosen, behind, strict=True):
                skipped[f"{stack}.{number}.{prefix}{name}"] = f"normed behind it by {norm}, which is the site"
            chosen = behind
        found |= dict.fromkeys(rf"{re.escape(stack)}\.\d+\.{re.escape(prefix)}{re.escape(name)}" for name in chosen)
    return list(found)


def _behind(model: nn.Module, stack: str) -> str:
    """The first norm or head that the model defines behind its last stack."""
    children = list(model.named_children())
    after = children[[name for name, _ in children].index(stack) + 1 :]
    heads = [name for name, child in after if not isinstance(child, nn.ModuleList) and not _TEXT.search(name)]
    heads += [name for name, _ in children if "final" in name]
    heads += [name for name, _ in children if re.fullmatch(r"norm_out|out_layer|proj_out", name)]
    if not heads:
        raise ExportError(
            f"{type(model).__name__} has no module behind `{stack}`, expected the final norm or head; "
            "declare it by hand, see families/README.md"
        )
    head = model.get_submodule(heads[0])
    alone = f".{next(iter(head))}" if isinstance(head, nn.ModuleDict) and len(head) == 1 else ""
    return f"{heads[0]}{alone}"


def _first_argument(module: nn.Module) -> str:
    return next(iter(inspect.signature(module.forward).parameters))


# Source --------------------------------------------------------------------------------------------------------------


def _quoted(pair: tuple[str, str]) -> str:
    return f'("{pair[0]}", "{pair[1]}")'


def _source(spec: Input) -> str:
    shape = ", ".join(f'"{entry}"' if isinstance(entry, str) else str(entry) for entry in spec.shape)
    shape += "," if len(spec.shape) == 1 else ""
    dtype = "" if spec.dtype == "float" else f', "{spec.dtype}"'
    values = "" if spec.values is None else f", values={spec.values}"
    fill = "" if spec.fill is None else f', fill="{spec.fill}"'
    return f'Input("{spec.name}", ({shape}), "{spec.role}"{dtype}{values}{fill})'
