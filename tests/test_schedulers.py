"""Schedulers and noise without torch: against diffusers and torch, within what their float32 may be off."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from taylorseer_export.errors import ConfigError
from taylorseer_export.families import FAMILIES
from taylorseer_export.runtime.ddim import DDIM, VelocityDDIM
from taylorseer_export.runtime.noise import BLOCK, HIGHEST_SEED, LOWEST_SEED, normals
from taylorseer_export.runtime.sampling import noise_of
from taylorseer_export.runtime.schedulers import FlowEuler
from taylorseer_export.runtime.solvers import DPMSolver, UniPC, linear

UNIT = 2.0**-24  # half of what lies between 1 and the next float32
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
PLAIN = {"clip_sample": False}


class Rounded:
    """A number, or an array, and how far from it the float32 numbers may be that were computed in its place.

    Every operation adds half a unit in the last place, and a function of torch's a whole one, which MKL stays below.
    """

    def __init__(self, value, error=0.0):
        self.value, self.error = np.asarray(value, np.float64), np.asarray(error, np.float64)

    @classmethod
    def of(cls, value, error, units=1):
        return cls(value, error + units * UNIT * (abs(value) + error))

    def __add__(self, other):
        return Rounded.of(self.value + other.value, self.error + other.error)

    def __sub__(self, other):
        return Rounded.of(self.value - other.value, self.error + other.error)

    def __mul__(self, other):
        error = abs(self.value) * other.error + abs(other.value) * self.error + self.error * other.error
        return Rounded.of(self.value * other.value, error)

    def __truediv__(self, other):
        value = self.value / other.value
        return Rounded.of(value, (self.error + abs(value) * other.error) / (abs(other.value) - other.error))

    def log(self):
        return Rounded.of(np.log(self.value), -np.log1p(-self.error / self.value), 2)

    def expm1(self):
        return Rounded.of(np.expm1(self.value), np.exp(self.value) * np.expm1(self.error), 2)

    def exp(self):
        return Rounded.of(np.exp(self.value), np.exp(self.value) * np.expm1(self.error), 2)

    def sqrt(self):
        root = np.sqrt(self.value)
        return Rounded.of(root, self.error / root if root else np.sqrt(self.error), 2)

    def once(self):
        """The same number, rounded once."""
        return Rounded.of(self.value, 0.0)

    def holds(self, seen):
        return bool((abs(seen - self.value) <= self.error).all())


ONE, HALF, TWO = Rounded(1.0), Rounded(0.5), Rounded(2.0)


def unipc(levels, noise, answers, exact):
    """The latents after each step, as in the paper: algorithms 1 and 2 with B(h) = exp(h) - 1, orders up to 2.

    Args:
        levels: `[S + 1]`, the last one 0.
        noise, answers: `[N]` and `[S, N]`.
        exact: Whether weights are rounded once, or each of their parts.
    """
    steps, made, ends, before, order = len(answers), [], [], None, 1
    level = [Rounded(value) for value in levels.astype(np.float64)]
    alpha = [ONE - value for value in level]
    ratios = [a.log() - s.log() for a, s in zip(alpha[:-1], level[:-1], strict=True)]
    weight = Rounded.once if exact else lambda value: value

    def growth(to):
        """alpha[to] (exp(-h) - 1), h the step of the log-ratio to it."""
        return alpha[to] * ((ratios[to - 1] - ratios[to]).expm1() if to < steps else Rounded(-1.0))

    def moved(to, latents, inner):
        """From the level before; `inner` is where this is heading."""
        return weight(level[to] / level[to - 1]) * latents - weight(growth(to)) * inner

    def difference(to, now, earlier):
        """Of two ends, over the steps of the log-ratio between them."""
        return (ends[earlier] - ends[now]) / weight((ratios[to - 2] - ratios[to - 1]) / (ratios[to] - ratios[to - 1]))

    latents = Rounded(noise)
    for k, answer in enumerate(answers):
        end = latents - level[k] * Rounded(answer)
        if k:
            corrected = HALF * (end - ends[-1])
            if order == 2:
                earliest, latest = correction(ratios[k] - ratios[k - 1], ratios[k - 2] - ratios[k - 1])
                corrected = weight(earliest) * difference(k, -1, -2) + weight(latest) * (end - ends[-1])
            latents = moved(k, before, ends[-1] + corrected)
        ends.append(end)
        order, before = min(2, k + 1, steps - k), latents
        inner = ends[-1]
        if order == 2:
            inner = inner + HALF * difference(k + 1, -1, -2)
        latents = moved(k + 1, before, inner)
        made.append(latents)
    return made


def correction(h, back):
    """Weights of the earliest and the latest difference.

    `b` are moments of a density on [0, 1] that is proportional to exp(h t); so by a change of h they change by a
    covariance of powers of t, at most a quarter of it. What float32 makes of their formulas is another matter.
    """
    at = Rounded(-h.value)
    grown = at.expm1()
    inner = grown / at - ONE
    b = [inner / grown, (inner / at - HALF) * TWO / grown]
    for moment in b:
        moment.error = moment.error + h.error / 4
    ratio = back / h
    latest = (b[1] - ratio * b[0]) * (ONE / (ONE - ratio))  # a solver may divide by multiplying
    return b[0] - latest, latest


def drawn(steps, seed):
    """(noise, answers) `[N]` and `[S, N]`."""
    noise, *answers = np.random.default_rng(seed).standard_normal((steps + 1, 8)).astype(np.float32)
    return noise, np.array(answers)


def loop(ours, noise, answers):
    """(latents, estimate) after each step; a look ahead at other answers changes nothing."""
    latents, made = ours.start(noise), []
    for step, answer in enumerate(answers):
        given = ours.model_input(latents, step)
        ours.ahead(answer + 1, step, given)
        expected = ours.ahead(answer, step, given)
        latents = ours.advance(answer, step, given)
        np.testing.assert_array_equal(expected, latents)
        assert latents.dtype == np.float32
        made.append((latents, ours.estimate()))
    return made


def loop_of_diffusers(theirs, noise, answers):
    """(latents, the step's output) after each step, as pipelines run it."""
    latents = torch.from_numpy(noise)[None]
    for timestep, answer in zip(theirs.timesteps, answers, strict=True):
        output = theirs.step(torch.from_numpy(answer)[None], timestep, latents)
        latents = output.prev_sample
        yield latents[0].numpy(), output


# UniPC


def both_unipc(steps, **config):
    """(ours, diffusers'), set."""
    ours, theirs = UniPC.of(FLOW | config), diffusers.UniPCMultistepScheduler(**FLOW, **config)
    ours.set(steps)
    theirs.set_timesteps(steps)
    theirs.set_begin_index(0)  # of equal timesteps the first is meant
    return ours, theirs


@given(st.integers(1, 40), st.floats(0.5, 12) | st.integers(1, 7), st.sampled_from([1000, 4000]), st.integers(0, 9))
@example(50, 5.0, 1000, 0)
def test_unipc_is_within_the_rounding_of_diffusers(steps, shift, count, seed):
    ours, theirs = both_unipc(steps, flow_shift=shift, num_train_timesteps=count)
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
    np.testing.assert_array_equal(ours._sigmas, theirs.sigmas.numpy())
    noise, answers = drawn(steps, seed)
    near, far = (unipc(theirs.sigmas.numpy(), noise, answers, exact) for exact in (True, False))
    found, expected = loop(ours, noise, answers), loop_of_diffusers(theirs, noise, answers)
    for k, ((latents, _), (other, _)) in enumerate(zip(found, expected, strict=True)):
        assert near[k].holds(latents), k
        assert far[k].holds(other), k


def test_the_bound_of_unipc_is_narrow():
    """Of latents around 1: some units for each step, and a few times that for the parts that diffusers rounds."""
    noise, answers = drawn(10, 0)
    levels = both_unipc(10, flow_shift=3.0)[1].sigmas.numpy()
    near, far = (max(made.error.max() for made in unipc(levels, noise, answers, exact)) for exact in (True, False))
    assert near < 20 * 10 * UNIT < far < 10 * near


@pytest.mark.parametrize("change", ["shift", "answer", "order"])
def test_the_comparison_with_unipc_can_fail(change):
    noise, answers = drawn(10, 0)
    ours, theirs = both_unipc(10, flow_shift=3.0)
    near, far = (unipc(theirs.sigmas.numpy(), noise, answers, exact) for exact in (True, False))
    if change == "shift":
        ours, _ = both_unipc(10, flow_shift=3.001)
    if change == "answer":
        answers[4] += 1e-3
    if change == "order":
        predicted = ours._predicted
        ours._predicted = lambda past, step: predicted(replace(past, order=1), step)
    found = [latents for latents, _ in loop(ours, noise, answers)]
    for made in (near, far):
        assert not all(one.holds(latents) for one, latents in zip(made, found, strict=True))


@given(st.integers(1, 20), st.integers(0, 9))
def test_where_a_step_of_unipc_ends_is_diffusers_own(steps, seed):
    """From one latent, bit for bit."""
    ours, theirs = both_unipc(steps, flow_shift=3.0)
    noise, answers = drawn(steps, seed)
    latents = ours.start(noise)
    for step, answer in enumerate(answers):
        theirs._step_index = step
        expected = theirs.convert_model_output(torch.from_numpy(answer), sample=torch.from_numpy(latents))
        latents = ours.advance(answer, step, latents)
        np.testing.assert_array_equal(ours.estimate(), expected.numpy())


def test_a_loop_begins_anew():
    ours, _ = both_unipc(5)
    noise, answers = drawn(5, 0)
    first, again = ([latents for latents, _ in loop(ours, noise, answers)] for _ in range(2))
    np.testing.assert_array_equal(first, again)


# DPM-Solver++


def dpm(levels, flow, last, noise, answers, exact):
    """(latents, end) after each step, as in the paper: algorithm 2, whose last step is of first order where `last`.

    Args:
        levels: `[S + 1]`.
        flow: Whether answers are of a flow.
        last: Whether the last step is of first order.
        noise, answers: `[N]` and `[S, N]`.
        exact: Whether weights are rounded once, or each of their parts as diffusers has them.
    """
    steps, made, before = len(answers), [], None
    added = [Rounded(value) for value in levels.astype(np.float64)]
    share = [ONE - t if flow else ONE / (t * t + ONE).sqrt() for t in added]
    level = added if flow else [t * a for t, a in zip(added, share, strict=True)]
    ratio = [a.log() - s.log() if s.value else None for a, s in zip(share, level, strict=True)]
    weight = Rounded.once if exact else lambda value: value
    latents = Rounded(noise)
    for k, answer in enumerate(answers):
        answer = Rounded(answer)
        if flow:
            end = latents - level[k] * answer
        elif exact:
            end = weight(ONE / share[k]) * latents - added[k] * answer
        else:
            end = (latents - level[k] * answer) / share[k]
        h = None if ratio[k + 1] is None else ratio[k + 1] - ratio[k]
        growth = share[k + 1] * (Rounded(-1.0) if h is None else Rounded(-h.value, h.error).exp() - ONE)
        following = weight(level[k + 1] / level[k]) * latents - weight(growth) * end
        if k and not (last and k == steps - 1):
            slope = ONE / ((ratio[k] - ratio[k - 1]) / h)
            if exact:
                following = following - weight(HALF * growth * slope) * (end - before)
            else:
                following = following - HALF * growth * (slope * (end - before))
        latents, before = following, end
        made.append((latents, end))
    return made


def both_dpm(steps, **config):
    """(ours, diffusers' over our levels), set: of a flow they have the same bits, and else the rounding of a root."""
    ours, theirs = DPMSolver.of(config), diffusers.DPMSolverMultistepScheduler(**config)
    ours.set(steps)
    if not config.get("use_flow_sigmas"):
        products = DDIM.of(PLAIN)
        products.set(1000)
        theirs.alphas_cumprod = torch.from_numpy(products._products[::-1].copy())
    theirs.set_timesteps(steps)
    theirs.set_begin_index(0)
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
    np.testing.assert_allclose(
        ours._levels, theirs.sigmas.numpy(), rtol=0 if config.get("use_flow_sigmas") else 8 * UNIT
    )
    theirs.sigmas = torch.from_numpy(ours._levels.copy())
    return ours, theirs


def last_is_plain(steps, config):
    return (
        config.get("final_sigmas_type", "zero") == "zero"
        or config.get("euler_at_final", False)
        or (config.get("lower_order_final", True) and steps < 15)
    )


@given(
    st.integers(1, 40),
    st.sampled_from([{}, {"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"}])
    | st.builds(lambda shift: FLOW | {"flow_shift": shift}, st.floats(0.5, 12) | st.integers(1, 7)),
    st.sampled_from([{}, *({"final_sigmas_type": "sigma_min"} | more for more in (
        {}, {"euler_at_final": True}, {"lower_order_final": False},
    ))]),
    st.integers(0, 9),
)  # fmt: skip
@example(20, {}, {}, 0)
@example(20, FLOW | {"flow_shift": 3.0}, {}, 0)
def test_dpm_solver_is_within_the_rounding_of_diffusers(steps, config, final, seed):
    config = config | final
    ours, theirs = both_dpm(steps, **config)
    noise, answers = drawn(steps, seed)
    how = ours._levels, "use_flow_sigmas" in config, last_is_plain(steps, config), noise, answers
    near, far = (dpm(*how, exact) for exact in (True, False))
    found, expected = loop(ours, noise, answers), loop_of_diffusers(theirs, noise, answers)
    for k, ((latents, end), (other, _)) in enumerate(zip(found, expected, strict=True)):
        assert near[k][0].holds(latents) and near[k][1].holds(end), k
        assert far[k][0].holds(other), k


@pytest.mark.parametrize("config", [{}, FLOW | {"flow_shift": 3.0}], ids=["noise", "flow"])
def test_the_comparison_with_dpm_solver_is_narrow_and_can_fail(config):
    """Of the last latents: some units for each step, and a few times that for the parts that diffusers rounds."""
    noise, answers = drawn(10, 0)
    ours, _ = both_dpm(10, **config)
    how = ours._levels, "use_flow_sigmas" in config, True, noise, answers
    near, far = (dpm(*how, exact) for exact in (True, False))
    (most, _), (more, _) = near[-1], far[-1]
    assert most.error.max() < 40 * 10 * UNIT * abs(most.value).max() and more.error.max() < 10 * most.error.max()
    first, turned = loop(ours, noise, answers), answers.copy()
    turned[4] *= 1 + 1e-3
    ours._plain_at = lambda step: step != 3
    for other in (loop(both_dpm(10, **config)[0], noise, turned), loop(ours, noise, answers)):
        assert not all(one.holds(latents) for (one, _), (latents, _) in zip(far, other, strict=True))
    assert all(one.holds(latents) for (one, _), (latents, _) in zip(near, first, strict=True))


# DDIM


def ddim(products, after, noise, answers):
    """(latents, end) after each step: equation 12 of the paper, without added noise."""
    latents, made = Rounded(noise), []
    for product, then, answer in zip(products, after, answers, strict=True):
        product, then, noise_now = Rounded(product), Rounded(then), Rounded(answer)
        end = (latents - (ONE - product).sqrt() * noise_now) / product.sqrt()
        latents = then.sqrt() * end + (ONE - then).sqrt() * noise_now
        made.append((latents, end))
    return made


def both_ddim(steps, **config):
    """(ours, diffusers' over our products), set: `test_products_of_ddim` compares those."""
    ours, theirs = DDIM.of(PLAIN | config), diffusers.DDIMScheduler(**PLAIN, **config)
    ours.set(steps)
    theirs.set_timesteps(steps)
    theirs.alphas_cumprod[ours.timesteps.copy()] = torch.from_numpy(ours._products.copy())
    return ours, theirs


spaces = st.tuples(st.floats(1e-5, 0.01), st.floats(1e-5, 0.05))


@given(st.integers(1, 60), st.sampled_from([60, 1000, 1001]), spaces, st.integers(0, 9))
@example(1000, 1000, (0.0001, 0.02), 0)
def test_ddim_is_within_the_rounding_of_diffusers(steps, count, betas, seed):
    config = {"num_train_timesteps": count, "beta_start": betas[0], "beta_end": betas[1]}
    ours, theirs = both_ddim(steps, **config)
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
    noise, answers = drawn(steps, seed)
    expected = ddim(ours._products, ours._after, noise, answers)
    found, other = loop(ours, noise, answers), loop_of_diffusers(theirs, noise, answers)
    for k, ((latents, end), (seen, output)) in enumerate(zip(found, other, strict=True)):
        assert expected[k][0].holds(latents) and expected[k][1].holds(end), k
        assert expected[k][0].holds(seen) and expected[k][1].holds(output.pred_original_sample[0].numpy()), k


def test_ddim_has_the_bits_of_diffusers_but_for_square_roots(monkeypatch):
    """Which MKL does not take to the nearest number on every CPU."""
    nearest = lambda value, exponent: torch.from_numpy(np.asarray(np.sqrt(value.numpy())))  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "__pow__", lambda v, e: nearest(v, e) if e == 0.5 else v * v)
    for steps in (1, 7, 50, 250):
        ours, theirs = both_ddim(steps)
        noise, answers = drawn(steps, steps)
        found, expected = loop(ours, noise, answers), loop_of_diffusers(theirs, noise, answers)
        for (latents, end), (other, output) in zip(found, expected, strict=True):
            np.testing.assert_array_equal(latents, other)
            np.testing.assert_array_equal(end, output.pred_original_sample[0].numpy())


