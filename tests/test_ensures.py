"""What `split` ensures: a forecast step with a part of the blocks left in it is refused, and the part is named."""

import dataclasses
import re

import pytest
import torch
from conftest import MODELS
from harness import FLOAT32, TOY, toy_trace
from torch import fx

from taylorseer_export.bundle.manifest import Tensor
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile import export
from taylorseer_export.errors import ExportError
from taylorseer_export.families import FAMILIES
from taylorseer_export.graph.cut import Cut
from taylorseer_export.graph.ensures import ensure
from taylorseer_export.graph.split import split
from taylorseer_export.graph.taps import tap_operator
from taylorseer_export.graph.trace import trace


def kind(site):
    """Of `transformer_blocks.3.attn`, what is the same in every block."""
    return re.sub(r"\d+", "*", site)


def leads_to(module, site):
    """Whether a message that names this module leads to the site that was removed.

    It is the site's own, or the block around it where nothing else of it is a site, or what the site norms.
    """
    normed = site.endswith("norm2") and module.rpartition(".")[0] == site.rpartition(".")[0]
    return normed or f"{site}.".startswith(f"{module}.")


def without(traced, removed):
    """The trace as a declaration without these sites gives it: their taps are identities then."""
    return dataclasses.replace(traced, sites=tuple(site for site in traced.sites if site not in removed))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_site_is_needed(traces, name):
    traced = traces(name)
    kinds = {kind(site): [s for s in traced.sites if kind(s) == kind(site)] for site in traced.sites}
    assert len(kinds) > 1
    for k, sites in enumerate(kinds.values()):
        for removed in (sites[:1], sites)[: 1 if k else 2]:  # a pattern that misses one block, and once a whole one
            with pytest.raises(ExportError, match=r"expected no attention, no MLP and no text.*`sites`") as refused:
                split(without(traced, removed), "module", "snapshots", 1)
            named = re.findall(r"`([\w.]+)`", str(refused.value).partition(", expected")[0])
            assert named and all(any(leads_to(module, site) for site in removed) for module in named)


@pytest.mark.parametrize("name", MODELS)
def test_coarser_granularities_need_no_list_of_sites(traces, name):
    """They are cut behind the blocks, whatever those hold; the first site is what a guard reads."""
    traced = traces(name)
    for granularity in ("residual", "last"):
        pieces = split(without(traced, traced.sites[1:]), granularity, "snapshots", 1, guards=("cg", "teacache"))
        assert list(pieces.sites) == [f"{granularity}{stream}" for stream in traced.streams]


@pytest.mark.slow
def test_an_export_is_refused_before_anything_is_written(tiny):
    family = dataclasses.replace(FAMILIES["dit"], sites=(r"transformer_blocks\.\d+\.attn1",))
    checkpoint = open_checkpoint(str(tiny("dit").folder), family)
    text = r"left with `transformer_blocks\.0\.ff`, `transformer_blocks\.1\.ff`, `transformer_blocks\.2\.ff`, expected"
    with pytest.raises(ExportError, match=text):
        export.draft(checkpoint, export.Options(order=1, interval=4, warmup=2))


def test_a_family_without_sites(tiny):
    family = dataclasses.replace(FAMILIES["dit"], sites=())
    model = open_checkpoint(str(tiny("dit").folder), family).skeleton(FLOAT32)
    with pytest.raises(ExportError, match=r"family dit has no `sites`, expected patterns of DiT.*families/README\.md"):
        trace(model, family, FLOAT32)


# Every rule can fail, on a toy


def attention(m, h, t, text, label):
    return h + m.site(h) + torch.nn.functional.scaled_dot_product_attention(h, h, h)


def own_attention(m, h, t, text, label):
    return h + m.site(h) + (h @ h.transpose(1, 2)).softmax(-1) @ h


def product(m, h, t, text, label):
    return h + m.site(h) + torch.nn.functional.linear(h.sin(), m.weight)


def rows_of_the_text(m, h, t, text, label):
    x = torch.cat([text, h], 1)
    return ((x + m.site(x)).cumsum(1))[:, text.shape[1] :]


def sum_of_the_text(m, h, t, text, label):
    return h + m.site(h) + (text * t[:, None, None]).sum(1, keepdim=True)


@pytest.mark.parametrize("compute", [attention, own_attention, product, rows_of_the_text, sum_of_the_text])
def test_what_must_not_be_left(compute):
    traced = toy_trace(compute, weight=torch.eye(4))[1]
    with pytest.raises(ExportError, match=r"the forecast graph is left with `\w+`"):
        split(traced, "module", "snapshots", 1)
    for granularity in ("residual", "last"):
        assert split(traced, granularity, "snapshots", 1).sites.keys() == {granularity}


def test_what_may_be_left():
    """Gates, additions, norms and casts of the rows of the latent."""

    def compute(m, h, t, text, label):
        x = h + torch.sigmoid(label[:, None]) * m.site(h)
        return torch.nn.functional.layer_norm(x.double(), (4,)).float() + t[:, None, None].tanh()

    assert split(toy_trace(compute)[1], "module", "snapshots", 1).sites.keys() == {"site"}


def test_a_site_whose_forecast_is_not_read():
    """Cut nowhere, it would be computed on every step; only a bug does that, so it is built by hand."""
    traced = toy_trace(lambda m, h, t, text, label: h + m.site(h))[1]
    with pytest.raises(ExportError, match="the forecast graph is left with `site`"):
        ensure(traced, (), {traced.taps()["site"]})


@pytest.mark.parametrize("wrong", ["types", "tap", "order"])
def test_graphs_are_well_formed(wrong):
    traced = toy_trace(lambda m, h, t, text, label: h + m.site(h))[1]
    graph = fx.Graph()
    one, other = graph.placeholder("one"), graph.placeholder("other")
    total = graph.call_function(torch.ops.aten.add.Tensor, (one, other))
    result = graph.call_function(tap_operator(), (total, "site")) if wrong == "tap" else total
    graph.output((result,))
    if wrong == "order":
        total.prepend(result.next)
    dtypes = ("float32", "bfloat16" if wrong == "types" else "float32")
    inputs = tuple(Tensor(name=n, dtype=d, shape=(2,), role="latent") for n, d in zip("ab", dtypes, strict=True))
    cut = Cut("full", fx.GraphModule(torch.nn.Module(), graph), inputs, inputs[:1])
    told = {"types": r"`aten\.add\.Tensor` of bfloat16 and float32", "tap": "holds site", "order": "before it has been"}
    with pytest.raises((ExportError, RuntimeError), match=told[wrong]):
        ensure(traced, (cut,), ())


def test_the_toy_is_right():
    assert TOY.sites == ("site",)
