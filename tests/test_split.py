"""The split: what each derived graph holds, reads and returns, counted from the graphs."""

import dataclasses
import re

import pytest
import torch
from harness import FLOAT32, TOY, Passage, Toy, toy_inputs, toy_trace
from oracle import tapped

from taylorseer_export.bundle.shapes import evaluate, names, resolve
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile.eager import eager_modules
from taylorseer_export.errors import ExportError
from taylorseer_export.families import FAMILIES
from taylorseer_export.graph.split import split
from taylorseer_export.graph.trace import trace

NAMES = ("flux", "plain", "dit")
GRANULARITIES = ("module", "residual", "last")
# Weights that a forecast step reads: embedder and head; everything else of the network is forecast or tabled.
ENDS = {"flux": r"(x_embedder|proj_out)\.", "plain": r"(x_embedder|proj_out)\.", "dit": r"(pos_embed|proj_out_2)\."}
# Weights of what depends on the request or on the step alone.
EARLY = {
    "flux": r"context_embedder|time_text_embed|norm_out\.linear|.*\.(norm1|norm1_context|norm)\.linear\.",
    "dit": r".*\.norm1\.|proj_out_1\.",
}
EARLY["plain"] = EARLY["flux"]
SIZES = {"batch": 3, "image_tokens": 10, "text_tokens": 7, "steps": 4}


def linears(model, keep):
    """Number of linear layers of the model whose weights `keep` accepts."""
    return sum(isinstance(m, torch.nn.Linear) and keep(f"{n}.weight") for n, m in model.named_modules())


def early(name):
    return lambda weight: re.match(EARLY[name], weight) is not None


def checkpoint_weights(cut, model):
    return set(cut.parameters()) & model.state_dict().keys()


def image_tokens(model):
    config = model.config
    return (config.sample_size // config.patch_size) ** 2 if "sample_size" in config else "image_tokens"


# What a forecast step leaves out


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_forecast_has_no_attention_no_mlp_no_text(drafts, tiny, name, granularity):
    forecast = drafts(name, granularity).split.forecast
    found = forecast.operators()
    heavy = ("scaled_dot_product_attention", "gelu", "silu", "rms_norm", "softmax", "sin", "cos", "cat", "embedding")
    assert {op: found[op] for op in heavy if found[op]} == {}
    assert found["layer_norm"] == 1  # the one before the head
    # The head, and the embedder where the stack's input is wanted: a linear layer in FLUX, a convolution in DiT.
    embedders = int(granularity != "last")
    assert (found["linear"], found["conv2d"]) == ((1, embedders) if name == "dit" else (1 + embedders, 0))
    assert found["matmul"] == len(drafts(name, granularity).split.sites)
    assert all(re.match(ENDS[name], weight) for weight in forecast.parameters())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["flux", "plain"])
def test_forecast_reads_nothing_of_the_text(drafts, name, granularity):
    forecast = drafts(name, granularity).split.forecast
    assert {t.role for t in forecast.inputs} == {"latent", "step", "weights", "taylor_in"}
    assert not any("text_tokens" in names(entry) for t in forecast.inputs for entry in t.shape)


@pytest.mark.parametrize("name", NAMES)
def test_full_does_all_of_attention_and_mlp(drafts, tiny, name):
    model = tiny(name).model
    found = drafts(name).split.full.operators()
    blocks = {n.rsplit(".", 1)[0] for n, _, _ in tapped(model)}
    assert found["scaled_dot_product_attention"] == len(blocks)
    mlps = sum(type(m).__name__ == "GELU" for m in model.modules())
    assert found["gelu"] == mlps
    assert found["linear"] == linears(model, lambda weight: not early(name)(weight))


@pytest.mark.parametrize("name", NAMES)
def test_full_costs_no_more_for_its_taps(drafts, name):
    """With snapshots the taps are outputs and no operator; with derivatives three per site and order."""
    snapshots, derivatives = (drafts(name, layout=layout).split for layout in ("snapshots", "derivatives"))
    more = derivatives.full.operators() - snapshots.full.operators()
    differences = 2 * len(snapshots.sites)
    assert more["mul"] == more["sub"] == differences
    assert more["stack"] == len(snapshots.sites)
    assert derivatives.forecast.operators() == snapshots.forecast.operators()
    assert derivatives.prepare.operators() == snapshots.prepare.operators()


