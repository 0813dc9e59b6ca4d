"""The cards of the published models: none is stale, and staleness is noticed."""

import json
from pathlib import Path

import cards
import pytest

COUNTED = ("operators", "matrix_products", "attention")
ROOT = Path(__file__).resolve().parents[1]


# `make check` looks at one of each kind of block; all of them take minutes.
QUICK = ("dit-xl-2-256", "flux.1-dev")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in cards.MODELS])
def test_no_card_is_stale(name):
    assert not cards.stale(name), f"graphs/{name}.md is stale; run python tools/cards.py --model {name}"


def test_every_card_has_a_model_and_every_model_a_card():
    assert {path.stem for path in (ROOT / "graphs").glob("*.md")} - {
        "README",
        "coverage",
        "parallel",
    } == cards.MODELS.keys()
    assert {path.stem for path in cards.PUBLISHED.glob("*.json")} >= cards.MODELS.keys()


@pytest.mark.slow
def test_a_card_is_generated_from_its_config_alone(monkeypatch):
    """Another width, another number of layers, another rule of the trace: each makes another digest."""
    name = "dit-xl-2-256"
    entries = cards.config(name)
    first = cards.digest(name)
    monkeypatch.setattr(cards, "config", lambda _: entries | {"num_layers": 30})
    deeper = cards.digest(name)
    monkeypatch.setattr(cards, "config", lambda _: entries | {"num_attention_heads": 12})
    narrower = cards.digest(name)
    assert len({first, deeper, narrower}) == 3
    monkeypatch.undo()
    monkeypatch.setattr(cards, "PRODUCTS", ())
    assert cards.digest(name) != first


@pytest.mark.slow
def test_the_record_says_what_the_card_says():
    """Both are counted from the graphs: of DiT-XL/2 at two layers the state of every order, and the operators."""
    entries = cards.config("dit-xl-2-256") | {"num_layers": 2}
    text, found = cards.text("dit-xl-2-256", entries), cards.numbers("dit-xl-2-256", entries)
    for granularity, of_it in found["granularities"].items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {granularity} |")).split(" | ")
        assert [cards.size(n) for n in of_it["state_bytes"].values()] == row[2:5]
    graphs = found["granularities"]["module"]["graphs"]
    for name, graph in graphs.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |")).strip("| ").split(" | ")
        assert row[1:5] == [cards.size(graph["weights_bytes"]), *(str(graph[k]) for k in COUNTED)]
    assert graphs["full"]["attention"] == 2 and graphs["forecast"]["attention"] == 0
    assert sum(graphs["full"]["by_operator"].values()) == graphs["full"]["operators"]


def test_a_claim_that_is_broken_is_said():
    found = {
        granularity: {"state_bytes": {"order 2": 10}, "graphs": {"forecast": {"weights_bytes": 5}}}
        for granularity in cards.GRANULARITIES
    }
    claims = cards._claims({"module": 9, "residual": 10, "forecast": 5}, found)
    assert [claim for claim, c in claims.items() if not c["holds"]] == ["state module, order 2"]
    assert len(claims) == 5


@pytest.mark.slow
def test_a_card_says_what_the_graphs_say():
    """The card of DiT-XL/2 at two layers, against numbers worked out by hand."""
    entries = cards.config("dit-xl-2-256") | {"num_layers": 2}
    text = cards.text("dit-xl-2-256", entries)
    snapshot = 2 * 256 * 1152 * 2  # batch of two halves, tokens, width, bytes of bfloat16
    assert f"| module | 4 | {4 * snapshot / 1e6:.2f} MB |" in text
    assert "| `transformer_blocks.*.attn1` | 2 | [batch, 256, 1152], 1.18 MB |" in text
    assert json.dumps("FF...F...F...F...F...F...F...F...F...F...F...F...F").strip('"') in text
    assert "14 full (interval 4, warmup 2): speed-up at most 3.57" in text
