"""Verify: a bundle against the eager diffusers model, step by step, within a derived bound.

The reference is the unmodified model with forward hooks on the bundle's sites, in float64 where memory allows: on a
full step the hooks record what the modules return, on a forecast step they replace it by the weighted sum of what was
recorded. Every other part of the model runs live, so the reference shares no graph with the bundle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.checkpoint.checkpoint import EMBEDDED, Checkpoint, open_checkpoint
from taylorseer_export.errors import CheckpointError, ParityError
from taylorseer_export.families import family_named
from taylorseer_export.families.family import AUTO, Family, unknown
from taylorseer_export.graph.propose import propose
from taylorseer_export.method import Forecasts, Guard, Plan, Rule, exact_weights, gain
from taylorseer_export.report.quantised import Errors, errors, hold_quantised, round_inputs
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.trajectory import Trajectory

_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Of what a quantised layer reads, row by row: half a step of e4m3, of int8 and of e2m1 as shares of a usual number. The
# largest of a few thousand is four of those: 4 / 127 / 2.
_OF_TOKENS = {"fp8": 2.0**-4, "int8": 2.0**-6, "nvfp4": 2.0**-2}
_LEAST = 1e-30  # a threshold that no error is under
_FLOAT64_LIMIT = 2 << 30  # bytes of float32 weights above which the reference stays in float32


@dataclass(frozen=True)
class Parity:
    """One request, as `executed`, compared: per step the largest difference and its bound, both absolute."""

    forecasts: Forecasts
    executed: str
    seen: tuple[float, ...]
    bound: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Largest seen / bound; above 1 the bundle is wrong."""
        return max(s / b for s, b in zip(self.seen, self.bound, strict=True))

    @property
    def worst(self) -> int:
        """The step of that ratio."""
        ratios = [s / b for s, b in zip(self.seen, self.bound, strict=True)]
        return ratios.index(max(ratios))


def checkpoint_of(denoiser: Denoiser, reference: str | None = None) -> Checkpoint:
    """The checkpoint a bundle was made from, refused if its weights are others.

    Raises:
        CheckpointError: It is not where it was, or its hash differs.
    """
    model = denoiser.manifest.model
    named = reference or (None if model.reference == EMBEDDED else model.reference)
    family = denoiser.manifest.family
    checkpoint = open_checkpoint(
        named,
        unknown(model.class_name) if family == AUTO else family_named(family),
        model.variant,
        model.config_file,
        model.loras,
        lora_skip=model.lora_skip,
    )
    seen = checkpoint.sha256()
    if seen != model.weights_sha256:
        raise CheckpointError(
            f"weights of {checkpoint.folder} have SHA-256 {seen[:12]}…, expected {model.weights_sha256[:12]}…, those "
            "the bundle was made from; pass the right --model, or export again"
        )
    return checkpoint


def reference_model(checkpoint: Checkpoint) -> nn.Module:
    """The eager model: float64 if its weights are small, else float32."""
    size = 4 * sum(map(math.prod, checkpoint.shapes.values()))
    return checkpoint.load(torch.float64 if size < _FLOAT64_LIMIT else torch.float32)


def family_of(model: nn.Module, manifest: Manifest) -> Family:
    """The declaration of a bundle's family; of one that was exported without, what is proposed for its model.

    That is told from fake weights of float32, as when it was exported: some code takes no other type. Sizes of which
    the bundle has one alone are that.
    """
    if manifest.family != AUTO:
        return family_named(manifest.family)
    config: Any = model.config
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        skeleton = type(model).from_config(config).eval()  # type: ignore[attr-defined]
    one = {name: size.minimum for name, size in manifest.dimensions.items() if size.minimum == size.maximum}
    return propose(skeleton).fixed(one, one).family()


