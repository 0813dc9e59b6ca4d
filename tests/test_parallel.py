"""Ranks: a model that is shared out over several gives what it gives alone, and sends what its graphs say."""

# Shapes: S steps, B batch

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from harness import allowed, as_arrays, eager_denoiser, run, toy_trace
from images_api import GENERATIONS, asked, got, models_over, serving
from kill_ranks import begun, killed, killed_under_torchrun
from oracle import assert_close
from parallel_page import rows_sent
from parity_on_ranks import ORDER, PLAN, fixed_size, parallel_options, shared_out, traced_for_ranks, usual, wide
from ranks import Counting, denoisers_on_ranks, following, on_ranks, replay_on_ranks, sound
from recorder import Recorder
from safetensors.torch import load_file, save_file
from tiny_bundles import options_of, trace_of
from tiny_models import MODELS
from tiny_pipelines import flux_pipeline
from torch import distributed

from taylorseer_export.bundle.manifest import Sections
from taylorseer_export.bundle.store import open_bundle
from taylorseer_export.compile import torch_tensorrt
from taylorseer_export.compile.eager import eager_modules
from taylorseer_export.compile.export import check_options, describe, draft, write_bundle
from taylorseer_export.errors import BuildError, BundleError, ConfigError, ExportError, RankError, StepError
from taylorseer_export.graph.shard import counted, sent, shard
from taylorseer_export.method import Forecasts, Guard, Plan
from taylorseer_export.runtime.adapter import Adapter
from taylorseer_export.runtime.denoiser import Denoiser, load
from taylorseer_export.runtime.driven import DrivenCourse
from taylorseer_export.runtime.eager import EagerRunner
from taylorseer_export.runtime.following import decoded, encoded, follow
from taylorseer_export.runtime.group import Group
from taylorseer_export.runtime.joined import Joined
from taylorseer_export.runtime.lead import leave
from taylorseer_export.runtime.sampling import Beginning, Loop, Request, denoise, sample
from taylorseer_export.runtime.sections import Course
from taylorseer_export.runtime.share import check_ranks, whole_of
from taylorseer_export.runtime.slot import Slot
from taylorseer_export.runtime.tensors import tensor_request

# (model, mode, ranks) -> (granularity, layout, sizes of the request); one trace each.
CASES = {
    ("flux", "gather", 2): [("module", "snapshots", {"height": 2, "width": 5}), ("residual", "derivatives", {})],
    ("flux", "ulysses", 2): [("module", "derivatives", {"height": 2, "width": 5}), ("last", "snapshots", {})],
}
RUNS = [(*key, *how) for key, runs in CASES.items() for how in runs]


@pytest.fixture(scope="module")
def shared(tiny):
    """(model, mode, ranks, granularity, layout) -> draft of what one rank runs."""
    traced = cache(lambda name, mode, ranks: trace_of(name, tiny(name).folder, parallel_options(mode, ranks)))
    return cache(
        lambda name, mode, ranks, granularity="module", layout="snapshots": draft(
            traced(name, mode, ranks), parallel_options(mode, ranks, granularity, layout)
        )
    )


@pytest.fixture(scope="module")
def guarded(tiny):
    """Ranks (1 is the model alone) -> draft with a guard."""
    how = {1: {}, 2: {"engine": "inductor", "parallel": "gather", "degree": 2}}
    made = {n: options_of("last", order=ORDER, guards=("fbcache",), **changes) for n, changes in how.items()}
    return cache(lambda ranks: draft(trace_of("plain", tiny("plain").folder, made[ranks]), made[ranks]))


@pytest.mark.parametrize(
    ("name", "mode", "ranks", "granularity", "layout", "sizes"), RUNS, ids=["-".join(map(str, r[:5])) for r in RUNS]
)
def test_ranks_give_what_the_model_gives(shared, tiny, name, mode, ranks, granularity, layout, sizes):
    """Every rank joins the same rows; odd numbers of them, a batch of two, guidance where the model is told of it."""
    model, inputs = tiny(name).model, tiny(name).inputs(len(PLAN), batch=2, **sizes)
    made = shared(name, mode, ranks, granularity, layout)
    reference = oracle.replay(model, *inputs, PLAN, ORDER, granularity)
    seen = replay_on_ranks(made, inputs, PLAN, ORDER)
    assert_close(f"{ranks} ranks", seen[0], reference, allowed(model, reference, PLAN, ORDER))
    assert all(torch.equal(other, seen[0]) for other in seen[1:])
    swapped = torch.roll(seen[0], 1, -2)  # rows at other places are seen
    with pytest.raises(AssertionError, match="differs by"):
        assert_close("swapped rows", swapped, reference, allowed(model, reference, PLAN, ORDER))