@given(st.integers(1, 1500), spaces)
@example(1000, (0.0001, 0.02))
def test_products_of_ddim(count, betas):
    """Torch's betas are up to three roundings off, ours up to one and that of the gap between them, which counts for
    every place; each factor is rounded once more, and each product. The bits are the same where torch fuses products.
    """
    theirs = diffusers.DDIMScheduler(beta_start=betas[0], beta_end=betas[1], num_train_timesteps=count, **PLAIN)
    found, largest = linear(*betas, count), max(betas)
    assert (abs(found - theirs.betas.numpy()) <= 8 * UNIT * largest).all()
    products = np.cumprod((1 - found).astype(np.float64)).astype(np.float32)
    factors = np.arange(1, count + 1)
    bound = (factors * (2 * UNIT + 8 * UNIT * largest) / (1 - largest) + 2 * UNIT) * products
    assert (abs(products - theirs.alphas_cumprod.numpy()) <= bound).all()
    exact = np.cumprod(1 - np.linspace(*np.array(betas, np.float32).astype(np.float64), count))
    assert (abs(products - exact) <= bound).all()


@pytest.mark.parametrize("change", ["betas", "answer"])
def test_the_comparison_with_ddim_can_fail(change):
    noise, answers = drawn(10, 0)
    ours, _ = both_ddim(10)
    expected = ddim(ours._products, ours._after, noise, answers)
    if change == "betas":
        ours, _ = both_ddim(10, beta_end=0.02001)
    if change == "answer":
        answers[4] *= 1 + 1e-4
    assert not all(e.holds(latents) for (e, _), (latents, _) in zip(expected, loop(ours, noise, answers), strict=True))


