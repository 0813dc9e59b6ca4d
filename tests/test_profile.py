"""Profiles: calibrated plans kept beside a bundle's engines, each in a sealed file of its own."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from harness import as_arrays, open_slot
from profiles import PLAN, made, weights_of

from taylorseer_export import cli
from taylorseer_export.bundle.profile import profile_names, read_profile, write_profile
from taylorseer_export.bundle.store import open_bundle
from taylorseer_export.errors import BundleError, ConfigError
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.runtime.denoiser import Denoiser


@pytest.fixture
def bundle(bundles, tmp_path):
    """A copy of the bundle `dit` that a test may add to."""
    return open_bundle(shutil.copytree(bundles("dit"), tmp_path / "dit"))


def test_a_profile_comes_back_and_the_bundle_still_opens(bundle):
    profile = made(bundle.manifest)
    write_profile(bundle, profile)
    write_profile(bundle, made(bundle.manifest, "other"))
    assert read_profile(bundle, "fast") == profile.seal()
    assert profile_names(bundle) == ["fast", "other"]
    assert open_bundle(bundle.folder).manifest == bundle.manifest


def test_a_failed_write_leaves_the_old_profile(bundle, monkeypatch):
    write_profile(bundle, made(bundle.manifest))
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_profile(bundle, made(bundle.manifest, samples=9))
    assert read_profile(bundle, "fast").samples == 8
    assert [path.name for path in (bundle.folder / "profiles").iterdir()] == ["fast.json"]


def test_a_profile_that_could_not_be_written_is_refused_before_anything_is_run(bundle, monkeypatch, capsys):
    """A bundle in the cache of a hub may be closed; nothing is sampled for a profile that has no place."""
    monkeypatch.setattr("taylorseer_export.commands.calibrate.open_denoiser", lambda *_: SimpleNamespace(bundle=bundle))
    command = ["calibrate", str(bundle.folder), "--name", "fast", "--full-steps", "4"]
    (bundle.folder / "profiles").write_text("x")
    assert cli.main(command) == 2
    assert "profiles is no folder, expected one for profile `fast`; remove it" in capsys.readouterr().err
    (bundle.folder / "profiles").unlink()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert cli.main(command) == 2
    assert "is not writable, expected it for profile `fast`; copy the bundle first" in capsys.readouterr().err


def test_every_changed_byte_is_noticed(bundle):
    path = write_profile(bundle, made(bundle.manifest))
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(BundleError, match=r"calibrate again|upgrade"):
            read_profile(bundle, "fast")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights_sha256": "0" * 64}, "000000000000 module"),
        ({"family": "flux"}, "is of flux"),
        ({"granularity": "last"}, "expected dit .* module"),
        ({"order": 4, "weights": weights_of(Plan(PLAN), 4)}, "order 4, expected at most 2"),
    ],
)
def test_a_profile_of_another_model_is_refused(bundle, changes, message):
    write_profile(bundle, made(bundle.manifest, **changes))
    with pytest.raises(BundleError, match=message):
        read_profile(bundle, "fast")


def test_a_loop_of_another_length_is_refused(bundle):
    write_profile(bundle, made(bundle.manifest))
    with pytest.raises(ConfigError, match=r"8 steps long, expected 50 .*--steps 50"):
        Denoiser(bundle.manifest, None, bundle).forecasts(profile="fast", steps=50)


def test_the_command_line_refuses_them_in_one_sentence(bundle, capsys):
    folder = str(bundle.folder)
    write_profile(bundle, made(bundle.manifest, "short"))
    write_profile(bundle, made(bundle.manifest, "other", weights_sha256="0" * 64))
    for arguments, expected in (
        (["run", folder, "--profile", "short", "--steps", "9"], "is 8 steps long, expected 9 (steps)"),
        (["run", folder, "--profile", "other"], "is of dit 000000000000 module"),
        (["evaluate", folder, "--steps", "8"], "is of dit 000000000000 module"),
    ):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1


def test_a_renamed_file_is_refused(bundle):
    write_profile(bundle, made(bundle.manifest)).rename(bundle.folder / "profiles" / "slow.json")
    with pytest.raises(BundleError, match="profile `fast`, expected `slow`"):
        read_profile(bundle, "slow")


@pytest.mark.parametrize("name", ["", "../up", "a b", "Fast", "x" * 65, ".hidden"])
def test_names_are_plain(bundle, name):
    with pytest.raises(ConfigError, match="lower-case letters"):
        write_profile(bundle, made(bundle.manifest, name))


def test_an_unknown_profile_names_those_there_are(bundle):
    with pytest.raises(ConfigError, match=r"it has none.*calibrate"):
        read_profile(bundle, "fast")
    write_profile(bundle, made(bundle.manifest))
    with pytest.raises(ConfigError, match=r"expected one of this bundle \(fast\)"):
        read_profile(bundle, "slow")


def test_weights_must_fit_the_plan(bundle):
    with pytest.raises(ValueError, match="one entry per snapshot"):
        made(bundle.manifest, weights=((),) * len(PLAN))


@pytest.mark.parametrize("name", ["flux", "dit"])  # snapshots and derivatives
def test_weights_of_a_profile_are_those_of_the_forecast(onnx, tiny, name):
    """The paper's weights given step by step change nothing; others do. Both layouts."""
    plan, order = Plan("FF.F...F.."), 2
    inputs = tiny(name).inputs(len(plan), batch=2)
    latents, timestep, conditioning = inputs
    slot = open_slot(onnx(name), inputs)

    def predictions(weights):
        slot.start(as_arrays(conditioning), Forecasts(plan, order, weights=weights), timestep.float().numpy())
        return np.stack([slot.step(x.numpy()) for x in latents])

    usual, given = predictions(None), predictions(weights_of(plan, order))
    gains = np.array(slot.gains).reshape(-1, *[1] * (usual.ndim - 1))
    assert (np.abs(given - usual) <= 64 * 2.0**-24 * gains * np.abs(usual).max()).all()
    reuse = tuple((0.0,) * (len(w) - 1) + (1.0,) if w else () for w in weights_of(plan, order))
    assert np.abs(predictions(reuse) - usual).max() > 1e-3
    slot.start(as_arrays(conditioning), Forecasts(plan, 0), timestep.float().numpy())
    zeroth = np.stack([slot.step(x.numpy()) for x in latents])
    assert (np.abs(predictions(reuse) - zeroth) <= 64 * 2.0**-24 * gains * np.abs(usual).max()).all()