# What is computed ahead


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_prepare_holds_the_modulation_and_the_steps_none(drafts, tiny, name, granularity):
    model, pieces = tiny(name).model, drafts(name, granularity).split
    weights = model.state_dict().keys()
    assert checkpoint_weights(pieces.prepare, model) == {w for w in weights if early(name)(w)}
    assert not any(early(name)(w) for cut in (pieces.full, pieces.forecast) for w in cut.parameters())
    # DiT embeds timestep and class a second time, with the weights of block 0, for its head: that is done once.
    assert pieces.prepare.operators()["linear"] == linears(model, early(name))


@pytest.mark.parametrize("name", NAMES)
def test_constants_are_folded(drafts, name):
    """Frequencies are computed once, by torch: an engine's own `exp` would move the angle of timestep 1000."""
    draft = drafts(name)
    for cut in draft.split.graphs:
        assert not cut.operators().keys() & {"exp", "arange", "pow", "log"}
    half = 128
    last = half - 1 if name == "dit" else half  # diffusers' downscale_freq_shift is 1 for DiT
    frequencies = 10000.0 ** -(torch.arange(half) / last)
    tables = [t for t in draft.buffers.values() if t.numel() == half]
    assert tables
    for table in tables:
        assert torch.allclose(table.flatten(), frequencies, rtol=1e-5)


@pytest.mark.parametrize("name", ["flux", "plain"])
def test_rope_and_prompt_are_made_once_per_request(drafts, name):
    pieces = drafts(name).split
    request = {t.name for t in pieces.prepare.outputs if t.role == "constant"}
    assert request == {t.name for t in pieces.full.inputs if t.role == "constant"}
    assert not pieces.full.operators().keys() & {"sin", "cos", "outer"}
    assert not any(t.name in ("encoder_hidden_states", "img_ids", "txt_ids") for t in pieces.full.inputs)


# Weights


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_read_and_only_the_ends_twice(drafts, tiny, name, granularity):
    model, draft = tiny(name).model, drafts(name, granularity)
    prepare, full, forecast = (checkpoint_weights(cut, model) for cut in draft.split.graphs)
    assert prepare | full | forecast == model.state_dict().keys()
    assert prepare & (full | forecast) == set()
    assert forecast <= full
    assert {w for w in forecast if not re.match(ENDS[name], w)} == set()
    assert draft.stored.keys() == set().union(*(cut.parameters() for cut in draft.split.graphs))


@pytest.mark.parametrize("name", NAMES)
def test_weight_bytes(drafts, tiny, name):
    draft = drafts(name)
    computed = sum(draft.buffers[n].nbytes for n in draft.stored if n in draft.buffers)
    assert draft.weights_bytes() == computed + sum(v.nbytes for v in tiny(name).model.state_dict().values())


# Sites and contracts


@pytest.mark.parametrize("layout", ["snapshots", "derivatives"])
@pytest.mark.parametrize("name", NAMES)
def test_sites_hold_image_rows_only(drafts, tiny, name, layout):
    """FLUX's single blocks work on text and image rows, of which only image rows reach the output."""
    model, draft = tiny(name).model, drafts(name, layout=layout)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    expected = [n for n, _, _ in tapped(model) if not n.endswith("ff_context")]
    assert sorted(draft.split.sites) == sorted(expected)
    rows = image_tokens(model)
    assert set(draft.split.sites.values()) == {("batch", rows, width)}
    entries = {t.shape for t in draft.split.forecast.inputs if t.role == "taylor_in"}
    assert entries == {(3, "batch", rows, width)}


@pytest.mark.parametrize("granularity", ["residual", "last"])
@pytest.mark.parametrize("name", NAMES)
def test_coarse_granularities_have_one_site(drafts, tiny, name, granularity):
    config = tiny(name).model.config
    width = config.num_attention_heads * config.attention_head_dim
    assert drafts(name, granularity).split.sites == {granularity: ("batch", image_tokens(tiny(name).model), width)}