def test_more_steps_than_ddim_has():
    with pytest.raises(ValueError, match=r"`steps` is 8, expected at most 7"):
        DDIM.of({**PLAIN, "num_train_timesteps": 7}).set(8)


# CogVideoX's


VELOCITY = {"prediction_type": "v_prediction"}


def velocity_ddim(shares, after, noise, answers):
    """(latents, end) after each step, by angles: `x = cos end + sin noise` and `v = cos noise - sin end`.

    With them `x' = cos' end + sin' noise` is `sin' / sin x + sin(angle - angle') / sin end`. Each weight is rounded
    once, for which two units leave what float64 rounds before.
    """
    latents, made = Rounded(noise), []
    for share, then, answer in zip(shares, after, answers, strict=True):
        now, next_ = np.arccos(np.sqrt(share)), np.arccos(np.sqrt(then))
        weights = np.cos(now), np.sin(now), np.sin(next_) / np.sin(now), np.sin(now - next_) / np.sin(now)
        cosine, sine, kept, added = (Rounded.of(value, 0.0, 2) for value in weights)
        end = cosine * latents - sine * Rounded(answer)
        latents = kept * latents + added * end
        made.append((latents, end))
    return made


def both_velocity(steps, **config):
    """(ours, diffusers'), set."""
    ours, theirs = VelocityDDIM.of(VELOCITY | config), diffusers.CogVideoXDDIMScheduler(**VELOCITY, **config)
    ours.set(steps)
    theirs.set_timesteps(steps)
    return ours, theirs