def compare(model: nn.Module, denoiser: Denoiser, data: Trajectory, forecasts: Forecasts) -> Parity:
    """Run one plan on the bundle and on the reference, fed the same latents at every step.

    Under a guard the reference takes the steps for full that the bundle did; that a guard decides as it should is for
    tests, but here its two halves of a full step are put beside the model.

    The bound on the difference at a step is that of `depth` sites whose rounding errors add up at random:

        bound = sqrt(depth) (sqrt(32) u_store + sqrt(length) u_sum) gain max|reference|

    and where modules round to bfloat16 in any precision, sqrt(2 of each) u_bfloat16 beside it,
    with u the unit roundoff of the stored features and of the float32 sums, `length` the longest contraction, and
    `gain` the sum of |weights|, by which a forecast amplifies the errors of its snapshots.
    Of quantised weights the reference holds what they stand for, and the bound is the same; where what they are
    multiplied with is quantised too, it grows by sqrt(layers) times half a step of that format. Where that is by
    constants the reference rounds by them as well, and the bound is for what falls on the other side of a step.
    """
    manifest = denoiser.manifest
    sizes = denoiser.sizes(data.latents.shape[1:], data.conditioning)
    slot = denoiser.slot(sizes)
    slot.start(data.conditioning, forecasts, data.timesteps)
    answers = [
        [slot.step(latent, others=data.beside(step)), *slot.others.values()] for step, latent in enumerate(data.latents)
    ]
    ran = replace(forecasts, plan=Plan(slot.executed))
    unit = roundoff_of(model, manifest)
    seen, bounds = [], []
    with Reference(model, denoiser, ran).hooked() as reference:
        for step, (latent, times) in enumerate(_steps(denoiser, data)):
            expected = reference.step(latent, times, {**data.conditioning, **data.beside(step)})
            amplified = 1.0 if ran.plan.is_full(step) else gain(_weights(ran, step))
            pairs = [
                (float(np.abs(found.astype(np.float64) - one).max()), unit * amplified * float(np.abs(one).max()))
                for found, one in zip(answers[step], expected, strict=True)
            ]
            off, bound = max(pairs, key=lambda pair: pair[0] / pair[1])  # of several latents the one that is worst
            seen.append(off)
            bounds.append(bound)
    return Parity(forecasts, slot.executed, tuple(seen), tuple(bounds))


def roundoff_of(model: nn.Module, manifest: Manifest) -> float:
    """Share of its largest value by which an output may be off: `compare`'s bound without gain and scale."""
    of_tokens, found = 0.0, manifest.quantised
    if found is not None and found.activations != "none":
        of_tokens = math.sqrt(len(found.layers)) * _OF_TOKENS[found.weights]
    family = family_of(model, manifest)
    sites = _module_sites(model, family)
    rounded = sum(any(re.fullmatch(p, name) for p in family.rounded) for name, _ in model.named_modules())
    depth, length = max(len(sites), 1), _longest_contraction(model)
    roundoff = _ROUNDOFF[manifest.state.dtype]
    inside = of_tokens + math.sqrt(2 * rounded) * _ROUNDOFF["bfloat16"]
    return math.sqrt(depth) * (math.sqrt(32) * roundoff + math.sqrt(length) * _ROUNDOFF["float32"]) + inside


def verify(
    denoiser: Denoiser, checkpoint: Checkpoint, data: Trajectory, on_plan: Callable[[Parity], object]
) -> Errors | None:
    """Compare the plans that matter: all full, the default, order 0, an uneven one; and what every guard executes.

    Returns:
        What quantised weights cost beside that; None where there are none.

    Raises:
        ParityError: A bound is broken.
    """
    model = reference_model(checkpoint)
    plain: list[np.ndarray] = []
    quantised = denoiser.manifest.quantised
    if quantised is not None:
        plain = _predictions(model, denoiser, data)
        if not quantised.kept:  # else that is what it holds
            hold_quantised(model, checkpoint, denoiser.manifest)
    round_inputs(model, denoiser.manifest)
    state, steps = denoiser.manifest.state, len(data.timesteps)
    cases = plans(denoiser, steps)
    for rule in state.guards:
        guarded = Guard(rule, _middle_error(denoiser, data, rule))
        cases.append(Forecasts(Plan.guarded(steps, min(2, steps)), state.order, guard=guarded))
    for forecasts in cases:
        result = compare(model, denoiser, data, forecasts)
        on_plan(result)
        if not result.ratio <= 1:
            step = result.worst
            raise ParityError(
                f"noise_pred differs by {result.seen[step]:.3g} at step {step} of plan {result.executed} (order "
                f"{forecasts.order}), "
                f"expected at most {result.bound[step]:.3g}; export again, and report it if it stays"
            )
    if quantised is None:
        return None
    full, *others = (_answers(denoiser, data, forecasts) for forecasts in plans(denoiser, steps)[:2])
    regular = others[0] if others else full  # of few steps at order 0 all plans are one
    return errors(quantised.compared_with, plain, full, regular)


