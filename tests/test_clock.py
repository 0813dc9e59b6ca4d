"""The scheduler of a bundle: its loop is the one that a pipeline of diffusers runs, or one sentence says why not."""

import copy
import subprocess
import sys
import warnings

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taylorseer_export.bundle.schedulers import SCHEDULERS
from taylorseer_export.errors import BundleError, ConfigError, StepError, TaylorSeerError
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.runtime.clock import clock
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.sampling import Loop, Request, sample
from taylorseer_export.runtime.schedulers import FlowEuler
from taylorseer_export.runtime.slot import Slot
from taylorseer_export.runtime.tensors import check_guidance, tensor_request

STEPS = 5
PLAN = Forecasts(Plan("FF.FF"), 1)
SHIFTED = {k: v for k, v in diffusers.FlowMatchEulerDiscreteScheduler().config.items() if not k.startswith("_")}
SHIFTED |= {"use_dynamic_shifting": True}
# Those that cannot run one step per timestep, and those that ask for a package that is none of this one's.
REFUSED = {
    "CogVideoXDPMScheduler": (BundleError, r"does not step by its config \(.*missing .* arguments"),
    "CosineDPMSolverMultistepScheduler": (BundleError, r"is not usable \(.*torchsde"),
    "DPMSolverSDEScheduler": (BundleError, r"is not usable \(.*torchsde"),
    "FlowMatchHeunDiscreteScheduler": (BundleError, r"sets no timesteps for 5 steps \(.*sigmas"),
    "HeunDiscreteScheduler": (ConfigError, r"^HeunDiscreteScheduler sets 9 timesteps for 5 steps, expected one for"),
    "KDPM2AncestralDiscreteScheduler": (ConfigError, r"sets 9 timesteps for 5 steps"),
    "KDPM2DiscreteScheduler": (ConfigError, r"sets 9 timesteps for 5 steps, expected one for each; use the bundle in"),
    "PNDMScheduler": (ConfigError, r"sets 14 timesteps for 5 steps"),
    "SCMScheduler": (BundleError, r"sets no timesteps for 5 steps \(.*\), expected .* ask for another number of steps"),
}
# Those that add noise on the way, which a pipeline draws from what the whole process shares.
NOISY = {
    "CMStochasticIterativeScheduler", "DDPMParallelScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler",
    "FlowMatchLCMScheduler", "LCMScheduler", "LTXEulerAncestralRFScheduler", "SASolverScheduler", "TCDScheduler",
}  # fmt: skip

# What is left to diffusers: of its defaults that class is here, and `test_schedulers.py` holds it to a bound.
ORDER = {"DPMSolverMultistepScheduler": {"solver_order": 3}}


@pytest.fixture
def sampled_by(eager):
    """(scheduler, config) -> a denoiser of the tiny DiT with that scheduler."""

    def made(name, config):
        known = eager("dit")
        sampling = known.manifest.sampling.model_copy(update={"scheduler": name, "config": config})
        return Denoiser(known.manifest.model_copy(update={"sampling": sampling}), known.runner)

    return made


def request(seed=0):
    noise = np.random.default_rng(seed).standard_normal((2, 4, 8, 8)).astype(np.float32)
    return Request(noise, {"class_labels": np.array([1, 2])}, False, 1.0, 0, 0)


def as_a_pipeline_does(denoiser, asked):
    """The loop of diffusers' DiT pipeline, over the same engines."""
    scheduler = getattr(diffusers, denoiser.manifest.sampling.scheduler).from_config(denoiser.manifest.sampling.config)
    flow = "FlowMatch" in type(scheduler).__name__
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS)) if flow else scheduler.set_timesteps(STEPS)
    latents = torch.from_numpy(asked.latents) * getattr(scheduler, "init_noise_sigma", 1.0)
    slot: Slot = denoiser.slot(denoiser.sizes(asked.latents.shape, asked.conditioning))
    slot.start(asked.conditioning, PLAN, scheduler.timesteps.numpy().astype(np.float32))
    for timestep in scheduler.timesteps:
        given = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        noise_pred = torch.from_numpy(slot.step(given.numpy()))[:, : latents.shape[1]]
        latents = scheduler.step(noise_pred, timestep, latents).prev_sample
    return latents.numpy()


