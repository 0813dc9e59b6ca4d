"""Guidance on two ranks: each runs one branch, and what they go on with is what one process has."""

# Shapes: S steps, B batch

import subprocess
import sys

import numpy as np
import oracle
import pytest
import torch
from harness import allowed, eager_denoiser
from kill_ranks import begun
from oracle import assert_close
from ranks import on_ranks, replay_on_ranks
from safetensors.torch import load_file
from tiny_bundles import options_of, trace_of

from taylorseer_export.compile.eager import eager_modules
from taylorseer_export.compile.export import describe, draft
from taylorseer_export.errors import ConfigError, StepError
from taylorseer_export.method import Guard
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.eager import EagerRunner
from taylorseer_export.runtime.sampling import Loop, sample
from taylorseer_export.runtime.tensors import tensor_request
from taylorseer_export.runtime.trajectory import random_conditioning

PLAN, ORDER = "FF.F..", 2
SMALL = {
    "wan": {"frames": 3, "rows": 2, "columns": 3},
    "qwen-image": {"image_tokens": 15},
    "hunyuan-channels": {"frames": 3, "rows": 2, "columns": 3},
    "hunyuan-1.5": {"frames": 2, "rows": 2, "columns": 3},
}


def ranks_of(made):
    """Group -> denoiser over the eager graphs of a draft, of a rank that runs one branch."""
    manifest, modules = describe(made, "eager"), eager_modules(made)
    return lambda group: Denoiser(manifest, EagerRunner(modules, manifest.graphs), group=group, guidance=True)


def request_of(denoiser, sizes, seeds=(3, 4), scale=3.0):
    texts = {"text_tokens": 4} if "text_tokens" in denoiser.manifest.dimensions else {}
    typical = {name: dimension.typical for name, dimension in denoiser.manifest.dimensions.items()}
    tensors = random_conditioning(denoiser, {**typical, **texts, **sizes, "batch": 1}, guided=True)
    return tensor_request(denoiser, tensors, seeds, sizes, (3, 5) if "image_tokens" in sizes else None, scale)


@pytest.mark.parametrize("name", SMALL)
def test_two_ranks_make_the_bits_of_one_process_by_one_exchange_a_step(drafts, name):
    """A whole loop, of two samples, where the model is called for each branch."""
    made = drafts(name, "module", "snapshots", ORDER)

    def work(denoiser):
        return sample(denoiser, request_of(denoiser, SMALL[name]), denoiser.forecasts(plan=PLAN, order=ORDER))

    (alone,) = on_ranks(1, lambda group: work(eager_denoiser(made)))  # in a thread, as the ranks are
    groups = []

    def one(group):
        groups.append(group)
        return work(ranks_of(made)(group))

    for result in on_ranks(2, one):
        assert result.executed == PLAN == alone.executed
        assert np.array_equal(result.latents, alone.latents)
    assert [group.sent for group in groups] == [len(PLAN) * alone.latents.nbytes] * 2


@pytest.mark.parametrize("ranks", [2, 4])
def test_halves_of_a_batch_are_branches(drafts, tiny, ranks):
    """One call of one process, on two ranks; or on four, of which each two share out the rows of their branch."""
    made = drafts("plain", "residual", "derivatives", ORDER)
    if ranks == 4:
        options = options_of("residual", "derivatives", ORDER, engine="inductor", parallel="gather", degree=2)
        made = draft(trace_of("plain", tiny("plain").folder, options), options)
    model, inputs = tiny("plain").model, tiny("plain").inputs(len(PLAN), batch=2, height=2, width=5)
    seen = replay_on_ranks(made, inputs, PLAN, ORDER, guidance=True)
    assert len(seen) == ranks and all(torch.equal(other, seen[0]) for other in seen)
    reference = oracle.replay(model, *inputs, PLAN, ORDER, "residual")
    bound = allowed(model, reference, PLAN, ORDER)
    assert_close(f"{ranks} ranks", seen[0], reference, bound)
    with pytest.raises(AssertionError, match="differs by"):
        assert_close("swapped branches", seen[0].flip(1), reference, bound)
    with pytest.raises(StepError, match=r"size `batch` is 3, expected an even one, whose first half"):
        replay_on_ranks(made, tiny("plain").inputs(1, batch=3, height=2, width=5), "F", guidance=True)


def test_a_guard_decides_as_in_one_process(drafts, tiny):
    """By all samples of the one call of both halves."""
    made, plan = drafts("plain", "last", "snapshots", ORDER, guards=("fbcache",)), "FF......"
    inputs = tiny("plain").inputs(len(plan), batch=2)

    def alone(threshold):
        slot, latents = begun(eager_denoiser(made), inputs, plan, guard=Guard("fbcache", threshold))
        return [slot.step(latent) for latent in latents], slot

    threshold = float(np.median([error for error in alone(1e30)[1].errors if error == error]))
    reference, slot = alone(threshold)
    assert 0 < slot.executed[2:].count("F") < 6
    guarded = replay_on_ranks(made, inputs, plan, guidance=True, guard=Guard("fbcache", threshold))
    assert [executed for _, executed in guarded] == [slot.executed] * 2
    bound = 2 * allowed(tiny("plain").model, torch.from_numpy(np.stack(reference)), slot.executed, ORDER)
    assert_close("guarded", guarded[0][0], torch.from_numpy(np.stack(reference)), bound)