def shares_of(theirs, steps):
    """(share of each step, share of what comes after it), as diffusers looks them up."""
    before = theirs.timesteps.numpy() - theirs.config.num_train_timesteps // steps
    products = theirs.alphas_cumprod.numpy()
    return products[theirs.timesteps.numpy()], np.where(before >= 0, products[before], 1.0)


@given(
    st.integers(1, 60),
    st.sampled_from([60, 1000, 1001]),
    st.tuples(st.floats(1e-4, 0.01), st.floats(1e-3, 0.05)),
    st.tuples(st.sampled_from([1.0, 3.0, 0.7]), st.booleans(), st.sampled_from(["leading", "linspace", "trailing"])),
    st.integers(0, 9),
)
@example(50, 1000, (0.00085, 0.012), (1.0, True, "trailing"), 0)
@example(1, 1000, (0.00085, 0.012), (1.0, True, "trailing"), 0)
@example(13, 60, (0.0078125, 0.03125), (1.0, False, "trailing"), 0)
@example(13, 60, (0.0078125, 0.03125), (3.0, True, "trailing"), 0)
def test_ddim_of_a_velocity_is_within_the_rounding_of_diffusers(steps, count, betas, kind, seed):
    shift, to_zero, spacing = kind
    ours, theirs = both_velocity(
        steps, num_train_timesteps=count, beta_start=betas[0], beta_end=betas[1], snr_shift_scale=shift,
        rescale_betas_zero_snr=to_zero, timestep_spacing=spacing,
    )  # fmt: skip
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
    noise, answers = drawn(len(ours.timesteps), seed)  # of some numbers diffusers makes one more; `clock` refuses those
    expected = velocity_ddim(*shares_of(theirs, steps), noise, answers)
    found, other = loop(ours, noise, answers), loop_of_diffusers(theirs, noise, answers)
    for k, ((latents, end), (seen, output)) in enumerate(zip(found, other, strict=True)):
        assert expected[k][0].holds(latents) and expected[k][1].holds(end), k
        assert expected[k][0].holds(seen) and expected[k][1].holds(output.pred_original_sample[0].numpy()), k


