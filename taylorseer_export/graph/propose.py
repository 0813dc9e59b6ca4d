"""A proposal of a declaration for a transformer that no family covers, read off its module tree.

Rules, in the names and shapes that diffusers' transformers share:

1. A stack is a list of modules of the model itself whose blocks hold an attention.
2. A block's sites are its attentions and its MLPs for image rows. A block without an MLP of its own joins both in its
   last linear layer, which is the site instead; one that has no such layer either has an attention that holds the MLP.
   Where each has a norm of its own behind it, `..._norm2` beside `..._norm1`, those norms are the sites.
3. The hidden state enters the first block of the first stack, and leaves into the first norm or head behind the last,
   or into one that is called final, wherever it is defined.
4. The inputs are those arguments of `forward` whose meaning diffusers fixes and whose width the config gives.

A proposal is a draft: the rules read names. `check` traces and splits the model with it, which proves the rest.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from taylorseer_export.errors import ExportError
from taylorseer_export.families.family import Family, Input, unknown
from taylorseer_export.graph.split import Split, split
from taylorseer_export.graph.trace import trace

_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
_MLP = re.compile(r"feedforward|mlp|swiglu|moe|glumb", re.IGNORECASE)
_TEXT = re.compile(r"(^|_)(context|txt|text|encoder|t)($|_)")
_OF_TEXT = "text rows: they have no path to the output of a forecast"
# Arguments that change how `forward` runs and hold no tensor of the loop.
_CONTROL = re.compile(r"return_dict|.*_kwargs|.*controlnet.*|skip_layers|img_sizes|hidden_states_masks|training")
_TEXT_WIDTHS = ("caption_channels", "joint_attention_dim", "text_embed_dim", "text_dim", "cross_attention_dim")


@dataclass(frozen=True)
class Proposal:
    """What a declaration of the model would say.

    Attributes:
        sites: Regular expressions over module names.
        stack_input, stack_output: (module, argument), as in a family.
        inputs: The arguments whose shape could be told.
        skipped: Module or argument -> why it is not in the declaration.
    """

    model_class: str
    sites: tuple[str, ...]
    stack_input: tuple[str, str]
    stack_output: tuple[str, str]
    inputs: tuple[Input, ...]
    skipped: dict[str, str]

    def family(self) -> Family:
        """The proposal as a family, enough to trace with it."""
        named = {name for spec in self.inputs for entry in spec.shape for name in re.findall(r"[a-z_]+", str(entry))}
        return replace(
            unknown(self.model_class),
            sites=self.sites,
            stack_input=self.stack_input,
            stack_output=self.stack_output,
            inputs=lambda config: self.inputs,
            dimensions=lambda config: {name: span for name, span in _RANGES.items() if name in named},
        )


_RANGES = {
    "batch": (1, 16),
    "image_tokens": (4, 4096),
    "frames": (1, 64),
    "rows": (2, 64),
    "columns": (2, 64),
    "text_tokens": (2, 512),
}


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
    inputs = _inputs(model, skipped)
    return Proposal(
        type(model).__name__,
        sites,
        (first, _first_argument(model.get_submodule(first))),
        (leaving, _first_argument(model.get_submodule(leaving))),
        inputs,
        skipped,
    )


def check(model: nn.Module, proposal: Proposal) -> Split:
    """Trace and split the model with the proposal, at granularity `module`.

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
    dimensions = proposal.family().dimensions({})
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


# Inputs --------------------------------------------------------------------------------------------------------------


def _inputs(model: nn.Module, skipped: dict[str, str]) -> tuple[Input, ...]:
    config = dict(model.config)  # type: ignore[arg-type]
    known = _known(model, config)
    found = []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if name in known:
            if known[name] is not None:
                found.append(known[name])
        elif not _CONTROL.fullmatch(name):
            needed = "needed" if parameter.default is inspect.Parameter.empty else "optional"
            skipped[f"argument {name}"] = f"{needed}, and its shape is not told by a convention; add it if you pass it"
    return tuple(spec for spec in found if spec is not None)


def _known(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Input | None]:
    """Argument -> its declaration; None where the config says that this variant does not take it."""
    text = next((config[key] for key in _TEXT_WIDTHS if isinstance(config.get(key), int)), None)
    pooled = config.get("pooled_projection_dim")
    image = config.get("image_dim")
    classes = config.get("num_embeds_ada_norm") if text is None else None
    # How many numbers say where a token is; 0 where the model does not take them.
    axes = [getattr(m, "axes_dim", None) for n, m in model.named_children() if "pos_embed" in n]
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


def _latent(model: nn.Module, config: Mapping[str, Any]) -> Input:
    """The latent as the first embedder takes it: rows of tokens, a picture, or frames of pictures."""
    channels, patch = config["in_channels"], config.get("patch_size") or 1
    side = patch[-1] if isinstance(patch, tuple | list) else patch
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d))
    picture: tuple[int | str, ...] = (f"{side}*rows", f"{side}*columns") if side > 1 else ("rows", "columns")
    if isinstance(layer, nn.Conv3d):
        picture = ("frames", *picture)
    elif isinstance(layer, nn.Linear) and _embedder_width(model, channels):
        return Input("hidden_states", ("batch", "image_tokens", channels), "latent")
    elif isinstance(config.get("sample_size"), int) and "pos_embed_max_size" not in config:
        picture = (config["sample_size"], config["sample_size"])
    return Input("hidden_states", ("batch", channels, *picture), "latent")


def _embedder_width(model: nn.Module, channels: int) -> bool:
    """Whether a linear layer of the model itself takes the channels as they come, already packed."""
    return any(isinstance(m, nn.Linear) and m.in_features == channels for _, m in model.named_children())


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
