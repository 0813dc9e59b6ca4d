"""A module whose weights are engines: what torch and diffusers may ask of a transformer besides a call.

What would change where or how an untouched model computes, and not what, has no effect and says so in one line; what
would change its numbers is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, Self

import torch

from taylorseer_export.bundle.device import Device
from taylorseer_export.errors import ConfigError

# Methods of diffusers' models (0.42) that are about speed or memory alone.
_WITHOUT_EFFECT = frozenset(
    {
        "compile_repeated_blocks",
        "disable_cache",
        "disable_gradient_checkpointing",
        "disable_xformers_memory_efficient_attention",
        "enable_group_offload",
        "enable_xformers_memory_efficient_attention",
        "fuse_qkv_projections",
        "reset_attention_backend",
        "set_attention_backend",
        "unfuse_qkv_projections",
    }
)
_AT_EXPORT = "expected it in the weights; load the bundle with lora=FILE, or export again with --lora FILE"
_REFUSED = {
    # What `load_ip_adapter` of a pipeline comes to.
    "_load_ip_adapter_weights": "expected no IP-Adapter, whose attentions are in no graph; use the untouched model",
    "add_adapter": _AT_EXPORT,
    "enable_cache": "expected the plan of the bundle alone, which is a cache already; leave it out",
    "enable_gradient_checkpointing": "expected inference, since engines are not trained; train the untouched model",
    "enable_layerwise_casting": "expected the precision of the bundle; export again with another --precision",
    "enable_lora_hotswap": _AT_EXPORT,
    "enable_parallelism": "expected one device; run the untouched model on several",
    "fuse_lora": _AT_EXPORT,
    "load_lora_adapter": _AT_EXPORT,
    "save_pretrained": "expected its bundle, which is saved already; save the pipeline with transformer=None",
    "set_adapters": _AT_EXPORT,
    "set_attn_processor": "expected the attention that was traced; export the model with that processor",
}


class Config(dict[str, Any]):
    """A config whose entries are attributes too, as diffusers has it; nothing in it can be set that way."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no entry `{name}`") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"config entry `{name}` cannot be set: the graphs were traced with it")


class EngineModule(torch.nn.Module):
    """A module without weights: they are the engines', which stay in their precision and on their device.

    Args:
        dtype: Precision of the engines.
        device: Where they were loaded.

    Attributes:
        dtype: What pipelines cast latents and prompts to, so that the engines get all that they can use; a pipeline's
            own conversion does not change it. A call takes any floating dtype and returns the one that it was given.
        device: What pipelines move latents and prompts to.
    """

    def __init__(self, dtype: torch.dtype, device: Device) -> None:
        super().__init__()
        self.dtype, self.device = dtype, torch.device(str(device))
        # For those who ask a module's first parameter for its dtype and device; offloading may park it elsewhere.
        self.place = torch.nn.Parameter(torch.empty(0, dtype=dtype, device=self.device), requires_grad=False)
        self._said: set[str] = set()
        self._outside: Callable[..., Any] | None = None  # the call below, once Dynamo is there: it takes 50 µs to make

    @property
    def __call__(self) -> Callable[..., Any]:  # type: ignore[override]
        """The call of every module; once Dynamo is there, one that it neither traces nor misses a graph in.

        `torch.compile(module)` takes it from here. A partial has no frame of its own that Dynamo could trace, and by
        that name it is not wrapped in one.
        """
        call = super().__call__
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is None:
            return call
        if self._outside is None:
            outside = partial(dynamo.disable(partial(self._outside_dynamo, call)))
            outside.__name__, outside.__code__ = "_wrapped_call_impl", type(self)._outside_dynamo.__code__  # type: ignore[attr-defined]
            self._outside = outside
        return self._outside

    def _outside_dynamo(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        frames = sys.modules["torch._dynamo"].eval_frame
        if getattr(frames, "_is_in_optimized_module", bool)():
            self._say("torch.compile")
        result = call(*args, **options)
        # Under fullgraph=True no frame compiled counts as a failure: the engines are that frame.
        count = getattr(frames, "set_fullgraph_compiled_frame_count", None)
        if count is not None and (so_far := count(-1)) >= 0:
            count(so_far + 1)
        return result

    def compile(self, *_: Any, **__: Any) -> None:
        """Change nothing: the engines are compiled."""
        self._say("compile")

    def _say(self, name: str) -> None:
        """Print once that a request has no effect."""
        if name not in self._said:
            self._said.add(name)
            print(f"{name} has no effect on a transformer of engines, which are compiled already", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        if name in _WITHOUT_EFFECT:
            return lambda *_, **__: self._say(name)
        if name in _REFUSED:
            return partial(_refuse, name)
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Every `to`, `half`, `cuda` of a module comes here; engines move nowhere, so a move to a GPU is refused.

        A move to the CPU is let through without effect: that is how model offloading parks a module. So is every
        floating dtype, which a pipeline hands to all of its parts.
        """
        there = fn(torch.empty(0, dtype=self.dtype, device=self.device)).device
        if there.type != "cpu" and not self.is_on(there):
            raise ConfigError(
                f"device is `{there}` for the transformer, expected `{self.device}`, where its engines were loaded; "
                f"load the bundle with device=`{there}`"
            )
        return self

    def is_on(self, device: torch.device) -> bool:
        """Whether that is where the engines are; of the CPU `cpu` and `cpu:0` are two names."""
        if device == self.device:
            return True
        if device.type != self.device.type:
            return False
        return device.type == "cpu" or device.index is None or device.index == self.device.index

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse: `copy` and `pickle` come here."""
        raise ConfigError(
            "a transformer of engines is copied or pickled, expected its bundle in its place; copy or save the "
            "pipeline without it, and set its transformer again by `as_transformer()` of the loaded bundle"
        )


def _refuse(name: str, *_: Any, **__: Any) -> NoReturn:
    raise ConfigError(f"{name} is called on a compiled transformer, {_REFUSED[name]}")