@pytest.mark.parametrize("layout", ["snapshots", "derivatives"])
@pytest.mark.parametrize("order", [0, 1, 4])
def test_buffers_follow_the_order(drafts, layout, order):
    pieces = drafts("dit", layout=layout, order=order).split
    read = [t.shape[0] for t in pieces.forecast.inputs if t.role == "taylor_in"]
    assert read == [order + 1] * len(pieces.sites)
    roles = {t.role for t in pieces.full.inputs}
    assert ("taylor_in" in roles) == ("weights" in roles) == (layout == "derivatives" and order > 0)
    written = {t.shape for t in pieces.full.outputs if t.role == "taylor_out"}
    snapshot = ("batch", 16, 32)
    assert written == {snapshot if layout == "snapshots" else (order + 1, *snapshot)}
    weights = {t.shape for t in pieces.forecast.inputs if t.role == "weights"}
    assert weights == {(order + 1,)}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_contracts_join_up(drafts, name, granularity):
    """What a step reads is given by the user, by prepare, by the schedule, or by an earlier full step."""
    for layout in ("snapshots", "derivatives"):
        prepare, full, forecast = drafts(name, granularity, layout).split.graphs
        made = {t.name: t for t in prepare.outputs}
        for tensor in (*full.inputs, *forecast.inputs):
            if tensor.role == "constant":
                assert made[tensor.name] == tensor
            if tensor.role == "step":
                assert made[tensor.name].shape == ("steps", *tensor.shape)
        assert "step.full" not in {t.name for t in forecast.inputs}
        assert full.outputs[0] == forecast.outputs[0]
        written = {t.name.split(".", 1)[1] for t in full.outputs[1:]}
        assert written == {t.name.split(".", 1)[1] for t in forecast.inputs if t.role == "taylor_in"}


@pytest.mark.parametrize("layout", ["snapshots", "derivatives"])
@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_what_the_contract_says(drafts, name, layout):
    """At sizes other than the traced ones: every symbolic entry evaluates to the size that is seen."""
    draft = drafts(name, layout=layout)
    modules = eager_modules(draft)
    for cut in draft.split.graphs:
        inputs = [torch.zeros(resolve(t.shape, SIZES), dtype=getattr(torch, t.dtype)) for t in cut.inputs]
        with torch.no_grad():
            outputs = modules[cut.name](*inputs)
        seen = [(tuple(x.shape), str(x.dtype)) for x in outputs]
        assert seen == [(resolve(t.shape, SIZES), f"torch.{t.dtype}") for t in cut.outputs]
        assert all(evaluate(entry, SIZES) > 0 for t in cut.outputs for entry in t.shape)


def test_splitting_twice_gives_the_same_graphs(traces):
    first, second = (split(traces("plain"), "module", "snapshots", 1) for _ in range(2))
    for one, other in zip(first.graphs, second.graphs, strict=True):
        assert str(one.module.graph) == str(other.module.graph)
        assert (one.inputs, one.outputs) == (other.inputs, other.outputs)


# What is refused


@pytest.mark.parametrize("name", ["flux", "dit"])
def test_a_pattern_that_matches_nothing(tiny, name):
    family = dataclasses.replace(FAMILIES[name], sites=(*FAMILIES[name].sites, r"blocks\.\d+\.mlp"))
    model = open_checkpoint(str(tiny(name).folder), family).skeleton(FLOAT32)
    text = rf"site pattern is `blocks\\.\\d\+\\.mlp`, expected it to match.* mend families/{name}.py"
    with pytest.raises(ExportError, match=text):
        trace(model, family, FLOAT32)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_trace_leaves_no_hooks():
    toy, _ = toy_trace(lambda m, h, t, text, label: m.site(h))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in toy.modules())


def test_mutation():
    def in_place(m, h, t, text, label):
        x = m.site(h) + 1
        x.relu_()
        return x

    with pytest.raises(ExportError, match=r"relu_\.default.* is in place.*run the model's part out of place before"):
        toy_trace(in_place)


def test_sizes_that_the_model_compares_are_named_after_the_one_that_is_left():
    def counted(m, h, t, text, label):
        if text.shape[1] + 1 != h.shape[1]:
            raise ValueError
        return m.site(h) + text[:, :1]

    latent, step, text, label = TOY.inputs({})
    text = dataclasses.replace(text, shape=("batch", "image_tokens-1", 4))
    family = dataclasses.replace(TOY, inputs=lambda config: (latent, step, text, label))
    with pytest.raises(
        ExportError, match=r"`image_tokens` of input `hidden_states` is image_tokens \+ 1 to the trace, .*"
    ):
        trace(Toy(counted).eval(), family, FLOAT32)
    latent = dataclasses.replace(latent, shape=("batch", "text_tokens+1", 4))
    text = dataclasses.replace(text, shape=("batch", "text_tokens", 4))
    assert set(trace(Toy(counted).eval(), family, FLOAT32).names.values()) == {"batch", "text_tokens"}


