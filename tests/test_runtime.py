"""The runtime: one contract for every runner, layout and family, against the oracle."""

import gc
import shutil
from functools import cache

import numpy as np
import oracle
import pytest
import torch
from harness import (
    FLOAT32,
    NEEDS_GPU,
    advance,
    allowed,
    as_arrays,
    begin,
    eager_denoiser,
    open_slot,
    representable,
    run,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import assert_close
from tiny_bundles import BUNDLES, ON_GPU, PACKAGES

from taylorseer_export.bundle.device import Device
from taylorseer_export.bundle.manifest import Graph, Tensor
from taylorseer_export.compile.export import PRECISIONS
from taylorseer_export.errors import BundleError, ConfigError, StepError
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.onnxruntime import HostBuffer, OnnxRuntimeRunner
from taylorseer_export.runtime.runner import check_binding


def drafted(options):
    return options.get("granularity", "module"), options.get("layout", "snapshots")


# (runner, model, granularity, layout); all of order 2. Those on a GPU are named by the kind of their engines.
CASES = [
    ("eager", "flux", "module", "snapshots"),
    ("eager", "flux", "module", "derivatives"),
    ("eager", "plain", "residual", "snapshots"),
    ("eager", "dit", "module", "snapshots"),
    ("eager", "dit", "last", "derivatives"),
    *[("onnx", n, *drafted(o)) for n, o in BUNDLES.items()],
    *[("inductor", n, *drafted(o)) for n, o in PACKAGES.items()],
    *[pytest.param((f"{k} cuda", n, *drafted(o)), marks=NEEDS_GPU, id=f"{k}-{n}-cuda") for (k, n), o in ON_GPU.items()],
]
PLANS = [
    ("FFF...F..F.F..", 2),  # uneven gaps
    ("F.F.F....F...F", 2),  # warm-up of one
    ("F.......", 2),  # never more than one snapshot
    ("FF.F.....F..", 1),
    ("FFFF...F..F.", 0),  # reuse with fresh gates
    ("FFFFFFFF", 2),  # interval 1
]
SIZES = {"plain": {"batch": 2, "height": 2, "width": 3}}  # the size its bundle is static in


class Case:
    """A denoiser with the model and inputs that belong to it."""

    def __init__(self, runner, name, granularity, layout, denoiser, tiny):
        self.runner, self.name, self.granularity, self.layout = runner, name, granularity, layout
        self.denoiser, self.tiny = denoiser, tiny

    @property
    def model(self):
        return self.tiny.model

    @property
    def dtype(self):
        return PRECISIONS[self.denoiser.manifest.precision]

    def inputs(self, steps, **sizes):
        inputs = self.tiny.inputs(steps, **{"batch": 2, **SIZES.get(self.name, {}), **sizes})
        return representable(inputs, self.dtype)

    def allowed(self, reference, plan, order):
        return allowed(self.model, reference, plan, order, self.dtype)


@pytest.fixture(params=CASES, ids="-".join)
def case(request, eager, onnx, inductor, on_gpu, tiny):
    runner, name, granularity, layout = request.param
    if runner == "eager":
        denoiser = eager(name, granularity, layout)
    elif runner.endswith(" cuda"):
        denoiser = on_gpu(runner.removesuffix(" cuda"), name)
    else:
        denoiser = {"onnx": onnx, "inductor": inductor}[runner](name)
    assert (denoiser.manifest.state.granularity, denoiser.manifest.state.layout) == (granularity, layout)
    return Case(*request.param, denoiser, tiny(name))


@pytest.fixture(scope="session")
def expected(tiny):
    """The oracle's answer, worked out once for all cases that share it."""

    @cache
    def make(name, plan, order, granularity, dtype=FLOAT32):
        inputs = representable(tiny(name).inputs(len(plan), **{"batch": 2, **SIZES.get(name, {})}), dtype)
        return oracle.replay(tiny(name).model, *inputs, plan, order, granularity)

    return make


# Numbers


def test_all_full_is_the_untouched_model(case):
    inputs = case.inputs(4)
    seen = run(case.denoiser, inputs, "FFFF")
    latents, timestep, conditioning = inputs
    with torch.no_grad():
        plain = [
            case.model(hidden_states=x, timestep=t.expand(len(x)), return_dict=False, **conditioning)[0]
            for x, t in zip(latents, timestep, strict=True)
        ]
    reference = torch.stack(plain)
    # Both are rounded, so both may err by the bound.
    assert_close("all full", seen, reference, 2 * case.allowed(reference, "FFFF", 2))


@pytest.mark.parametrize(("plan", "order"), PLANS)
def test_parity_with_the_oracle(case, expected, plan, order):
    reference = expected(case.name, plan, order, case.granularity, case.dtype)
    seen = run(case.denoiser, case.inputs(len(plan)), plan, order)
    assert_close(plan, seen, reference, case.allowed(reference, plan, order))


def test_the_parity_test_can_fail(eager, tiny, expected):
    """Another order, another granularity and another plan of the same length are all told apart."""
    plan, inputs = "FFF...F..F.F..", tiny("flux").inputs(14, batch=2)
    seen = run(eager("flux"), inputs, plan, 2)
    for other in ((plan, 1, "module"), (plan, 2, "residual"), ("FFF...F..FF...", 2, "module")):
        reference = expected("flux", *other)
        with pytest.raises(AssertionError, match="differs by"):
            assert_close(str(other), seen, reference, allowed(tiny("flux").model, reference, *other[:2]))


@pytest.mark.parametrize("layout", ["snapshots", "derivatives"])
@pytest.mark.parametrize("capacity", [0, 1, 4])
def test_every_capacity(eager, tiny, expected, capacity, layout):
    plan = "FFF.F..F...F.."
    reference = expected("dit", plan, capacity, "module")
    seen = run(eager("dit", "module", layout, capacity), tiny("dit").inputs(14, batch=2), plan, capacity)
    assert_close(plan, seen, reference, allowed(tiny("dit").model, reference, plan, capacity))


@pytest.mark.parametrize("granularity", ["module", "residual", "last"])
@pytest.mark.parametrize("name", ["flux", "plain", "dit"])
def test_layouts_agree(eager, tiny, name, granularity):
    plan, inputs = "FFF...F..F.F..", tiny(name).inputs(14)
    snapshots, derivatives = (run(eager(name, granularity, lay), inputs, plan) for lay in ("snapshots", "derivatives"))
    assert_close("layouts", derivatives, snapshots, 2 * allowed(tiny(name).model, snapshots, plan, 2))


@pytest.mark.parametrize("sizes", [
    {"batch": 1, "height": 2, "width": 2, "text_tokens": 1},
    {"batch": 3, "height": 3, "width": 5, "text_tokens": 7},
    {"batch": 2, "height": 2, "width": 3, "text_tokens": 6},  # as many text as image tokens
])  # fmt: skip
@pytest.mark.parametrize("runner", ["eager", "onnx"])
def test_any_size_in_one_bundle(eager, onnx, tiny, runner, sizes):
    denoiser = eager("flux") if runner == "eager" else onnx("flux")
    inputs = tiny("flux").inputs(5, **sizes)
    inputs[2]["guidance"] = torch.arange(1.0, sizes["batch"] + 1)  # another for each sample
    reference = oracle.replay(tiny("flux").model, *inputs, "FF..F", 1)
    seen = run(denoiser, inputs, "FF..F", 1)
    assert_close(str(sizes), seen, reference, allowed(tiny("flux").model, reference, "FF..F", 1))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("runner", ["eager", "onnx"])
def test_any_batch_in_one_bundle(eager, onnx, tiny, runner, batch):
    denoiser = eager("dit", "module", "derivatives") if runner == "eager" else onnx("dit")
    inputs = tiny("dit").inputs(5, batch=batch)
    reference = oracle.replay(tiny("dit").model, *inputs, "FF..F", 1)
    seen = run(denoiser, inputs, "FF..F", 1)
    assert_close(f"batch {batch}", seen, reference, allowed(tiny("dit").model, reference, "FF..F", 1))


def test_text_may_vary_in_a_static_bundle(onnx, tiny):
    for tokens in (1, 9):
        inputs = tiny("plain").inputs(3, **SIZES["plain"], text_tokens=tokens)
        reference = oracle.replay(tiny("plain").model, *inputs, "FF.", 1, "last")
        seen = run(onnx("plain"), inputs, "FF.", 1)
        assert_close(f"{tokens} tokens", seen, reference, allowed(tiny("plain").model, reference, "FF.", 1))


def test_a_plan_of_one_step(case):
    inputs = case.inputs(1)
    seen = run(case.denoiser, inputs, "F", ahead=False)
    reference = oracle.replay(case.model, *inputs, "F", 0, case.granularity)
    assert_close("one step", seen, reference, case.allowed(reference, "F", 0))


def test_timesteps_known_ahead_or_not(case):
    """Tables of all steps and of one at a time: the same rows of the same products, up to rounding."""
    plan, inputs = "FFF..F..", case.inputs(8)
    ahead = run(case.denoiser, inputs, plan)
    one_by_one = run(case.denoiser, inputs, plan, ahead=False)
    assert_close("one by one", one_by_one, ahead, 2 * case.allowed(ahead, plan, 2))


def test_newton(case):
    plan, inputs = "FFF..F...", case.inputs(9)
    if case.layout == "derivatives":
        with pytest.raises(ConfigError, match="export again with --layout snapshots"):
            run(case.denoiser, inputs, plan, form="newton")
        return
    taylor, newton = (run(case.denoiser, inputs, plan, form=form) for form in ("taylor", "newton"))
    assert torch.equal(taylor[:3], newton[:3])
    assert not torch.equal(taylor[8], newton[8])  # they part at order 2
    lines = [run(case.denoiser, inputs, plan, 1, form=form) for form in ("taylor", "newton")]
    assert torch.equal(*lines)  # one line through two points


def test_default_order_and_plan_are_the_bundle_s(case):
    plan = case.denoiser.forecasts(steps=7).plan
    assert str(plan) == "FF...F."  # interval 4, warm-up 2
    assert len(case.denoiser.forecasts()) == 20
    inputs = case.inputs(7)
    assert torch.equal(run(case.denoiser, inputs, str(plan)), run(case.denoiser, inputs, str(plan), 2))
    with pytest.raises(ConfigError, match="pass a plan of 7 characters or run 3 steps"):
        case.denoiser.forecasts(plan="FF.", steps=7)


# Requests and slots


def test_interleaved_requests_equal_the_same_alone(case):
    plans = ("FFF..F..", "F.F...")
    inputs = [case.inputs(len(plan), seed=k) for k, plan in enumerate(plans)]
    alone = [run(case.denoiser, i, p) for i, p in zip(inputs, plans, strict=True)]
    slots = [open_slot(case.denoiser, i) for i in inputs]
    seen = ([], [])
    begin(slots[0], inputs[0], plans[0])
    for which in (0, 0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0):
        if which == 1 and not seen[1]:
            begin(slots[1], inputs[1], plans[1])
        seen[which].append(advance(slots[which], inputs[which], len(seen[which])))
    for k in (0, 1):
        assert torch.equal(torch.stack(seen[k]), alone[k])
    assert not torch.equal(alone[0][:2], alone[1][:2])


@pytest.mark.parametrize("poison", [np.nan, np.inf, 3.0])
def test_nothing_leaks_into_the_next_request(case, poison):
    # Forecasts begin after one full step: the rest of the buffers is as the request before left it.
    plan, first, second = "F..F....", case.inputs(8), case.inputs(8, seed=1)
    clean = run(case.denoiser, second, plan)
    slot = open_slot(case.denoiser, first)
    run(case.denoiser, first, "F.F.F..F", slot=slot)
    for buffers in slot.memory.taylor:
        for buffer in buffers.values():
            buffer.write(poison)
    assert torch.equal(run(case.denoiser, second, plan, slot=slot), clean)


def test_a_request_may_be_dropped_half_way(case):
    first, second = case.inputs(8, seed=3), case.inputs(6)
    slot = open_slot(case.denoiser, first)
    begin(slot, first, "FFF..F..")
    for step in range(4):
        advance(slot, first, step)
    # Another plan, length and order in the same slot.
    assert torch.equal(run(case.denoiser, second, "FF..F.", 1, slot=slot), run(case.denoiser, second, "FF..F.", 1))


def test_every_call_on_a_gpu_is_a_cuda_graph(case):
    """And on the CPU none is counted as a fallback."""
    run(case.denoiser, case.inputs(4), "FF..")
    assert case.denoiser.runner.fallbacks == 0


@pytest.mark.parametrize(
    ("kind", "name"), [pytest.param(*key, marks=NEEDS_GPU, id="-".join(key)) for key in ON_GPU if key[1] == "flux"]
)
def test_without_cuda_graphs_the_numbers_are_the_same_and_every_call_is_counted(on_gpu, tiny, kind, name):
    inputs = tiny(name).inputs(9, batch=2)
    captured, plain = (on_gpu(kind, name, graphs) for graphs in (True, False))
    before = plain.runner.fallbacks
    seen = run(plain, inputs, "FFF..F.F.")
    assert plain.runner.fallbacks - before == 10  # prepare and nine steps
    assert torch.equal(seen, run(captured, inputs, "FFF..F.F."))


def test_a_forecast_step_copies_only_the_rows_that_it_reads(eager, tiny):
    denoiser, inputs = eager("dit"), tiny("dit").inputs(2, batch=2)
    graphs = denoiser.manifest.graphs
    full, forecast = ({t.name for t in graphs[g].inputs if t.role == "step"} for g in ("full", "forecast"))
    assert full - forecast
    expected, slot = run(denoiser, inputs, "F."), open_slot(denoiser, inputs)
    begin(slot, inputs, "F.")
    advance(slot, inputs, 0)
    for name in full - forecast:
        slot.memory.buffers[name].write(np.float32(np.nan))
    assert torch.equal(advance(slot, inputs, 1), expected[1])
    assert all(np.isnan(slot.memory.buffers[name].read()).all() for name in full - forecast)


def test_what_was_planned_is_what_ran(case):
    plan, inputs = "FFF...F.", case.inputs(8)
    slot = open_slot(case.denoiser, inputs)
    begin(slot, inputs, plan)
    for step in range(8):
        assert slot.executed == plan[:step]
        advance(slot, inputs, step)
    assert slot.executed == str(slot.plan) == plan
    assert list(slot.gains) == pytest.approx(oracle.gains(plan, 2))


def test_buffers_never_move(case):
    inputs = case.inputs(8)
    slot = open_slot(case.denoiser, inputs)

    def addresses():
        taylor = [b.address for buffers in slot.memory.taylor for b in buffers.values()]
        return taylor, {n: b.address for n, b in slot.memory.buffers.items()}

    before = addresses()
    assert len(set(before[0]) | set(before[1].values())) == len(before[0]) + len(before[1])
    for plan in ("FFF..F..", "F.F...."):
        run(case.denoiser, tuple(x[: len(plan)] if x is not inputs[2] else x for x in inputs), plan, slot=slot)
        assert addresses() == before


def test_what_goes_in_and_out_is_copied(case):
    inputs = case.inputs(3)
    clean = run(case.denoiser, inputs, "FF.")
    slot = open_slot(case.denoiser, inputs)
    conditioning = {n: v.copy() for n, v in as_arrays(inputs[2]).items()}
    slot.start(conditioning, Forecasts(Plan("FF."), 2), inputs[1].float().numpy())
    outputs = []
    for step in range(3):
        latents = inputs[0][step].numpy().copy()
        outputs.append(slot.step(latents))
        latents[...] = 0
        for value in conditioning.values():
            value[...] = 0
    assert torch.equal(torch.from_numpy(np.stack(outputs)), clean)


def test_wider_kinds_are_accepted(case):
    """float64 latents and int32 labels change nothing."""
    inputs = case.inputs(2)
    slot = open_slot(case.denoiser, inputs)
    wide = {n: v.astype("float64" if v.dtype.kind == "f" else "int32") for n, v in as_arrays(inputs[2]).items()}
    slot.start(wide, Forecasts(Plan("F."), 2), inputs[1].double().numpy())
    seen = [torch.from_numpy(slot.step(x.double().numpy())) for x in inputs[0]]
    assert torch.equal(torch.stack(seen), run(case.denoiser, inputs, "F."))


# What reaches a forecast step


def changed(value, k):
    """Another value of the same kind."""
    return (value + k) % 10 if value.dtype == torch.int64 else value * 0.7 + 0.2 * k


@pytest.mark.parametrize("name", ["flux", "plain", "dit"])
def test_text_does_not_reach_a_forecast_but_the_gates_do(eager, tiny, name):
    """Full step with one conditioning, forecast step with another: only what drives the modulation matters."""
    model, inputs = tiny(name).model, tiny(name).inputs(2, batch=2)
    latents, timestep, conditioning = inputs

    def forecast(latents=latents, timestep=timestep, other=conditioning):
        slot = open_slot(eager(name), inputs)
        begin(slot, inputs, "F.", ahead=False)
        slot.step(latents[0].numpy(), float(timestep[0]))
        for key, value in as_arrays(other).items():
            slot.memory.buffers[key].write(value)  # timesteps come one by one, so each step prepares from these
        return torch.from_numpy(slot.step(latents[1].numpy(), float(timestep[1])))

    base = forecast()
    for key, value in conditioning.items():
        other = {**conditioning, key: changed(value, 1)}
        seen = forecast(other=other)
        if key in ("encoder_hidden_states", "img_ids", "txt_ids"):
            assert torch.equal(seen, base), key
        else:
            assert not torch.equal(seen, base), key
        stepwise = oracle.Oracle(model, "F.", 2)
        stepwise.step(latents[0], timestep[0], conditioning)
        reference = stepwise.step(latents[1], timestep[1], other)
        assert_close(key, seen, reference, oracle.bound(reference, 1.0, FLOAT32, *oracle.extent(model)))
    assert not torch.equal(forecast(timestep=torch.stack([timestep[0], changed(timestep[1], 3)])), base)
    assert not torch.equal(forecast(latents=torch.stack([latents[0], latents[1] + 0.1])), base)


# What is refused


def without(mapping, key):
    return {n: v for n, v in mapping.items() if n != key}


def test_missing_and_unknown_inputs(case):
    inputs = case.inputs(2)
    slot, arrays = open_slot(case.denoiser, inputs), as_arrays(inputs[2])
    plan = case.denoiser.forecasts(plan="F.")
    for key in arrays:
        with pytest.raises(StepError, match=rf"`{key}` is missing, expected .*; pass it with the conditioning"):
            slot.start(without(arrays, key), plan)
    with pytest.raises(StepError, match=r"`encoder_attention_mask` is not known, expected only .*; leave it out"):
        slot.start({**arrays, "encoder_attention_mask": np.ones(2)}, plan)


def test_conditioning_of_another_shape(case):
    inputs = case.inputs(2)
    slot, arrays = open_slot(case.denoiser, inputs), as_arrays(inputs[2])
    plan = case.denoiser.forecasts(plan="F.")
    for key, value in arrays.items():
        with pytest.raises(StepError, match=rf"`{key}` .* pass `{key}` "):
            slot.start({**arrays, key: value[..., None]}, plan)
        if key not in ("txt_ids", "img_ids"):
            with pytest.raises(StepError, match=rf"`{key}` dimension 0 .* elements, expected 2"):
                slot.start({**arrays, key: np.concatenate([value, value])}, plan)


def test_conditioning_that_is_no_number(case):
    inputs = case.inputs(2)
    slot, arrays = open_slot(case.denoiser, inputs), as_arrays(inputs[2])
    plan = case.denoiser.forecasts(plan="F.")
    for key, value in arrays.items():
        with pytest.raises(StepError, match=rf"`{key}` is complex64, expected \w+; convert it before the call"):
            slot.start({**arrays, key: value.astype(np.complex64)}, plan)
        if value.dtype.kind == "f":
            bad = value.copy()
            bad.flat[[0, -1]] = np.nan, np.inf
            with pytest.raises(StepError, match=rf"`{key}` has {len({0, bad.size - 1})} values that are NaN or infin"):
                slot.start({**arrays, key: bad}, plan)
        else:
            with pytest.raises(StepError, match=rf"`{key}` is float64, expected int64"):
                slot.start({**arrays, key: value.astype(float)}, plan)


def test_bad_latents_do_not_use_up_a_step(case):
    inputs = case.inputs(3)
    clean = run(case.denoiser, inputs, "FF.")
    slot = open_slot(case.denoiser, inputs)
    begin(slot, inputs, "FF.")
    seen = []
    for step in range(3):
        good = inputs[0][step].numpy()
        bad = good.copy()
        bad.flat[1] = np.nan
        with pytest.raises(
            StepError, match=rf"`hidden_states` has 1 values .* at step {step}, expected finite .*; che"
        ):
            slot.step(bad)
        with pytest.raises(StepError, match=rf"1 values that are NaN or infinite at step {step}"):
            slot.step(np.where(np.arange(good.size).reshape(good.shape) == 1, 1e300, good.astype(float)))
        with pytest.raises(StepError, match=rf"at step {step}, expected .* when the slot was opened; open a slot of"):
            slot.step(good[:1])
        with pytest.raises(StepError, match=rf"is complex64 at step {step}, expected \w+; convert"):
            slot.step(good.astype(np.complex64))
        seen.append(torch.from_numpy(slot.step(good)))
    assert torch.equal(torch.stack(seen), clean)


def test_steps_outside_a_request(case):
    inputs = case.inputs(2)
    slot = open_slot(case.denoiser, inputs)
    with pytest.raises(StepError, match=r"the slot has no request, expected one under way; call start\(\) first"):
        slot.step(inputs[0][0].numpy())
    run(case.denoiser, inputs, "F.", slot=slot)
    with pytest.raises(StepError, match=r"a request after its last step \(2 of 2\).* call start\(\) first"):
        slot.step(inputs[0][0].numpy())


def test_timesteps_that_do_not_fit(case):
    inputs = case.inputs(3)
    slot, arrays = open_slot(case.denoiser, inputs), as_arrays(inputs[2])
    known = inputs[1].float().numpy()
    with pytest.raises(ConfigError, match=r"is 3 steps long, expected 2 .*; pass a plan of 2 characters"):
        slot.start(arrays, case.denoiser.forecasts(plan="FF."), known[:2])
    with pytest.raises(StepError, match="`timestep` has 1 values that are NaN"):
        slot.start(arrays, case.denoiser.forecasts(plan="FF."), [*known[:2], np.nan])
    for shape in ((3, 1), (1, 3), ()):
        with pytest.raises(StepError, match=r"`timestep` .*\[steps\]"):
            slot.start(arrays, case.denoiser.forecasts(plan="FF."), np.zeros(shape))
    slot.start(arrays, case.denoiser.forecasts(plan="FF."))
    with pytest.raises(StepError, match=r"timestep of step 0 is unknown, expected it from start\(\) or step\(\)"):
        slot.step(inputs[0][0].numpy())
    slot.start(arrays, case.denoiser.forecasts(plan="FF."), known)
    with pytest.raises(StepError, match=r"timestep is .* at step 0, expected .* as prepared; leave timesteps out"):
        slot.step(inputs[0][0].numpy(), float(known[1]))
    assert torch.isfinite(advance(slot, inputs, 0, ahead=False)).all()


def test_orders_that_do_not_fit(case):
    inputs = case.inputs(2)
    for order, fix in ((3, "which the bundle's buffers hold; export again with --order 3"), (-1, "expected 0 to 4")):
        with pytest.raises(ConfigError, match=fix):
            run(case.denoiser, inputs, "F.", order)


def test_a_refused_start_leaves_the_request_under_way(case):
    plan, inputs = "FF.F.", case.inputs(5)
    clean = run(case.denoiser, inputs, plan)
    slot = open_slot(case.denoiser, inputs)
    begin(slot, inputs, plan)
    seen = []
    for step in range(5):
        with pytest.raises(StepError, match="is missing"):
            slot.start({}, case.denoiser.forecasts(plan="F."))
        with pytest.raises(ConfigError, match="export again with --order 4"):
            begin(slot, case.inputs(5, seed=1), plan, 4)
        seen.append(advance(slot, inputs, step))
    assert torch.equal(torch.stack(seen), clean)


def test_a_request_that_could_not_be_prepared_does_not_run(eager, tiny, monkeypatch):
    """Its tables would be those of the request before."""
    denoiser = eager("dit", "module", "derivatives")
    inputs = tiny("dit").inputs(2, batch=2)
    slot = open_slot(denoiser, inputs)
    run(denoiser, inputs, "F.", slot=slot)

    def fail(*arguments):
        raise StepError("graph `prepare` failed")

    with monkeypatch.context() as patch:
        patch.setattr(slot.memory, "prepare", fail)
        with pytest.raises(StepError, match="prepare"):
            begin(slot, inputs, "F.")
    with pytest.raises(StepError, match=r"the slot has no request.*call start\(\) first"):
        slot.step(inputs[0][0].numpy())
    assert torch.equal(run(denoiser, inputs, "F.", slot=slot), run(denoiser, inputs, "F."))


def test_a_label_outside_the_table_is_refused(eager, tiny):
    """An engine would read past its table, or count from the end."""
    denoiser = eager("dit", "module", "derivatives")
    inputs = tiny("dit").inputs(2, batch=2)
    for label in (-1, 11):
        wrong = (*inputs[:2], {"class_labels": torch.tensor([0, label])})
        with pytest.raises(StepError, match=r"expected 0 to 10 \(table index\); correct the values"):
            begin(open_slot(denoiser, inputs), wrong, "F.")


def test_sizes_out_of_range(eager, onnx, tiny):
    inputs = tiny("flux").inputs(1, batch=17)
    fix = "size `batch` is 17, expected 1 to 16; use such a size, or export again without --size"
    with pytest.raises(StepError, match=fix):
        open_slot(eager("flux"), inputs)
    with pytest.raises(StepError, match=r"size `image_tokens` is 2, expected 4 to 16384"):
        open_slot(eager("flux"), tiny("flux").inputs(1, height=1, width=2))
    with pytest.raises(StepError, match=r"size `batch` is 3, expected 2 \(the bundle is static\)"):
        open_slot(onnx("plain"), tiny("plain").inputs(1, batch=3, height=2, width=3))
    with pytest.raises(StepError, match=r"size `image_tokens` is 8, expected 6 \(the bundle is static\)"):
        open_slot(onnx("plain"), tiny("plain").inputs(1, batch=2, height=2, width=4))


def test_a_request_of_another_size_than_the_slot(eager, tiny):
    slot = open_slot(eager("flux"), tiny("flux").inputs(1, text_tokens=6))
    with pytest.raises(StepError, match=r"those of the slot; open a slot of that size"):
        begin(slot, tiny("flux").inputs(1, text_tokens=5), "F")


# Memory


def buffer_at(memory, begin, size):
    return HostBuffer(memory[begin : begin + size], "uint8")


def contract(inputs, outputs):
    tensors = [
        tuple(Tensor(name=n, dtype="float32", shape=(1,), role=role) for n in names)
        for names, role in ((inputs, "taylor_in"), (outputs, "taylor_out"))
    ]
    return Graph(file="full.onnx", inputs=tensors[0], outputs=tensors[1], weights_bytes=0)


windows = st.tuples(st.integers(0, 20), st.integers(0, 8))


@given(st.lists(windows, min_size=1, max_size=4), st.lists(windows, min_size=1, max_size=3))
@example([(0, 8), (1, 1)], [(5, 1)])  # an output inside a long input, behind a short one
def test_overlap_is_refused_and_nothing_else(ins, outs):
    """Against all pairs: an output may share no byte with anything; inputs may share with each other."""
    memory = np.zeros(64, np.uint8)
    inputs = {f"in{k}": buffer_at(memory, *w) for k, w in enumerate(ins)}
    outputs = {f"out{k}": buffer_at(memory, *w) for k, w in enumerate(outs)}

    def bytes_of(window):
        return set(range(window[0], sum(window)))

    clash = any(bytes_of(o) & bytes_of(i) for o in outs for i in ins)
    clash |= any(bytes_of(a) & bytes_of(b) for k, a in enumerate(outs) for b in outs[:k])
    if not clash:
        assert check_binding(contract(inputs, outputs), inputs, outputs) is None
        return
    with pytest.raises(StepError, match=r"overlaps .* in memory.*; allocate one buffer for each"):
        check_binding(contract(inputs, outputs), inputs, outputs)


def test_binding_over_itself_is_refused(case):
    """Invariant 6 on the real graphs, for every runner."""
    runner, graph = case.denoiser.runner, case.denoiser.manifest.graphs["forecast"]
    slot = open_slot(case.denoiser, case.inputs(1))
    memory = slot.memory
    inputs = {t.name: memory.buffers.get(t.name) or memory.taylor[0][t.site] for t in graph.inputs}
    with pytest.raises(StepError, match=r"`noise_pred` of \S+ overlaps|overlaps output `noise_pred`"):
        runner.bind("forecast", inputs, {"noise_pred": inputs["hidden_states"]})
    with pytest.raises(StepError, match=r"`noise_pred` of \S+ has no buffer.* bind every name of the contract"):
        runner.bind("forecast", inputs, {})
    with pytest.raises(StepError, match=r"has no buffer, expected one for each of \d+ tensors"):
        runner.bind("forecast", without(inputs, "weights"), {"noise_pred": slot.memory.buffers["noise_pred"]})


@given(st.lists(st.integers(0, 5), max_size=4), st.sampled_from(["float32", "int64", "bool"]))
@settings(max_examples=30)
def test_host_buffers_are_aligned_and_zero(shape, dtype):
    buffer = HostBuffer.zeros(tuple(shape), dtype)
    assert buffer.address % 256 == 0 or buffer.nbytes == 0
    assert buffer.shape == tuple(shape)
    assert buffer.nbytes == int(np.prod(shape)) * np.dtype(dtype).itemsize
    assert not buffer.read().any()


def test_an_entry_is_a_window():
    buffer = HostBuffer.zeros((3, 2), "float32")
    buffer.entry(1).write(np.float32([5, 6]))
    assert buffer.read().tolist() == [[0, 0], [5, 6], [0, 0]]
    assert buffer.entry(1).address == buffer.address + 8
    buffer.read()[...] = 9
    assert buffer.read().max() == 6
    with pytest.raises(TypeError):
        HostBuffer.zeros((2,), "int64").write(np.array([0.5, 1.5]))


def test_buffers_outlive_the_names_they_were_bound_under(onnx, tiny):
    """A bound call holds addresses; it must hold the memory too."""
    inputs = tiny("dit").inputs(1, batch=2)
    slot = open_slot(onnx("dit"), inputs)
    begin(slot, inputs, "F")
    expected = run(onnx("dit"), inputs, "F")
    taylor, slot.memory.taylor = slot.memory.taylor, []
    del taylor
    gc.collect()
    ballast = [np.full(4096, np.nan, np.float32) for _ in range(64)]
    assert torch.equal(advance(slot, inputs, 0), expected[0])
    assert len(ballast) == 64


# Loading


def test_a_graph_that_is_none(bundles, tmp_path):
    folder = shutil.copytree(bundles("dit"), tmp_path / "dit")
    (folder / "full.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"full.onnx is .* bytes, expected"):
        load(folder)
    with pytest.raises(
        BundleError, match=r"full.onnx is refused by onnxruntime .* rebuild the bundle with this version"
    ):
        OnnxRuntimeRunner({"full": folder / "full.onnx"}, {})


def test_a_graph_of_another_bundle(bundles, onnx):
    """The file must have the inputs and outputs of the manifest, in their order."""
    graphs = onnx("dit").manifest.graphs
    with pytest.raises(BundleError, match=r"inputs of .*full.onnx are .*, expected .* as in the manifest; export the"):
        OnnxRuntimeRunner({"full": bundles("dit") / "full.onnx"}, {"full": graphs["forecast"]})
    other = graphs["full"].model_copy(update={"outputs": graphs["full"].outputs[::-1]})
    with pytest.raises(BundleError, match=r"outputs of .*full.onnx are .*, expected .* as in the manifest; export the"):
        OnnxRuntimeRunner({"full": bundles("dit") / "full.onnx"}, {"full": other})


def test_a_device_that_is_not_there(bundles):
    with pytest.raises(ConfigError, match=r"device is tpu, expected cpu, cuda or cuda:N .*; choose one of those"):
        load(bundles("dit"), device="tpu")
    with pytest.raises(
        BundleError, match=r"device is `tpu`, expected one that .* was built for \(cpu, cuda\); choose one"
    ):
        load(bundles("dit"), device=Device("tpu"))
    with pytest.raises(BundleError, match=r"device is `tpu`, expected one that this onnxruntime has .*--device cpu"):
        OnnxRuntimeRunner({}, {}, Device("tpu"))


def test_a_closed_denoiser_holds_no_engine(drafts, bundles):
    with load(bundles("dit"), threads=1) as denoiser:
        assert denoiser.runner._sessions
    assert not denoiser.runner._sessions
    with eager_denoiser(drafts("dit")) as denoiser:
        assert denoiser.runner._functions
    assert not denoiser.runner._functions


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("layout", ["snapshots", "derivatives"])
@pytest.mark.parametrize("granularity", ["module", "residual", "last"])
def test_a_narrow_state_stays_within_its_own_roundoff(drafts, tiny, granularity, layout, name, dtype):
    """Buffers in half precision, arithmetic in float32: the error is that of storing each snapshot once."""
    inputs = tiny("flux").inputs(8, batch=2)
    plan, order = "FFF..F..", 2
    model = tiny("flux").model
    draft = drafts("flux", granularity=granularity, layout=layout, state_dtype=name)
    seen = run(eager_denoiser(draft), inputs, plan, order)
    expected = oracle.replay(model, *inputs, plan, order, granularity)
    bound = oracle.bound(expected, oracle.gains(plan, order), dtype, *oracle.extent(model))
    oracle.assert_close("noise_pred", seen, expected, bound)
    buffers = [t for t in draft.split.forecast.inputs if t.role == "taylor_in"]
    assert {t.dtype for t in buffers} == {str(dtype).removeprefix("torch.")}
