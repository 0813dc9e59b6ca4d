"""A slot: one request at a time, in memory of its own.

Starting a request runs `prepare` for all its timesteps; each step then copies in a latent and its rows of tables and
replays one bound call. Under a guard the probe is called before it, and a full step is the rest of what the probe
began. `memory.py` holds the buffers and the calls, which one request after another uses.

Shapes: S steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from taylorseer_export.bundle.manifest import GraphName, Tensor
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.errors import StepError
from taylorseer_export.method import Forecasts, Guard, Plan
from taylorseer_export.runtime.adapter import Adapter
from taylorseer_export.runtime.contract import Contract
from taylorseer_export.runtime.group import Group
from taylorseer_export.runtime.memory import Memory
from taylorseer_export.runtime.runner import Buffer, Runner
from taylorseer_export.runtime.schedule import ForecastStep, FullStep, forecast_step, full_step, schedule
from taylorseer_export.runtime.values import array_for, number_for


class Slot:
    """Runs requests of one size, one after another: `start` begins one, `step` runs it to the end of its plan.

    Args:
        contract: Of the bundle.
        runner: The loaded engines.
        sizes: Of every dimension but the steps; of one rank, where the bundle is shared out.
        lora: What requests get that bring no LoRA of their own; none if left out.
        group: The ranks that run it.

    Attributes:
        reuses: Whether a request that is prepared like the one before is not prepared again; False at first.
        reused: Whether the request under way was not.
        memory: Its buffers and bound calls.
        whole: The sizes that it was asked for, of all ranks where it takes whole requests.
        plan: Of the request under way; None before the first.
        executed: The steps that ran, `F` full and `.` forecast.
    """

    def __init__(
        self,
        contract: Contract,
        runner: Runner,
        sizes: Mapping[str, int],
        lora: Adapter | None = None,
        group: Group | None = None,
    ) -> None:
        self.contract, self.sizes, self._lora, self._group = contract, dict(sizes), lora, group
        self.whole = self.sizes
        self.memory = Memory(contract, runner, sizes, group)
        self._capacity = contract.defaults.capacity
        self._latents = {t.name: t for t in (contract.latent, *contract.others.values())}
        self._shapes = {name: resolve(tensor.shape, self.sizes) for name, tensor in self._latents.items()}
        self._guard: Guard | None = None
        self._compared = False
        self._steps: list[FullStep | ForecastStep] = []
        self._forecasts = Forecasts(Plan("F"), 0)
        self._tables: dict[str, Buffer] = {}
        self._sent: Sequence[FullStep | ForecastStep] = ()  # the steps whose numbers are in these tables
        self._number_tables: dict[GraphName, Buffer] = {}
        self._timesteps: np.ndarray | None = None
        self.reuses = self.reused = False
        self._prepared: tuple[dict[str, np.ndarray], np.ndarray] | None = None  # constants and timesteps, copies
        self.plan: Plan | None = None
        self.executed = ""

    def start(
        self,
        conditioning: Mapping[str, Any],
        forecasts: Forecasts,
        timesteps: Sequence[float] | np.ndarray | None = None,
        lora: Adapter | None = None,
    ) -> None:
        """Begin a request: check and copy its conditioning, clear the state, prepare all steps.

        Args:
            conditioning: Constant inputs by their diffusers argument names.
            forecasts: Which steps are full, and how the others are forecast.
            timesteps: `[S]`, the value passed to the transformer at each step. Left out, `step` takes them one by one.
            lora: From `Denoiser.adapter`; that of the slot if left out.

        Raises:
            ConfigError: Forecasts and timesteps do not fit each other or the bundle.
            StepError: An input is missing, of another shape or dtype, or not finite.
        """
        steps, plan = self._steps_of(forecasts), forecasts.plan
        arrays = self.contract.arrays(conditioning)
        sizes = self.contract.sizes(self._shapes[self.contract.latent.name], {**conditioning, **arrays})
        if sizes != self.sizes:
            raise StepError(f"sizes are {sizes}, expected {self.sizes}, those of the slot; open a slot of that size")
        if timesteps is not None:
            timesteps = array_for(self.contract.timestep, timesteps)
            if timesteps.ndim != 1:
                raise StepError(
                    f"input `{self.contract.timestep.name}` is {list(timesteps.shape)}, expected [steps], one for all "
                    "samples of the batch; pass one number per step"
                )
            plan.check_length(len(timesteps))
        self.plan = None  # until all is in place: a request that could not be prepared must not run
        self.reused = self.holds(arrays, timesteps, lora)
        if not self.reused:
            self._prepared = None
        self.memory.adapt(lora or self._lora)
        if not self.reused:
            for name, array in arrays.items():
                self.memory.buffers[name].write(array)
        self.memory.clear()
        self._steps, self.executed, self._timesteps = steps, "", timesteps
        self._send_numbers()
        self._forecasts, self._guard = forecasts, forecasts.guard
        if forecasts.guard is not None:
            assert self.memory.probe is not None
            self.memory.probe.start(forecasts)
        if not self.reused:
            self._tables = {} if timesteps is None else self.memory.prepare(self.contract.times(timesteps))
            if self.reuses and timesteps is not None:
                self._prepared = {name: array.copy() for name, array in arrays.items()}, timesteps.copy()
        self.plan = plan

    def holds(
        self, arrays: Mapping[str, np.ndarray], timesteps: np.ndarray | None, lora: Adapter | None = None
    ) -> bool:
        """Whether the slot is prepared for just this, value by value; never where it does not reuse.

        Args:
            arrays: Constant inputs, from `Contract.arrays`.
            timesteps: `[S]`; None where they come one by one.
            lora: As of `start`.
        """
        if self._prepared is None or timesteps is None or not self.reuses or not self.has(lora):
            return False
        constants, known = self._prepared
        same = np.array_equal(known, timesteps) and constants.keys() == arrays.keys()
        return same and all(np.array_equal(constants[name], value) for name, value in arrays.items())

    def has(self, lora: Adapter | None) -> bool:
        """Whether the low-rank weights that a request with this LoRA reads are in place, so that it copies none."""
        return self.memory.adapted == (lora or self._lora)

    def extend(self, plan: Plan) -> None:
        """Go on with a longer plan, where the length of the loop is not known ahead; it begins as the one under way."""
        if self.plan is None or not str(plan).startswith(str(self.plan)):
            raise StepError(f"plan is {plan}, expected one that begins with {self.plan}; lengthen the plan under way")
        self._forecasts = replace(self._forecasts, plan=plan)
        if self._guard is None:
            self._steps = self._steps_of(self._forecasts)
            self._send_numbers()
        self.plan = plan

    def _send_numbers(self) -> None:
        """Put the numbers of all steps on the device, where they are known ahead."""
        self._sent = tuple(self._steps)
        self._number_tables = self.memory.number_tables(self._sent) if self._sent else {}

    def _steps_of(self, forecasts: Forecasts) -> list[FullStep | ForecastStep]:
        """What the steps of a plan do; under a guard that is known step by step."""
        if forecasts.guard is None:
            return list(schedule(forecasts, self._capacity))
        self._capacity.check(forecasts)
        return []

    def step(
        self,
        latents: Any,
        timestep: float | None = None,
        others: Mapping[str, Any] | None = None,
        next_timestep: float | None = None,
    ) -> np.ndarray:
        """Run the next step of the plan.

        Args:
            latents: The transformer's `hidden_states`.
            timestep: Needed where `start` was not given the timesteps; checked against them where it was.
            others: Further latents by their diffusers argument names, where the model has some.
            next_timestep: Of the step behind it, where the model is told that too; needed and checked alike.

        Returns:
            `noise_pred`, a new array. What is predicted of further latents is in `others`.

        Raises:
            StepError: No request was started, its plan is at its end, or the latents do not fit.
        """
        return self.advance(latents, timestep, others=others, next_timestep=next_timestep).read()

    @property
    def others(self) -> dict[str, np.ndarray]:
        """Further latent -> its prediction by the step that ran last, a new array."""
        return {name: buffer.read() for name, buffer in self.memory.others.items()}

    def advance(
        self,
        latents: Any,
        timestep: float | None = None,
        decided: str | None = None,
        others: Mapping[str, Any] | None = None,
        next_timestep: float | None = None,
    ) -> Buffer:
        """As `step`, and all of it on the device: nothing comes back to the host but the error that a guard waits for.

        `latents` may be a tensor on a GPU, whose values are then not checked. `decided` is as of `stage`. Returns the
        buffer of `noise_pred`, which the next step overwrites.
        """
        self.stage(latents, timestep, decided, others, next_timestep)
        self.run()
        return self._count()

    def stage(
        self,
        latents: Any,
        timestep: float | None = None,
        decided: str | None = None,
        others: Mapping[str, Any] | None = None,
        next_timestep: float | None = None,
    ) -> None:
        """The first third of `step`: check the latents and put all inputs of the next step in place.

        Under a guard it is settled here which kind of step it is. `decided` is what the guard of another branch of the
        same step decided, `F` or `.`, and holds for this one too.
        """
        number = self._number()
        given = {self.contract.latent.name: latents, **(others or {})}
        arrays = {name: self._array(tensor, given.get(name), number) for name, tensor in self._latents.items()}
        self._write_rows(number, timestep, next_timestep)
        for name, array in arrays.items():
            self.memory.buffers[name].write(array)
        if self._guard is not None:
            self._decide(number, decided)
        self._write_numbers(number)

    def _array(self, tensor: Tensor, latents: Any, number: int) -> Any:
        """A latent of a step, of the shape that the slot is for."""
        if latents is None:
            raise StepError(
                f"input `{tensor.name}` is missing at step {number}, expected {tensor.dtype} "
                f"{list(self._shapes[tensor.name])}, a latent beside `{self.contract.latent.name}`; pass both"
            )
        on_device = getattr(latents, "is_cuda", False)  # to look at its values would be to wait for them
        array = latents if on_device else array_for(tensor, latents, f" at step {number}")
        if array.shape != self._shapes[tensor.name]:
            raise StepError(
                f"input `{tensor.name}` is {list(array.shape)} at step {number}, expected "
                f"{list(self._shapes[tensor.name])} as when the slot was opened; open a slot of that size"
            )
        return array

    def _write_numbers(self, number: int) -> None:
        """Give the graph the numbers of its step: a row of what was sent, unless they were settled since."""
        step, graph = self.upcoming, self.graph
        numbers = self.memory.numbers.get(graph)
        if numbers is None:
            return
        if number < len(self._sent) and self._sent[number] is step:
            numbers.copy(self._number_tables[graph].entry(number))
        else:
            numbers.write(step.numbers)

    def _decide(self, number: int, decided: str | None) -> None:
        """Run the probe, and fix what the step does by its error, unless the plan or another branch has done so."""
        assert self.memory.probe is not None and self.plan is not None
        del self._steps[number:]  # the step may have been staged before
        planned_full = self.plan.is_full(number)
        self._compared = not planned_full and decided is None
        if planned_full or decided != ".":
            self.memory.probe.measure(self.executed)
        full = planned_full or decided == "F" or (self._compared and not self.memory.probe.forecasts())
        so_far = replace(self._forecasts, plan=Plan(self.executed + ("F" if full else ".")))
        self._steps.append((full_step if full else forecast_step)(so_far, number, self._capacity))

    def run(self) -> None:
        """The second third of `step`: the engine call. A call shared with other slots (`SharedCalls`) replaces it."""
        call = self.memory.call(self.graph, self.upcoming)
        if self._group is None or self.graph == "forecast":
            return call()  # of a forecast step no rank asks another anything
        with self._group.together(len(self.executed)):
            self._group.same(len(self.executed))
            call()

    def finish(self) -> np.ndarray:
        """The last third of `step`: count the step and return its `noise_pred`, a new array."""
        return self._count().read()

    def _count(self) -> Buffer:
        self.executed += "F" if isinstance(self.upcoming, FullStep) else "."
        if self._guard is not None and self.memory.probe is not None:
            self.memory.probe.keep(self.executed, self._compared)
        return self.memory.prediction

    def try_weights(self, latents: Any, weights: Sequence[float] | np.ndarray) -> np.ndarray:
        """What the next step, a forecast step, returns with these weights of its history, oldest first.

        The weights stay, so `step` then runs with the last ones tried; the request does not advance.
        """
        number = self._number()
        self._steps[number] = forecast_step(self._forecasts, number, self._capacity, weights)
        self.stage(latents)
        self.run()
        return self.memory.prediction.read()

    @property
    def upcoming(self) -> FullStep | ForecastStep:
        """The step that comes next; raises `StepError` where there is none, or a guard has yet to settle it."""
        number = len(self.executed)
        if self.plan is None or number >= len(self._steps):
            number = self._number()
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
        return tuple(self.memory.probe.errors) if self._guard is not None and self.memory.probe is not None else ()

    def _number(self) -> int:
        """Index of the next step; raises `StepError` where there is none."""
        number = len(self.executed)
        if self.plan is None or number >= len(self.plan):
            seen = "no request" if self.plan is None else f"a request after its last step ({number} of {number})"
            raise StepError(f"the slot has {seen}, expected one under way; call start() first")
        return number

    def source(self, tensor: Tensor) -> Buffer:
        """Where the upcoming step reads an input of its graph."""
        return self.memory.source(tensor, self.upcoming)

    def target(self, tensor: Tensor) -> Buffer:
        """Where the upcoming step writes an output of its graph."""
        return self.memory.target(tensor, self.upcoming)

    @property
    def gains(self) -> tuple[float, ...]:
        """Noise amplification of every step of the plan; 1 on a full step."""
        return tuple(s.gain if isinstance(s, ForecastStep) else 1.0 for s in self._steps)

    def _write_rows(self, number: int, timestep: float | None, next_timestep: float | None) -> None:
        if self._timesteps is None:
            tables, row = self.memory.prepare(self._times(number, timestep, next_timestep)), 0
        else:
            _check_time("timestep", timestep, self._timesteps, number)
            if next_timestep is not None and self.contract.next_timestep is not None:
                known = self.contract.times(self._timesteps)[self.contract.next_timestep.name]
                _check_time("next_timestep", next_timestep, known, number)
            tables, row = self._tables, number
        # The rows that the step's graph reads; all of them under a guard, which settles later which graph that is.
        read = tables.keys() if self._guard is not None else self.contract.inputs[self.graph]
        for name, table in tables.items():
            if name in read:
                self.memory.buffers[name].copy(table.entry(row))

    def _times(self, number: int, timestep: float | None, next_timestep: float | None) -> dict[str, np.ndarray]:
        """What prepare takes of one step, `[1]` each, where the steps are not known ahead."""
        told = {"timestep": (self.contract.timestep, timestep)}
        if self.contract.next_timestep is not None:
            told["next_timestep"] = self.contract.next_timestep, next_timestep
        made = {}
        for name, (tensor, value) in told.items():
            if value is None:
                raise StepError(
                    f"the {name} of step {number} is unknown, expected it from start() or step(); pass {name}="
                )
            made[tensor.name] = number_for(tensor, value)
        return made


def _check_time(name: str, given: float | None, known: np.ndarray, number: int) -> None:
    """Refuse another timestep at a step than the one that was prepared for it."""
    if given is not None and not abs(known[number] - given) <= 1e-8 + 1e-5 * abs(given):
        raise StepError(
            f"{name} is {given} at step {number}, expected {known[number]} as prepared; leave timesteps out of "
            "start() when they are not known ahead"
        )