def test_control_flow_on_data():
    with pytest.raises(
        ExportError, match=r"Toy is not traceable with batch, image_tokens, text_tokens symbolic.*says:"
    ):
        toy_trace(lambda m, h, t, text, label: m.site(h) if h.sum() > 0 else h)


def test_a_size_that_no_input_of_the_graph_has():
    _, traced = toy_trace(lambda m, h, t, text, label: m.site(h) * text.shape[1])
    with pytest.raises(ExportError, match=r"size `text_tokens` is needed by graph `full`.*declare an input with that"):
        split(traced, "module", "snapshots", 1)


def test_a_size_that_is_no_arithmetic():
    _, traced = toy_trace(lambda m, h, t, text, label: m.site(h) * torch.sym_max(h.shape[1], 9))
    with pytest.raises(
        ExportError, match=r"is computed by Max, expected \+ \* // or %; make that size an input dimens"
    ):
        split(traced, "module", "snapshots", 1)


# A toy end to end: the derived graphs against the toy itself


def network(m, h, t, text, label):
    """One site; gate by the step and the request, prompt by the request, and rows of both."""
    x = torch.cat([text, h], 1)
    gate = torch.sin(t[:, None] * m.weight) + label
    x = x + gate[:, None] * m.site(x.tanh())
    return x[:, text.shape[1] :] * gate[:, None]


@pytest.mark.parametrize("sizes", [{}, {"batch": 1}, {"batch": 3, "image_tokens": 4, "text_tokens": 4}], ids=str)
def test_toy_full_step_is_the_toy(sizes):
    toy, traced = toy_trace(network, weight=torch.arange(1.0, 5.0))
    prepare, full, forecast = split(traced, "module", "snapshots", 1).graphs
    inputs = toy_inputs(**sizes)
    with torch.no_grad():
        expected = toy(**inputs)[0]
        given = {**inputs, "timestep": inputs["timestep"][:1]}  # one step, the same for every sample
        shared = toy(**{**inputs, "timestep": given["timestep"].expand(len(inputs["label"]))})[0]
        early_values = dict(
            zip(
                [t.name for t in prepare.outputs], prepare.module(*[given[t.name] for t in prepare.inputs]), strict=True
            )
        )
        row = {n: v[0] if n.startswith("step.") else v for n, v in early_values.items()} | inputs
        noise, snapshot = full.module(*[row[t.name] for t in full.inputs])
        again = {"weights": torch.tensor([0.25, 0.75]), "taylor_in.site": torch.stack([snapshot, snapshot])}
        (forecasted,) = forecast.module(*[(row | again)[t.name] for t in forecast.inputs])
    assert torch.equal(noise, shared)
    assert snapshot.shape == inputs["hidden_states"].shape
    # The weights sum to one and both snapshots are this step's: the forecast is the full step.
    assert torch.allclose(forecasted, shared, rtol=0, atol=8 * 2.0**-24 * shared.abs().max().item())
    assert len(inputs["label"]) == 1 or not torch.equal(expected, shared)
    assert TOY.dimensions({}).keys() == {"batch", "image_tokens", "text_tokens"}


def two_branches(gated):
    """A toy of two branches; the second has a gate or not."""

    def compute(model, x, timestep, text, label):
        hidden = x + model.site(torch.tanh(x))
        branch = model.other(torch.sin(hidden))
        return hidden + (label.unsqueeze(1) * branch if gated else branch)

    toy = Toy(compute).eval()
    toy.other = Passage()
    return trace(toy, dataclasses.replace(TOY, sites=("site", "other")), FLOAT32)


def test_branches_without_a_gate_share_one_buffer():
    pieces = split(two_branches(gated=False), "module", "snapshots", 1)
    assert list(pieces.sites) == ["ungated"]
    x, history, weights = torch.randn(2, 5, 4), torch.randn(2, 2, 5, 4), torch.tensor([-1.5, 2.5])
    noise_pred, stored = pieces.full.module(x)
    hidden = x + torch.tanh(x)
    torch.testing.assert_close(stored, torch.tanh(x) + torch.sin(hidden), rtol=0, atol=8 * 2**-24)
    torch.testing.assert_close(noise_pred, hidden + torch.sin(hidden), rtol=0, atol=8 * 2**-24)
    (forecast,) = pieces.forecast.module(x, weights, history)
    expected = x + weights[0] * history[0] + weights[1] * history[1]
    assert (forecast - expected).abs().max() <= 16 * 2**-24 * (
        weights.abs().sum() * history.abs().max() + x.abs().max()
    )


