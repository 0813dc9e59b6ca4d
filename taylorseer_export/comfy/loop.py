"""One loop of a ComfyUI sampler is one request: its boundaries, its plan, and what ran in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.patcher_extension
import numpy as np
import torch

from taylorseer_export.errors import ConfigError
from taylorseer_export.method import RequestOptions
from taylorseer_export.runtime.dropin import DropIn

KEY = "taylorseer"

# Samplers of ComfyUI that call the network once for every sigma but the last, and at that sigma: all steps are prepared
# at once, as they are nowhere else. Others may call it between the sigmas, and each call is a step of the plan.
ONCE_PER_SIGMA = frozenset(
    f"sample_{name}"
    for name in (
        "euler", "euler_ancestral", "ddpm", "deis", "dpmpp_2m",
        "gradient_estimation", "ipndm", "ipndm_v", "lcm", "lms", "res_multistep", "res_multistep_ancestral",
    )
)  # fmt: skip

_CONDITIONING = {
    "control": "a ControlNet",
    "area": "an area",
    "mask": "a mask",
    "gligen": "boxes of GLIGEN",
    "hooks": "hooks, such as a LoRA of its own",
}
_MODEL = {"patches": "patches of the network", "patches_replace": "replaced parts of the network"}


class OpenLoop:
    """A loop under way.

    Args:
        stack: Closed when the loop is over.
        options: Of the plan.
        timesteps: `[S]`, what the network is called with, where that is known.

    Attributes:
        conditioning: Branch -> what ComfyUI gave at its first call, and all inputs that were made of it.
        calls: (branch, kind of step, start, end) of each call: seconds, or events of the GPU.
    """

    def __init__(self, stack: ExitStack, options: RequestOptions, timesteps: np.ndarray | None) -> None:
        self._stack, self._options, self._timesteps = stack, options, timesteps
        self._dropin: DropIn | None = None
        self.conditioning: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {}
        self.calls: list[tuple[str, str, Any, Any]] = []

    def dropin(self, make: Callable[[RequestOptions], DropIn]) -> DropIn:
        """What answers the loop, from `make`; it begins with the first call, when the engines are loaded."""
        if self._dropin is None:
            dropin = make(self._options)
            self._stack.enter_context(dropin.request(timesteps=self._timesteps))
            self._dropin = dropin
        return self._dropin

    @contextmanager
    def timed(self, dropin: DropIn, branch: str, device: torch.device) -> Iterator[None]:
        """Note how long a call takes; on a GPU by events, so that nothing waits."""
        begun = _now(device)
        yield
        self.calls.append((branch, dropin.executed[branch][-1], begun, _now(device)))


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


class Sampling:
    """Around every loop of a sampler, by ComfyUI's wrapper of that name: makes a request of it.

    Args:
        options: Of the plan.

    Attributes:
        last: What ran in the last loop that was begun with it, as `report` says.
    """

    def __init__(self, options: RequestOptions) -> None:
        self.options = options
        self.last = "nothing has run yet"

    def __call__(
        self, executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: torch.Tensor, *rest: Any, **named: Any
    ) -> Any:
        """Run the loop; however it ends, its slots are free then.

        Raises:
            ConfigError: The workflow asks for what engines cannot do; nothing ran.
        """
        guider = executor.class_obj
        transformer_options = guider.model_options["transformer_options"]
        check_honoured(guider.conds, guider.model_options)
        self.last = "the loop was interrupted"
        with ExitStack() as stack:
            loop = OpenLoop(stack, self.options, timesteps_of(guider.model_patcher, sampler, sigmas))
            transformer_options[KEY] = loop
            made = executor(noise, latent_image, sampler, sigmas, *rest, **named)
        self.last = report(loop.calls)
        return made


def timesteps_of(patcher: Any, sampler: Any, sigmas: torch.Tensor) -> np.ndarray | None:
    """`[S]`, what the network will be called with, float64; None where the sampler may call it at other times."""
    called = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    if called not in ONCE_PER_SIGMA:
        return None
    sampling = patcher.get_model_object("model_sampling")
    timesteps: np.ndarray = sampling.timestep(sigmas[:-1].cpu()).double().numpy()
    return timesteps


def check_honoured(conditioning: Mapping[str, Sequence[Mapping[str, Any]]], model_options: Mapping[str, Any]) -> None:
    """Refuse what engines cannot do.

    Args:
        conditioning: Name -> entries, as a guider has them.
        model_options: Of the guider.

    Raises:
        ConfigError: It is asked for.
    """
    kinds = comfy.patcher_extension.WrappersMP
    asked = [
        f"conditioning has {what}"
        for entries in conditioning.values()
        for entry in entries
        for name, what in _CONDITIONING.items()
        if entry.get(name) is not None
    ]
    transformer_options = model_options["transformer_options"]
    asked += [f"the model has {what}" for name, what in _MODEL.items() if transformer_options.get(name)]
    around = transformer_options.get("wrappers", {}).get(kinds.DIFFUSION_MODEL, {})
    asked += [
        f"the model has a wrapper of the network ({key or 'without a name'})" for key, own in around.items() if own
    ]
    if model_options.get("context_handler") is not None:
        asked.append("the model has context windows")
    if asked:
        raise ConfigError(
            f"{asked[0]}, expected none: the engines of a bundle take prompts alone; leave that node out, or use "
            "ComfyUI's own model"
        )


def report(calls: Sequence[tuple[str, str, Any, Any]]) -> str:
    """What ran: the plan of each branch of guidance, and the mean time of a full and of a forecast step."""
    if not calls:
        return "no step ran"
    plans: dict[str, str] = {}
    times: dict[str, list[float]] = {"F": [], ".": []}
    for branch, kind, begun, ended in calls:
        plans[branch] = plans.get(branch, "") + kind
        if not isinstance(begun, float):
            ended.synchronize()
        times[kind].append(1e3 * (ended - begun) if isinstance(begun, float) else begun.elapsed_time(ended))
    steps = sum(map(len, plans.values()))
    lines = [f"plan {plan}" for plan in dict.fromkeys(plans.values())]
    for kind, name in (("F", "full"), (".", "forecast")):
        if times[kind]:
            lines.append(f"{len(times[kind])} of {steps} calls {name}, {np.mean(times[kind]):.1f} ms each")
    return "\n".join(lines)