@pytest.mark.parametrize("change", ["betas", "shift", "answer"])
def test_the_comparison_with_ddim_of_a_velocity_can_fail(change):
    noise, answers = drawn(10, 0)
    ours, theirs = both_velocity(10)
    expected = velocity_ddim(*shares_of(theirs, 10), noise, answers)
    if change == "betas":
        ours, _ = both_velocity(10, beta_end=0.01201)
    if change == "shift":
        ours, _ = both_velocity(10, snr_shift_scale=3.001)
    if change == "answer":
        answers[4] *= 1 + 1e-4
    assert not all(e.holds(latents) for (e, _), (latents, _) in zip(expected, loop(ours, noise, answers), strict=True))


def test_steps_that_ddim_of_a_velocity_has_not():
    with pytest.raises(ValueError, match=r"`steps` is 8, expected at most 7"):
        VelocityDDIM.of({**VELOCITY, "num_train_timesteps": 7}).set(8)
    with pytest.raises(ValueError, match=r"`steps_offset` is 5, expected timesteps below 7; lower it"):
        VelocityDDIM.of({**VELOCITY, "num_train_timesteps": 7, "steps_offset": 5}).set(3)


# Which configs


def declared():
    """(family, class, config) of each scheduler that a family or one of its variants declares."""
    for name, family in FAMILIES.items():
        for variant in ({}, *family.variants.values()):
            kind = variant.get("scheduler", family.scheduler)
            yield name, kind, dict(variant.get("scheduler_config", family.scheduler_config))