def test_a_branch_with_a_gate_keeps_its_own_buffer():
    pieces = split(two_branches(gated=True), "module", "snapshots", 1)
    assert list(pieces.sites) == ["site", "other"]


def branches(compute, **parameters):
    """The trace of a toy with the sites `blocks.0.a`, `blocks.0.b`, `blocks.1.a` and `blocks.1.b`."""
    toy = Toy(compute, **parameters).eval()
    toy.blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"a": Passage(), "b": Passage()}) for _ in range(2))
    return trace(toy, dataclasses.replace(TOY, sites=(r"blocks\.\d\.[ab]",)), FLOAT32)


def shared_gates(model, x, timestep, text, label):
    """Each block takes its gates anew from one modulation, as FLUX.2's do."""
    for block in model.blocks:
        gate_a, gate_b = (timestep[:, None] * label)[:, None].chunk(2, -1)
        x = x + gate_a.repeat(1, 1, 2) * block["a"](x.tanh())
        x = x + gate_b.repeat(1, 1, 2) * block["b"](x.sin())
    return x


@pytest.mark.parametrize("layout", ["snapshots", "derivatives"])
def test_branches_that_share_a_gate_share_one_buffer(layout):
    traced = branches(shared_gates)
    pieces = split(traced, "module", layout, 1)
    assert list(pieces.sites) == ["blocks.a", "blocks.b"]
    given = toy_inputs(batch=1)
    x, gate = given["hidden_states"], (given["timestep"] * given["label"])[:, None].chunk(2, -1)
    gates, features, hidden = [g.repeat(1, 1, 2) for g in gate], {"a": [], "b": []}, x
    for _ in range(2):
        for g, key, function in zip(gates, "ab", (torch.tanh, torch.sin), strict=True):
            features[key].append(function(hidden))
            hidden = hidden + g * features[key][-1]
    columns = pieces.prepare.module(*[given[t.name] for t in pieces.prepare.inputs])
    given |= {t.name: value[0] for t, value in zip(pieces.prepare.outputs, columns, strict=True)}
    histories = {f"taylor_in.blocks.{key}": torch.randn(2, 1, 5, 4) for key in "ab"}
    given |= histories | {"weights": torch.tensor([-1.5, 2.5]), "scales": torch.tensor([0.5])}
    noise_pred, *stored = pieces.full.module(*[given[t.name] for t in pieces.full.inputs])
    torch.testing.assert_close(noise_pred, hidden, rtol=0, atol=16 * 2**-24 * hidden.abs().max().item())
    for value, key in zip(stored, "ab", strict=True):
        kept = value if layout == "snapshots" else value[0]
        torch.testing.assert_close(kept, sum(features[key]), rtol=0, atol=8 * 2**-24)
    (forecast,) = pieces.forecast.module(*[given[t.name] for t in pieces.forecast.inputs])
    expected = x + sum(
        g * torch.einsum("m,mbtc->btc", given["weights"], h) for g, h in zip(gates, histories.values(), strict=True)
    )
    torch.testing.assert_close(forecast, expected, rtol=0, atol=32 * 2**-24 * expected.abs().max().item())
    # A sum of modules may be beyond float16 before its gate.
    assert len(split(traced, "module", layout, 1, torch.float16).sites) == 4


