"""A slot: one request's memory and the calls bound to it.

Buffers are allocated and bound once, and used by one request after another. Starting a request runs `prepare` for all
its timesteps; each step then copies in a latent and two table rows and replays one bound call. Under a guard the probe
is called before it, and a full step is the rest of what the probe began.

Shapes: S steps, B batch, M = order + 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from taylorseer_export.bundle.manifest import GraphName, Tensor
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.errors import ConfigError, StepError
from taylorseer_export.method import Guard, Plan
from taylorseer_export.method.weights import Form
from taylorseer_export.runtime.probe import Probe, check_guard
from taylorseer_export.runtime.runner import Buffer, Call
from taylorseer_export.runtime.schedule import (
    ForecastStep,
    FullStep,
    check_request,
    forecast_step,
    full_step,
    schedule,
)
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
        self._latent_shape = resolve(denoiser.latent.shape, sizes)
        self._buffers: dict[str, Buffer] = {}
        looped = [t for name, g in manifest.graphs.items() if name != "prepare" for t in (*g.inputs, *g.outputs)]
        for tensor in (*looped, *denoiser.constants.values()):
            if tensor.role not in ("taylor_in", "taylor_out", "probe_in") and tensor.name not in self._buffers:
                self._buffers[tensor.name] = self._new(tensor)
        # With derivatives a full step reads one set of buffers and writes the other.
        self._taylor = [self._taylor_buffers() for _ in range(2 if self._layout == "derivatives" else 1)]
        self._full_calls, self._forecast_calls = self._bind_full("full"), self._bind_forecast()
        self._rest_calls, self._probe = [], None
        if "probe" in manifest.graphs:
            self._rest_calls = self._bind_full("rest")
            self._probe = Probe(manifest, self._runner, self._buffers, self._new)
        self._guard: Guard | None = None
        self._compared = False
        self._prepared: _Prepared | None = None
        self._steps: list[FullStep | ForecastStep] = []
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
        guard: Guard | None = None,
    ) -> None:
        """Begin a request: check and copy its conditioning, clear the state, prepare all steps.

        Args:
            conditioning: Constant inputs by their diffusers argument names.
            plan: Which steps are full.
            order: Order of the forecasts; the bundle's default if left out.
            timesteps: `[S]`, the value passed to the transformer at each step. Left out, `step` takes them one by one.
            form: `taylor` or `newton`.
            weights: Of each step, in the place of the form's, as `schedule` takes them; those of a profile.
            guard: What may turn forecast steps of the plan into full ones.

        Raises:
            ConfigError: Plan, order and timesteps do not fit each other or the bundle.
            StepError: An input is missing, of another shape or dtype, or not finite.
        """
        manifest = self.denoiser.manifest
        order = min(manifest.plan.order, manifest.state.order) if order is None else order
        steps = self._planned(plan, order, form, weights, guard)
        arrays = {
            n: checked(self.denoiser.constants[n], v) for n, v in conditioning.items() if n in self.denoiser.constants
        }
        sizes = self.denoiser.sizes(self._latent_shape, {**conditioning, **arrays})
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
        self._forecasts, self._guard = (order, form), guard
        if guard is not None:
            assert self._probe is not None
            self._probe.start(guard, order)
        self._tables = {} if timesteps is None else self._prepare(timesteps)
        self.plan = plan

    def extend(self, plan: Plan) -> None:
        """Go on with a longer plan, where the length of the loop is not known ahead; it begins as the one under way."""
        if self.plan is None or not str(plan).startswith(str(self.plan)):
            raise StepError(f"plan is {plan}, expected one that begins with {self.plan}; lengthen the plan under way")
        if self._guard is None:
            self._steps = self._planned(plan, *self._forecasts, None, None)
        self.plan = plan

    def _planned(
        self, plan: Plan, order: int, form: Form, weights: Sequence[Sequence[float]] | None, guard: Guard | None
    ) -> list[FullStep | ForecastStep]:
        """What the steps of a plan do; under a guard that is known step by step."""
        capacity = self.denoiser.manifest.state.order
        if guard is None:
            return list(schedule(plan, order, capacity, self._layout, form, weights))
        check_guard(self.denoiser.manifest, guard)
        check_request(order, capacity, self._layout, form)
        if weights is not None:
            raise ConfigError(
                f"weights are given beside guard {guard}, expected none, since they belong to one plan; leave one out"
            )
        return []

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

    def advance(self, latents: Any, timestep: float | None = None, decided: str | None = None) -> Buffer:
        """As `step`, and all of it on the device: nothing comes back to the host but the error that a guard waits for.

        `latents` may be a tensor on a GPU, whose values are then not checked. `decided` is as of `stage`. Returns the
        buffer of `noise_pred`, which the next step overwrites.
        """
        self.stage(latents, timestep, decided)
        self.run()
        return self._count()

    def stage(self, latents: Any, timestep: float | None = None, decided: str | None = None) -> None:
        """The first third of `step`: check the latents and put all inputs of the next step in place.

        Under a guard it is settled here which kind of step it is. `decided` is what the guard of another branch of the
        same step decided, `F` or `.`, and holds for this one too.
        """
        number = self._number()
        on_device = getattr(latents, "is_cuda", False)  # to look at its values would be to wait for them
        array = latents if on_device else checked(self.denoiser.latent, latents, f" at step {number}")
        if array.shape != self._latent_shape:
            raise StepError(
                f"input `{self.denoiser.latent.name}` is {list(array.shape)} at step {number}, expected "
                f"{list(self._latent_shape)} as when the slot was opened; open a slot of that size"
            )
        self._write_rows(number, timestep)
        self._buffers[self.denoiser.latent.name].write(array)
        if self._guard is not None:
            self._decide(number, decided)
        current = self.upcoming
        if isinstance(current, ForecastStep):
            self._buffers["weights"].write(current.weights)
        elif "scales" in self._buffers:
            self._buffers["scales"].write(current.scales)

    def _decide(self, number: int, decided: str | None) -> None:
        """Run the probe, and fix what the step does by its error, unless the plan or another branch has done so."""
        assert self._probe is not None and self.plan is not None
        del self._steps[number:]  # the step may have been staged before
        planned_full = self.plan.is_full(number)
        self._compared = not planned_full and decided is None
        if planned_full or decided != ".":
            self._probe.measure(self.executed)
        full = planned_full or decided == "F" or (self._compared and not self._probe.forecasts())
        (order, form), capacity = self._forecasts, self.denoiser.manifest.state.order
        if full:
            self._steps.append(full_step(Plan(self.executed + "F"), number, order, capacity, self._layout))
        else:
            so_far = Plan(self.executed + ".")
            self._steps.append(forecast_step(so_far, number, order, capacity, self._layout, form))

    def run(self) -> None:
        """The second third of `step`: the engine call. A call shared with other slots (`SharedCalls`) replaces it."""
        calls = {"full": self._full_calls, "rest": self._rest_calls, "forecast": self._forecast_calls}[self.graph]
        calls[self.upcoming.entry % len(calls)]()

    def finish(self) -> np.ndarray:
        """The last third of `step`: count the step and return its `noise_pred`, a new array."""
        return self._count().read()

    def _count(self) -> Buffer:
        self.executed += "F" if isinstance(self.upcoming, FullStep) else "."
        if self._guard is not None and self._probe is not None:
            self._probe.keep(self.executed, self._compared)
        return self._buffers["noise_pred"]

    def try_weights(self, latents: Any, weights: Sequence[float] | np.ndarray) -> np.ndarray:
        """What the next step, a forecast step, returns with these weights of its history, oldest first.

        The weights stay, so `step` then runs with the last ones tried; the request does not advance.
        """
        assert self.plan is not None
        number, (order, form), state = len(self.executed), self._forecasts, self.denoiser.manifest.state
        step = forecast_step(self.plan, number, order, state.order, self._layout, form, weights)
        self._steps[number] = step
        self.stage(latents)
        self.run()
        return self._buffers["noise_pred"].read()

    @property
    def upcoming(self) -> FullStep | ForecastStep:
        """The step that comes next; raises `StepError` where there is none, or a guard has yet to settle it."""
        number = self._number()
        if number >= len(self._steps):
            raise StepError(f"step {number} is not settled, expected it staged under a guard; call stage() first")
        return self._steps[number]

    @property
    def graph(self) -> GraphName:
        """The graph that the upcoming step runs."""
        if isinstance(self.upcoming, ForecastStep):
            return "forecast"
        return "full" if self._guard is None else "rest"

    @property
    def errors(self) -> tuple[float, ...]:
        """What the probe measured at each step so far, dimensionless; NaN where the guard was not asked."""
        return tuple(self._probe.errors) if self._guard is not None and self._probe is not None else ()

    def _number(self) -> int:
        """Index of the next step; raises `StepError` where there is none."""
        number = len(self.executed)
        if self.plan is None or number >= len(self.plan):
            seen = "no request" if self.plan is None else f"a request after its last step ({number} of {number})"
            raise StepError(f"the slot has {seen}, expected one under way; call start() first")
        return number

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

    def _taylor_buffers(self) -> dict[str, Buffer]:
        """Site -> buffer `[M, ...]`."""
        inputs = self.denoiser.manifest.graphs["forecast"].inputs
        return {_site(t): self._new(t) for t in inputs if t.role == "taylor_in"}

    def _sources(self, tensors: Sequence[Tensor], taylor: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """Tensor -> its buffer; Taylor buffers by their site in `taylor`."""
        roles = ("taylor_in", "taylor_out")
        return {t.name: taylor[_site(t)] if t.role in roles else self._buffers[t.name] for t in tensors}

    def _bind_forecast(self) -> list[Call]:
        """One bound call per set of buffers that a forecast step may read."""
        graph = self.denoiser.manifest.graphs["forecast"]
        prediction = {"noise_pred": self._buffers["noise_pred"]}
        return [
            self._runner.bind("forecast", self._sources(graph.inputs, buffers), prediction) for buffers in self._taylor
        ]

    def _bind_full(self, name: GraphName) -> list[Call]:
        """One bound call of `full` or `rest` per entry that a full step may write."""
        graph = self.denoiser.manifest.graphs[name]
        if self._layout == "derivatives":
            a, b = self._taylor
            pairs = [(b, a), (a, b)]
        else:
            (ring,) = self._taylor
            entries = self.denoiser.manifest.state.order + 1
            pairs = [(ring, {site: buffer.entry(k) for site, buffer in ring.items()}) for k in range(entries)]
        return [
            self._runner.bind(name, self._sources(graph.inputs, read), self._sources(graph.outputs, written))
            for read, written in pairs
        ]

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
        # The rows that the step's graph reads; all of them under a guard, which settles later which graph that is.
        graphs = self.denoiser.manifest.graphs
        read = tables.keys() if self._guard is not None else {t.name for t in graphs[self.graph].inputs}
        for name, table in tables.items():
            if name in read:
                self._buffers[name].copy(table.entry(row))


def _site(tensor: Tensor) -> str:
    """Site of a Taylor buffer."""
    assert tensor.site is not None, f"bug in taylorseer-export: `{tensor.name}` has no site"
    return tensor.site