@pytest.mark.parametrize("name", sorted(SCHEDULERS - {"none"}))
def test_a_loop_is_that_of_a_pipeline(sampled_by, name):
    """Of schedulers that scale what the transformer is given, too."""
    denoiser = sampled_by(name, ORDER.get(name, {}))
    if name in REFUSED:
        kind, text = REFUSED[name]
        with pytest.raises(kind, match=text) as error:
            sample(denoiser, request(), PLAN)
        assert str(error.value).isprintable()
        return
    found = sample(denoiser, request(), PLAN).latents
    torch.manual_seed(1)
    assert (sample(denoiser, request(), PLAN).latents == found).all(), "noise on the way is the request's own"
    if name not in NOISY:
        np.testing.assert_array_equal(found, as_a_pipeline_does(denoiser, request()))


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDIMScheduler"])
def test_the_comparison_can_fail(sampled_by, name):
    denoiser = sampled_by(name, {})
    assert (sample(denoiser, request(1), PLAN).latents != as_a_pipeline_does(denoiser, request())).any()


@pytest.mark.parametrize("name", sorted(NOISY))
def test_a_look_ahead_draws_nothing(sampled_by, name):
    """What would come of a prediction, asked between two steps, changes no step."""
    denoiser = sampled_by(name, {})
    plain, asked = (Loop(denoiser, request(), PLAN) for _ in range(2))
    answer = np.full(request().latents.shape, 0.5, np.float32)
    for _ in range(STEPS):
        ahead = asked.preview(answer)
        for loop in (plain, asked):
            loop.accept(answer)
        np.testing.assert_array_equal(ahead, asked.latents)
    np.testing.assert_array_equal(plain.latents, asked.latents)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "num_train_timesteps": st.sampled_from([1, 3, 1000]),
            "shift": st.floats(0.1, 20) | st.integers(1, 7),
            "use_dynamic_shifting": st.booleans(),
            "shift_terminal": st.sampled_from([None, 0.02, 0.5]),
            "invert_sigmas": st.booleans(),
            "time_shift_type": st.sampled_from(["exponential", "linear"]),
        },
    ),
    st.integers(1, 60),
    st.booleans(),
    st.floats(0.1, 3),
)
def test_euler_s_rule_is_diffusers_own_bit_for_bit(config, steps, spaced, mu):
    ours, theirs = FlowEuler.of(config), diffusers.FlowMatchEulerDiscreteScheduler(**config)
    assert ours is not None
    sigmas, mu = (
        np.linspace(1.0, 1.0 / steps, steps) if spaced else None,
        mu if ours._known.use_dynamic_shifting else None,
    )
    ours.set(steps, sigmas, mu)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a schedule that ends at once
        theirs.set_timesteps(None if spaced else steps, sigmas=sigmas, mu=mu)
    theirs.set_begin_index(0)  # as pipelines do: of equal timesteps the first is meant
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
    draw = np.random.default_rng(steps)
    noise, *answers = draw.standard_normal((steps + 1, 2, 3)).astype(np.float32)
    latents, expected = ours.start(noise), torch.from_numpy(noise)
    for step, answer in enumerate(answers):
        clean = expected - theirs.sigmas[step] * torch.from_numpy(answer)
        expected = theirs.step(torch.from_numpy(answer), theirs.timesteps[step], expected).prev_sample
        latents = ours.advance(answer, step, latents)
        np.testing.assert_array_equal(latents, expected.numpy())
        np.testing.assert_array_equal(ours.estimate(), clean.numpy())


@pytest.mark.parametrize(
    "config",
    [
        {"use_karras_sigmas": True}, {"stochastic_sampling": True}, {"use_beta_sigmas": "x"}, {"shift": "x"},
        {"shift": True}, {"time_shift_type": "x"}, {"num_train_timesteps": 0}, {"base_shift": None},
    ],
)  # fmt: skip
def test_what_is_not_here_is_left_to_diffusers(config):
    assert FlowEuler.of(config) is None


def test_euler_s_rule_needs_neither_torch_nor_diffusers():
    code = "from taylorseer_export.runtime.schedulers import FlowEuler as F; import sys; F.of({}).set(4); "
    code += "print(sorted({'torch', 'diffusers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


