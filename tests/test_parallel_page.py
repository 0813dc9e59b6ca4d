"""The page of what several GPUs would send and take: made of the counts it holds, which are those of a formula."""

import cards
import parallel_page
import pytest
from parallel_page import LINKS, MODELS, MODES, RANKS, Link, gains, rows_sent, times

PAGE = parallel_page.PAGE.read_text(encoding="utf-8")
COUNTS = parallel_page.held(PAGE)
# Rows of the latent at the sizes of a page, where they are not one size, and attentions that look at them.
ROWS = ("image_tokens", "frames", "rows", "columns")
DEPTH = ("num_layers", "num_single_layers")


def test_the_page_is_made_of_its_counts():
    assert tuple(COUNTS) == MODELS
    assert parallel_page.page(COUNTS) == PAGE, "graphs/parallel.md is stale; run python tools/parallel_page.py --render"


@pytest.mark.parametrize("name", MODELS)
def test_its_bytes_are_those_of_a_formula_over_the_config(name):
    """That graphs send so much by attention, `test_parallel` counts in a run: what changes it makes the page stale."""
    config, found = cards.config(name), COUNTS[name]
    attentions = sum(config.get(depth, 0) for depth in DEPTH)
    channels = config["num_attention_heads"] * config["attention_head_dim"] * 2  # bytes in bfloat16
    text = 0 if name.startswith("wan") else found["sizes"]["text_tokens"]  # Wan's text has attentions of its own
    assert found["ranks"]["1"]["sent"] == 0
    for mode in MODES:
        for ranks in RANKS:
            one = found["ranks"][f"{mode} {ranks}"]
            sizes = {**found["sizes"], one["dimension"]: one["rows"]}
            local = 1
            for size in ROWS:
                local *= sizes.get(size, 1)
            assert one["padded"] == bool(found["sizes"][one["dimension"]] % ranks)
            assert one["sent"] == attentions * channels * rows_sent(mode, ranks, local, text)
            assert one["collectives"] == attentions * parallel_page.EACH[mode]


def counts(flops, forecast=0, sent=0, collectives=0, prepare=0):
    """Of one rank; bytes of a forecast step beside its launch."""
    return {"flops": flops, "full_bytes": 0, "prepare_bytes": prepare, "forecast_bytes": {"module": forecast},
            "sent": sent, "collectives": collectives}  # fmt: skip


def test_times_by_hand():
    link = Link("", 1e9, 1e-3, between=1e8)
    one = counts(0.6 * 989e12, 0.8 * 4.8e12, sent=8e8, collectives=10, prepare=0.8 * 4.8e12)
    alone = times(one, "module")
    assert alone.prepare == pytest.approx(1) and alone.computed == pytest.approx(1) and alone.wire == 0
    assert alone.forecast == pytest.approx(1 + parallel_page.LAUNCH)
    assert alone.loop(2, 3) == pytest.approx(1 + 2 + 3 * alone.forecast)
    # Of 4 ranks: half of a gather's bytes in each card of a ring, two thirds of what an exchange sends across.
    assert times(one, "module", "gather", 4, link).wire == pytest.approx(0.01 + 4e8 / 1e8 / 0.8)
    assert times(one, "module", "ulysses", 4, link).wire == pytest.approx(0.01 + 8e8 * 2 / 3 / 1e8 / 0.8)
    assert times(one, "module", "gather", 4, Link("", 1e9, 1e-3)).wire == pytest.approx(0.01 + 1)


def test_gains_multiply_where_everything_shrinks_alike(monkeypatch):
    monkeypatch.setattr(parallel_page, "LAUNCH", 0.0)

    def off(**shared):
        ranks = {"1": counts(8e15, 1e12), "gather 2": counts(**{"flops": 4e15, "forecast": 5e11, **shared})}
        return gains({"plan": "F...F...", "ranks": ranks}, "module", "gather 2", LINKS["PCIe"])[1].off

    assert off() == pytest.approx(0)
    assert off(sent=1e11) > 0.001  # a full step pays the wire
    assert off(forecast=1e12) < -0.001  # a forecast step does not shrink
