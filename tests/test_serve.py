"""Serving without a server: who runs next, what each request gets, and the repository that is written."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from harness import as_arrays
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import made, weights_of

from taylorseer_export.bundle.device import Device
from taylorseer_export.bundle.memory import request_bytes
from taylorseer_export.bundle.profile import write_profile
from taylorseer_export.bundle.store import open_bundle
from taylorseer_export.cli import main
from taylorseer_export.errors import BundleError, ConfigError, ServeError, StepError
from taylorseer_export.method import Forecasts, Plan, RequestOptions
from taylorseer_export.runtime.branches import Branches
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.sampling import Loop, Request, sample
from taylorseer_export.runtime.slot import Slot
from taylorseer_export.runtime.tensors import CONDITION, NEGATIVE, condition_shape, tensor_request
from taylorseer_export.runtime.trajectory import random_conditioning, random_trajectory
from taylorseer_export.serve import contract, probe, repository, server
from taylorseer_export.serve.batcher import _PATIENCE, Batcher, Job
from taylorseer_export.serve.reader import Reader
from taylorseer_export.serve.repository import Deployment, config, slot_bytes, write_repository
from taylorseer_export.serve.service import Limits, Service

SECONDS = 60  # until a test gives up waiting; nothing is measured with it

# The batcher


def seated(batcher, *jobs):
    """Offer jobs and start them; all are ready afterwards."""
    for job in jobs:
        batcher.offer(job)
        assert batcher.take(0.0) == ("start", [job])
    for job in jobs:
        batcher.give_back(job)


def test_a_later_request_joins_at_the_next_step():
    batcher, first, later = Batcher(slots=2, queue=9, batch=4, most=8), Job(key="full"), Job(key="full")
    seated(batcher, first)
    assert batcher.take(0.0) == ("step", [first])
    batcher.offer(later)
    assert batcher.take(0.0) == ("start", [later])
    batcher.give_back(later)
    batcher.give_back(first)
    assert batcher.take(0.0) == ("step", [later, first])


def test_only_equal_keys_share_and_a_lonely_one_shares_with_nobody():
    batcher = Batcher(slots=6, queue=9, batch=6, most=8)
    a, b, c, d, e, f = (Job(key=key) for key in ("x", "y", "x", None, None, "x"))
    seated(batcher, a, b, c, d, e, f)
    assert [batcher.take(0.0).jobs for _ in range(4)] == [[d], [e], [a, c, f], [b]]
    assert batcher.take(0.0) is None


def test_steps_that_run_alone_go_first_but_nobody_waits_for_ever():
    batcher, shared, lonely, partner = Batcher(slots=3, queue=9, batch=3, most=8), Job(key="x"), Job(), Job(key="x")
    seated(batcher, shared, lonely, partner)
    for _ in range(_PATIENCE):
        assert batcher.take(0.0) == ("step", [lonely])
        batcher.give_back(lonely)
    assert batcher.take(0.0) == ("step", [shared, partner])
    assert shared.passed == 0


@pytest.mark.parametrize(
    ("limits", "groups"),
    [
        ({"batch": 4, "most": 8}, [4]),
        ({"batch": 3, "most": 8}, [3, 1]),
        ({"batch": 4, "most": 5}, [2, 2]),  # two samples each
        ({"batch": 4, "most": 8, "workers": 2}, [2, 2]),  # no worker is left without
        ({"batch": 1, "most": 8}, [1, 1, 1, 1]),
    ],
)
def test_a_call_has_its_limits(limits, groups):
    batcher = Batcher(slots=4, queue=9, **limits)
    seated(batcher, *(Job(key="x", samples=2) for _ in range(4)))
    assert [len(batcher.take(0.0).jobs) for _ in groups] == groups


def started(batcher, *jobs):
    """Offer jobs and let each have the only slot in turn; returns the order they are begun in."""
    for job in jobs:
        batcher.offer(job)
    order = []
    while batcher.waiting:
        turn = batcher.take(0.0)
        assert turn.kind == "start"
        order += turn.jobs
        batcher.leave(turn.jobs[0])
    return order


def test_a_short_request_does_not_wait_for_long_ones():
    long, longer, short, shorter, other = (Job(cost=cost) for cost in (10.0, 30.0, 4.0, 1.5, 4.9))
    assert started(Batcher(slots=1, queue=9), long, longer, short, shorter, other) == [
        shorter, short, other, long, longer,
    ]  # fmt: skip
    alike = [Job(cost=cost) for cost in (10.0, 6.0, 5.0, 10.0)]  # none has less than half of the work of another
    assert started(Batcher(slots=1, queue=9), *alike) == alike


def test_nobody_is_overtaken_for_ever():
    batcher, long = Batcher(slots=1, queue=99), Job(cost=100.0)
    batcher.offer(long)
    begun, count = None, 0
    while begun is not long:  # a short one comes whenever one was begun
        batcher.offer(Job(cost=1.0))
        (begun,) = batcher.take(0.0).jobs
        batcher.leave(begun)
        count += 1
    assert count == 5 and long.overtaken == 4
    jobs = [Job(cost=100.0 / 3**k) for k in range(12)]
    order = started(Batcher(slots=1, queue=99), *jobs)
    assert {job.overtaken for job in jobs} <= set(range(5)) and len(order) == 12


def test_the_queue_is_bounded_and_a_free_slot_counts():
    batcher = Batcher(slots=1, queue=1)
    jobs = [Job(), Job()]
    for job in jobs:
        batcher.offer(job)
    with pytest.raises(ServeError, match=r"queue is full \(1 requests wait for 1 slots\), expected room") as caught:
        batcher.offer(Job())
    assert caught.value.status == "UNAVAILABLE"
    assert batcher.take(0.0) == ("start", [jobs[0]])
    assert batcher.waiting == 1 and batcher.in_use == 1 and not batcher.pending and batcher.take(0.0) is None


def test_late_and_cancelled_requests_are_dropped_wherever_they_are():
    batcher = Batcher(slots=3, queue=9, batch=3, most=8)
    late, left, good = Job(deadline=5.0, key="x"), Job(cancelled=lambda: True, key="x"), Job(key="x")
    waiting = Job(deadline=5.0)
    left.cancelled = lambda: False
    seated(batcher, good, late, left)
    left.cancelled = lambda: True
    batcher.offer(waiting)
    turns = [batcher.take(5.0) for _ in range(4)]
    assert turns == [("drop", [waiting]), ("step", [good]), ("drop", [late]), ("drop", [left])]
    gone = Job(cancelled=lambda: True)
    batcher.leave(late)
    batcher.offer(gone)
    assert batcher.take(5.0) == ("drop", [gone]) and batcher.in_use == 2


def test_closing_hands_back_what_waits_and_lets_the_rest_go_on():
    batcher, under_way, waiting = Batcher(slots=1, queue=9), Job(), Job()
    seated(batcher, under_way)
    batcher.offer(waiting)
    assert batcher.close() == [waiting]
    with pytest.raises(ServeError, match="the server is stopping"):
        batcher.offer(Job())
    assert not batcher.idle and batcher.take(0.0) == ("step", [under_way])
    batcher.leave(under_way)
    assert batcher.idle


@settings(max_examples=60)
@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from("xy."), st.integers(1, 6), st.integers(1, 2)), min_size=1, max_size=20),
)  # fmt: skip
def test_every_request_gets_all_its_steps(slots, batch, workers, wanted):
    """Jobs of random keys and lengths: slots are never exceeded, calls are within limits, and everybody ends."""
    batcher = Batcher(slots, len(wanted), batch, 4, workers)
    jobs = [
        Job(SimpleNamespace(left=steps), samples, key=None if key == "." else key) for key, steps, samples in wanted
    ]
    for job in jobs:
        batcher.offer(job)
    idle = 0
    while not batcher.idle:
        assert batcher.pending
        turn = batcher.take(0.0)
        assert turn is not None and batcher.in_use <= slots
        assert len(turn.jobs) == 1 or sum(job.samples for job in turn.jobs) <= 4
        assert len(turn.jobs) <= batch and len({job.key for job in turn.jobs}) == 1
        idle += 1
        assert idle <= sum(steps for _, steps, _ in wanted) + len(jobs)  # each turn starts or advances somebody
        for job in turn.jobs:
            job.work.left -= turn.kind == "step"
            (batcher.give_back if job.work.left else batcher.leave)(job)
    assert all(job.work.left == 0 for job in jobs)


# The service


class Caller:
    """Remembers what it is told; leaves after `patience` steps."""

    def __init__(self, patience=None, fails_at=None):
        self.patience, self.fails_at = patience, fails_at
        self.steps, self.latents, self.executed, self.error = 0, None, None, None
        self.done = threading.Event()

    def cancelled(self):
        return self.patience is not None and self.steps >= self.patience

    def advanced(self, loop):
        self.steps = loop.step
        if self.fails_at == loop.step:
            raise RuntimeError("the line is dead")

    def finished(self, loop, executed):
        self.latents, self.executed = loop.latents, executed
        self.done.set()

    def failed(self, error):
        self.error = error
        self.done.set()

    def wait(self):
        assert self.done.wait(SECONDS)
        return self


@pytest.fixture(params=["flux", "dit"])
def denoiser(request, onnx):
    return onnx(request.param)


@pytest.fixture
def serve(denoiser):
    """Open services of that denoiser; all are closed at the end."""
    opened = []

    def make(**limits):
        opened.append(Service(denoiser, Limits(**{"workers": 2, **limits})))
        return opened[-1]

    yield make
    for service in opened:
        service.close()


def request_of(denoiser, tiny, seed, **sizes):
    latents, _, conditioning = tiny(denoiser.manifest.family).inputs(1, batch=1, seed=seed, **sizes)
    return Request(latents[0].numpy(), as_arrays(conditioning), False, 1.0, 0, 0)


def mixed(denoiser, tiny):
    """(request, forecasts) of twelve requests that differ in everything a request may choose."""
    sizes = [{}] if denoiser.manifest.family == "dit" else [{}, {"height": 2, "width": 3}, {"height": 3, "width": 2}]
    plans = ["FFF..F..", "FFFF", "FF.F.F....", "F....F"]
    return [
        (request_of(denoiser, tiny, k, **sizes[k % len(sizes)]), Forecasts(Plan(plans[k % 4]), k % 3))
        for k in range(12)
    ]


def check_empty(service):
    assert service.slots_in_use == 0 and service.waiting == 0
    assert len(service._idle) <= service.limits.slots


@pytest.mark.slow
def test_every_answer_is_the_one_it_gets_alone(denoiser, serve, tiny):
    service, asked = serve(slots=3), mixed(denoiser, tiny)
    service.warm_up()
    callers = [Caller() for _ in asked]
    for (request, forecasts), caller in zip(asked, callers, strict=True):
        service.submit(request, forecasts, caller)
    for (request, forecasts), caller in zip(asked, callers, strict=True):
        alone = sample(denoiser, request, forecasts)
        assert caller.wait().error is None
        assert caller.latents.tobytes() == alone.latents.tobytes() and caller.executed == str(forecasts.plan)
        assert caller.steps == len(forecasts) - 1  # every step but the last was reported
    check_empty(service)
    counts, plans = service.snapshot(), [str(forecasts.plan) for _, forecasts in asked]
    full = sum(plan.count("F") for plan in plans)
    assert counts["steps.full"] == counts["planned.full"] == counts["executed.full"] == full
    assert counts["steps.forecast"] == sum(map(len, plans)) - full
    assert counts["requests.done"] == len(asked) and not service.unequal


def test_a_slot_that_is_prepared_for_a_request_is_not_prepared_again(denoiser, serve, tiny):
    """Three prompts over two slots: the bits are those of fresh slots, and slots are an LRU of what prepared them."""
    service, forecasts = serve(slots=2), Forecasts(Plan("FF.F"), 1)
    first, second, third = (request_of(denoiser, tiny, seed) for seed in range(3))
    sizes = Loop(denoiser, first, forecasts).sizes
    service._idle = [Branches([denoiser.slot(sizes)]) for _ in range(2)]
    for branches in service._idle:
        branches.slots[0].reuses = True
    noisy = replace(first, latents=second.latents)
    shorter = Forecasts(Plan("FF."), 1)
    hits = []
    for request, asked in (
        (first, forecasts),
        (second, forecasts),
        (noisy, forecasts),  # other noise, the same conditioning
        (first, shorter),  # other timesteps
        (second, forecasts),
        (third, forecasts),
        (second, forecasts),
        (third, forecasts),
    ):
        caller, before = Caller(), service.counts["prepared.hit"]
        service.submit(request, asked, caller)
        assert caller.wait().error is None
        hits.append(service.counts["prepared.hit"] > before)
        assert caller.latents.tobytes() == sample(denoiser, request, asked).latents.tobytes()
    assert hits == [False, False, True, False, False, False, True, True]
    assert service.snapshot()["prepared.miss"] == 5


def test_slots_of_no_server_are_prepared_for_every_request(denoiser, tiny):
    request = request_of(denoiser, tiny, 0)
    slot = denoiser.slot(Loop(denoiser, request, Forecasts(Plan("F."), 0)).sizes)
    for reuses, reused in ((False, False), (False, False), (True, False), (True, True)):
        slot.reuses = reuses
        slot.start(request.conditioning, Forecasts(Plan("F."), 0), np.array([0.5, 0.25], np.float32))
        assert slot.reused == reused
    changed = {name: np.array(value) for name, value in request.conditioning.items()}
    next(iter(changed.values()))[...] += 1  # what was kept is a copy
    assert slot.holds(request.conditioning, np.array([0.5, 0.25], np.float32))
    assert not slot.holds(changed, np.array([0.5, 0.25], np.float32))
    with pytest.raises(StepError):
        slot.start({}, Forecasts(Plan("F."), 0), np.array([0.5, 0.25], np.float32))


def test_sizes_are_warm_before_the_first_request(denoiser, serve):
    """A slot of each size waits, as far as there is room, and a request of such a size takes it."""
    service, scale = serve(slots=2), denoiser.manifest.sampling.latent_scale * denoiser.manifest.pipeline.packing
    if denoiser.manifest.family == "dit":  # which knows one size alone
        service.limits.warm = ((3 * scale, 6 * scale),)
        with pytest.raises(ConfigError, match=r"--warm is .*, which the bundle takes; change it"):
            service.warm_up()
        return
    service.limits.warm = ((4 * scale, 6 * scale), (2 * scale, 2 * scale))
    opened, slot = [], denoiser.slot
    denoiser.slot = lambda sizes: opened.append(sizes["image_tokens"]) or slot(sizes)
    try:
        service.warm_up()
        assert opened[2:] == [24, 24, 4, 4]
        check_empty(service)
        opened.clear()
        asked = random_trajectory(denoiser, 1, {"image_tokens": 24})
        for _ in range(2):
            caller = Caller()
            request = Request(asked.latents[0], asked.conditioning, False, 1.0, 0, 0)
            service.submit(request, Forecasts(Plan("F."), 0), caller)
            assert caller.wait().error is None
        assert opened == []
    finally:
        del denoiser.slot


def test_a_profile_s_weights_are_those_that_run(denoiser, serve, tiny):
    plan, request = Plan("FF..F..."), request_of(denoiser, tiny, 0)
    reuse = tuple((0.0,) * (len(w) - 1) + (1.0,) if w else () for w in weights_of(plan, 1))
    values = {"latents": request.latents, **request.conditioning, "profile": np.array([b"fast"], object)}
    asked = contract.ask(denoiser, "denoiser", values, {"fast": made(denoiser.manifest, weights=reuse)})
    service, caller = serve(slots=1), Caller()
    service.submit(asked.request, asked.forecasts, caller)
    assert caller.wait().executed == str(plan)
    assert caller.latents.tobytes() == sample(denoiser, request, Forecasts(plan, 1, weights=reuse)).latents.tobytes()
    assert caller.latents.tobytes() != sample(denoiser, request, Forecasts(plan, 1)).latents.tobytes()


def test_guarded_requests_get_what_they_would_alone(denoiser, serve, tiny):
    """Each decides for itself, and shares calls with whoever decided the same."""
    service, waiting = serve(slots=3, batch=3), []
    for k, threshold in enumerate((1e-9, 0.05, 1e9, 0.05)):
        request = request_of(denoiser, tiny, k)
        values = {"latents": request.latents, **request.conditioning, "steps": np.array([8]), "warmup": np.array([2])}
        values |= {"guard": np.array([b"cg"], object), "threshold": np.array([threshold]), "cap": np.array([3])}
        asked = contract.ask(denoiser, "denoiser", values)
        waiting.append((asked, Caller()))
    for asked, caller in waiting:
        service.submit(asked.request, asked.forecasts, caller)
    for asked, caller in waiting:
        alone = sample(denoiser, asked.request, asked.forecasts)
        assert caller.wait().error is None
        assert (caller.executed, caller.latents.tobytes()) == (alone.executed, alone.latents.tobytes())
    assert [caller.executed for _, caller in waiting][0::2] == ["FFFFFFFF", "FF...F.F"]
    check_empty(service)
    counts = service.snapshot()
    assert counts["planned.full"] == 4 * 3 < counts["executed.full"]


# Case -> (model of conftest, what its negative prompt changes).
GUIDED = {
    "qwen-image": ("qwen-image", ("encoder_hidden_states", "encoder_hidden_states_mask")),
    "wan-image": ("wan-image", ("encoder_hidden_states",)),
    "first frame": ("hunyuan-replace", ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", GUIDED)
def test_guidance_in_two_calls_and_what_is_joined_to_the_noise(eager, tiny, case):
    """A request with `negative_` inputs and a `condition` gets what `run --inputs` does, beside others without."""
    name, texts = GUIDED[case]
    denoiser = eager(name)
    latents, _, conditioning = tiny(name).inputs(1, batch=1)
    tensors, latents = as_arrays(conditioning), latents[0].numpy()
    rng = np.random.default_rng(0)
    short = name != "wan-image"  # whose text has one length
    for text in texts:  # of another length, where the model has no fixed one
        kept = tensors[text][:, 1:] if short else tensors[text]
        tensors[NEGATIVE + text] = np.ones_like(kept) if text.endswith("_mask") else -kept
    beside = condition_shape(denoiser.manifest, latents.shape)
    if beside is not None:
        tensors[CONDITION] = rng.standard_normal(beside).astype(np.float32)
    whole = denoiser.sizes(latents.shape, as_arrays(conditioning))
    alone = tensor_request(denoiser, tensors, [3], whole, (4, 4) if name == "qwen-image" else None, 3.0)
    values = {"latents": alone.latents, **tensors, "steps": np.array([6]), "interval": np.array([3])}
    if texts:
        values["guidance_scale"] = np.array([3.0], np.float32)
    ports = {port.name: port for port in contract.inputs(denoiser.manifest, "denoiser")}
    assert values.keys() <= ports.keys()
    for key in ("latents", *tensors):
        assert all(d in (-1, size) for d, size in zip(ports[key].dims, values[key].shape, strict=True)), key
    asked = contract.ask(denoiser, "denoiser", values)
    plain = contract.ask(denoiser, "denoiser", {n: v for n, v in values.items() if not n.startswith(NEGATIVE)})
    assert (len(asked.request.branches), len(plain.request.branches)) == (1 + bool(texts), 1)
    service, callers = Service(denoiser, Limits(slots=2, workers=2)), [Caller() for _ in range(4)]
    try:
        for caller, one in zip(callers, (asked, plain, asked, plain), strict=True):
            service.submit(one.request, one.forecasts, caller)
        for caller, request in zip(callers, (alone, plain.request, alone, plain.request), strict=True):
            expected = sample(denoiser, request, asked.forecasts)
            assert caller.wait().error is None
            assert caller.latents.tobytes() == expected.latents.tobytes() and caller.executed == expected.executed
        check_empty(service)
    finally:
        service.close()


@pytest.mark.slow
def test_two_branches_take_the_room_of_two(eager, tiny):
    denoiser = eager("wan")
    latents, _, conditioning = tiny("wan").inputs(1, batch=1)
    one = Request(latents[0].numpy(), as_arrays(conditioning), False, 1.0, 0, 0)
    both = replace(one, guided=True, guidance_scale=3.0, negative=one.conditioning)
    needed = request_bytes(denoiser.manifest, {**Loop(denoiser, one, Forecasts(Plan("F"), 0)).sizes, "steps": 3})
    service = Service(denoiser, Limits(slots=1, workers=1, slot_bytes=needed))
    try:
        with pytest.raises(ConfigError, match="Taylor buffers and step tables, expected at most"):
            service.submit(both, Forecasts(Plan("FF."), 1), Caller())
        service.submit(one, Forecasts(Plan("FF."), 1), caller := Caller())
        assert caller.wait().error is None
    finally:
        service.close()
    typical = {name: d.typical for name, d in denoiser.manifest.dimensions.items()}
    assert slot_bytes(denoiser.manifest, 1, None) == 4 * 2 * request_bytes(denoiser.manifest, typical)


def test_requests_of_one_kind_share_calls(denoiser, serve, tiny):
    service, held = serve(slots=4, workers=1), threading.Event()

    class Holding(Caller):
        def advanced(self, loop):
            held.wait(SECONDS)
            super().advanced(loop)

    callers = [Holding() for _ in range(4)]
    for k, caller in enumerate(callers):
        service.submit(request_of(denoiser, tiny, k), Forecasts(Plan.all_full(6), 1), caller)
    held.set()
    assert all(caller.wait().error is None for caller in callers)
    counts = service.snapshot()
    # All wait for the first one's first step, and are in step from their second on at the latest.
    assert counts["steps.full"] == 24 and counts["calls.full"] <= 2 + 4 + 5


def test_a_request_that_is_cancelled_frees_its_slot_within_a_step(denoiser, serve, tiny):
    service = serve(slots=1)
    leaving, next_one = Caller(patience=2), Caller()
    service.submit(request_of(denoiser, tiny, 0), Forecasts(Plan.all_full(40), 0), leaving)
    service.submit(request_of(denoiser, tiny, 1), Forecasts(Plan("FF."), 1), next_one)
    error = leaving.wait().error
    assert (error.status, leaving.steps) == ("CANCELLED", 2)
    assert str(error).startswith("request is cancelled after 2 of 40 steps, expected")
    alone = sample(denoiser, request_of(denoiser, tiny, 1), Forecasts(Plan("FF."), 1))
    assert next_one.wait().latents.tobytes() == alone.latents.tobytes()
    check_empty(service)


def test_a_late_request_is_given_up(denoiser, serve, tiny):
    service, caller = serve(slots=1), Caller()
    service.submit(request_of(denoiser, tiny, 0), Forecasts(Plan.all_full(40), 0), caller, timeout=0.0)
    error = caller.wait().error
    assert error.status == "UNAVAILABLE" and str(error).startswith("request is late after 0 of 40 steps, expected")
    check_empty(service)


@pytest.mark.parametrize("fault", ["engine", "caller", "nan"])
def test_a_failing_request_harms_nobody(denoiser, serve, tiny, monkeypatch, fault):
    service = serve(slots=3, workers=1)
    bad, good = Caller(fails_at=2 if fault == "caller" else None), [Caller(), Caller()]
    poisoned = request_of(denoiser, tiny, 7)
    accept = Slot.finish

    def finish(slot):
        prediction = accept(slot)
        if slot._mark is poisoned and len(slot.executed) == 2:
            if fault == "engine":
                raise StepError("graph `full` failed, expected it to run; try again")
            prediction[...] = np.nan
        return prediction

    if fault != "caller":
        monkeypatch.setattr(Slot, "finish", finish)
        begin = Loop.begin

        def marked(loop, branches):
            branches.slots[0]._mark = loop.request
            begin(loop, branches)

        monkeypatch.setattr(Loop, "begin", marked)
    service.submit(request_of(denoiser, tiny, 0), Forecasts(Plan("FFF..F"), 2), good[0])
    service.submit(poisoned, Forecasts(Plan("FFF..F"), 2), bad)
    service.submit(request_of(denoiser, tiny, 1), Forecasts(Plan("FFF..F"), 2), good[1])
    expected = {
        "engine": "the server failed: graph `full` failed",
        "caller": "the server failed: the line is dead",
        "nan": "the server failed: noise_pred has values that are NaN",
    }
    assert str(bad.wait().error).startswith(expected[fault]) and bad.error.status == "INTERNAL"
    latents = [caller.wait().latents for caller in good]
    monkeypatch.undo()
    for k, seen in enumerate(latents):
        alone = sample(denoiser, request_of(denoiser, tiny, k), Forecasts(Plan("FFF..F"), 2))
        assert seen.tobytes() == alone.latents.tobytes()
    check_empty(service)


def test_what_does_not_fit_is_refused_before_it_is_queued(denoiser, serve, tiny):
    service = serve(slots=1, slot_bytes=10_000)
    with pytest.raises(ConfigError, match=r"request needs .* expected at most 10.00 KB for one slot"):
        service.submit(request_of(denoiser, tiny, 0), Forecasts(Plan("FF."), 1), Caller())
    with pytest.raises(StepError, match="expected"):
        service.submit(Request(np.zeros((1, 2), np.float32), {}, False, 1.0, 0, 0), Forecasts(Plan("F"), 1), Caller())
    check_empty(service)


def test_closing_finishes_what_is_under_way_and_refuses_the_rest(denoiser, tiny):
    service, first, second = Service(denoiser, Limits(slots=1, workers=1)), Caller(), Caller()
    service.submit(request_of(denoiser, tiny, 0), Forecasts(Plan.all_full(8), 0), first)
    service.submit(request_of(denoiser, tiny, 1), Forecasts(Plan.all_full(8), 0), second)
    service.close()
    for caller in (first.wait(), second.wait()):
        assert caller.executed == "F" * 8 or caller.error.status == "UNAVAILABLE"
    assert second.error is not None and not any(worker.is_alive() for worker in service._workers)


def test_a_turn_that_does_not_end_is_seen(denoiser, serve, tiny, monkeypatch):
    service, entered, held = serve(slots=1, workers=1), threading.Event(), threading.Event()
    assert service.stalled == 0.0

    class Holding(Caller):
        def advanced(self, loop):
            entered.set()
            held.wait(SECONDS)

    service.submit(request_of(denoiser, tiny, 0), Forecasts(Plan("FFF"), 0), caller := Holding())
    assert entered.wait(SECONDS)
    first = service.stalled
    assert service.stalled > first > 0.0
    held.set()
    assert caller.wait().error is None
    service.close()
    assert service.stalled == 0.0


def test_reading_is_handed_over_and_one_that_cannot_be_read_harms_nobody():
    reader, started, held, seen = Reader(room=2), threading.Event(), threading.Event(), []

    def slow(left):
        started.set()
        held.wait(SECONDS)
        seen.append(("slow", left))

    def wrong(left):
        raise ConfigError("steps is 0, expected 1")

    def refuse(error):
        seen.append(str(error))

    reader.hand_over(slow, refuse)
    assert started.wait(SECONDS)  # on another thread: this one goes on
    reader.hand_over(wrong, refuse)
    reader.hand_over(lambda left: seen.append(("late", left)), refuse, timeout=0.0)
    reader.hand_over(slow, refuse)  # no room
    assert seen == ["queue is full (2 requests wait to be read), expected room; try again later"]
    held.set()
    reader.close()
    assert seen[1:] == [("slow", None), "steps is 0, expected 1", ("late", 0.0)]
    reader.hand_over(slow, refuse)
    assert seen[-1].startswith("the server is stopping")


# The server's arguments, and whether its models are alive


def test_the_arguments_are_completed_and_what_is_given_stands():
    default = server.server_arguments("models", "secret")
    assert server.completed_arguments(["--model-repository=models"], "secret") == [
        *(argument for argument in default if "repository=" not in argument), "--model-repository=models"
    ]  # fmt: skip
    given = ["--model-repository=m", "--exit-on-error=false", "--backend-config=python,stub-timeout-seconds=9"]
    made = server.completed_arguments(given, "secret")
    assert made[-3:] == given and sum("exit-on-error" in argument for argument in made) == 1
    assert sum("stub-timeout" in argument for argument in made) == 1
    assert any("shm-region-prefix-name" in argument for argument in made)  # another setting of the same backend
    assert "--model-control-mode=none" in made
    for wrong, message in ((["models"], "option is `models`"), (["--log-verbose=1"], "--model-repository is missing")):
        with pytest.raises(ConfigError, match=message):
            server.completed_arguments(wrong, "secret")


@pytest.fixture
def tritonserver(tmp_path):
    """An environment whose `tritonserver` prints its arguments, a line each."""
    program = tmp_path / "bin/tritonserver"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    environment.pop(server.SECRET, None)
    return environment


def test_the_lines_that_are_printed_start_a_server(tritonserver, tmp_path):
    repository = tmp_path / "my models"
    _, _, line = server.start_lines(repository)
    refused = subprocess.run(["sh", "-c", line], env=tritonserver, capture_output=True, text=True, check=False)
    assert refused.returncode != 0 and refused.stdout == ""  # never with an empty secret
    started = subprocess.run(
        ["sh", "-c", line], env={**tritonserver, server.SECRET: "s3"}, capture_output=True, text=True, check=True
    )
    assert tuple(started.stdout.splitlines()) == server.server_arguments(repository, "s3")


def test_the_launcher_becomes_the_server_with_a_secret_of_its_own(tritonserver):
    def launched(**more):
        command = [sys.executable, "-m", "taylorseer_export.serve.server", "--model-repository=m", "--log-verbose=1"]
        done = subprocess.run(command, env=tritonserver | more, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    def secret_of(arguments):
        (restricted,) = (a for a in arguments if a.startswith("--http-restricted-api="))
        assert restricted.replace("http-restricted-api", "grpc-restricted-protocol") in arguments
        return restricted.rpartition("=")[2]

    first, second = launched(), launched()
    assert len(secret_of(first)) == 32 and secret_of(first) != secret_of(second)
    assert launched(**{server.SECRET: "s3"}) == server.completed_arguments(
        ["--model-repository=m", "--log-verbose=1"], "s3"
    )


def test_only_memory_that_nobody_has_mapped_is_swept(tmp_path, monkeypatch):
    import mmap

    monkeypatch.setattr(server, "SHARED_MEMORY", tmp_path)
    names = (server.REGION + "dead", server.REGION + "used", "another")
    for name in names:
        (tmp_path / name).write_bytes(bytes(4096))
    with (tmp_path / names[1]).open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert server.sweep() == [tmp_path / names[0]]
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])
    assert server.sweep() == [tmp_path / names[1]]
    assert [path.name for path in tmp_path.iterdir()] == ["another"]


@pytest.mark.parametrize(("name", "kept"), [("tritonserver", 1), ("triton_python_b", 1), ("init", 0)])
def test_nothing_is_swept_while_a_server_cannot_be_looked_into(tmp_path, monkeypatch, name, kept):
    memory, processes = tmp_path / "shm", tmp_path / "proc"
    memory.mkdir()
    (processes / "7").mkdir(parents=True)
    (processes / "7/comm").write_text(name + "\n")
    (memory / (server.REGION + "x")).touch()
    monkeypatch.setattr(server, "SHARED_MEMORY", memory)
    monkeypatch.setattr(server, "_PROCESSES", processes)
    real = type(memory).read_text

    def closed(path, *args, **kwargs):
        if path.name == "maps":
            raise PermissionError
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "read_text", closed)
        assert len(server.sweep()) == 1 - kept
    assert len(server.sweep()) == kept  # a process without a `maps` has ended


def test_instances_of_a_model_share_counts_and_no_gauge(denoiser, serve, monkeypatch):
    """Triton keeps one number for one set of labels: a sum of counts, and of a gauge what was set last."""
    told = []

    class Family:
        COUNTER, GAUGE = "counter", "gauge"

        def __init__(self, name, description, kind):
            self.name, self.kind = name, kind

        def Metric(self, labels):  # as Triton calls it
            key = (self.name, self.kind, tuple(sorted(labels.items())))
            return SimpleNamespace(set=lambda value: told.append((key, value)), increment=lambda by: None, key=key)

    flags = {"TRITONSERVER_RESPONSE_COMPLETE_FINAL": 1, "MetricFamily": Family}
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", SimpleNamespace(**flags))
    monkeypatch.delitem(sys.modules, "taylorseer_export.serve.model", raising=False)
    from taylorseer_export.serve.model import Metrics

    service, keys = serve(), []
    for instance in ("toy_0_0", "toy_0_1"):
        told.clear()
        metrics = Metrics(service, "toy", instance)
        counts = {metric.key for metric in metrics._metrics.values() if metric.key[1] == "counter"}
        metrics.close()
        keys.append(({key for key, _ in told}, counts))
    (gauges, counts), (others, same) = keys
    assert {name for name, *_ in gauges} == {
        f"taylorseer_{name}"
        for name in ("slots", "slots_in_use", "queue", "conditioning_bytes", probe.BEAT, probe.PROGRESS)
    }
    assert all(kind == "gauge" for _, kind, _ in gauges) and not gauges & others and counts == same


METRICS = """\
# HELP taylorseer_heartbeat_timestamp_seconds When this process last reported
taylorseer_heartbeat_timestamp_seconds{instance="flux-tiny_0_0",model="flux-tiny"} 1764390000.25
taylorseer_heartbeat_timestamp_seconds{instance="dit-tiny_0_0",model="dit-tiny"} 1.76439e+09
taylorseer_progress_timestamp_seconds{instance="flux-tiny_0_0",model="flux-tiny"} 1764389900
nv_inference_count{model="flux-tiny",version="1"} 3
"""


@pytest.mark.parametrize(
    ("models", "now", "expected"),
    [
        ((), 1764390001.0, []),
        (("flux-tiny", "dit-tiny"), 1764390001.0, []),
        (("flux-tiny", "gone"), 1764390001.0, ["model gone does not report"]),
        (("dit-tiny",), 1764390011.0, ["its heartbeat is 11.0 s old in dit-tiny_0_0, expected at most 10 s"]),
        (
            (),
            1764390210.25,
            ["its heartbeat is 210.2 s old in dit-tiny_0_0", "its heartbeat is 210.0 s old in flux-tiny_0_0",
             "its last turn of work is 310.2 s old in flux-tiny_0_0, expected at most 300 s"],
        ),
    ],
)  # fmt: skip
def test_what_is_old_is_dead(models, now, expected):
    beats, progress = (probe.times(METRICS, name) for name in (probe.BEAT, probe.PROGRESS))
    assert (len(beats), len(progress)) == (2, 1)
    said = probe.complaints(beats, progress, models, now, 10.0, 300.0)
    assert [text[: len(start)] for text, start in zip(said, expected, strict=True)] == expected
    assert probe.complaints({}, {}, (), now, 10.0, 300.0) == [
        "model any does not report, expected its heartbeat; restart the server"
    ]


def test_a_server_that_drips_does_not_hold_the_probe():
    """It sends a byte whenever the last one was read, and would go on for ever."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = "{}:{}".format(*listening.getsockname())
        done = threading.Event()

        def drip():
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                while not done.wait(0.01):
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        return

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            with pytest.raises(ServeError, match=r"does not send its metrics in 0\.2 s"):
                probe.page(address, 0.2)
        finally:
            done.set()
            dripping.join(SECONDS)
    assert probe.main(["--url", address, "--timeout", "1"]) == 1


