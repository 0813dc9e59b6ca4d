"""Plans: the strings of both dialects, the history they give, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taylorseer_export.errors import ConfigError
from taylorseer_export.method import Plan

sizes = st.integers(1, 60)
plans = st.builds(Plan.regular, sizes, st.integers(1, 12), sizes, st.sampled_from(["original", "diffusers"]))
texts = st.text("F.", max_size=40).map(lambda tail: f"F{tail}")


def counted(steps: int, interval: int, warmup: int) -> list[int]:
    """Full steps by the counter of the paper's code, which `original` states in closed form."""
    full, since = [], 0
    for step in range(steps):
        if step < warmup or since == interval - 1:
            full.append(step)
            since = 0
        else:
            since += 1
    return full


@pytest.mark.parametrize(
    ("steps", "interval", "warmup", "full", "last", "count"),
    [
        (50, 6, 3, (0, 1, 2, 8, 14), 44, 10),  # FLUX.1-dev
        (28, 6, 3, (0, 1, 2, 8, 14, 20, 26), 26, 7),
        (4, 6, 3, (0, 1, 2), 2, 3),  # FLUX-schnell
        (50, 4, 3, (0, 1, 2, 6, 10), 46, 14),  # FLUX-Kontext
        (50, 5, 1, (0, 5, 10), 45, 10),  # HunyuanVideo, Wan2.1
        (40, 5, 1, (0, 5, 10), 35, 8),  # Wan2.1 image to video
        (50, 4, 1, (0, 4, 8), 48, 13),  # HiDream
        (28, 4, 1, (0, 4, 8), 24, 7),
        (16, 4, 1, (0, 4, 8, 12), 12, 4),
        (50, 4, 2, (0, 1, 5), 49, 14),  # DiT-XL/2, counted from 0 up
        (25, 5, 1, (0, 5, 10, 15, 20), 20, 5),  # FramePack
    ],
)
def test_published_schedules(steps, interval, warmup, full, last, count):
    plan = Plan.regular(steps, interval, warmup)
    assert plan.full_steps[: len(full)] == full
    assert plan.full_steps[-1] == last
    assert len(plan.full_steps) == count
    assert plan.ceiling == steps / count


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        ("original", "FFF....F....F....F....F....F....F....F....F....F.."),
        ("diffusers", "FFF.F....F....F....F....F....F....F....F....F....F"),
    ],
)
def test_dialects_for_50_steps(dialect, text):
    plan = Plan.regular(50, 5, 3, dialect)
    assert str(plan) == text
    assert len(plan) == plan.steps == 50
    assert plan.warmup == 3


@given(sizes, st.integers(1, 12), sizes)
def test_original_is_the_counter_of_the_paper(steps, interval, warmup):
    assert list(Plan.regular(steps, interval, warmup).full_steps) == counted(steps, interval, warmup)


@given(plans)
def test_print_and_parse_are_inverse(plan):
    assert Plan.parse(str(plan)) == plan
    assert hash(Plan.parse(str(plan))) == hash(plan)


@given(sizes, st.integers(1, 12), sizes, st.sampled_from(["original", "diffusers"]))
def test_forecast_stretches_are_shorter_than_the_interval(steps, interval, warmup, dialect):
    plan = Plan.regular(steps, interval, warmup, dialect)
    assert plan.is_full(0)
    assert max(map(len, str(plan).split("F"))) < interval
    assert len(plan.full_steps) == sum(map(plan.is_full, range(plan.steps)))


@given(texts, st.integers(0, 4), st.data())
def test_history_follows_its_rule(text, order, data):
    plan = Plan(text)
    step = data.draw(st.integers(0, plan.steps - 1))
    expected = []
    for past in range(max(plan.warmup - 2, 0), step):
        if text[past] == "F":
            expected.append(past)
    assert plan.history(step, order) == tuple(expected)[max(len(expected) - order - 1, 0) :]


@given(texts, st.integers(0, 4))
def test_every_forecast_step_has_a_history(text, order):
    plan = Plan(text)
    forecast = [step for step in range(plan.steps) if not plan.is_full(step)]
    assert all(plan.history(step, order) for step in forecast)


def test_history_of_flux_ramps_up():
    plan = Plan.regular(50, 6, 3)
    assert plan.history_start == 1
    histories = [plan.history(step, 2) for step in (0, 1, 2, 3, 8, 9, 15)]
    assert histories == [(), (), (1,), (1, 2), (1, 2), (1, 2, 8), (2, 8, 14)]


@pytest.mark.parametrize(
    ("text", "warmup", "start"), [("F....", 1, 0), ("FF...", 2, 0), ("FFF..", 3, 1), ("FFFF", 4, 2)]
)
def test_history_starts_two_before_the_end_of_warmup(text, warmup, start):
    assert (Plan(text).warmup, Plan(text).history_start) == (warmup, start)


def test_warmup_is_clipped_to_the_loop():
    assert str(Plan.regular(4, 5, 99)) == "FFFF"


@pytest.mark.parametrize(
    ("call", "fix"),
    [
        (lambda: Plan.parse(""), "write a plan such as"),
        (lambda: Plan.parse("FxF"), "`x` at step 1"),
        (lambda: Plan.parse("FF \n"), "write a plan such as"),
        (lambda: Plan.parse(".FF"), "begin the plan with `F`"),
        (lambda: Plan("ff"), "write a plan such as"),
        (lambda: Plan.regular(0, 5, 3), r"steps is 0, expected at least 1 \(steps\)"),
        (lambda: Plan.regular(50, 0, 3), r"interval is 0, expected at least 1 \(steps\)"),
        (lambda: Plan.regular(50, 5, 0), r"warmup is 0, expected at least 1 \(steps\)"),
        (lambda: Plan.regular(50, 5, 3, "paper"), "use `original`"),
        (lambda: Plan("F.").is_full(2), "plan of the length of the loop"),
        (lambda: Plan("F.").is_full(-1), "plan of the length of the loop"),
        (lambda: Plan("F.").history(2, 1), "plan of the length of the loop"),
        (lambda: Plan("F.").history(1, 5), "pass --order 2"),
        (lambda: Plan("F.").check_length(3), "pass a plan of 3 characters or run 2 steps"),
    ],
)
def test_refusals_say_the_fix(call, fix):
    with pytest.raises(ConfigError, match=fix):
        call()


def test_check_length_accepts_its_own():
    plan = Plan("F..")
    plan.check_length(3)
    with pytest.raises(AttributeError):
        plan.text = "FFF"