@pytest.mark.parametrize("whole", [True, False])
def test_gates_that_differ_in_weights_alone_share_a_buffer_and_one_of_what_the_weights_are_of(whole):
    """Each block adds a table of its own to one modulation, as Wan's do; what has no gate goes with the second sum.

    A table may lack the batch and the tokens, and its rows come by `unbind`, as Krea 2's do.
    """

    def tabled(model, x, timestep, text, label):
        e = timestep[:, None] * label
        e = torch.stack([e, 2 * e, 3 * e], 1)
        for block, table in zip(model.blocks, (model.one, model.other), strict=True):
            _, gate, _ = (table + e).chunk(3, 1) if whole else (e[:, None] + table).unbind(-2)
            x = x + gate * block["a"](x.tanh())
            x = x + block["b"](x.sin())
        return x

    draw = torch.Generator().manual_seed(3)
    tables = [torch.randn(1, 3, 4, generator=draw) for _ in range(2)]
    one, other = tables if whole else (table[0] for table in tables)
    traced = branches(tabled, one=one, other=other)
    pieces = split(traced, "module", "snapshots", 1)
    assert list(pieces.sites) == ["blocks.a", "ungated"]
    given = toy_inputs(batch=1)
    x, e, hidden = given["hidden_states"], 2 * (given["timestep"] * given["label"])[:, None], given["hidden_states"]
    features = []
    for table in tables:
        features += [(hidden.tanh(), table[:, 1:2])]
        hidden = hidden + (table[:, 1:2] + e) * features[-1][0]
        features += [(hidden.sin(), None)]
        hidden = hidden + features[-1][0]
    columns = pieces.prepare.module(*[given[t.name] for t in pieces.prepare.inputs])
    given |= {t.name: value[0] for t, value in zip(pieces.prepare.outputs, columns, strict=True)}
    history = {f"taylor_in.{site}": torch.randn(2, 1, 5, 4, generator=draw) for site in pieces.sites}
    given |= history | {"weights": torch.tensor([-1.5, 2.5])}
    noise_pred, stored, ungated = pieces.full.module(*[given[t.name] for t in pieces.full.inputs])
    near = {"rtol": 0, "atol": 32 * 2**-24 * max(hidden.abs().max().item(), 1.0)}
    torch.testing.assert_close(noise_pred, hidden, **near)
    torch.testing.assert_close(stored, features[0][0] + features[2][0], **near)
    weighed = [feature if weights is None else weights * feature for feature, weights in features]
    torch.testing.assert_close(ungated, sum(weighed), **near)
    (forecast,) = pieces.forecast.module(*[given[t.name] for t in pieces.forecast.inputs])
    of_a, of_ungated = (torch.einsum("m,mbtc->btc", given["weights"], kept) for kept in history.values())
    expected = x + e * of_a + of_ungated
    torch.testing.assert_close(forecast, expected, rtol=0, atol=64 * 2**-24 * expected.abs().max().item())


def test_branches_keep_their_buffers_where_something_reads_the_sum_between_them():
    def scaled(model, x, timestep, text, label):
        return shared_gates(model, x, timestep, text, label) * label[:, None]

    def between(model, x, timestep, text, label):
        for block in model.blocks:
            x = x + label[:, None] * block["a"](x.tanh())
            x = (x + label[:, None] * block["b"](x.sin())) * label[:, None]
        return x

    for compute in (scaled, between):
        sites = split(branches(compute), "module", "snapshots", 1).sites
        assert list(sites) == [f"blocks.{k}.{key}" for k in range(2) for key in "ab"]


class Widened(torch.nn.Module):
    def forward(self, hidden_states):
        return hidden_states.float()


@pytest.mark.parametrize("layout", ["snapshots", "derivatives"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_hidden_state_kept_in_float32(granularity, layout):
    """Half precision with a first block that returns float32: every sum is formed in the wider of its two types."""
    half = torch.bfloat16
    toy = Toy(lambda m, h, t, text, label: h + m.site(h.tanh().to(half)).float()).eval()
    toy.first = Widened()
    traced = trace(toy, TOY, half)
    pieces = split(traced, granularity, layout, 1, guards=("cg", "fbcache", "teacache"))
    values = {"hidden_states": torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).to(half)}
    weights = {"weights": torch.tensor([1.0, 0.0]), "scales": torch.zeros(1)}
    for cut in (pieces.full, pieces.probe, pieces.rest, pieces.forecast):
        for tensor in cut.inputs:
            shape, dtype = resolve(tensor.shape, {"batch": 2, "image_tokens": 5}), getattr(torch, tensor.dtype)
            values.setdefault(tensor.name, weights.get(tensor.name, torch.zeros(shape, dtype=dtype)))
        returned = cut.module(*[values[t.name] for t in cut.inputs])
        assert [str(value.dtype) for value in returned] == [f"torch.{t.dtype}" for t in cut.outputs]
        values |= {t.name: value for t, value in zip(cut.outputs, returned, strict=True)}
        if cut is pieces.full:
            (site,) = pieces.sites
            stored, expected = values[f"taylor_out.{site}"], values["noise_pred"]
            values[f"taylor_in.{site}"] = stored if layout == "derivatives" else torch.stack([stored, stored])
            torch.testing.assert_close(expected, toy(values["hidden_states"], None, None, None)[0], rtol=0, atol=0)
    # The weights give the last full step again, as it was stored: rounded once.
    limit = 2**-8 * (values["hidden_states"].abs().max() + 1)
    assert (values["noise_pred"] - expected).abs().max() <= limit