def test_every_scheduler_of_a_family_needs_no_diffusers():
    """Under its own config, and under all entries that diffusers stores of it."""
    kinds = {kind.name: kind for kind in (FlowEuler, UniPC, DPMSolver, DDIM, VelocityDDIM)}
    seen = set()
    for family, kind, config in declared():
        stored = dict(getattr(diffusers, kind)(**config).config)
        assert kinds[kind].of(config) is not None, family
        assert kinds[kind].of(stored) is not None, family
        seen.add(kind)
    assert seen == kinds.keys()


@pytest.mark.parametrize(("kind", "config"), [
    *((UniPC, FLOW | change) for change in (
        {"solver_order": 3}, {"solver_type": "bh1"}, {"predict_x0": False}, {"lower_order_final": False},
        {"disable_corrector": [0]}, {"thresholding": True}, {"final_sigmas_type": "sigma_min"}, {"shift_terminal": 0.1},
        {"use_dynamic_shifting": True}, {"use_karras_sigmas": True}, {"prediction_type": "epsilon"},
        {"use_flow_sigmas": False}, {"use_flow_sigmas": 1}, {"flow_shift": 0}, {"flow_shift": "x"},
        {"flow_shift": float("nan")}, {"flow_shift": 10**400}, {"flow_shift": True}, {"num_train_timesteps": 0},
        {"num_train_timesteps": 1000.0}, {"solver_p": {}}, {"solver_order": [2]},
    )),
    *((DDIM, PLAIN | change) for change in (
        {"clip_sample": True}, {"clip_sample": None}, {"prediction_type": "v_prediction"}, {"thresholding": True},
        {"beta_schedule": "scaled_linear"}, {"trained_betas": [0.1]}, {"set_alpha_to_one": False}, {"steps_offset": 1},
        {"timestep_spacing": "trailing"}, {"rescale_betas_zero_snr": True}, {"beta_start": 0}, {"beta_end": 1},
        {"beta_start": "x"}, {"num_train_timesteps": True},
    )),
    *((DPMSolver, change) for change in (
        {"solver_order": 3}, {"solver_type": "heun"}, {"algorithm_type": "sde-dpmsolver++"}, {"thresholding": True},
        {"beta_schedule": "scaled_linear"}, {"trained_betas": [0.1]}, {"rescale_betas_zero_snr": True},
        {"variance_type": "learned"}, {"lambda_min_clipped": -5.1}, {"use_karras_sigmas": True},
        {"use_lu_lambdas": True}, {"prediction_type": "v_prediction"}, {"prediction_type": "flow_prediction"},
        {"use_flow_sigmas": True}, {"use_flow_sigmas": 0}, {"timestep_spacing": "x"}, {"steps_offset": -1},
        {"steps_offset": True}, {"beta_start": 0}, {"num_train_timesteps": 0}, {"flow_shift": 0},
        {"final_sigmas_type": None}, {"lower_order_final": 1},
    )),
    *((VelocityDDIM, VELOCITY | change) for change in (
        {"prediction_type": "epsilon"}, {"beta_schedule": "linear"}, {"trained_betas": [0.1]},
        {"set_alpha_to_one": False}, {"steps_offset": -1}, {"timestep_spacing": "x"}, {"rescale_betas_zero_snr": 1},
        {"beta_start": 0}, {"beta_end": 1}, {"snr_shift_scale": 0}, {"num_train_timesteps": 0},
        {"num_train_timesteps": 1, "rescale_betas_zero_snr": True},
    )),
    (UniPC, {}), (UniPC, {"use_flow_sigmas": True}), (DDIM, {}), (VelocityDDIM, {}),
])  # fmt: skip
def test_what_is_not_here_is_left_to_diffusers(kind, config):
    assert kind.of(config) is None