HOSTILE = (None, "x", -1, 0, 1e308, -1e308, 10**40, [], ["x"], {}, True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of arithmetic in schedulers, on numbers that are none
@pytest.mark.parametrize(("name", "config"), [
    ("DDIMScheduler", dict(diffusers.DDIMScheduler().config)),
    ("EulerDiscreteScheduler", dict(diffusers.EulerDiscreteScheduler().config)),
    ("UniPCMultistepScheduler", dict(diffusers.UniPCMultistepScheduler(use_flow_sigmas=True).config)),
    ("FlowMatchEulerDiscreteScheduler", SHIFTED),
    ("FlowMatchLCMScheduler", dict(diffusers.FlowMatchLCMScheduler().config)),
])  # fmt: skip
def test_any_entry_of_a_config_is_refused_in_one_sentence_or_runs(sampled_by, name, config):
    """At the loop's beginning, before the transformer is called, as far as it shows there; numbers are finite."""
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    denoiser, asked = sampled_by(name, plain), request()
    answer = np.full(asked.latents.shape, 0.5, np.float32)
    refused = ran = 0
    for key in plain:
        for value in HOSTILE:
            sampling = denoiser.manifest.sampling.model_copy(update={"config": {**plain, key: copy.copy(value)}})
            changed = Denoiser(denoiser.manifest.model_copy(update={"sampling": sampling}), denoiser.runner)
            try:
                if key == "num_train_timesteps":
                    type(sampling).model_validate(sampling.model_dump())  # as the manifest does
                loop = Loop(changed, asked, PLAN)
                for _ in range(STEPS):
                    loop.accept(answer)
                assert np.isfinite(loop.latents).all(), (key, value)
                ran += 1
            except (TaylorSeerError, ValueError) as error:
                assert isinstance(error, TaylorSeerError) or key == "num_train_timesteps", (key, value, error)
                assert str(error).isprintable() or key == "num_train_timesteps", (key, value)
                refused += 1
    assert refused > 10 and ran > 10, (refused, ran)


def test_a_shift_without_its_numbers(sampled_by):
    for change in ({"max_image_seq_len": 256}, {"base_shift": None}, {"base_image_seq_len": "x"}):
        denoiser = sampled_by("FlowMatchEulerDiscreteScheduler", {**SHIFTED, "base_image_seq_len": 256, **change})
        with pytest.raises(
            BundleError, match=r"config of FlowMatchEulerDiscreteScheduler sets no timesteps for 5 step"
        ):
            clock(denoiser.manifest, request().latents.shape, STEPS)


def test_latents_that_a_scheduler_breaks(sampled_by, monkeypatch):
    denoiser = sampled_by("DDIMScheduler", {})
    loop = Loop(denoiser, request(), PLAN)
    loop.accept(np.full(request().latents.shape, 0.5, np.float32))
    before = loop.latents.copy()
    monkeypatch.setattr(loop._scheduler, "advance", lambda *_: np.full((2, 4, 8, 8), np.nan, np.float32))
    with pytest.raises(StepError, match=r"latents after step 1 of DDIMScheduler are NaN or infinite, expected finite"):
        loop.accept(np.full(request().latents.shape, 0.5, np.float32))
    assert loop.step == 1 and (loop.latents == before).all()


# Guidance


@pytest.mark.parametrize(
    ("guidance", "scale", "negative", "expected"),
    [
        (
            "none",
            3.0,
            False,
            r"guidance scale is 3 for dit-eager, expected none: this model has no guidance; leave it out",
        ),
        ("none", 1.0, False, "this model has no guidance"),
        (
            "branches",
            3.0,
            False,
            r"guidance scale is 3 without `negative_` inputs, expected them to be guided away from",
        ),
        ("batched", 0.0, False, "without `negative_` inputs"),
        ("branches", 3.0, True, None),
        ("branches", 1.0, False, None),
        ("embedded", 3.0, False, None),
        ("none", None, False, None),
        ("branches", None, False, None),
    ],
)
def test_a_guidance_scale_is_used_or_refused(eager, guidance, scale, negative, expected):
    known = eager("dit").manifest
    manifest = known.model_copy(update={"sampling": known.sampling.model_copy(update={"guidance": guidance})})
    if expected is None:
        check_guidance(manifest, scale, negative)
        return
    with pytest.raises(ConfigError, match=expected):
        check_guidance(manifest, scale, negative)


def test_a_request_that_is_not_guided_says_so(eager):
    with pytest.raises(ConfigError, match=r"guidance scale is 2 without `negative_` inputs"):
        tensor_request(eager("dit"), {"class_labels": np.array([1])}, guidance_scale=2.0)
