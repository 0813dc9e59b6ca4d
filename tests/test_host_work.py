"""What a step costs the host beside its engine call: how often it launches, and copies between host and device."""

import host_work
import pytest

from taylorseer_export.errors import ServeError


@pytest.fixture(scope="module")
def found(eager):
    return host_work.measure(eager("plain", "residual").manifest, 1)


def test_a_step_of_a_slot_stays_on_the_device(found):
    """Nothing is sent either: latents are on the device, and so are the rows of the tables and the weights."""
    assert found["slot"]["forecast"]["per_step"] == {"launches": 1, "on the device": 3}
    assert found["slot"]["full"]["per_step"] == {"launches": 1, "on the device": 3}


def test_the_drop_in_adds_the_prepare_graph_and_its_timestep(found):
    """A pipeline says its timesteps one by one, so the tables have one row, made at every step."""
    for kind, of_it in found["drop-in"].items():
        slot = found["slot"][kind]["per_step"]
        more = {"launches": 1, "to the device": 1}
        assert of_it["per_step"] == {what: slot.get(what, 0) + more.get(what, 0) for what in slot.keys() | more}


def test_requests_that_share_a_call_launch_one(found):
    for of_it in found["shared"].values():
        assert of_it["per_step"]["launches"] == 1 / host_work.SLOTS


def test_every_time_is_one_of_a_step(found):
    kinds = {name: ["forecast", "full"] for name in host_work.WAYS} | {"served": ["any"]}
    assert {name: sorted(of_it) for name, of_it in found.items()} == kinds
    assert all(it["microseconds"] > 0 for kinds in found.values() for it in kinds.values())


def test_requests_of_the_service_share_calls(found):
    """How many meet depends on which worker is first; alone each step would launch one, and `prepare` one more."""
    assert 1 / host_work.SLOTS <= found["served"]["any"]["per_step"]["launches"] < 1


def test_a_sender_learns_that_its_request_failed():
    waiting = host_work.Waiting()
    waiting.failed(ServeError("slot is gone, expected it to stay; send again", "INTERNAL"))
    with pytest.raises(ServeError, match="slot is gone"):
        waiting.wait()


def test_a_sampled_step_sends_the_latents_and_takes_the_prediction(found):
    for kind, of_it in found["sampled"].items():
        on_the_device = found["slot"][kind]["per_step"]["on the device"] - 1
        crossing = {"to the device": 1, "to the host": 1}
        assert of_it["per_step"] == {"launches": 1, "on the device": on_the_device, **crossing}


def test_what_stretches_of_forecast_steps_would_save_is_the_host_between_them():
    ways = {"sampled": {"forecast": {"microseconds": 99.0}}, "slot": {"forecast": {"microseconds": 4.5}}}
    saved = host_work.without_the_host(ways, host_work.Plan.parse("FF.F...F.."))
    assert saved == {"longest_stretch": 3, "microseconds_of_a_step": 94.5, "microseconds_of_a_loop": 567.0}