def _predictions(model: nn.Module, denoiser: Denoiser, data: Trajectory) -> list[np.ndarray]:
    """Of the eager model, all steps full."""
    every = Forecasts(Plan.all_full(len(data.timesteps)), 0)
    with Reference(model, denoiser, every).hooked() as reference:
        pairs = enumerate(_steps(denoiser, data))
        return [_joined(reference.step(x, t, {**data.conditioning, **data.beside(step)})) for step, (x, t) in pairs]


def _steps(denoiser: Denoiser, data: Trajectory) -> list[tuple[np.ndarray, dict[str, float]]]:
    """(latent, what the model is told of the time, by name) of every step."""
    times = denoiser.contract.times(data.timesteps)
    return [(x, {name: float(of[step]) for name, of in times.items()}) for step, x in enumerate(data.latents)]


def _answers(denoiser: Denoiser, data: Trajectory, forecasts: Forecasts) -> list[np.ndarray]:
    """Of the bundle."""
    slot = denoiser.slot(denoiser.sizes(data.latents.shape[1:], data.conditioning))
    slot.start(data.conditioning, forecasts, data.timesteps)
    return [
        _joined([slot.step(latent, others=data.beside(step)), *slot.others.values()])
        for step, latent in enumerate(data.latents)
    ]


def _joined(predictions: Sequence[np.ndarray]) -> np.ndarray:
    """Those of all latents as one vector."""
    return np.concatenate([one.ravel() for one in predictions])


def _middle_error(denoiser: Denoiser, data: Trajectory, rule: Rule) -> float:
    """A threshold at which a guard forecasts some steps and not others: the median error of full steps."""
    slot = denoiser.slot(denoiser.sizes(data.latents.shape[1:], data.conditioning))
    plan = Plan.guarded(len(data.timesteps), min(2, len(data.timesteps)))
    slot.start(data.conditioning, Forecasts(plan, denoiser.defaults.order, guard=Guard(rule, _LEAST)), data.timesteps)
    for step, latent in enumerate(data.latents):
        slot.step(latent, others=data.beside(step))
    errors = [error for error in slot.errors if math.isfinite(error)]
    return max(float(np.median(errors)), _LEAST) if errors else 1.0


def plans(denoiser: Denoiser, steps: int) -> list[Forecasts]:
    """Plans and orders that together reach every rule of the method."""
    capacity, regular = denoiser.manifest.state.order, denoiser.forecasts(steps=steps).plan
    uneven = Plan.parse(("FF..F.F....FF..." * steps)[:steps])
    pairs = [(Plan.all_full(steps), capacity), (regular, capacity), (regular, 0), (uneven, capacity)]
    return [Forecasts(plan, order) for plan, order in dict.fromkeys(pairs)]


def _weights(forecasts: Forecasts, step: int) -> tuple[Fraction, ...]:
    """Exact weights of a forecast step."""
    if forecasts.weights is not None:
        return tuple(map(Fraction, forecasts.weights[step]))
    return exact_weights(forecasts.plan.history(step, forecasts.order), step, forecasts.order, forecasts.form)


