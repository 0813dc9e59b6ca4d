"""Sampling: a whole denoising loop over a slot, by the scheduler of the bundle.

What a pipeline does around the transformer is here and nowhere else: how noise becomes its input, and what becomes of
its answer. `clock.py` knows timesteps, `combined.py` guidance, and `tensors.py` makes requests of any family.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from taylorseer_export.errors import ConfigError, StepError
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.runtime.adapter import Adapter
from taylorseer_export.runtime.branches import Branches
from taylorseer_export.runtime.clock import clock
from taylorseer_export.runtime.combined import combined
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.driven import DrivenCourse
from taylorseer_export.runtime.joined import Joined
from taylorseer_export.runtime.lead import beginning
from taylorseer_export.runtime.noise import normals
from taylorseer_export.runtime.one_branch import one_branch
from taylorseer_export.runtime.schedulers import begun, own_scheduler, scheduler_of
from taylorseer_export.runtime.sections import Course
from taylorseer_export.runtime.values import check_prediction


@dataclass(frozen=True)
class Beginning:
    """What a loop begins with in the place of noise alone.

    Of all steps, as evenly spaced as ever, the last ones run: as many as `steps_at` says. The first of them begins with
    the picture's latents and as much noise as belongs there.

    Attributes:
        latents: Of the picture, as the request's.
        strength: Share of the steps that run, above 0 and at most 1.
        steps: All of them; the most that leave as many as run if None.
    """

    latents: np.ndarray
    strength: float
    steps: int | None = None

    def of(self, run: int) -> int:
        """Of how many steps `run` are the last ones.

        Raises:
            ConfigError: So many do not run of all steps.
        """
        if self.steps is None:
            about = math.floor(run / self.strength)
            return max(n for n in range(max(run, about - 1), about + 2) if steps_at(self.strength, n) <= run)
        if (expected := steps_at(self.strength, self.steps)) != run:
            raise ConfigError(
                f"plan is {run} steps long, expected {expected}, which run of {self.steps} at a strength of "
                f"{self.strength:g}; change one of them"
            )
        return self.steps


def steps_at(strength: float, steps: int) -> int:
    """How many of `steps` run at a strength, as diffusers' pipelines reckon."""
    return steps - int(max(steps - min(steps * strength, steps), 0))


@dataclass(frozen=True)
class Request:
    """What a sampling loop starts from; of a video in sections, what each of its loops does.

    Attributes:
        latents: The noise `[N, ...]`, float32, one entry per picture; that of sections one after the other along the
            frames, in the order in which they are made.
        conditioning: Constant inputs of the transformer, by their diffusers argument names.
        guided: Whether guidance combines two predictions: of two halves of the transformer's batch, conditional and
            unconditional, or of two branches.
        guidance_scale: Dimensionless; used where `guided`.
        height, width: Of a picture, in pixels; 0 where only latents are made.
        sigmas: `[S]` noise levels of the steps, for flow-matching schedulers; evenly spaced if left out.
        negative: Constant inputs of the second branch, where guidance calls the transformer twice.
        joined: What the transformer is given beside the latents.
        beginning: What the loop begins with beside the noise; noise alone if left out.
        course: How one section follows another; None where there is one loop.
        lora: From `Denoiser.adapter`; what the bundle was loaded with if left out.
        ahead: Leading latent frames of a video that are made and are no part of it.
        previews: How many are asked for while the loop runs, see `preview_steps`; several ranks know when by this.
    """

    latents: np.ndarray
    conditioning: dict[str, np.ndarray]
    guided: bool
    guidance_scale: float
    height: int
    width: int
    sigmas: np.ndarray | None = None
    negative: dict[str, np.ndarray] | None = None
    joined: Joined | None = None
    beginning: Beginning | None = None
    course: Course | DrivenCourse | None = None
    lora: Adapter | None = None
    previews: int = 0
    ahead: int = 0

    @property
    def branches(self) -> list[dict[str, np.ndarray]]:
        """The constant inputs of each call of a step, the conditional first."""
        return [self.conditioning] if self.negative is None else [self.conditioning, self.negative]

    @property
    def loops(self) -> int:
        """How many it is."""
        return 1 if self.course is None else self.course.count

    def planned(self, plan: Plan) -> Plan:
        """Which steps of all its loops are full, one loop after the other, by the plan of one."""
        return plan if self.course is None else Plan(str(plan) * self.loops)