# Noise


def lengths(count, seed):
    """`[count]` float64: of the pair that each number belongs to, from torch's own uniform numbers."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(count, generator=generator).double().numpy()
    if count % BLOCK:
        uniform = uniform[: count - count % BLOCK]
        last = torch.rand(BLOCK, generator=generator).double().numpy()
    halves = uniform.reshape(-1, 2, BLOCK // 2)[:, [0, 0]].reshape(-1)
    if count % BLOCK:
        halves = np.concatenate([halves[: count - BLOCK], np.tile(last[: BLOCK // 2], 2)])
    return np.sqrt(-2 * np.log1p(-halves))


def assert_is_torch_s(found, expected, seed):
    """Within the bound that `noise.py` derives; below 16 numbers both round what two float64 functions give."""
    assert found.shape == expected.shape and found.dtype == expected.dtype == np.float32
    if found.size < BLOCK:
        bound = np.spacing(abs(expected))
    else:
        bound = (4 * np.pi + 6) * UNIT * lengths(found.size, seed).reshape(found.shape)
    assert (abs(found - expected) <= bound).all()


def torch_noise(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()


SEEDS = (0, 1, 2**32 + 5, -1, -(2**40), LOWEST_SEED, HIGHEST_SEED)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "shape", [(0,), (1,), (3, 5), (16,), (17,), (2, 15), (31,), (1, 4, 8), (1, 16, 128, 128), (99_999,)]
)
def test_noise_is_torch_s(shape, seed):
    """A last block that 16 does not divide is drawn anew; above 8192, blocks are made in parts."""
    assert_is_torch_s(noise_of(shape, seed), torch_noise(shape, seed), seed)


@given(st.integers(0, 300), st.integers(LOWEST_SEED, HIGHEST_SEED))
def test_noise_of_any_size_and_seed_is_torch_s(count, seed):
    assert_is_torch_s(normals(count, seed), torch_noise((count,), seed), seed)


@pytest.mark.parametrize("count", [3, 16, 40])
def test_the_comparison_of_noise_can_fail(count):
    expected = torch_noise((count,), 7)
    turned = normals(count, 7) * np.float32(1 + 64 * UNIT)
    for other in (normals(count, 8), turned, np.roll(normals(count, 7), 1)):
        with pytest.raises(AssertionError):
            assert_is_torch_s(other, expected, 7)


@pytest.mark.parametrize("seed", [LOWEST_SEED - 1, HIGHEST_SEED + 1, 10**400])
def test_a_seed_that_torch_does_not_take(seed):
    with pytest.raises(ValueError, match="Overflow"):
        torch.Generator().manual_seed(seed)
    with pytest.raises(ConfigError, match=r"seed has \d+ bits, expected at most 64; choose a smaller one"):
        normals(4, seed)


def test_noise_is_normal():
    """Moments of a million numbers, each within six of its own deviations."""
    found = normals(10**6, 3).astype(np.float64)
    for power, mean, deviation in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs((found**power).mean() - mean) < 6e-3 * deviation


# Without torch and diffusers


@pytest.mark.parametrize(("name", "given"), [
    ("shapes", ["--prompt", "a red circle left of a blue square"]),
    ("digits", ["--label", "3"]),
    ("videos", []),
])  # fmt: skip
def test_an_embedded_model_is_sampled_without_torch_and_diffusers(embedded, tmp_path, name, given):
    """To the bits that it has with them."""
    command = ["run", str(embedded(name)), *given, "--steps", "4", "--out"]
    absent = "import sys; sys.modules.update(torch=None, diffusers=None)\n"
    start = "from taylorseer_export.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    made = []
    for k, before in enumerate((absent, "")):
        out = tmp_path / f"{k}.safetensors"
        done = subprocess.run(
            [sys.executable, "-c", before + start, *command, str(out)], capture_output=True, text=True,
            cwd=Path(__file__).parents[1], check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        made.append(out.read_bytes())
    assert made[0] == made[1]


BITS = """
import sys, hashlib
import numpy as np
from taylorseer_export.runtime.noise import normals
from taylorseer_export.runtime.schedulers import FlowEuler
from taylorseer_export.runtime.ddim import DDIM, VelocityDDIM
from taylorseer_export.runtime.solvers import DPMSolver, UniPC

