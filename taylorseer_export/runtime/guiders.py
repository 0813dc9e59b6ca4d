"""The guider of a modular pipeline, read for what it states: the step, the length of the loop, the branch of a call.

    pipe.update_components(transformer=denoiser.as_transformer(guider=pipe.guider))

A modular pipeline (`diffusers.ModularPipeline`) names its calls by no `cache_context`. Its guider is told the step and
the number of steps (`set_state`) and counts its branches (`prepare_models`), so a call's place is read there, and
nothing is guessed from the order of calls. A state that cannot be that of the call is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.errors import ConfigError, StepError
from taylorseer_export.runtime.calls import Context, LoopState
from taylorseer_export.runtime.clock import model_timesteps

_STATED = ("step", "num_inference_steps", "timestep", "count_prepared", "num_conditions")
_ROUNDED = 2.0**-7  # of a timestep that a pipeline passes in bfloat16, divided in it: twice half a unit, and some


class Guidance:
    """A guider that combines predictions and leaves the transformer alone.

    Args:
        guider: One of `diffusers.guiders`, the very one that the pipeline calls.
        manifest: The bundle, which says how a timestep is passed to the model.

    Raises:
        ConfigError: It is no guider, or changes layers of the transformer, which engines do not have.
    """

    def __init__(self, guider: Any, manifest: Manifest) -> None:
        from diffusers.guiders.guider_utils import BaseGuidance

        kind = type(guider).__name__
        if not isinstance(guider, BaseGuidance):
            raise ConfigError(f"guider is a {kind}, expected a guider of diffusers; pass `guider=pipe.guider`")
        if type(guider).prepare_models is not BaseGuidance.prepare_models or len(guider._input_predictions or ()) > 2:
            raise ConfigError(
                f"guider is {kind}, which changes layers of the transformer, expected one that combines a conditional "
                "and an unconditional prediction, like ClassifierFreeGuidance; set another by "
                "`pipe.update_components(guider=...)`"
            )
        self._guider, self._manifest = guider, manifest

    def context(self, loop: LoopState | None, timestep: float) -> tuple[Context, int]:
        """Where a call is, by the guider's state.

        Args:
            loop: The caller's loop under way, if any.
            timestep: What the transformer is passed.

        Returns:
            (branch and step index, steps of the loop).

        Raises:
            StepError: The state is none of a loop, or of another call than this one.
        """
        state: dict[str, Any] = self._guider.get_state()
        if any(state.get(name) is None for name in _STATED):
            raise self._wrong("states no step", "the step of a loop that runs")
        step, steps, count, conditions = (int(state[name]) for name in _STATED if name != "timestep")
        stated = float(state["timestep"])
        if not (0 <= step < steps and 1 <= count <= conditions <= 2):
            raise self._wrong(
                f"states step {step} of {steps} and branch {count} of {conditions}", "a step of the loop and a branch"
            )
        name = "cond" if self._guider.is_conditional else "uncond"
        before = loop.said if loop is not None and not loop.over and loop.said is not None else -1
        ran = loop.ran if loop is not None and before == step else set()
        if step not in (0, before, before + 1) or (count != len(ran) + 1 and (step, count) != (0, 1)):
            raise self._wrong(
                f"states step {step} and branch {count} after step {before} and branch {len(loop.ran) if loop else 0}",
                "the step or the branch that comes next",
            )
        passed = float(model_timesteps(self._manifest, np.array([stated], np.float32))[0])
        if abs(passed - timestep) > _ROUNDED * max(abs(passed), abs(timestep)) + _ROUNDED**2:
            raise self._wrong(f"states timestep {stated:g}, passed on as {passed:g}", f"{timestep:g} as called")
        return Context(name, step), steps

    def _wrong(self, seen: str, expected: str) -> StepError:
        return StepError(
            f"guider {type(self._guider).__name__} {seen}, expected {expected}; call the transformer from the modular "
            "pipeline whose guider it is, and after a change of that set it again by "
            "`as_transformer(guider=pipe.guider)`"
        )


class Signed:
    """A `forward` that has the signature of the model's: modular pipelines pass on what they find there.

    It is no property, since offloading puts its own `forward` in the place of a module's.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        return self if module is None else _Bound(self._function, module)


class _Bound:
    def __init__(self, function: Callable[..., Any], module: Any) -> None:
        self._function, self._module = function, module

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._function(self._module, *args, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        import diffusers

        model = getattr(diffusers, self._module.denoiser.manifest.model.class_name, None)
        found = inspect.signature(self._function if model is None else model.forward)
        return found.replace(parameters=[p for name, p in found.parameters.items() if name != "self"])