@pytest.mark.parametrize("mode", ["gather", "ulysses"])
def test_all_full_on_ranks_is_the_untouched_model(shared, tiny, mode):
    inputs = tiny("flux").inputs(2, batch=1)
    latents, timestep, conditioning = inputs
    (seen, *_) = replay_on_ranks(shared("flux", mode, 2), inputs, "FF")
    with torch.no_grad():
        model = tiny("flux").model
        plain = [
            model(hidden_states=x, timestep=t.expand(len(x)), return_dict=False, **conditioning)[0]
            for x, t in zip(latents, timestep, strict=True)
        ]
    reference = torch.stack(plain)
    assert_close("all full", seen, reference, 2 * allowed(model, reference, "FF", ORDER))


@pytest.mark.parametrize(("mode", "each"), [("gather", 2), ("ulysses", 4)])
def test_only_full_steps_send_and_as_much_as_their_graph_says(shared, tiny, mode, each):
    """2 or 4 collectives for each attention, none to prepare or to forecast; bytes as counted from the graph."""
    made, groups = shared("flux", mode, 2), []
    attentions = made.split.full.operators()["scaled_dot_product_attention"]
    assert attentions > 2
    assert counted({cut.name: cut.module.graph for cut in made.graphs}) == {
        "prepare": 0, "full": each * attentions, "forecast": 0,
    }  # fmt: skip
    inputs = tiny("flux").inputs(len(PLAN), batch=2, height=2, width=5)
    replay_on_ranks(made, inputs, PLAN, ORDER, lambda group: groups.append(Counting(group)))
    full, sizes = PLAN.count("F"), {"batch": 2, "image_tokens": 5, "text_tokens": 6}
    for group in groups:
        assert sum(group.calls.values()) == full * each * attentions
        assert group.bytes == full * sent(made.split.full, sizes, 2) > 0
    config = tiny("flux").model.config
    width = config.num_attention_heads * config.attention_head_dim * 4  # bytes of a row of keys
    rows = 2 * rows_sent(mode, 2, 5, 6)  # of both samples
    assert groups[0].bytes == full * attentions * rows * width


def test_ranks_decide_alike_by_the_error_of_all_rows(guarded, tiny):
    """As the model alone does; a rank that went by its own rows would decide otherwise, and the other would wait."""
    inputs, plan = tiny("plain").inputs(8, batch=2), "FF......"
    denoiser = eager_denoiser(guarded(1))

    def alone(threshold):
        slot, latents = begun(denoiser, inputs, plan, guard=Guard("fbcache", threshold))
        return torch.from_numpy(np.stack([slot.step(latent) for latent in latents])), slot

    errors = [error for error in alone(1e30)[1].errors if error == error]
    threshold = float(np.median(errors))
    reference, slot = alone(threshold)
    assert 0 < slot.executed[2:].count("F") < 6
    ranks = replay_on_ranks(guarded(2), inputs, plan, guard=Guard("fbcache", threshold))
    assert [executed for _, executed in ranks] == [slot.executed] * 2
    bound = 2 * allowed(tiny("plain").model, reference, slot.executed, ORDER)
    assert_close("guarded", ranks[0][0], reference, bound)


def test_state_and_tables_of_rows_are_of_one_rank(shared, drafts):
    alone, one = describe(drafts("flux", "module", "snapshots", ORDER), "a"), describe(shared("flux", "gather", 2), "b")
    assert one.parallel.degree == 2 and one.parallel.dimension == "image_tokens"
    assert one.sites == alone.sites
    for name in ("minimum", "typical", "maximum"):
        assert getattr(one.dimensions["image_tokens"], name) * 2 == getattr(alone.dimensions["image_tokens"], name)
    assert "--parallel gather --degree 2" in one.command()


def test_what_is_not_shared_out_is_refused(shared, tiny):
    manifest = describe(shared("flux", "gather", 2), "a")
    with pytest.raises(BundleError, match=r"1 rank runs a bundle .* over 2, expected 2; run it with `torchrun"):
        check_ranks(manifest, None)
    why = "inductor, tensorrt, tensorrt-rtx, torch-tensorrt \\(ONNX Runtime's packages hold none"
    with pytest.raises(ConfigError, match=rf"--engine onnxruntime, expected one .* {why}"):
        check_options(options_of(parallel="gather", engine="onnxruntime"))
    with pytest.raises(ConfigError, match="is 4096 image_tokens, expected a size that --degree 3 divides"):
        trace_of("flux", tiny("flux").folder, parallel_options("gather", 3))
    with pytest.raises(ConfigError, match=r"without a size, expected one for family hidream, .* at one size .* --size"):
        trace_of("hidream", tiny("hidream").folder, parallel_options("gather", 2))
    with pytest.raises(StepError, match=r"size `image_tokens` is 15, expected a multiple of 2, .* another --degree"):
        replay_on_ranks(shared("flux", "gather", 2), tiny("flux").inputs(2, height=3, width=5), "FF")
    with pytest.raises(ConfigError, match="2 ranks run a bundle that is not shared out, expected one process"):
        check_ranks(manifest.model_copy(update={"parallel": None}), on_ranks(2, lambda group: group)[0])