flow = {"use_dynamic_shifting": True}
unipc = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
print(np.__version__)
velocity = VelocityDDIM.of({"prediction_type": "v_prediction"})
others = UniPC.of(unipc), DPMSolver.of({}), DPMSolver.of(unipc), DDIM.of({"clip_sample": False}), velocity
for made, more in ((FlowEuler.of(flow), {"mu": 0.7}), *((one, {}) for one in others)):
    total = hashlib.sha256()
    for steps in (7, 35, 50):
        made.set(steps, np.linspace(1, 1 / steps, steps) if more else None, **more)
        latents = made.start(normals(4096, 3).reshape(1, 4, 32, 32))
        for step in range(steps):
            latents = made.advance(normals(4096, step).reshape(latents.shape), step, latents)
            total.update(latents.tobytes())
    print(made.name, made.timesteps.dtype, latents.dtype, total.hexdigest())
"""


def test_numpy_1_makes_the_same_bits():
    """Triton's Python backend of 2024 runs numpy 1.26, where a number of Python makes float64 of a float32."""
    older = Path(sys.prefix) / "triton"
    if not (older / "numpy").is_dir():
        pytest.skip(f"{older} has no numpy 1.26; `make .venv` puts it there beside the Triton server")
    root = Path(__file__).resolve().parents[1]
    said = []
    for path in (f"{root}", f"{older}:{root}"):
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", BITS], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines())
    (newer, *bits), (old, *same) = said
    assert newer.startswith("2.") and old.startswith("1.26") and bits == same
