"""LoRA of a request: low-rank inputs of the graphs, against the model that peft itself gives the LoRA."""

import copy

import oracle
import pytest
import torch
from harness import advance, allowed, as_arrays, eager_denoiser, open_slot, run
from test_lora_at_load import pairs, written
from tiny_bundles import options_of, trace_of

from taylorseer_export.bundle.low_rank import LORA
from taylorseer_export.cli import main
from taylorseer_export.compile import export
from taylorseer_export.errors import ConfigError, StepError
from taylorseer_export.method import Forecasts, Plan

PLAN, ORDER, R = "FF..F.", 2, 4  # the files are of rank 3
# In prepare (modulation, text), in full (attention, MLP), and in all kinds of step (head).
TARGETS = (
    "transformer_blocks.0.norm1.linear", "context_embedder", "transformer_blocks.1.attn.to_q",
    "transformer_blocks.0.attn.add_k_proj", "single_transformer_blocks.1.proj_mlp",
    "single_transformer_blocks.0.proj_out", "x_embedder", "norm_out.linear", "proj_out",
)  # fmt: skip
OTHER = ("transformer_blocks.0.attn.to_q", "proj_out")


@pytest.fixture(scope="module")
def graphs(tiny):
    """The eager graphs of FLUX with low-rank inputs."""
    options = options_of(guards=("cg",), lora_rank=R)
    return eager_denoiser(export.draft(trace_of("flux", tiny("flux").folder, options), options))


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """Two LoRAs; what one of them says of no layer the other does."""
    folder, model = tmp_path_factory.mktemp("lora"), tiny("flux").model
    one = written(folder / "one.safetensors", pairs(model, TARGETS), alpha=None)
    return one, written(folder / "other.safetensors", pairs(model, OTHER, seed=1), alpha=None)


def with_loras(model, given):
    """The untouched model with LoRAs as diffusers loads them: file -> strength."""
    adapted = copy.deepcopy(model)
    for number, path in enumerate(given):
        adapted.load_lora_adapter(str(path), prefix="transformer", adapter_name=f"a{number}")
    adapted.set_adapters([f"a{number}" for number in range(len(given))], list(given.values()))
    return adapted


@pytest.mark.parametrize("plan", ["FFFF", PLAN])
def test_a_request_with_a_lora_is_the_model_that_peft_gives_it(tiny, graphs, files, plan):
    """All full and with forecasts, at a strength of its own."""
    one, lora = tiny("flux"), graphs.adapter(f"{files[0]}:0.7")
    inputs, model = one.inputs(len(plan)), with_loras(one.model, {files[0]: 0.7})
    slot = open_slot(graphs, inputs)
    seen = drawn(slot, inputs, plan, lora)
    expected = oracle.replay(model, *inputs, plan, ORDER)
    limit = allowed(one.model, expected, plan, ORDER)
    oracle.assert_close("lora", seen, expected, limit)
    with pytest.raises(AssertionError, match="differs by"):
        oracle.assert_close("plain", seen, oracle.replay(one.model, *inputs, plan, ORDER), limit)
    assert torch.equal(drawn(slot, inputs, plan, graphs.adapter(files[0]).at(0.7)), seen)  # the same, said otherwise


def start(slot, inputs, plan, lora):
    _, timestep, conditioning = inputs
    slot.start(as_arrays(conditioning), Forecasts(Plan(plan), ORDER), timestep.float().numpy(), lora)


def drawn(slot, inputs, plan, lora):
    start(slot, inputs, plan, lora)
    return torch.stack([advance(slot, inputs, step) for step in range(len(plan))])


def test_no_lora_is_the_bundle_without_the_inputs(tiny, graphs, eager):
    """Bit by bit, and the forecast graph reads no layer of the blocks besides."""
    inputs = tiny("flux").inputs(len(PLAN))
    assert torch.equal(run(graphs, inputs, PLAN, ORDER), run(eager("flux", guards=("cg",)), inputs, PLAN, ORDER))


def test_requests_with_loras_of_their_own_leave_each_other_alone(tiny, graphs, files):
    """Interleaved in two slots as each alone, in whatever slot; the next request of a slot gets nothing of it."""
    one, other = (graphs.adapter(path) for path in files)
    inputs = tiny("flux").inputs(len(PLAN))
    alone = [drawn(open_slot(graphs, inputs), inputs, PLAN, lora) for lora in (one, other, None)]
    slots = [open_slot(graphs, inputs) for _ in range(2)]
    for slot, lora in zip(slots, (one, other), strict=True):
        start(slot, inputs, PLAN, lora)
    seen = [[advance(slot, inputs, step) for slot in slots] for step in range(len(PLAN))]
    for k in range(2):
        assert torch.equal(torch.stack([row[k] for row in seen]), alone[k]) and not torch.equal(alone[k], alone[2])
    assert torch.equal(drawn(slots[0], inputs, PLAN, other), alone[1])
    assert torch.equal(drawn(slots[0], inputs, PLAN, None), alone[2])