def test_the_first_of_two_calls_decides_for_both(drafts):
    made = drafts("wan", "last", "snapshots", ORDER, guards=("fbcache",))

    def work(denoiser, threshold):
        guard = Guard("fbcache", threshold)
        forecasts = denoiser.forecasts(plan="FF......", order=ORDER, guard=guard)
        return sample(denoiser, request_of(denoiser, SMALL["wan"]), forecasts)

    (all_forecast,) = on_ranks(1, lambda group: work(eager_denoiser(made), 1e30))
    threshold = float(np.median([error for error in all_forecast.errors if error == error]))
    (alone,) = on_ranks(1, lambda group: work(eager_denoiser(made), threshold))
    assert 0 < alone.executed[2:].count("F") < 6
    for result in on_ranks(2, lambda group: work(ranks_of(made)(group), threshold)):
        assert result.executed == alone.executed
        np.testing.assert_array_equal(result.errors, alone.errors)  # NaN where nothing was asked
        assert np.array_equal(result.latents, alone.latents)


def test_what_two_ranks_cannot_do_is_refused_on_both(drafts):
    made = drafts("wan", "module", "snapshots", ORDER)

    def off(group):
        denoiser = ranks_of(made)(group)
        sample(denoiser, request_of(denoiser, SMALL["wan"], scale=1.0), denoiser.forecasts(plan="FF"))

    def other_noise(group):
        denoiser = ranks_of(made)(group)
        sample(denoiser, request_of(denoiser, SMALL["wan"], (group.rank,)), denoiser.forecasts(plan="FF"))

    def other_plan(group):
        denoiser = ranks_of(made)(group)
        sample(denoiser, request_of(denoiser, SMALL["wan"]), denoiser.forecasts(plan="F." if group.rank else "FF"))

    def other_scale(group):
        denoiser = ranks_of(made)(group)
        sample(denoiser, request_of(denoiser, SMALL["wan"], scale=2.0 + group.rank), denoiser.forecasts(plan="FF"))

    def full(*given):
        raise StepError("no room")

    def no_room(group):
        denoiser = ranks_of(made)(group)
        loop = Loop(denoiser, request_of(denoiser, SMALL["wan"]), denoiser.forecasts(plan="FF"))
        branches = loop.open(denoiser)
        if group.rank:
            branches.slots[0].start = full
        loop.begin(branches)

    for work, said in (
        (
            other_scale,
            r"`latents after a step \(give all ranks one guidance scale\)` of rank 1 is float32 .*, expected",
        ),
        (no_room, r"^(rank 1 did not begin the request \(no room\), expected all ranks to; mend that there|no room)$"),
        (off, r"guidance of this request is off .*, expected two predictions in a step"),
        (lambda group: ranks_of(made)(group).as_transformer(), r"a drop-in is asked of ranks that run one branch"),
        (other_noise, r"`latents` of rank 1 is float32 .*, expected float32 .* as of rank 0; start all ranks alike"),
        (other_plan, r"`plan` of rank 1 is .*, expected .* as of rank 0; start all ranks alike"),
    ):
        for error in on_ranks(2, work):
            with pytest.raises((ConfigError, StepError), match=said):
                raise error
    with pytest.raises(ConfigError, match=r"--parallel guidance is asked of 3 ranks, expected 2, .*per-node 2"):
        raise on_ranks(3, ranks_of(made))[0]
    with pytest.raises(ConfigError, match=r"--parallel guidance is asked of 1 rank, expected 2"):
        ranks_of(made)(None)


def test_a_rank_that_leaves_its_branch_is_named(drafts):
    """In mid-loop, where the other one waits for its prediction."""
    made = drafts("wan", "module", "snapshots", ORDER)

    def work(group):
        denoiser = ranks_of(made)(group)

        def leave(loop):
            if group.rank == 1 and loop.step == 2:
                raise KeyError("left")

        sample(denoiser, request_of(denoiser, SMALL["wan"]), denoiser.forecasts(plan=PLAN), on_step=leave)

    error, other = on_ranks(2, work, timeout=3.0)
    assert isinstance(error, StepError) and isinstance(other, KeyError)
    assert "rank 1 of 2 has died or is late after " in str(error)


@pytest.mark.slow
def test_torchrun_draws_the_bits_of_one_process(embedded, tmp_path):
    """ONNX Runtime, which has no collectives: two processes sample with the embedded Wan, and one writes."""
    drawn = ["-m", "taylorseer_export", "run", str(embedded("videos")), "--steps", "4", "--seed", "5"]
    drawn += ["--threads", "1", "--guidance-scale", "3"]
    alone, both = tmp_path / "alone.safetensors", tmp_path / "both.safetensors"
    done = subprocess.run([sys.executable, *drawn, "--out", str(alone)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, *drawn, "--out", str(both), "--parallel", "guidance"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    assert torch.equal(load_file(both)["latents"], load_file(alone)["latents"])