@dataclass(frozen=True)
class Result:
    """What a request made.

    Attributes:
        latents: `[N, ...]` float32.
        planned, executed: The plan of all loops as asked and as run; equal, but for forecasts that a guard made full.
        milliseconds: Time of each step in the denoiser alone, without the scheduler.
        prepare_ms: Time of preparing the request, for its first loop.
        errors: Under a guard, what its probe measured at each step, NaN where it was not asked.
    """

    latents: np.ndarray
    planned: str
    executed: str
    milliseconds: tuple[float, ...]
    prepare_ms: float
    errors: tuple[float, ...] = ()


def sample(
    denoiser: Denoiser,
    request: Request,
    forecasts: Forecasts,
    branches: Branches | None = None,
    on_step: Callable[[Loop], object] | None = None,
) -> Result:
    """Run a request from noise to latents.

    Args:
        denoiser: The loaded bundle.
        request: From `label_request`, `prompt_request` or `tensor_request`.
        forecasts: From `Denoiser.forecasts`; the length of their plan is the number of steps of a loop.
        branches: Slots to reuse, from a `Pool`; new ones are opened if left out.
        on_step: Called with the loop after each step.

    Raises:
        StepError: An input does not fit the bundle, or a step returned a number that is not finite.
    """
    loop = Loop(denoiser, request, forecasts)
    branches = branches or loop.open(denoiser)
    began = time.perf_counter()
    loop.begin(branches)
    prepare_ms = 1e3 * (time.perf_counter() - began)
    milliseconds = []
    for step in denoise(loop, branches):
        milliseconds.append(step.milliseconds)
        if on_step:
            on_step(loop)
    executed = branches.executed
    return Result(loop.latents, str(loop.plan), executed, tuple(milliseconds), prepare_ms, branches.errors)


@dataclass(frozen=True)
class Step:
    """A step that a loop has taken.

    Attributes:
        number: Its index in the loop.
        noise_pred: What the transformer answered.
        milliseconds: Time in the denoiser alone.
    """

    number: int
    noise_pred: np.ndarray
    milliseconds: float


def denoise(
    loop: Loop,
    branches: Branches,
    before: Callable[[int, np.ndarray], object] | None = None,
    answered: Callable[[np.ndarray], object] | None = None,
) -> Iterator[Step]:
    """Run a loop that was begun to its end, and all that follow it, and give each step once it is taken.

    Args:
        loop: At its first step.
        branches: Begun by it.
        before: Called with the number of a step and the transformer's input, before the transformer is.
        answered: Called with the transformer's answer, before the latents advance by it.

    Raises:
        StepError: A step returned a number that is not finite.
    """
    for number in range(len(loop.plan)):
        if number and loop.begins:
            loop.begin(branches)
        model_input = loop.model_input()
        if before:
            before(number, model_input)
        began = time.perf_counter()
        noise_pred = branches.step(model_input)
        milliseconds = 1e3 * (time.perf_counter() - began)
        if answered:
            answered(noise_pred)
        loop.accept(noise_pred)
        yield Step(number, noise_pred, milliseconds)
    loop.check_executed(branches.executed)


