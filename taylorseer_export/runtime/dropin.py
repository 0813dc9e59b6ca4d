"""The drop-in: a bundle in the place of a diffusers pipeline's transformer.

    pipe.transformer = tse.load("engines/flux-tiny").as_transformer()

It is called as the transformer was, and learns from the calls alone where a request begins and which step and branch a
call is (`calls.py` tells by what rule, and `callers.py` whose loop it is); nothing is hooked and nothing is global.
In a modular pipeline the guider states them (`guiders.py`).
`request` and `begin` state the same things exactly, for loops of one's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from taylorseer_export.bundle.device import Device
from taylorseer_export.bundle.manifest import Manifest, Tensor
from taylorseer_export.errors import ConfigError, StepError
from taylorseer_export.method import (
    BundleDefaults,
    CalibratedPlan,
    Forecasts,
    Guard,
    RequestOptions,
    forecasts_from_options,
)
from taylorseer_export.runtime.adapter import Adapter
from taylorseer_export.runtime.arguments import clock_of, form_of, latent_of, rows_ahead
from taylorseer_export.runtime.callers import Callers
from taylorseer_export.runtime.calls import Branch, Context, LoopState, Seen, TransformerCall, host_array
from taylorseer_export.runtime.engine_module import Config, EngineModule
from taylorseer_export.runtime.guiders import Guidance, Signed
from taylorseer_export.runtime.modules import modules_of
from taylorseer_export.runtime.runner import Buffer, Runner
from taylorseer_export.runtime.slot import Slot
from taylorseer_export.runtime.values import check_prediction

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Loaded(Protocol):
    """What the drop-in needs of a denoiser."""

    manifest: Manifest
    runner: Runner
    device: Device
    latent: Tensor
    others: dict[str, Tensor]
    timestep: Tensor
    next_timestep: Tensor | None
    constants: dict[str, Tensor]
    defaults: BundleDefaults

    @property
    def profiles(self) -> Mapping[str, CalibratedPlan]:
        """As `Denoiser.profiles`."""

    def sizes(self, latents: tuple[int, ...], conditioning: Mapping[str, np.ndarray]) -> dict[str, int]:
        """As `Denoiser.sizes`."""

    def slot(self, sizes: Mapping[str, int]) -> Slot:
        """As `Denoiser.slot`."""

    def adapter(self, lora: Any) -> Adapter:
        """As `Denoiser.adapter`."""


class DropIn(EngineModule):
    """Runs a denoiser under the call signature of the diffusers transformer it was exported from.

    Pipelines in several threads may share it: a loop belongs to its caller, and every loop under way has slots of its
    own, as many bytes as it would have with a drop-in of its own.

    Args:
        denoiser: The loaded bundle; other drop-ins and slots may share it.
        plan: An explicit plan, which every loop must then be as long as.
        steps: The same for the regular plan; left out, a loop may be of any length.
        interval, warmup, dialect: Of the regular plan; the bundle's defaults if left out. Unit: steps.
        order: Order of the forecasts, dimensionless; the bundle's default if left out.
        form: `taylor`, the default, or `newton`.
        profile: Name of a calibrated plan of the bundle, in the place of plan, interval, warmup, order and form.
        guard: What may turn forecast steps into full ones, or the name of its rule; the plan is then a warm-up followed
            by forecasts, unless one is given. The branches of guidance share the decisions of the one that is called
            first.
        threshold, guard_order, cap, accumulate: Of a guard given by name; a profile beside it brings the threshold.
        guider: The guider of the modular pipeline that it is put in, `pipe.guider`: its state then says the step, the
            length of the loop and the branch of a call, outside a `cache_context`.
        lora: `FILE`, `FILE:STRENGTH` or several, or an `Adapter`, of a bundle with low-rank inputs; others over the
            same denoiser may have others.

    Attributes:
        forecasts: What a loop begins with.
        config: The model's config, its entries also as attributes.

    Raises:
        ConfigError: The options contradict each other or the bundle.
    """

    def __init__(
        self,
        denoiser: Loaded,
        plan: str | None = None,
        steps: int | None = None,
        interval: int | None = None,
        warmup: int | None = None,
        order: int | None = None,
        profile: str | None = None,
        guard: Guard | str | None = None,
        dialect: str | None = None,
        form: str | None = None,
        threshold: float | None = None,
        guard_order: int | None = None,
        cap: int | None = None,
        accumulate: bool = False,
        guider: Any = None,
        lora: Any = None,
    ) -> None:
        super().__init__(DTYPES[denoiser.manifest.precision], denoiser.device)
        self.denoiser = denoiser
        self._options = RequestOptions(
            steps, plan, interval, warmup, dialect, order, form, profile, guard, threshold, guard_order, cap, accumulate
        )
        self.forecasts = self._forecasts_of(self._options)
        self._tensors = hasattr(denoiser.runner.buffer((1,), "float32"), "tensor")
        pipeline = denoiser.manifest.pipeline
        self.config = Config(denoiser.manifest.model.config)
        for name, value in {**pipeline.attributes, **modules_of(denoiser.manifest)}.items():
            setattr(self, name, value)
        self._lora = lora if lora is None or isinstance(lora, Adapter) else denoiser.adapter(lora)
        self._form, self._clock = form_of(denoiser.manifest), clock_of(denoiser.manifest)
        self._known = frozenset((denoiser.timestep.name, *denoiser.constants, *pipeline.ignored_inputs))
        self._renewed = frozenset(pipeline.cast_inputs)
        self._lists, self._ahead = (pipeline.arguments == word for word in ("lists", "rows-ahead"))
        self._callers = Callers()
        self._guidance = None if guider is None else Guidance(guider, denoiser.manifest)

    # What a pipeline asks of its transformer -------------------------------------------------------------------------

    @Signed
    def forward(self, hidden_states: Any = None, *placed: Any, return_dict: bool = True, **inputs: Any) -> Any:
        """One call of the transformer, under diffusers' argument names.

        Args:
            hidden_states: The latents, on the engines' device, of any floating dtype. Some models call them otherwise,
                and some take them in a list, one entry for each sample; then so does the answer come.
            placed: What the model's pipeline passes by place behind them.
            return_dict: Whether to return diffusers' output class instead of a tuple.
            inputs: The timestep and the conditioning, and further latents where the model has some.

        Returns:
            The prediction, in the dtype of `hidden_states`, that of each further latent, and what a call asks for.

        Raises:
            StepError: An argument is missing, unknown to the bundle, or does not fit it; loops take turns; or on the
                CPU, the prediction is not finite (on a GPU that would wait at every step). The request is over.
        """
        try:
            inputs |= self._by_place(placed)
            given = inputs.pop(self.denoiser.latent.name) if hidden_states is None else hidden_states
            given, inputs, kept = rows_ahead(given, inputs) if self._ahead else (given, inputs, None)
            predicted, *beside = self._predict(_together(given) if self._lists else given, inputs)
            sample: Any = list(predicted.unsqueeze(2)) if self._lists else predicted
        except BaseException:
            self._abort()
            raise
        if not return_dict:
            return (sample, *beside) if kept is None else (sample, kept)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        answer: Any = Transformer2DModelOutput(sample=sample)
        for name, prediction in zip(self.denoiser.others, beside, strict=True):
            setattr(answer, name.replace("hidden_states", "sample"), prediction)
        if kept is not None:
            answer.kv_cache = kept
        return answer

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """Name the branch of the calls inside; diffusers' pipelines use `cond` and `uncond`.

        Args:
            name: The branch.
            where: What the pipeline says of the loop. `step_index`, where it is given, tells the steps in the place of
                the timesteps; the rest is not read.
        """
        here = self._callers.here
        outer, here.context = here.context, Context(name, where.get("step_index"))
        try:
            yield
        except BaseException:
            self._abort()
            raise
        finally:
            here.context = outer

    def reset(self) -> None:
        """End the caller's request under way, if any; its slots serve the next one.

        Warns:
            UserWarning: Fewer steps ran than an explicit plan, a profile or a number of steps says. It is no error,
                since a loop that was interrupted on purpose ends so too, and its picture is not to be lost.
        """
        loop = self._callers.here.loop
        try:
            if loop is not None:
                loop.warn_if_short()
        finally:
            self._abort()

    def _abort(self) -> None:
        """End the request under way because of an error, which says enough."""
        loop = self._callers.here.loop
        if loop is not None:
            self._callers.end(loop)

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """Called by diffusers' pipelines when their call is over."""
        self.reset()

    # Exact control ---------------------------------------------------------------------------------------------------

    def begin(
        self,
        plan: str | None = None,
        steps: int | None = None,
        timesteps: Sequence[float] | np.ndarray | None = None,
        order: int | None = None,
    ) -> None:
        """Begin a request: every call up to `reset` or the pipeline's end belongs to it, whatever its tensors.

        Args:
            plan: Explicit plan, in the place of the drop-in's plan or profile; those if left out.
            steps: Length of the loop; any if left out, and nothing else says it.
            timesteps: `[S]`, what the transformer is passed at each step; known ahead, all are prepared at once.
            order: Order of the forecasts; the drop-in's if left out.

        Raises:
            ConfigError: Plan, steps, order and timesteps do not fit each other or the drop-in's options.
        """
        if timesteps is not None:
            timesteps = np.asarray(timesteps, np.float64)
            if steps not in (None, len(timesteps)):
                raise ConfigError(f"steps is {steps}, expected {len(timesteps)}, one per timestep; leave steps out")
            steps = len(timesteps)
        options = self._options
        if plan is not None:  # a profile beside a guard still brings its threshold
            kept = options.profile if options.guard is not None else None
            options = replace(options, steps=None, interval=None, warmup=None, dialect=None, profile=kept, plan=plan)
        given: dict[str, Any] = {
            name: value for name, value in (("steps", steps), ("order", order)) if value is not None
        }
        options = replace(options, **given)
        loop = LoopState(self._forecasts_of(options), options.fixes_length, declared=True, timesteps=timesteps)
        self._callers.begin(loop)

    @contextmanager
    def request(self, **options: Any) -> Iterator[DropIn]:
        """`begin` with these options, and `reset` at the end of the block."""
        self.begin(**options)
        try:
            yield self
        except BaseException:
            self._abort()
            raise
        self.reset()

    @property
    def executed(self) -> dict[str, str]:
        """Branch -> the steps that ran, `F` full and `.` forecast, of the caller's request under way or its last."""
        loop = self._callers.here.loop
        return {} if loop is None else dict(loop.executed)

    # One call --------------------------------------------------------------------------------------------------------

    def _predict(self, latents: torch.Tensor, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """The predictions of all latents; those beside the first are among the inputs."""
        here = self._callers.here
        others = {name: inputs.pop(name, None) for name in self.denoiser.others}
        call, steps = self._call(here.context, latents, inputs), None
        if call.context is None and self._guidance is not None:
            context, steps = self._guidance.context(here.loop, call.timestep)
            call = call._replace(context=context)
        request, name, begins = self._request_of(here.loop, call, steps)
        if begins:
            request.advance(call)
            if request.step >= len(request.plan):
                self._lengthen(request)
        request.latents = call.latents
        request.ran.add(name)
        branch, slot = self._branch(request, name, call)
        taken = latent_of(latents, branch.latent)
        stays = self._tensors and latents.is_cuda  # a GPU's values never come to the host
        first, *rest = (value if stays or value is None else host_array(value) for value in (taken, *others.values()))
        beside = dict(zip(others, rest, strict=True))
        prediction = slot.advance(first, call.timestep, request.decided, beside, call.next_timestep)
        if request.forecasts.guard is not None:
            request.decided = slot.executed[-1]
        request.executed[name] = branch.before + slot.executed
        branch.next = request.step + 1
        return [self._answer(one, latents, request) for one in (prediction, *slot.memory.others.values())]

    def _answer(self, prediction: Buffer, latents: torch.Tensor, request: LoopState) -> torch.Tensor:
        """A prediction in the dtype of the latents."""
        if not self._tensors:
            read = prediction.read()
            check_prediction(bool(np.isfinite(read).all()), request.step, request.plan)
            return torch.from_numpy(read).to(latents)
        kept: torch.Tensor = prediction.tensor  # type: ignore[attr-defined]
        if not kept.is_cuda:
            check_prediction(bool(np.isfinite(host_array(kept)).all()), request.step, request.plan)
        # A copy in any case, since the next step overwrites it.
        return kept.clone() if kept.dtype == latents.dtype else kept.to(latents.dtype)

    def _by_place(self, placed: tuple[Any, ...]) -> dict[str, Any]:
        names = self.denoiser.manifest.pipeline.positional
        if len(placed) > len(names):
            raise StepError(
                f"{len(placed)} arguments follow the latents by place, expected at most {len(names)} "
                f"({', '.join(names) or 'none'}); pass the others by name"
            )
        return dict(zip(names, placed, strict=False))

    def _call(self, context: Context | None, latents: torch.Tensor, inputs: dict[str, Any]) -> TransformerCall:
        """The call, its arguments checked by name."""
        clock, constants = self.denoiser.timestep.name, self.denoiser.constants
        after, conditioning = self.denoiser.next_timestep, {}
        following = None if after is None else self._timestep(after.name, inputs.pop(after.name, None))
        for name, value in inputs.items():
            if name in constants:
                if value is not None:
                    conditioning[name] = Seen.of(value, name in self._renewed)
            elif name not in self._known and not _is_nothing(value):
                raise StepError(
                    f"argument `{name}` is given, expected only {clock}, {', '.join(constants)}, which the bundle was "
                    "traced with; leave it out"
                )
        if not isinstance(latents, torch.Tensor) or not self.is_on(latents.device):
            seen = f"on `{latents.device}`" if isinstance(latents, torch.Tensor) else type(latents).__name__
            raise StepError(
                f"input `{self.denoiser.latent.name}` is {seen}, expected a tensor on `{self.device}`, where the "
                "engines were loaded; move the pipeline there or load the bundle with another device"
            )
        timestep = self._timestep(clock, self._clock(latents, inputs.get(clock), inputs))
        return TransformerCall(context, Seen.of(latents), latents.shape, timestep, conditioning, following)

    def _timestep(self, name: str, given: Any) -> float:
        """The timestep of a call, whatever its shape."""
        if isinstance(given, torch.Tensor) and given.numel() == 1:
            return float(given)
        values = np.unique(host_array(given)) if given is not None else np.empty(0)
        if len(values) != 1:
            raise StepError(
                f"input `{name}` has {len(values)} different values, expected one for all "
                "samples and tokens; pass the timestep of the step"
            )
        return float(values[0])

    def _request_of(
        self, running: LoopState | None, call: TransformerCall, steps: int | None
    ) -> tuple[LoopState, str, bool]:
        """The request that a call belongs to, a new one if not the one under way; its branch; whether it is a step.

        Where a guider states the `steps` of the loop, an explicit plan must have as many.
        """
        if running is not None:
            name, begins = running.branch_of(call)
            if running.continues(call, name, begins):
                if begins:
                    self._callers.check_turns(call, running)
                return running, name, begins
        self._callers.check_turns(call, None)
        renewed = running is not None and running.renews(call)
        if running is not None and running.alike(call):  # else it may have been left by an error elsewhere
            running.warn_if_short()
        forecasts, fixed = self.forecasts, self._options.fixes_length
        if steps is not None and fixed:
            forecasts.plan.check_length(steps)
        elif steps is not None:
            forecasts, fixed = self._forecasts_of(replace(self._options, steps=steps)), True
        loop = LoopState(forecasts, fixed, renewed=renewed)
        self._callers.begin(loop)
        return loop, *loop.branch_of(call)

    def _branch(self, request: LoopState, name: str, call: TransformerCall) -> tuple[Branch, Slot]:
        """The branch of a call and its slot; one that is new or missed a step starts with a full step."""
        branch = request.branches.get(name)
        slot = request.slots.get(name)
        if branch is None or slot is None or branch.next != request.step:
            taken, inputs = self._form(call.latents.value, {n: seen.value for n, seen in call.conditioning.items()})
            shape = tuple(taken.shape)
            conditioning = {n: host_array(value) for n, value in inputs.items()}
            sizes = self.denoiser.sizes(shape, conditioning)
            slot = self._callers.slot(request, name, sizes, shape, self.denoiser.slot)
            timesteps = None if request.timesteps is None else request.timesteps[request.step :]
            if request.forecasts.weights is not None and request.step > 0:
                raise StepError(
                    f"branch `{name}` begins at step {request.step} of a calibrated plan, expected step 0, since its "
                    "weights are for the snapshots of all full steps; use the drop-in without a profile"
                )
            before = request.executed.get(name, "")
            slot.start(conditioning, request.forecasts_from(request.step), timesteps, self._lora)
            branch = request.branches[name] = Branch(call.conditioning, shape, request.step, request.step, before)
        elif len(request.plan) > branch.begun + len(slot.plan or ()):
            slot.extend(request.forecasts_from(branch.begun).plan)
        return branch, slot

    # Plans -----------------------------------------------------------------------------------------------------------

    def _forecasts_of(self, options: RequestOptions, steps: int | None = None) -> Forecasts:
        """What a request begins with; where nothing says how long its loop is, `steps` of it or the bundle's number."""
        denoiser = self.denoiser
        if options.fixes_length:
            return forecasts_from_options(options, denoiser.defaults, denoiser.profiles)
        options = replace(options, steps=steps or denoiser.defaults.steps)
        return forecasts_from_options(options, denoiser.defaults, ends=False)

    def _lengthen(self, request: LoopState) -> None:
        """A regular plan goes on as long as the loop does; an explicit one is over."""
        if request.fixed:
            raise StepError(
                f"the loop is at its step {request.step}, expected its end after {len(request.plan)} steps (plan "
                f"{request.plan}); give a plan as long as the loop, or none"
            )
        longer = self._forecasts_of(self._options, 2 * len(request.plan))
        request.forecasts = replace(request.forecasts, plan=longer.plan)


def _together(latents: Any) -> Any:
    """Latents `[C, 1, H, W]` of each sample as one tensor `[N, C, H, W]`."""
    if not isinstance(latents, list | tuple) or not all(isinstance(one, torch.Tensor) for one in latents):
        raise StepError(
            f"latents are {type(latents).__name__}, expected a list of tensors [C, 1, H, W]; pass one for each"
        )
    if len({one.shape for one in latents}) != 1 or latents[0].ndim != 4 or latents[0].shape[1] != 1:
        shapes = ", ".join(sorted({str(list(one.shape)) for one in latents}))
        raise StepError(f"latents are {shapes}, expected [C, 1, H, W] of one size; make a call for each size")
    return torch.stack([one.squeeze(1) for one in latents])


def _is_nothing(value: Any) -> bool:
    """Whether an argument asks for nothing: not given, switched off, or an empty container."""
    return value is None or value is False or (isinstance(value, dict | list | tuple) and not value)