class Reference:
    """The eager model with hooks that record on full steps and replace on forecast steps."""

    def __init__(self, model: nn.Module, denoiser: Denoiser, forecasts: Forecasts) -> None:
        self.model, self.forecasts = model, forecasts
        self.family = family_of(model, denoiser.manifest)
        self.latent, contract = denoiser.latent.name, denoiser.contract
        clocks = [t for t in (contract.timestep, contract.next_timestep) if t is not None]
        self.scaled = {"guidance", *(t.name for t in clocks)}
        read = (denoiser.latent, *clocks, *denoiser.others.values(), *denoiser.constants.values())
        self.specs = {t.name: t for t in read}
        self.divisor = denoiser.manifest.sampling.timestep_divisor
        self.granularity = denoiser.manifest.state.granularity
        # The family's, not the manifest's: sites that share a gate, or have none, are one there, forecast alike.
        self.sites = _module_sites(model, self.family) if self.granularity == "module" else []
        widest = max(model.parameters(), key=lambda parameter: parameter.dtype.itemsize)  # some are kept in float32
        self.dtype, self.device = widest.dtype, widest.device
        self.record: dict[tuple[str, int], Tensor] = {}
        self.number = 0
        self.entering: dict[str, Tensor] = {}

    def step(
        self, latent: np.ndarray, times: Mapping[str, float], conditioning: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        """The predictions of all latents; those beside the first are in `conditioning`."""
        clocks = {name: np.full(len(latent), time, np.float32) for name, time in times.items()}
        given = {self.latent: latent, **clocks, **conditioning}
        with torch.no_grad():
            inputs = {name: self._as_seen(name, value) for name, value in given.items()}
            result: Any = self.family.forward(self.model, inputs)
        self.number += 1
        return [one.double().cpu().numpy() for one in (result if isinstance(result, tuple) else (result,))]

    def _as_seen(self, name: str, values: Any) -> Tensor:
        """An input as the bundle sees it: rounded to its contract's type, and again where the model scales it up.

        FLUX multiplies timestep and guidance by 1000 in the type they come in; in bfloat16 that moves them by up to 2.
        """
        value = torch.as_tensor(values, device=self.device)
        if not value.is_floating_point():
            return value
        value = value.to(getattr(torch, self.specs[name].dtype))
        if name in self.scaled and self.divisor != 1:
            return ((value * self.divisor).double() / self.divisor).to(self.dtype)
        return value.to(self.dtype)

    @contextmanager
    def hooked(self) -> Iterator[Reference]:
        modules = dict(self.model.named_modules())
        with ExitStack() as hooks:
            for name in self.sites:
                hooks.callback(modules[name].register_forward_hook(self._output(name)).remove)
            if self.granularity != "module":
                streams = {"": (self.family.stack_input, self.family.stack_output), **self.family.others}
                for stream, (entry, leave) in streams.items():
                    for (name, argument), rule in ((entry, self._enter), (leave, self._leave)):
                        hook = _on_argument(argument, partial(rule, stream))
                        handle = modules[name].register_forward_pre_hook(hook, with_kwargs=True)
                        hooks.callback(handle.remove)
            yield self

    def _forecast(self, name: str, value: Tensor) -> Tensor:
        """Record the value on a full step, replace it on a forecast step."""
        plan = self.forecasts.plan
        if plan.is_full(self.number):
            self.record[name, self.number] = value
            return value
        past = plan.history(self.number, self.forecasts.order)
        weights = _weights(self.forecasts, self.number)
        terms = [float(w) * self.record[name, s] for w, s in zip(weights, past, strict=True)]
        return torch.stack(terms).sum(0)

    def _output(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self._forecast(name, output[0]), *output[1:])
            return self._forecast(name, output)

        return hook

    def _enter(self, stream: str, value: Tensor) -> Tensor:
        self.entering[stream] = value
        return value

    def _leave(self, stream: str, value: Tensor) -> Tensor:
        site = f"{self.granularity} {stream}"
        if self.granularity == "last":
            return self._forecast(site, value)
        # FramePack drops the tokens of the past before the final norm; Z-Image has those of the text behind, which it
        # drops later, so that it is no matter what they are added to.
        entered = self.entering[stream][:, -value.shape[1] :]
        entered = torch.nn.functional.pad(entered, (0, 0, 0, value.shape[1] - entered.shape[1]))
        return entered + self._forecast(site, value - entered)


def _on_argument(argument: str, rule: Callable[[Tensor], Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if argument in kwargs:
            return args, {**kwargs, argument: rule(kwargs[argument])}
        return (rule(args[0]), *args[1:]), kwargs

    return hook


def _module_sites(model: nn.Module, family: Family) -> list[str]:
    import re

    return [name for name, _ in model.named_modules() if any(re.fullmatch(p, name) for p in family.sites)]


def _longest_contraction(model: nn.Module) -> int:
    return max((m.in_features for m in model.modules() if isinstance(m, nn.Linear)), default=1)