class Loop:
    """A sampling loop under way, apart from the engine that answers it; of a video in sections one after the other.

    Every step: `model_input()` goes to its slots, their prediction comes back through `accept`. Where a loop `begins`,
    `begin` comes before its first step. `denoise` does this for one request; a server does it for many in turn, and
    both get the same numbers. Over ranks each has its own rows of the latents from `begin` on, and all of them at
    the end of a loop and for a preview that is due.

    Args:
        denoiser, request, forecasts: As in `sample`.

    Attributes:
        latents: `[N, ...]` float32, after the steps accepted so far: of the section under way, at the end of the video.
        plan: Which steps are full, as planned, of all loops.
        step: Steps accepted so far, of all loops.
        conditioning: The constant inputs of each call of a step, as of `Request.branches`, in the loop under way.
        model_timesteps: `[S]`, what the transformer takes at each step of a loop.
        branches: Sizes of the slot that each branch of guidance needs.
        sizes: Those of the first.

    Raises:
        StepError: An input does not fit the bundle.
        ConfigError: Ranks share the rows out, and the scheduler does not take each by itself.
    """

    def __init__(self, denoiser: Denoiser, request: Request, forecasts: Forecasts) -> None:
        self._share = denoiser.share.of_loop()
        if self._share.ranks > 1 and own_scheduler(denoiser.manifest) is None:
            self._share.expect_one(f"a loop of {denoiser.manifest.sampling.scheduler} under its config")
        self.request, self.forecasts = request, forecasts
        self._manifest, self._pipeline = denoiser.manifest, denoiser.manifest.pipeline
        self.plan = request.planned(forecasts.plan)
        self.step = 0
        self._seen: np.ndarray | None = None  # over ranks: all rows of a preview that is due
        self._made = np.empty(0, np.float32) if request.course is None else request.latents[:, :, :0]  # of loops before
        self._enter()
        shape = self.model_input().shape
        self.branches = [denoiser.sizes(shape, conditioning) for conditioning in self.conditioning]
        self.sizes = self.branches[0]

    def _enter(self) -> None:
        """Go to the first step of the next loop: a scheduler at its start, noise, and what a section is given."""
        request, run, first = self.request, len(self.forecasts), self.request.beginning
        noise, self.conditioning, self._joined = request.latents, request.branches, request.joined
        if request.course is not None:
            number, window = self.step // run, request.course.window
            noise = np.ascontiguousarray(noise[:, :, number * window : (number + 1) * window])
            of_request = self.conditioning, self._joined
            self.conditioning, self._joined = request.course.enter(number, self._made, *of_request)
        steps = run if first is None else first.of(run)
        self._scheduler = scheduler_of(self._manifest)
        timesteps = clock(self._manifest, noise.shape, steps, request.sigmas, self._scheduler)
        self.model_timesteps = timesteps[steps - run :]
        self.latents = self._scheduler.start(noise)
        if first is not None:
            self.latents = begun(self._scheduler, noise, first.latents, steps - run)

    @property
    def begins(self) -> bool:
        """Whether the next step is the first of a loop."""
        return self._place == 0 and self.step < len(self.plan)

    @property
    def _place(self) -> int:
        """Index of the next step in its loop."""
        return self.step % len(self.forecasts)

    def open(self, denoiser: Denoiser) -> Branches:
        """New slots for it; raises what `one_branch` raises where each rank runs one branch of guidance."""
        one = one_branch(denoiser, self.model_input(), self.conditioning, self.request.guided)
        return one or Branches([denoiser.slot(sizes, own=True) for sizes in self.branches])

    def begin(self, branches: Branches) -> None:
        """Begin the request, or its next loop, in slots of its sizes; on all ranks, or on none."""
        with beginning(self._share.group, self._share.lead, self):
            self.enter(branches)

    def enter(self, branches: Branches) -> None:
        """The part of `begin` that each rank does alone."""
        share = self._share
        self.latents, self.conditioning = share.latents(self.latents), [*map(share.conditioning, self.conditioning)]
        if self._joined is not None:
            self._joined = replace(self._joined, value=share.latents(self._joined.value))
        start = branches.go_on if self.step else branches.start
        start(self.conditioning, self.forecasts, self.model_timesteps, self.request.lora)

    def check_executed(self, executed: str) -> None:
        """Fail if the steps that ran are not those planned: only a guard adds full ones."""
        pairs = list(zip(str(self.plan), executed, strict=True))
        same = all(ran == kind or (self.forecasts.guard and ran == "F") for kind, ran in pairs)
        assert same, "bug in taylorseer-export: the steps that ran are not those planned"

    def model_input(self, latents: np.ndarray | None = None) -> np.ndarray:
        """What the transformer takes of the latents, the loop's own if left out."""
        latents = self.latents if latents is None else latents
        if (joined := self._joined) is not None:
            own = latents[:, :, joined.value.shape[2] :] if joined.ahead else latents
            latents = np.concatenate([joined.value, own] if joined.ahead else [own, joined.value], joined.axis)
        if self.step < len(self.plan):
            latents = self._scheduler.model_input(latents, self._place)
        return np.concatenate([latents, latents]) if self.request.guided and self.request.negative is None else latents

    def prediction(self, noise_pred: np.ndarray) -> np.ndarray:
        """What the scheduler takes of the transformer's answer: both guided ones combined, a learned sigma dropped."""
        if self._pipeline.prediction_sign < 0:
            noise_pred = -noise_pred
        if self.request.guided:
            noise_pred = combined(noise_pred, self.request.guidance_scale, self._pipeline)
        return noise_pred[:, : self.latents.shape[1]] if noise_pred.ndim == 4 else noise_pred

    def preview(self, prediction: np.ndarray) -> np.ndarray:
        """The latents that this prediction would lead to; the loop does not advance."""
        return self._following(self._scheduler.ahead, prediction)

    def accept(self, prediction: np.ndarray) -> None:
        """Advance the latents by the transformer's answer.

        Raises:
            StepError: It has numbers that are not finite, or the scheduler makes such of it.
            BundleError: The scheduler does not step.
        """
        alone = self._share.ranks == 1  # others judge by the rows of all, which are there at the end of the loop
        check_prediction(not alone or bool(np.isfinite(prediction).all()), self.step, self.plan)
        latents, taken = self._following(self._scheduler.advance, self.prediction(prediction)), self.step + 1
        ends = taken % len(self.forecasts) == 0
        if ends:
            latents = self._share.joined(latents)
        if taken == len(self.plan):
            self._share.done()
        if (alone or ends) and not np.isfinite(latents).all():
            raise StepError(
                f"latents after step {self.step} of {self._scheduler.name} are NaN or infinite, expected finite "
                "numbers; check its config, and --guidance-scale"
            )
        due = self._share.ranks > 1 and taken in preview_steps(len(self.plan), self.request.previews)
        self._seen = self._share.joined(self._scheduler.estimate()) if due else None
        self.step, self.latents = taken, latents
        if (course := self.request.course) is not None and self._place == 0:
            self._made = course.joined(self._made, latents)
            if self.begins:
                self._enter()
            else:
                self.latents = course.video(self._made)

    def _following(self, step: Callable[[np.ndarray, int, np.ndarray], np.ndarray], answer: np.ndarray) -> np.ndarray:
        """The next latents, by a step of the scheduler; frames that are no part of what is sampled stay."""
        latents, joined = self.latents, self._joined
        if joined is None or not joined.ahead:
            return step(answer, self._place, latents)
        frames = joined.value.shape[2]
        following = step(answer[:, :, frames:], self._place, latents[:, :, frames:])
        return np.concatenate([joined.value, following], 2)

    def estimate(self) -> np.ndarray:
        """`[N, ...]` float32: where the last step thinks the loop will end, for previews; of sections those so far.

        Raises:
            ConfigError: Ranks share the rows out, and the request asks for no preview after this step.
        """
        if self._share.ranks > 1 and self._seen is None:
            self._share.expect_one(f"a preview after step {self.step} that the request does not ask for")
        course = self.request.course
        if course is not None and self._place == 0:
            return course.video(self._made)
        seen = self._scheduler.estimate() if self._seen is None else self._seen
        return seen if course is None else course.video(course.joined(self._made, seen))