# The repository


def test_the_configuration_reads_back_with_triton_s_own_protobuf(onnx):
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as schema

    manifest = onnx("flux").manifest
    text = config(
        manifest, "denoiser-stream", Deployment(instances=2, slots=3, queue=5, conditioning_cache=0, warm=((32, 48),))
    )
    seen = text_format.Parse(text, schema.ModelConfig())
    assert seen.name == f"flux-{manifest.name}-denoiser-stream" and seen.backend == "python"
    assert seen.model_transaction_policy.decoupled and seen.instance_group[0].count == 2
    assert {i.name: (schema.DataType.Name(i.data_type), list(i.dims), i.optional) for i in seen.input}["latents"] == (
        "TYPE_FP32", [-1, -1, 16], False,
    )  # fmt: skip
    asked = {field.name for field in fields(RequestOptions)}
    assert {i.name for i in seen.input if i.optional} == {"sigmas", *asked}
    told = [seen.parameters[name].string_value for name in ("slots", "queue", "conditioning_cache", "warm")]
    assert told == ["3", "5", "0", "32x48"]
    with pytest.raises(ConfigError, match="--warm height is 33, expected a multiple of"):
        config(manifest, "denoiser", Deployment(warm=((33, 48),)))


@pytest.mark.parametrize(
    ("deployment", "kind", "gpus"),
    [
        (Deployment(), "KIND_CPU", []),
        (Deployment(Device("cuda")), "KIND_GPU", []),  # an instance on every GPU that the server has
        (Deployment(Device("cuda"), gpus=(0, 2)), "KIND_GPU", [0, 2]),
        (Deployment(Device("cuda", 1)), "KIND_GPU", [1]),
    ],
)
def test_instances_are_placed_on_gpus_by_number(onnx, deployment, kind, gpus):
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as schema

    seen = text_format.Parse(config(onnx("flux").manifest, "denoiser", deployment), schema.ModelConfig())
    (group,) = seen.instance_group
    assert (schema.ModelInstanceGroup.Kind.Name(group.kind), list(group.gpus), group.count) == (kind, gpus, 1)
    assert seen.parameters["device"].string_value == deployment.device.kind