def test_weights_of_another_plan_are_refused():
    with pytest.raises(ConfigError, match="expected 2, one for each snapshot"):
        Forecasts(Plan("FF.."), 2, weights=((), (), (1.0,), (1.0,)))


def test_the_drop_in_runs_a_profile(bundle, onnx, tiny):
    """Its calls equal a slot's with the profile's weights; a plan beside it, and a loop too long, are refused."""
    reuse = tuple((0.0,) * (len(w) - 1) + (1.0,) if w else () for w in weights_of(Plan(PLAN), 1))
    write_profile(bundle, made(bundle.manifest, weights=reuse))
    denoiser = Denoiser(bundle.manifest, onnx("dit").runner, bundle)
    latents, timestep, conditioning = inputs = tiny("dit").inputs(len(PLAN), batch=2)
    slot = open_slot(denoiser, inputs)
    slot.start(as_arrays(conditioning), Forecasts(Plan(PLAN), 1, weights=reuse), timestep.float().numpy())
    expected = np.stack([slot.step(x.numpy()) for x in latents])
    transformer = denoiser.as_transformer(profile="fast")
    seen = [
        transformer(hidden_states=x, timestep=t.expand(2), **conditioning, return_dict=False)[0].numpy()
        for x, t in zip(latents, timestep, strict=True)
    ]
    np.testing.assert_array_equal(np.stack(seen), expected)
    assert list(transformer.executed.values()) == [PLAN]
    with transformer.request(timesteps=timestep.float().numpy()):
        seen = [
            transformer(hidden_states=x, timestep=t.expand(2), **conditioning, return_dict=False)[0].numpy()
            for x, t in zip(latents, timestep, strict=True)
        ]
    np.testing.assert_array_equal(np.stack(seen), expected)
    with pytest.raises(ConfigError, match="8 steps long, expected 5"):
        transformer.begin(steps=5)
    with pytest.raises(ConfigError, match="plan is given beside profile"):
        denoiser.as_transformer(profile="fast", plan="FF..")
    with pytest.raises(ConfigError, match="8 steps long, expected 20"):
        denoiser.as_transformer(profile="fast", steps=20)
