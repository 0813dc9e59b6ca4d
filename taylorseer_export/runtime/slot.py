"""A slot: one request's memory and the calls bound to it.

Buffers are allocated and bound once, and used by one request after another. Starting a request runs `prepare` for all
its timesteps; each step then copies in a latent and two table rows and replays one bound call.

Shapes: S steps, B batch, M = order + 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from taylorseer_export.bundle.manifest import Tensor
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.errors import StepError
from taylorseer_export.method import Plan
from taylorseer_export.method.weights import Form
from taylorseer_export.runtime.runner import Buffer, Call
from taylorseer_export.runtime.schedule import ForecastStep, FullStep, forecast_step, schedule
from taylorseer_export.runtime.values import checked

if TYPE_CHECKING:
    from taylorseer_export.runtime.denoiser import Denoiser


class _Prepared(NamedTuple):
    """The prepare graph bound for one number of steps: `clock` `[S]` goes in, `tables` `[S, B, W]` come out."""

    clock: Buffer
    tables: dict[str, Buffer]
    call: Call


class Slot:
    """One request's memory: Taylor buffers, inputs, outputs, and the calls bound to them.

    `start` begins a request, `step` runs it to the end of its plan; then `start` may be called again.
    """

    def __init__(self, denoiser: Denoiser, sizes: dict[str, int]) -> None:
        self.denoiser, self.sizes = denoiser, sizes
        self._runner = denoiser.runner
        manifest = denoiser.manifest
        self._layout = manifest.state.layout
        full, forecast = manifest.graphs["full"], manifest.graphs["forecast"]
        self._buffers: dict[str, Buffer] = {}
        for tensor in (*full.inputs, *full.outputs, *forecast.inputs, *denoiser.constants.values()):
            if tensor.role not in ("taylor_in", "taylor_out") and tensor.name not in self._buffers:
                self._buffers[tensor.name] = self._new(tensor)
        # With derivatives a full step reads one set of buffers and writes the other.
        self._taylor = [self._taylor_buffers() for _ in range(2 if self._layout == "derivatives" else 1)]
        self._full_calls, self._forecast_calls = self._bind(full.inputs, full.outputs, forecast.inputs)
        self._prepared: _Prepared | None = None
        self._steps: tuple[FullStep | ForecastStep, ...] = ()
        self._forecasts: tuple[int, Form] = (0, "taylor")
        self._tables: dict[str, Buffer] = {}
        self._timesteps: np.ndarray | None = None
        self.plan: Plan | None = None
        self.executed = ""

    def start(
        self,
        conditioning: Mapping[str, Any],
        plan: Plan,
        order: int | None = None,
        timesteps: Sequence[float] | np.ndarray | None = None,
        form: Form = "taylor",
        weights: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """Begin a request: check and copy its conditioning, clear the state, prepare all steps.

        Args:
            conditioning: Constant inputs by their diffusers argument names.
            plan: Which steps are full.
            order: Order of the forecasts; the bundle's default if left out.
            timesteps: `[S]`, the value passed to the transformer at each step. Left out, `step` takes them one by one.
            form: `taylor` or `newton`.
            weights: Of each step, in the place of the form's, as `schedule` takes them; those of a profile.

        Raises:
            ConfigError: Plan, order and timesteps do not fit each other or the bundle.
            StepError: An input is missing, of another shape or dtype, or not finite.
        """
        manifest = self.denoiser.manifest
        order = min(manifest.plan.order, manifest.state.order) if order is None else order
        steps = schedule(plan, order, manifest.state.order, self._layout, form, weights)
        arrays = {
            n: checked(self.denoiser.constants[n], v) for n, v in conditioning.items() if n in self.denoiser.constants
        }
        sizes = self.denoiser.sizes(self._latent_shape(), {**conditioning, **arrays})
        if sizes != self.sizes:
            raise StepError(f"sizes are {sizes}, expected {self.sizes}, those of the slot; open a slot of that size")
        if timesteps is not None:
            timesteps = checked(self.denoiser.timestep, timesteps)
            if timesteps.ndim != 1:
                raise StepError(
                    f"input `{self.denoiser.timestep.name}` is {list(timesteps.shape)}, expected [steps], one for all "
                    "samples of the batch; pass one number per step"
                )
            plan.check_length(len(timesteps))
        self.plan = None  # until all is in place: a request that could not be prepared must not run
        for name, array in arrays.items():
            self._buffers[name].write(array)
        for buffers in self._taylor:
            for buffer in buffers.values():
                buffer.clear()  # what an earlier request left, infinities included, must not reach this one
        self._steps, self.executed, self._timesteps = steps, "", timesteps
        self._forecasts = order, form
        self._tables = {} if timesteps is None else self._prepare(timesteps)
        self.plan = plan

    def extend(self, plan: Plan) -> None:
        """Go on with a longer plan, where the length of the loop is not known ahead; it begins as the one under way."""
        if self.plan is None or not str(plan).startswith(str(self.plan)):
            raise StepError(f"plan is {plan}, expected one that begins with {self.plan}; lengthen the plan under way")
        order, form = self._forecasts
        self._steps = schedule(plan, order, self.denoiser.manifest.state.order, self._layout, form)
        self.plan = plan

    def step(self, latents: Any, timestep: float | None = None) -> np.ndarray:
        """Run the next step of the plan.

        Args:
            latents: The transformer's `hidden_states`.
            timestep: Needed where `start` was not given the timesteps; checked against them where it was.

        Returns:
            `noise_pred`, a new array.

        Raises:
            StepError: No request was started, its plan is at its end, or the latents do not fit.
        """
        return self.advance(latents, timestep).read()

    def advance(self, latents: Any, timestep: float | None = None) -> Buffer:
        """As `step`, and all of it on the device: nothing waits for it and nothing comes back to the host.

        `latents` may be a tensor on a GPU, whose values are then not checked. Returns the buffer of `noise_pred`, which
        the next step overwrites.
        """
        self.stage(latents, timestep)
        self.run()
        return self._count()

    def stage(self, latents: Any, timestep: float | None = None) -> None:
        """The first third of `step`: check the latents and put all inputs of the next step in place."""
        current, number = self.upcoming, len(self.executed)
        on_device = getattr(latents, "is_cuda", False)  # to look at its values would be to wait for them
        array = latents if on_device else checked(self.denoiser.latent, latents, f" at step {number}")
        if array.shape != self._latent_shape():
            raise StepError(
                f"input `{self.denoiser.latent.name}` is {list(array.shape)} at step {number}, expected "
                f"{list(self._latent_shape())} as when the slot was opened; open a slot of that size"
            )
        self._write_rows(number, timestep)
        self._buffers[self.denoiser.latent.name].write(array)
        if isinstance(current, ForecastStep):
            self._buffers["weights"].write(current.weights)
        elif "scales" in self._buffers:
            self._buffers["scales"].write(current.scales)

    def run(self) -> None:
        """The second third of `step`: the engine call. A call shared with other slots (`SharedCalls`) replaces it."""
        current = self.upcoming
        calls = self._full_calls if isinstance(current, FullStep) else self._forecast_calls
        calls[current.entry % len(calls)]()

    def finish(self) -> np.ndarray:
        """The last third of `step`: count the step and return its `noise_pred`, a new array."""
        return self._count().read()

    def _count(self) -> Buffer:
        self.executed += "F" if isinstance(self.upcoming, FullStep) else "."
        return self._buffers["noise_pred"]

    def try_weights(self, latents: Any, weights: Sequence[float] | np.ndarray) -> np.ndarray:
        """What the next step, a forecast step, returns with these weights of its history, oldest first.

        The weights stay, so `step` then runs with the last ones tried; the request does not advance.
        """
        assert self.plan is not None
        number, (order, form), state = len(self.executed), self._forecasts, self.denoiser.manifest.state
        step = forecast_step(self.plan, number, order, state.order, self._layout, form, weights)
        self._steps = (*self._steps[:number], step, *self._steps[number + 1 :])
        self.stage(latents)
        self.run()
        return self._buffers["noise_pred"].read()

    @property
    def upcoming(self) -> FullStep | ForecastStep:
        """The step that comes next; raises `StepError` where there is none."""
        number = len(self.executed)
        if self.plan is None or number >= len(self.plan):
            seen = "no request" if self.plan is None else f"a request after its last step ({number} of {number})"
            raise StepError(f"the slot has {seen}, expected one under way; call start() first")
        return self._steps[number]

    def source(self, tensor: Tensor) -> Buffer:
        """Where the upcoming step reads an input of its graph."""
        if tensor.role != "taylor_in":
            return self._buffers[tensor.name]
        entry = self.upcoming.entry + isinstance(self.upcoming, FullStep)  # a full step reads what it does not write
        return self._taylor[entry % len(self._taylor)][_site(tensor)]

    def target(self, tensor: Tensor) -> Buffer:
        """Where the upcoming step writes an output of its graph."""
        if tensor.role != "taylor_out":
            return self._buffers[tensor.name]
        if self._layout == "derivatives":
            return self._taylor[self.upcoming.entry][_site(tensor)]
        return self._taylor[0][_site(tensor)].entry(self.upcoming.entry)

    @property
    def gains(self) -> tuple[float, ...]:
        """Noise amplification of every step of the plan; 1 on a full step."""
        return tuple(s.gain if isinstance(s, ForecastStep) else 1.0 for s in self._steps)

    # Binding -------------------------------------------------------------------------------------------------------

    def _new(self, tensor: Tensor) -> Buffer:
        return self._runner.buffer(resolve(tensor.shape, self.sizes), tensor.dtype)

    def _latent_shape(self) -> tuple[int, ...]:
        return resolve(self.denoiser.latent.shape, self.sizes)

    def _taylor_buffers(self) -> dict[str, Buffer]:
        """Site -> buffer `[M, ...]`."""
        inputs = self.denoiser.manifest.graphs["forecast"].inputs
        return {_site(t): self._new(t) for t in inputs if t.role == "taylor_in"}

    def _bind(
        self, full_in: Sequence[Tensor], full_out: Sequence[Tensor], forecast_in: Sequence[Tensor]
    ) -> tuple[list[Call], list[Call]]:
        """One bound call per entry a full step may write, and per set of buffers a forecast step may read."""

        def inputs(tensors: Sequence[Tensor], source: dict[str, Buffer]) -> dict[str, Buffer]:
            return {t.name: source[_site(t)] if t.role == "taylor_in" else self._buffers[t.name] for t in tensors}

        def outputs(target: Mapping[str, Buffer]) -> dict[str, Buffer]:
            return {t.name: target[_site(t)] if t.role == "taylor_out" else self._buffers[t.name] for t in full_out}

        bind = self._runner.bind
        prediction = {"noise_pred": self._buffers["noise_pred"]}
        forecasts = [bind("forecast", inputs(forecast_in, buffers), prediction) for buffers in self._taylor]
        if self._layout == "derivatives":
            a, b = self._taylor
            fulls = [bind("full", inputs(full_in, b), outputs(a)), bind("full", inputs(full_in, a), outputs(b))]
        else:
            (ring,) = self._taylor
            entries = self.denoiser.manifest.state.order + 1
            fulls = [
                bind("full", inputs(full_in, ring), outputs({site: b.entry(k) for site, b in ring.items()}))
                for k in range(entries)
            ]
        return fulls, forecasts

    # Preparing -----------------------------------------------------------------------------------------------------

    def _prepare(self, timesteps: np.ndarray) -> dict[str, Buffer]:
        """Run the prepare graph; request values land in place, tables `[S, B, W]` stay on the device."""
        if self._prepared is None or self._prepared.clock.shape != timesteps.shape:
            self._prepared = self._bind_prepare(len(timesteps))
        self._prepared.clock.write(timesteps)
        self._prepared.call()
        return self._prepared.tables

    def _bind_prepare(self, steps: int) -> _Prepared:
        """Bind the prepare graph for `steps` timesteps; kept until a request of another length comes."""
        graph, sizes = self.denoiser.manifest.graphs["prepare"], {**self.sizes, "steps": steps}
        clock = self._runner.buffer((steps,), self.denoiser.timestep.dtype)
        rows = [t for t in graph.outputs if t.role == "step"]
        tables = {t.name: self._runner.buffer(resolve(t.shape, sizes), t.dtype) for t in rows}
        inputs = {t.name: clock if t.role == "step" else self._buffers[t.name] for t in graph.inputs}
        outputs = {t.name: tables[t.name] if t.role == "step" else self._buffers[t.name] for t in graph.outputs}
        return _Prepared(clock, tables, self._runner.bind("prepare", inputs, outputs))

    def _write_rows(self, number: int, timestep: float | None) -> None:
        if self._timesteps is None:
            if timestep is None:
                raise StepError(
                    f"the timestep of step {number} is unknown, expected it from start() or step(); pass timestep="
                )
            tables, row = self._prepare(checked(self.denoiser.timestep, [timestep])), 0
        else:
            known = self._timesteps[number]
            if timestep is not None and not np.isclose(known, timestep, rtol=1e-5):
                raise StepError(
                    f"timestep is {timestep} at step {number}, expected {known} as prepared; leave timesteps out of "
                    "start() when they are not known ahead"
                )
            tables, row = self._tables, number
        for name, table in tables.items():
            self._buffers[name].copy(table.entry(row))


def _site(tensor: Tensor) -> str:
    """Site of a Taylor buffer: the name behind `taylor_in.` or `taylor_out.`."""
    return tensor.name.split(".", 1)[1]