@pytest.mark.parametrize(
    ("kind", "number", "device"),
    [("cpu", "0", Device()), ("cuda", "0", Device("cuda", 0)), ("cuda", "3", Device("cuda", 3))],
)
def test_an_instance_runs_on_the_gpu_that_the_server_gives_it(monkeypatch, kind, number, device):
    class Refused(Exception):
        pass

    backend = SimpleNamespace(TRITONSERVER_RESPONSE_COMPLETE_FINAL=1, TritonModelException=Refused)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    file = Path(repository.__file__).with_name("model.py")
    spec = importlib.util.spec_from_file_location("served", file)
    served = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(served)
    seen = []

    def load(bundle, device, threads):
        seen.append(device)
        raise BundleError("enough")

    served.load = load
    values = {"role": "denoiser", "device": kind, "threads": "1"}
    parameters = {name: {"string_value": value} for name, value in values.items()}
    model_config = json.dumps({"parameters": parameters, "model_transaction_policy": {"decoupled": False}})
    arguments = {"model_config": model_config, "model_repository": "models", "model_version": "1"}
    with pytest.raises(Refused, match="enough"):
        served.TritonPythonModel().initialize({**arguments, "model_instance_device_id": number})
    assert seen == [device]


def test_a_repository_is_whole_versioned_and_checks_its_bundle(bundles, tmp_path):
    (first,) = write_repository(bundles("dit"), tmp_path / "models", Deployment(models=("denoiser",)))
    (second,) = write_repository(bundles("dit"), tmp_path / "models", Deployment(models=("denoiser",)))
    assert (first.name, second.name) == ("1", "2") and first.parent == second.parent
    assert sorted(path.name for path in first.parent.iterdir()) == ["1", "2", "config.pbtxt"]
    assert sorted(path.name for path in first.iterdir()) == ["bundle", "model.py"]
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [first.parent.name]
    copied, listed = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (first / "bundle", bundles("dit"))
    )
    assert copied == listed