def test_what_is_in_place_is_not_copied_again(tiny, graphs, files, monkeypatch):
    """A slot prepared for a request takes it again as it is, with this LoRA alone."""
    lora, inputs = graphs.adapter(files[0]), tiny("flux").inputs(2)
    slot, written = open_slot(graphs, inputs), []
    slot.reuses = True
    buffer = slot.memory.buffers[LORA]
    write = buffer.write
    monkeypatch.setattr(buffer, "write", lambda values: (written.append(values), write(values)))
    for given, reused in ((lora, False), (lora, True), (lora.at(2), False), (lora.at(2), True), (None, False)):
        drawn(slot, inputs, "F.", given)
        assert slot.reused == reused
    assert len(written) == 2


def test_several_files_add_up(tiny, graphs, files):
    """Side by side as far as the rank goes: each layer has R columns."""
    one = tiny("flux")
    few = written(files[0].parent / "few.safetensors", pairs(one.model, ("proj_out",), seed=2), alpha=None)
    narrow = {module: (up[:, :1], down[:1]) for module, (up, down) in pairs(one.model, OTHER, seed=3).items()}
    thin = written(files[0].parent / "thin.safetensors", narrow, alpha=None)
    inputs, model = one.inputs(2), with_loras(one.model, {few: 1.0, thin: -0.5})
    seen = drawn(open_slot(graphs, inputs), inputs, "FF", graphs.adapter([few, f"{thin}:-0.5"]))
    expected = oracle.replay(model, *inputs, "FF", ORDER)
    oracle.assert_close("both", seen, expected, allowed(one.model, expected, "FF", ORDER))
    with pytest.raises(ConfigError, match=r"thin.safetensors has rank 5 with those before it at `proj_out`, expected "
                       r"at most 4 \(dimensionless\).*export again with --lora-rank 5"):  # fmt: skip
        graphs.adapter([few, thin, thin])


def test_what_does_not_fit_is_refused_by_name(tiny, graphs, files, eager, tmp_path):
    one, dit = tiny("flux"), tiny("dit")
    high = {module: (up.repeat(1, 2), down.repeat(2, 1)) for module, (up, down) in pairs(one.model, OTHER).items()}
    path = written(tmp_path / "high.safetensors", high)
    with pytest.raises(ConfigError, match=r"has rank 6 at `.*`, expected at most 4 .*export again with --lora-rank 6"):
        graphs.adapter(path)
    options = options_of(lora_rank=R, lora_targets=r"attn1\.to_[qkv]$")
    draft = export.draft(trace_of("dit", dit.folder, options), options)
    chosen = eager_denoiser(draft)
    assert {layer.module.rpartition(".")[2] for layer in draft.lora.layers} == {"to_q", "to_k", "to_v"}
    assert [name for name, g in chosen.manifest.graphs.items() if any(t.role == LORA for t in g.inputs)] == ["full"]
    with pytest.raises(ConfigError, match=r"changes 1 layers that have no low-rank inputs \(`proj_out_1`\), expected "
                       r"layers of this bundle that have them, those that --lora-targets .* chose at export; export "
                       r"again with other targets, or use another"):  # fmt: skip
        chosen.adapter(written(tmp_path / "dit.safetensors", pairs(dit.model, ("proj_out_1",))))
    plain = eager("flux", guards=("cg",))
    with pytest.raises(ConfigError, match=r"bundle without low-rank inputs, expected one .*with --lora-rank R"):
        plain.adapter(files[0])
    lora = graphs.adapter(files[0])
    for model, denoiser, seen in ((one, plain, "given, expected none"), (dit, chosen, "of another bundle, expected")):
        with pytest.raises(StepError, match=f"lora is {seen}"):
            drawn(open_slot(denoiser, model.inputs(2)), model.inputs(2), "FF", lora)
    with pytest.raises(ConfigError, match="lora strength is nan, expected a finite number"):
        lora.at(float("nan"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--lora-targets", "x"], "--lora-targets is x without --lora-rank, expected it too"),
        (["--lora-rank", "0"], "--lora-rank is 0, expected"),
        (["--lora-rank", "9999"], "--lora-rank is 9999, expected 1 to 1024"),
        (["--lora-rank", "2", "--lora-targets", "("], "--lora-targets is (, which is no regular expression"),
        (
            ["--lora-rank", "2", "--lora-targets", "nothing"],
            "in the name of no linear layer of the graphs, expected a part of one",
        ),
    ],
)
def test_options_that_mean_nothing(tmp_path, capsys, given, expected):
    assert main(["dit", *given, "--out", str(tmp_path)]) == 2
    assert expected in capsys.readouterr().err and not list(tmp_path.iterdir())
