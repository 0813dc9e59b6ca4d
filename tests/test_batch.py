"""Shared engine calls: several slots in one call get, bit for bit, what each gets alone."""

import numpy as np
import pytest
from harness import as_arrays, open_slot, run

from taylorseer_export.errors import StepError
from taylorseer_export.runtime.batch import SharedCalls, ids_of

PLAN, ORDER = "FFF..F..", 2


@pytest.fixture(params=["flux", "dit"])  # snapshots and derivatives, over ONNX Runtime
def denoiser(request, onnx):
    return onnx(request.param)


def requests(denoiser, tiny, count, **sizes):
    """[(slot, inputs)]: requests under way that differ in all their numbers, and in their batch."""
    name = denoiser.manifest.family
    made = []
    for k in range(count):
        inputs = tiny(name).inputs(len(PLAN), batch=1 + k % 2, seed=k, **sizes)
        slot = open_slot(denoiser, inputs)
        slot.start(as_arrays(inputs[2]), denoiser.forecasts(plan=PLAN, order=ORDER), inputs[1].float().numpy())
        made.append((slot, inputs))
    return made


def advance_all(calls, made, step):
    """One step of every request in one call: (whether it was shared, the predictions)."""
    for slot, inputs in made:
        slot.stage(inputs[0][step].numpy())
    done = calls.run([slot for slot, _ in made])
    return done, [slot.finish() for slot, _ in made] if done else []


def alone(denoiser, made):
    return [run(denoiser, inputs, PLAN, ORDER).numpy() for _, inputs in made]


def test_shared_equals_alone_bit_for_bit(denoiser, tiny):
    calls = SharedCalls(denoiser)
    made = requests(denoiser, tiny, 3)
    expected = alone(denoiser, made)
    for repeat in range(2):  # the first time every kind of call is made both ways, the second time once
        for step in range(len(PLAN)):
            done, seen = advance_all(calls, made, step)
            assert done
            for prediction, reference in zip(seen, expected, strict=True):
                assert prediction.tobytes() == reference[step].tobytes(), (repeat, step)
        made = requests(denoiser, tiny, 3)
    assert calls.unequal == set()


def test_partners_may_change_at_every_step(denoiser, tiny):
    calls = SharedCalls(denoiser)
    made = requests(denoiser, tiny, 3)
    expected = alone(denoiser, made)
    for step in range(len(PLAN)):
        pair = [made[step % 3], made[(step + 1) % 3]]
        (lonely,) = [m for m in made if m not in pair]
        done, seen = advance_all(calls, pair, step)
        answers = dict(zip([made.index(m) for m in pair], seen, strict=True))
        answers[made.index(lonely)] = lonely[0].step(lonely[1][0][step].numpy())
        assert done
        assert all(answers[k].tobytes() == expected[k][step].tobytes() for k in answers)


def test_an_engine_that_rounds_otherwise_in_a_batch_is_found_out(denoiser, tiny, monkeypatch):
    bind = type(denoiser.runner).bind

    def rounding(runner, graph, inputs, outputs):
        call = bind(runner, graph, inputs, outputs)

        def wrong():
            call()
            if graph != "prepare" and len(outputs["noise_pred"].array) > 2:  # no request has as many
                outputs["noise_pred"].array[0] = np.nextafter(outputs["noise_pred"].array[0], np.inf)

        return wrong

    monkeypatch.setattr(type(denoiser.runner), "bind", rounding)
    calls = SharedCalls(denoiser)
    made = requests(denoiser, tiny, 3)
    expected = alone(denoiser, made)
    done, seen = advance_all(calls, made, 0)
    assert done and len(calls.unequal) == 1
    assert all(a.tobytes() == b[0].tobytes() for a, b in zip(seen, expected, strict=True))
    done, _ = advance_all(calls, made, 1)
    assert not done  # each has to run alone now
    predictions = []
    for slot, _ in made:
        slot.run()
        predictions.append(slot.finish())
    assert all(a.tobytes() == b[1].tobytes() for a, b in zip(predictions, expected, strict=True))


@pytest.mark.parametrize("fault", ["nan", "refused"])
def test_a_failing_call_leaves_every_slot_as_it_was(denoiser, tiny, monkeypatch, fault):
    calls = SharedCalls(denoiser)
    made = requests(denoiser, tiny, 2)
    expected = alone(denoiser, made)
    assert advance_all(calls, made, 0)[0]
    (bound,) = calls._bound.values()

    def call():
        if fault == "refused":
            raise StepError("engine failed, expected it to run; try again")
        bound.outputs["noise_pred"].array[...] = np.nan

    for key in calls._bound:
        calls._bound[key] = bound._replace(call=call)
    done, _ = advance_all(calls, made, 1)
    assert not done
    for (slot, _), reference in zip(made, expected, strict=True):
        slot.run()
        assert slot.finish().tobytes() == reference[1].tobytes()


def test_keys_tell_apart_what_cannot_be_shared(onnx, tiny):
    denoiser = onnx("flux")
    calls = SharedCalls(denoiser)

    def key(plan=PLAN, steps=0, **sizes):
        inputs = tiny("flux").inputs(len(plan), batch=1, **sizes)
        slot = open_slot(denoiser, inputs)
        conditioning = as_arrays(inputs[2])
        slot.start(conditioning, denoiser.forecasts(plan=plan, order=ORDER), inputs[1].float().numpy())
        for step in range(steps):
            slot.step(inputs[0][step].numpy())
        return calls.key(slot, ids_of(denoiser, conditioning))

    assert key() == key(seed=7) == key("FFFFF...", steps=2)  # full steps of any plan, in any phase
    assert key(height=2, width=3) != key(height=3, width=2)  # as many tokens, at other places
    assert key() != key(height=2, width=2)
    assert key(steps=3) is None  # a forecast reads more state than weights


def test_a_static_batch_is_not_shared(onnx):
    assert SharedCalls(onnx("plain")).most == 2  # one request of the static batch fills it