def test_a_repository_that_is_not_finished_holds_nothing_of_it(bundles, tmp_path, monkeypatch):
    """Ended at any of its files, or killed and swept by the next: what Triton would take for a model is one."""
    models, copyfile = tmp_path / "models", shutil.copyfile
    deployment = Deployment(models=("denoiser", "denoiser-stream"))
    total = len(open_bundle(bundles("dit")).manifest.files) + 3  # the manifest, and two model files
    for last in range(total):
        left = iter(range(last))

        def copy(source, target, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return copyfile(source, target)

        monkeypatch.setattr(shutil, "copyfile", copy)
        with pytest.raises(KeyboardInterrupt):
            write_repository(bundles("dit"), models, deployment)
        assert list(models.iterdir()) == []
    monkeypatch.setattr(shutil, "copyfile", copyfile)
    (models / ".dit-dit.partial-0123456789ab" / "dit-dit-denoiser" / "1").mkdir(parents=True)
    (models / "dit-dit-denoiser" / "\u00b2").mkdir(parents=True)  # a digit to Python, and no number
    first, second = write_repository(bundles("dit"), models, deployment)
    assert (first.name, second.name) == ("1", "1")
    assert sorted(path.name for path in models.iterdir()) == ["dit-dit-denoiser", "dit-dit-denoiser-stream"]


def test_profiles_go_with_their_bundle_and_a_damaged_one_is_found(bundles, tmp_path):
    folder, models = tmp_path / "bundle", tmp_path / "models"
    shutil.copytree(bundles("dit"), folder)
    bundle = open_bundle(folder)
    path = write_profile(bundle, made(bundle.manifest))
    (version,) = write_repository(folder, models, Deployment(models=("denoiser",)))
    denoiser = Denoiser(bundle.manifest, SimpleNamespace(), open_bundle(version / "bundle"))
    assert dict(denoiser.profiles) == {"fast": made(bundle.manifest).seal()}
    path.write_bytes(path.read_bytes().replace(b"8", b"9", 1))
    with pytest.raises(BundleError, match="calibrate again"):
        write_repository(folder, models, Deployment(models=("denoiser",)))
    assert [path.name for path in models.iterdir()] == [version.parent.name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "picture"], "--models has `picture`, expected some of denoiser, denoiser-stream"),
        (["--memory-budget", "1MB"], "--memory-budget is 1.00 MB, expected at least"),
        (["--device", "cuda", "--batch", "2"], "--batch is 2 on cuda, expected 1"),
        (["--gpus", "0,1"], "--gpus is given with --device cpu, expected it with --device cuda; leave one out"),
        (["--device", "cuda:1", "--gpus", "0"], "--gpus is given with --device cuda:1, expected one of them"),
        (["--device", "cuda", "--gpus", "1,1"], "--gpus is 1,1, expected different numbers from 0, like 0,1"),
        (["--device", "cuda", "--gpus", "all"], "--gpus is all, expected different numbers from 0"),
        (["--slots", "0"], "--slots is 0, expected a whole number, at least 1"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_is_written(bundles, tmp_path, capsys, options, message):
    assert main(["triton", str(bundles("dit")), "--out", str(tmp_path / "models"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_slots_share_the_memory_budget(onnx):
    manifest = onnx("flux").manifest
    weights = sum(file.size for file in manifest.files.values())
    assert slot_bytes(manifest, 4, weights + 4 * 20_000_000) == 20_000_000
    assert slot_bytes(manifest, 8, None) == slot_bytes(manifest, 1, None) > 0


# The contract


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": [0]}, "steps is 0, expected 1 to 1000 (steps)"),
        ({"steps": [10_000]}, "steps is 10000, expected 1 to 1000 (steps)"),
        ({"plan": [b"FF."], "steps": [7]}, "plan FF. is 3 steps long, expected 7 (steps)"),
        ({"plan": [b"F" * 1001]}, "plan is 1001 steps long, expected 1 to 1000 (steps)"),
        ({"plan": [b"F" * 5000]}, "plan is 5000 characters long, expected at most 4096"),
        ({"plan": [b"F\xff"]}, "plan is not readable"),
        ({"plan": [b"FF."], "interval": [3]}, "interval is given beside plan, expected one of them"),
        ({"interval": [0]}, "interval is 0, expected at least 1 (steps)"),
        ({"latents": np.full((1, 4, 16), np.nan, np.float32)}, "input `latents` has values that are NaN or infinite"),
        ({"guidance": np.array([np.inf], np.float32)}, "input `guidance` has values that are NaN or infinite"),
        ({"profile": [b"slow"]}, "profile is `slow`, expected one of this bundle (fast); choose one of those"),
        ({"profile": [b"../fast"]}, "profile is `../fast`, expected one of this bundle (fast)"),
        ({"profile": [b"x" * 5000]}, "profile is 5000 characters long, expected at most 4096"),
        ({"profile": [b"\xff"]}, "profile is not readable"),
        ({"profile": [b"fast"], "plan": [b"FF......"]}, "plan is given beside profile, expected one of them"),
        ({"profile": [b"fast"], "order": [1]}, "order is given beside profile, expected one of them"),
        ({"profile": [b"fast"], "steps": [9]}, "profile `fast` is 8 steps long, expected 9 (steps)"),
        ({"profile": [b"fast"], "sigmas": np.array([0.5, 0.2], np.float32)}, "is 8 steps long, expected 2 (steps)"),
        ({"guard": [b"magic"]}, "guard is `magic`, expected one of `cg`, `fbcache`, `teacache`"),
        ({"guard": [b"cg"]}, "threshold is missing, expected a number above 0 for guard cg"),
        ({"guard": [b"cg"], "threshold": [0.0]}, "threshold is 0.0, expected a number above 0"),
        ({"guard": [b"cg"], "threshold": [np.nan]}, "threshold is nan, expected a number above 0"),
        ({"guard": [b"cg"], "threshold": [0.1], "cap": [0]}, "cap is 0, expected at least 1"),
        ({"guard": [b"cg"], "threshold": [0.1], "interval": [3]}, "interval is given beside guard"),
        ({"guard": [b"cg"], "profile": [b"slow"]}, "profile is `slow`, expected one of this bundle (fast)"),
        ({"threshold": [0.1]}, "threshold is given without a guard, expected one beside it"),
        ({"sigmas": np.array([0.2, 0.5], np.float32)}, "sigmas are not falling"),
        ({"sigmas": np.array([0.5, 0.2], np.float32), "steps": [3]}, "plan F"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_request_is_said(onnx, tiny, change, message):
    denoiser = onnx("flux")
    latents, _, conditioning = tiny("flux").inputs(1, batch=1, height=2, width=2)
    values = {"latents": latents[0].numpy(), **as_arrays(conditioning)}
    known = {"fast": made(denoiser.manifest)}
    contract.ask(denoiser, "denoiser", values, known)  # is right before the change
    for name in values.keys() if "steps" in change else ():
        with pytest.raises(ConfigError, match=f"input `{name}` is missing, expected"):
            contract.ask(denoiser, "denoiser", {n: value for n, value in values.items() if n != name}, known)
    with pytest.raises(ConfigError) as caught:
        contract.ask(denoiser, "denoiser", values | {n: np.asarray(value) for n, value in change.items()}, known)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["flux", "qwen-image", "wan"])
def test_sizes_are_refused_before_noise_is_drawn(eager, tiny, monkeypatch, name):
    """By number alone: neither noise nor places of tokens of that size are made."""
    from taylorseer_export.runtime import places, sampling, tensors

    denoiser = eager(name)
    _, _, conditioning = tiny(name).inputs(1, batch=1)
    made = []
    real = sampling.noise_of
    monkeypatch.setattr(tensors, "noise_of", lambda shape, seed: made.append(shape) or real(shape, seed))
    monkeypatch.setattr(tensors, "value_from_fill", lambda *args: made.append(args) or places.value_from_fill(*args))
    dimension = "image_tokens" if "image_tokens" in denoiser.manifest.dimensions else "rows"
    most = denoiser.manifest.dimensions[dimension].maximum
    given = as_arrays(conditioning)
    text = {n: v for n, v in given.items() if n.startswith(("encoder", "pooled", "text"))}
    with pytest.raises(StepError, match=rf"size `{dimension}` is {1 << 40}, expected \d+ to {most}"):
        tensor_request(denoiser, text, sizes={dimension: 1 << 40})
    assert made == []
    typical = {name: d.typical for name, d in denoiser.manifest.dimensions.items()}
    for door in (random_conditioning, Denoiser.slot):  # 2**40 of anything would not fit
        with pytest.raises(StepError, match=rf"size `{dimension}` is {1 << 40}, expected \d+ to {most}"):
            door(denoiser, {**typical, dimension: 1 << 40})