def preview_steps(steps: int, previews: int) -> set[int]:
    """After how many of its steps a loop shows each of its previews: spread evenly, none at its end."""
    return {steps * k // (previews + 1) for k in range(1, previews + 1)}


class Pool:
    """Branches by the size of their requests, opened when first asked for."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._opened: dict[str, Branches] = {}

    def __len__(self) -> int:
        return len(self._opened)

    def of(self, request: Request) -> Branches:
        """Branches that fit a request; whoever holds them starts them anew."""
        loop = Loop(self._denoiser, request, Forecasts(Plan("F"), 0))
        key = str([sorted(one.items()) for one in loop.branches])
        if key not in self._opened:
            self._opened[key] = loop.open(self._denoiser)
        return self._opened[key]


# Small parts ---------------------------------------------------------------------------------------------------------


def noise_of(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Noise as diffusers' pipelines draw it on the CPU, in float32; within the bound of `normals`, without torch."""
    return normals(math.prod(shape), seed).reshape(shape)


def tokens_of(latents: np.ndarray, side: int = 2) -> np.ndarray:
    """`[N, C, P R, P W]` as tokens of P x P latent pixels, `[N, R W, P P C]`, row by row; P is `side`."""
    count, channels, height, width = latents.shape
    parts = latents.reshape(count, channels, height // side, side, width // side, side).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(parts.reshape(count, height * width // side**2, side**2 * channels))


def latents_of(tokens: np.ndarray, rows: int, columns: int, side: int = 2) -> np.ndarray:
    """`[N, C, P R, P W]` of tokens `[N, R W, P P C]`: the inverse of `tokens_of`."""
    channels = tokens.shape[2] // side**2
    parts = tokens.reshape(len(tokens), rows, columns, channels, side, side).transpose(0, 3, 1, 4, 2, 5)
    return np.ascontiguousarray(parts.reshape(len(tokens), channels, rows * side, columns * side))