# Model -> (granularity, layout, sizes of the request). Most share out an odd number of rows, or of tokens, to each of 4
# ranks. `tools/parallel_parity.py` crosses them with all granularities, layouts and sizes, and with 2 ranks.
TOKENS = {"height": 4, "width": 5}
FAMILIES = {
    "flux": ("module", "snapshots", TOKENS),
    "kontext": ("module", "snapshots", TOKENS),
    "flux2": ("residual", "derivatives", TOKENS),
    "flux2-edit": ("last", "snapshots", TOKENS),
    "flux3": ("module", "derivatives", TOKENS),
    "chroma": ("residual", "snapshots", TOKENS),
    "z-image": ("module", "snapshots", {"height": 12, "width": 3}),
    "krea-2": ("last", "derivatives", TOKENS),
    "longcat-image": ("module", "snapshots", TOKENS),
    "ovis-image": ("residual", "derivatives", TOKENS),
    "qwen-image": ("module", "snapshots", TOKENS),
    "qwen-image-edit": ("last", "snapshots", TOKENS),
    "qwen-image-2.1": ("module", "derivatives", {"height": 8, "width": 6}),
    "sd3": ("residual", "snapshots", {"height": 12, "width": 3}),
    "hunyuan": ("module", "snapshots", {"height": 3, "width": 12}),
    "hunyuan-replace": ("module", "derivatives", {"height": 12}),  # its first frame
    "framepack": ("last", "snapshots", {"frames": 3, "height": 12}),
    "hunyuan-1.5": ("last", "derivatives", {"height": 12}),
    "kandinsky-5": ("module", "derivatives", {"height": 12}),
    "cogvideox": ("residual", "snapshots", {"height": 12}),
    "wan": ("module", "snapshots", {"height": 12}),
    "wan-5b-image": ("last", "snapshots", {"frames": 4}),  # the first of which is told by its place
    "wan-vace": ("module", "derivatives", {"height": 3, "width": 12}),
    "wan-animate": ("last", "snapshots", {"height": 3, "width": 12}),
    "hidream": ("residual", "derivatives", {"side": 12}),
    "ltx-2": ("module", "snapshots", {"height": 4, "width": 3}),  # its sound is whole on every rank
    "ltx-2-image": ("residual", "derivatives", {"height": 4, "width": 3}),
    "dit": ("module", "snapshots", {}),  # of one size
    "pixart": ("residual", "derivatives", {}),
    "sana": ("module", "derivatives", {"height": 12}),  # sums over rows, and convolutions
    "cogvideox-table": ("last", "snapshots", {}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_that_is_shared_out_gives_what_its_model_gives(tmp_path, name):
    """By gathers and by exchanges on 4 ranks, which need 4 heads, from one trace."""
    granularity, layout, sizes = FAMILIES[name]
    model = wide(name)
    inputs = MODELS[name][2](model, len(PLAN), batch=2, **sizes)
    reference = oracle.replay(model, *inputs, PLAN, ORDER, granularity)
    model.save_pretrained(tmp_path)
    whole = usual(traced_for_ranks(name, tmp_path), inputs[0])
    bound = allowed(model, reference, PLAN, ORDER)
    for mode in ("gather", "ulysses"):
        options = parallel_options(mode, 4, granularity, layout, fixed_size(whole, inputs[0]))
        made = draft(shared_out(whole, options), options)
        seen = replay_on_ranks(made, inputs, PLAN, ORDER)
        assert_close(f"{name} by {mode}", seen[0], reference, bound)
        assert len(seen) == 4 and all(torch.equal(other, seen[0]) for other in seen)
        collectives = counted({cut.name: cut.module.graph for cut in made.graphs})
        assert collectives["full"] > 0 == collectives["prepare"] == collectives["forecast"]


MIXING = {
    "a mean over rows": lambda m, x, t, text, label: m.site(x) + x.mean(1, True),
    "a product over rows and words": lambda m, x, t, text, label: (
        m.site(x) + x @ (torch.cat([x, text], 1).transpose(1, 2) @ torch.cat([x, text], 1))
    ),
    "a sum of rows so far": lambda m, x, t, text, label: m.site(x).cumsum(1),
    "the number of rows and of words": lambda m, x, t, text, label: (
        m.site(x) + torch.cat([x, text], 1).mean(2, True).sum() / torch.cat([x, text], 1).shape[1]
    ),
    "the first row": lambda m, x, t, text, label: m.site(x) + x[:, :1],
    "all rows but the first": lambda m, x, t, text, label: (
        m.site(x) + torch.cat([x.new_zeros(1, 1, 1), x.new_ones(1, x.shape[1] - 1, 1)], 1)
    ),
    "rows turned around": lambda m, x, t, text, label: m.site(x).flip(1),
}


@pytest.mark.parametrize("mixing", MIXING)
def test_a_model_that_mixes_rows_is_refused_by_name(mixing):
    _, trace = toy_trace(MIXING[mixing])
    with pytest.raises(ExportError, match=r"along `image_tokens`, expected each row .* leave --parallel out"):
        shard(trace, "gather", 2, "image_tokens", "toy")


def test_ranks_that_differ_say_so_alike_and_one_that_never_comes_is_named():
    def differ(group):
        group.agree({"bundle": "a", "plan": "FF." if group.rank == 2 else "FFF"})

    assert {str(e) for e in on_ranks(3, differ)} == {
        "`plan` of rank 2 is FF., expected FFF as of rank 0; start all ranks alike"
    }
    elsewhere = on_ranks(2, lambda group: group.same(4 + group.rank))
    assert {str(e) for e in elsewhere} == {"rank 1 is at step 5, expected step 4 as rank 0; run one plan on all ranks"}

    def late(group):
        if group.rank == 0:
            group.agree({"plan": "FF"})

    error, other = on_ranks(2, late, timeout=0.5)
    assert other is None and "rank 1 of 2 has died or is late, expected it within 0.5 s" in str(error)


def test_a_rank_that_does_not_come_to_a_collective_is_named():
    def work(group):
        if group.rank == 0:
            with group.together(7):
                group.gathered(np.zeros(1))

    error, other = on_ranks(2, work, timeout=0.5)
    assert other is None and isinstance(error, StepError)
    assert "rank 1 of 2 has died or is late after " in str(error) and "at step 7" in str(error)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_in_mid_loop_ends_the_other_with_its_name(shared, tiny, rank):
    """On a full step, which waits for it, long before the group's timeout; `tools/kill_ranks.py` does it 20 times."""
    plan = "F" * 40
    said, seconds = killed(shared("flux", "gather", 2), tiny("flux").inputs(len(plan)), plan, rank, 20)
    assert f"rank {rank} of 2 has died or is late after " in said and "expected all 2 ranks within 20 s" in said
    assert seconds < 20


@pytest.mark.parametrize("mode", ["gather", "ulysses"])
def test_torch_tensorrt_finds_collectives_that_it_fuses(shared, tmp_path, monkeypatch, mode):
    """On a double: its pass takes each of torch's with one wait behind it, and asks the environment for the ranks."""
    known, found = ("all_gather_into_tensor", "all_to_all_single"), {}

    def convert(program, arg_inputs, arg_input_binding_names, use_distributed_mode_trace, **asked):
        assert (os.environ["WORLD_SIZE"], os.environ["RANK"]) == ("2", "0") and use_distributed_mode_trace
        nodes = [n for n in program.graph.nodes if str(n.target).startswith("_c10d_functional.")]
        sent = [n for n in nodes if "wait_tensor" not in str(n.target)]
        for node in sent:
            assert str(node.target).split(".")[1] in known
            assert [str(user.target) for user in node.users] == ["_c10d_functional.wait_tensor.default"]
            assert "single" not in str(node.target) or len({*node.args[1], *node.args[2]}) == 1  # it splits evenly
        found[len(found)] = len(sent)
        return b"plan"

    library = SimpleNamespace(
        Input=lambda **asked: asked,
        dynamo=SimpleNamespace(convert_exported_program_to_serialized_trt_engine=convert),
        ENABLED_FEATURES=SimpleNamespace(native_trt_collectives=False),
        __version__="2.11.0",
    )
    monkeypatch.setattr(torch_tensorrt, "_library", lambda: library)
    with pytest.raises(BuildError, match=r"^torch-tensorrt 2.11.0 has no collectives .*, or use --engine tensorrt$"):
        torch_tensorrt.check(options_of(parallel=mode, engine="torch-tensorrt", device="cuda"))
    monkeypatch.setattr(torch_tensorrt, "DEVICE", "cpu")
    monkeypatch.setenv("RANK", "7")
    made = shared("flux", mode, 2)
    torch_tensorrt.build(made, tmp_path, lambda *_: None)
    assert [*found.values()] == [*counted({cut.name: cut.module.graph for cut in made.graphs}).values()]
    assert os.environ["RANK"] == "7" and "WORLD_SIZE" not in os.environ


# Loops, and ranks that follow


@pytest.fixture(scope="module")
def request_(tiny):
    """Two pictures of an odd number of rows on each rank."""
    latents, _, conditioning = tiny("flux").inputs(1, batch=2, height=2, width=5)
    noise = np.random.default_rng(7).standard_normal(latents.shape[1:]).astype(np.float32)
    return Request(noise, as_arrays(conditioning), False, 0.0, 0, 0)


def test_a_loop_on_ranks_gathers_its_latents_once_and_is_that_of_one(shared, tiny, request_):
    """Predictions are the model's within the bound; what is made of them is what one process makes, to the bit."""
    made = shared("flux", "gather", 2)

    def alike(denoiser):
        loop, group = Loop(denoiser, request_, denoiser.forecasts(plan=PLAN)), denoiser.share.group
        branches = loop.open(denoiser)
        loop.begin(branches)
        before, predictions = group.sent, [step.noise_pred for step in denoise(loop, branches)]
        return predictions, loop.latents, group.sent - before, branches.executed

    ranks = sound(denoisers_on_ranks(made, alike))
    manifest = whole_of(describe(made, "eager"))
    one = Loop(alone := Denoiser(manifest, EagerRunner({}, {})), request_, alone.forecasts(plan=PLAN))
    given, answers = [], [np.concatenate(parts, 1) for parts in zip(ranks[0][0], ranks[1][0], strict=True)]
    for answer in answers:
        given.append(one.model_input())
        one.accept(answer)
    for _, latents, given_away, executed in ranks:
        assert np.array_equal(latents, one.latents) and executed == PLAN
        assert given_away == 8 * PLAN.count("F") + one.latents.nbytes // 2  # steps, then its own rows
    model, conditioning = tiny("flux").model, {n: torch.from_numpy(v) for n, v in request_.conditioning.items()}
    times = torch.from_numpy(one.model_timesteps.astype(np.float32))
    expected = oracle.replay(model, torch.from_numpy(np.stack(given)), times, conditioning, PLAN, ORDER)
    bound = allowed(model, expected, PLAN, ORDER)
    assert_close("a loop", torch.from_numpy(np.stack(answers)), expected, bound)


def test_rank_0_leads_and_the_others_follow(shared, request_):
    """A request, one that does not begin, one that is given up, and the first once more: the same to the bit."""
    nothing = np.full((6, 3), np.nan, np.float32)
    broken = replace(request_, conditioning={**request_.conditioning, "txt_ids": nothing})
    plan = "FF..F.F"

    def work(denoiser):
        with denoiser:
            if follow(denoiser):
                return "followed"
            forecasts = denoiser.forecasts(plan=plan)
            first = sample(denoiser, request_, forecasts)
            with pytest.raises(StepError, match="`txt_ids` has 18 values that are NaN"):
                sample(denoiser, broken, forecasts)
            loop = Loop(denoiser, request_, forecasts)
            branches = loop.open(denoiser)
            loop.begin(branches)
            for _ in range(2):
                loop.accept(branches.step(loop.model_input()))
            leave(denoiser.share.group, denoiser.share.lead, loop, branches)
            again = sample(denoiser, request_, forecasts)
            driven = DrivenCourse(*[None] * 3, 2, 5, {}, np.zeros(1), np.zeros(1))
            with pytest.raises(ConfigError, match="a video in sections that others drive is asked of several ranks, e"):
                encoded(replace(request_, course=driven), forecasts)
            return first.latents, again.latents, loop.step, again.executed

    (first, again, left, executed), other = sound(denoisers_on_ranks(shared("flux", "gather", 2), work))
    assert np.array_equal(first, again) and executed == plan and other == "followed"
    assert left == plan.index("F", 2)  # forecast steps went on, and the next full one did not


def test_memory_that_one_rank_lacks_fails_that_request_alone(shared, request_):
    """Torch says so by a RuntimeError."""

    def work(denoiser):
        buffer, full = denoiser.runner.buffer, [True] * denoiser.share.rank

        def allocate(*given):
            if full and full.pop():
                raise RuntimeError("can't allocate memory")
            return buffer(*given)

        denoiser.runner.buffer = allocate
        with denoiser:
            if follow(denoiser):
                return "followed"
            forecasts = denoiser.forecasts(plan=PLAN)
            with pytest.raises(StepError, match=r"rank 1 did not begin the request \(can't allocate"):
                sample(denoiser, request_, forecasts)
            return sample(denoiser, request_, forecasts).executed

    assert denoisers_on_ranks(shared("flux", "gather", 2), work, timeout=10.0) == [PLAN, "followed"]


def test_a_forecast_that_fails_on_a_rank_that_follows_ends_it(shared, request_):
    """It does not wait for the next request while the others are within this one."""

    def fail(*tensors):
        raise RuntimeError("no memory")

    def work(denoiser):
        if denoiser.share.rank:
            denoiser.runner._functions["forecast"] = fail
        with denoiser:
            if not follow(denoiser):
                sample(denoiser, request_, denoiser.forecasts(plan="FF.F"))

    first, other = denoisers_on_ranks(shared("flux", "gather", 2), work, timeout=2.0)
    assert isinstance(first, RankError) and "rank 1 of 2 has died or is late" in str(first)
    assert isinstance(other, StepError) and "graph `forecast` failed (no memory)" in str(other)


def test_what_is_sent_is_what_is_asked():
    value = np.arange(6, dtype=np.float32).reshape(1, 6)
    request = Request(
        value, {"a": value + 1, "n": np.array([3])}, True, 2.5, 32, 48, sigmas=value[0], negative={"a": value + 2},
        joined=Joined(2, value + 3, ahead=True), beginning=Beginning(value + 4, 0.5, 9), previews=3,
        lora=Adapter(("a:0.5",), value + 5, value > 2, 3, ("b",), 0.5),
    )  # fmt: skip
    for guard in (None, Guard("fbcache", 0.25, cap=3)):
        forecasts = Forecasts(Plan("FF."), 1, "newton", None if guard else ((), (), (-1.0, 2.0)), guard)
        again, same = decoded(encoded(request, forecasts))
        assert same == forecasts and encoded(again, same) == encoded(request, forecasts)
        assert decoded(encoded(request, forecasts, request.lora), request.lora)[0].lora == request.lora
        one = DrivenCourse(*[None] * 3, 1, 5, {}, value, value)  # a section of which the request has all
        assert encoded(replace(request, course=one), forecasts) == encoded(request, forecasts)
        with pytest.raises(ConfigError, match="a video in sections that others drive is asked of several ranks"):
            encoded(replace(request, course=replace(one, count=2)), forecasts)
        past = Sections(direction="backward", new="new", past=(("a", "b"),), usual=4)
        again, _ = decoded(encoded(replace(request, course=Course(past, (2, 2), 3, 4, value)), forecasts))
        assert (again.course.described, again.course.held) == (past, (2, 2))
        assert (again.course.window, again.course.count) == (3, 4) and np.array_equal(again.course.picture, value)
    assert decoded(encoded(Request(value, {}, False, 0.0, 0, 0), forecasts))[0].negative is None


def test_a_rank_that_does_not_follow_and_one_that_does_not_lead_are_named(shared, request_):
    def lead_alone(denoiser):
        if denoiser.share.rank == 0:
            follow(denoiser)
            sample(denoiser, request_, denoiser.forecasts(plan="FF"))

    error, _ = denoisers_on_ranks(shared("flux", "gather", 2), lead_alone, timeout=1.0)
    assert isinstance(error, RankError) and "rank 1 of 2 has died or is late" in str(error)
    _, error = denoisers_on_ranks(shared("flux", "gather", 2), lambda d: d.share.rank and follow(d), timeout=1.0)
    assert isinstance(error, RankError) and "rank 0 of 2 has died or is late" in str(error)

    def differ(denoiser):
        sample(denoiser, request_, denoiser.forecasts(plan="FF."[: 3 - denoiser.share.rank]))

    told = {str(error) for error in denoisers_on_ranks(shared("flux", "gather", 2), differ)}
    assert len(told) == 1 and "`plan` of rank 1 is " in told.pop()


def test_a_diffusers_pipeline_runs_on_every_rank(shared, tiny):
    """Each rank runs it whole, with one seed; another seed is refused before the first step."""
    model, options = tiny("flux").model, {"height": 16, "width": 16, "max_sequence_length": 6, "output_type": "latent"}

    def paint(pipe, seed=0):
        return pipe("cat", num_inference_steps=5, generator=torch.Generator().manual_seed(seed), **options).images

    pipes = [flux_pipeline(model) for _ in range(2)]

    def alike(denoiser):
        pipe = pipes[denoiser.share.rank]
        pipe.transformer = denoiser.as_transformer(plan="FFF.F")
        seen = Recorder(pipe.transformer)
        painted = paint(pipe)
        seen.assert_plan(model, "FFF.F", ORDER)
        return painted, seen

    (first, seen), (other, _) = sound(denoisers_on_ranks(shared("flux", "gather", 2), alike))
    assert torch.equal(first, other)
    with seen.retold_by(model):
        assert torch.equal(first, paint(flux_pipeline(model)))

    def seeded(denoiser):
        pipe = pipes[denoiser.share.rank]
        pipe.transformer = denoiser.as_transformer()
        paint(pipe, seed=denoiser.share.rank)

    (told,) = {str(error) for error in denoisers_on_ranks(shared("flux", "gather", 2), seeded)}
    assert "`latents (give all ranks one seed)` of rank 1 is float32 [1, 16, " in told


def test_whole_latents_of_two_kinds_are_taken_on_every_rank(tmp_path):
    """LTX-2, as the drop-in calls it: rows of the video are joined at each step, the sound is whole as it is."""
    model = MODELS["ltx-2"][1]()
    inputs = MODELS["ltx-2"][2](model, len(PLAN), batch=2, height=4, width=3)
    latents, timesteps, conditioning = inputs
    model.save_pretrained(tmp_path)
    made = draft(
        shared_out(traced_for_ranks("ltx-2", tmp_path), parallel_options("gather", 2)), parallel_options("gather", 2)
    )

    def work(denoiser):
        given = as_arrays(conditioning, denoiser.others)
        slot = denoiser.slot(denoiser.sizes(tuple(latents.shape[1:]), given))
        slot.start(given, denoiser.forecasts(plan=PLAN, order=ORDER), timesteps.float().numpy())
        made = []
        for step, latent in enumerate(latents.numpy()):
            beside = {name: conditioning[name][step].numpy() for name in denoiser.others}
            made.append([slot.step(latent, others=beside), *slot.others.values()])
        return np.stack([np.concatenate([one.reshape(2, -1) for one in of_step], 1) for of_step in made])

    first, other = sound(denoisers_on_ranks(made, work))
    reference = oracle.replay(model, *inputs, PLAN, ORDER)
    assert np.array_equal(first, other)
    assert_close("video and sound", torch.from_numpy(first), reference, allowed(model, reference, PLAN, ORDER))


def test_weights_are_tried_on_all_rows(shared, request_):
    """Of whole latents; the step itself then runs with the last ones tried."""

    def work(denoiser):
        loop = Loop(denoiser, request_, forecasts := denoiser.forecasts(plan=PLAN[: PLAN.index(".") + 1]))
        slot = denoiser.slot(loop.sizes)
        slot.start(loop.conditioning[0], forecasts, loop.model_timesteps)
        for _ in range(len(forecasts) - 1):
            slot.step(request_.latents)
        weights = np.linspace(-1, 2, PLAN.index("."))
        return slot.try_weights(request_.latents, weights), slot.step(request_.latents)

    (tried, made), (other, _) = sound(denoisers_on_ranks(shared("flux", "gather", 2), work))
    assert made.shape == request_.latents.shape and np.array_equal(tried, made) and np.array_equal(tried, other)


def test_a_server_on_ranks_answers_all_and_ends_when_one_is_killed(shared, whole_flux, monkeypatch):
    """Two pictures, one that is late in mid-loop between them, then rank 1 is killed: 503 with its name, no hang."""
    made, bundle = shared("flux", "gather", 2), open_bundle(whole_flux)
    own = describe(made, "eager")
    parts = {name: getattr(own, name) for name in ("parallel", "dimensions", "graphs", "state")}
    manifest, modules = bundle.manifest.model_copy(update=parts), eager_modules(made)
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    body = {"prompt": "cat", "size": "16x16", "plan": "FF..F..F", "seed": 3}
    step, ran, ended = [], Slot.run, []

    def watched(slot):
        for at, action in step:
            if len(slot.executed) == at and len(slot.plan) == 8:
                action()
        ran(slot)

    with following(manifest, modules, store.port) as rank_1:
        denoiser = Denoiser(
            manifest, EagerRunner(modules, manifest.graphs), bundle, group=Group(store, 0, 2, timeout=20.0)
        )
        denoiser.share.owned = True
        with denoiser, models_over(denoiser_leading(denoiser), slots=1, batch=1, workers=1) as models:
            models.ends(ended.append)
            with serving(models) as port:
                monkeypatch.setattr(Slot, "run", watched)
                first = asked(port, GENERATIONS, body)
                assert first[0] == 200, first
                step.append((2, lambda: time.sleep(1.0)))
                late = asked(port, GENERATIONS, {**body, "timeout": 0.9})
                assert late[0] == 504 and b"late after 3 of 8 steps" in late[2]
                step.clear()
                second = asked(port, GENERATIONS, body)
                pictures = [json.loads(answer[2])["data"] for answer in (first, second)]
                assert second[0] == 200 and pictures[0] == pictures[1]
                step.append((4, rank_1.kill))
                for _ in range(2):
                    status, _, told = asked(port, GENERATIONS, body)
                    assert status == 503 and b"the server stopped (rank 1 of 2 has died or is late after " in told
                assert got(port, "/health")[0] == 503
    assert len(ended) == 1 and "at step 4" in str(ended[0])


def denoiser_leading(denoiser):
    assert not follow(denoiser)
    return denoiser


@pytest.fixture(scope="module")
def package(tiny, once):
    """Folder of an AOTInductor bundle for two ranks that exchange heads, of every size."""
    options = options_of("residual", order=ORDER, engine="inductor", parallel="ulysses", degree=2)

    def write(folder):
        return write_bundle(draft(trace_of("plain", tiny("plain").folder, options), options), folder, "ranks")

    return once("parallel-ulysses", write)


@pytest.mark.slow
def test_torchrun_writes_what_one_process_writes(package, tiny, tmp_path):
    """Two processes with compiled graphs, of odd rows each and a batch of two; then one of them has other inputs."""
    inputs = tiny("plain").inputs(len(PLAN), batch=2, height=2, width=5)
    latents, timestep, conditioning = inputs
    tensors = {"latents": latents, "timestep": timestep, **conditioning}
    given, written = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, given)
    replay = ["-m", "taylorseer_export", "replay", str(package), "--inputs", str(given), "--outputs", str(written)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, *replay, "--plan", PLAN], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    reference = oracle.replay(tiny("plain").model, *inputs, PLAN, ORDER, "residual")
    bound = allowed(tiny("plain").model, reference, PLAN, ORDER)
    assert_close("torchrun", load_file(written)["noise_pred"], reference, bound)
    # One step from noise: the latents are the noise and a part of the prediction, at most all of it.
    save_file({name: value.contiguous() for name, value in conditioning.items()}, tmp_path / "one.safetensors")
    drawn = tmp_path / "drawn.safetensors"
    draw = ["--inputs", str(tmp_path / "one.safetensors"), "--seed", "3", "4", "--plan", "F", "--out", str(drawn)]
    draw = [*torchrun, "-m", "taylorseer_export", "run", str(package), *draw]
    done = subprocess.run(draw, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.count("wrote") == 1, done.stderr
    one = Denoiser(whole_of(open_bundle(package).manifest), EagerRunner({}, {}))
    request = tensor_request(one, as_arrays(conditioning), [3, 4])
    loop = Loop(one, request, one.forecasts(plan="F"))
    noise, time_ = torch.from_numpy(loop.model_input())[None], torch.from_numpy(np.float32(loop.model_timesteps))
    predicted = oracle.replay(tiny("plain").model, noise, time_, conditioning, "F", ORDER, "residual")
    loop.accept(predicted[0].float().numpy())
    bound = allowed(tiny("plain").model, predicted, "F", ORDER)
    assert_close("run", load_file(drawn)["latents"][None], torch.from_numpy(loop.latents)[None], bound)
    alone = subprocess.run([sys.executable, *replay], capture_output=True, text=True, timeout=600)
    assert alone.returncode == 2 and "1 rank runs a bundle that is shared out over 2, expected 2" in alone.stderr
    with pytest.raises(BundleError, match="1 rank runs a bundle"):
        load(package)


@pytest.mark.slow
def test_a_compiled_rank_that_is_killed_under_torchrun_is_named(package, tiny, tmp_path):
    """And no process is left; `tools/kill_ranks.py --torchrun` does it 20 times."""
    latents, timestep, conditioning = tiny("plain").inputs(20)
    given = tmp_path / "in.safetensors"
    tensors = {"latents": latents, "timestep": timestep, **conditioning}
    save_file({name: value.contiguous() for name, value in tensors.items()}, given)
    replay = ["replay", package, "--inputs", given, "--outputs", tmp_path / "out.safetensors", "--plan", "F" * 20]
    said, seconds, left = killed_under_torchrun(replay, 1, 11, timeout=30)
    assert said.startswith("rank 1 of 2 has died or is late after ") and "at step 11" in said
    assert seconds < 30 and not left and not (tmp_path / "out.safetensors").exists()


def test_one_rank_is_what_it_was(drafts, tiny):
    """A bundle that is not shared out is the share of one rank: everything."""
    denoiser = eager_denoiser(drafts("plain"))
    inputs = tiny("plain").inputs(2)
    share, latents = denoiser.share, inputs[0].numpy()
    assert share.ranks == 1 and share.latents(latents) is latents and share.joined(latents) is latents
    assert run(denoiser, inputs, "FF").shape == inputs[0].shape
