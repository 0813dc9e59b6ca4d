"""LoRA of a request: low-rank inputs of the graphs, against the model that peft itself gives the LoRA."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import oracle
import pytest
import torch
from diffusers import DiTTransformer2DModel
from harness import advance, allowed, as_arrays, eager_denoiser, open_slot, run
from images_api import GENERATIONS, alone, asked, picture_in, serving
from recorder import Recorder
from safetensors.torch import load_file
from test_dropin import paint
from test_lora_at_load import ASSETS, pairs, updated, written
from tiny_bundles import options_of, trace_of
from tiny_pipelines import flux_pipeline

from taylorseer_export.bundle.agreement import contradiction
from taylorseer_export.bundle.low_rank import LORA
from taylorseer_export.bundle.store import open_bundle
from taylorseer_export.cli import main
from taylorseer_export.compile import export
from taylorseer_export.embedded.requests import label_request
from taylorseer_export.errors import ConfigError, StepError
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.sampling import sample
from taylorseer_export.runtime.trajectory import random_trajectory
from taylorseer_export.serve.api.loaded import load_models
from taylorseer_export.serve.api.problems import Refusal
from taylorseer_export.serve.api.wishes import Wish, takes_of
from taylorseer_export.serve.service import Limits

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
    few = chosen.manifest.lora.model_copy(update={"layers": chosen.manifest.lora.layers[1:]})
    for manifest, lora, said in (
        (chosen.manifest, None, "lora is null, and the graphs have an input of that role"),
        (plain.manifest, few, "lora is given, and the graphs have no input of that role"),
        (chosen.manifest, few, "its layers and rank give `lora` ["),
    ):
        assert said in contradiction(manifest.model_copy(update={"lora": lora}))
    with pytest.raises(ConfigError, match=r"bundle without low-rank inputs, expected one .*with --lora-rank R"):
        plain.adapter(files[0])
    lora = graphs.adapter(files[0])
    for model, denoiser, seen in ((one, plain, "given, expected none"), (dit, chosen, "of another bundle, expected")):
        with pytest.raises(StepError, match=f"lora is {seen}"):
            drawn(open_slot(denoiser, model.inputs(2)), model.inputs(2), "FF", lora)
    with pytest.raises(ConfigError, match="lora strength is nan, expected a finite number"):
        lora.at(float("nan"))


def test_a_pipeline_with_a_drop_in_paints_with_its_lora(tiny, graphs, files):
    """As the pipeline whose model peft gives it, and another drop-in over the same engines paints without."""
    model = with_loras(tiny("flux").model, {files[0]: 0.7})
    pipe = flux_pipeline(tiny("flux").model)
    pipe.transformer = graphs.as_transformer(interval=1, lora=f"{files[0]}:0.7")
    seen = Recorder(pipe.transformer)
    painted = paint(pipe)
    with seen.retold_by(model):
        assert torch.equal(painted, paint(flux_pipeline(model)))
    seen.assert_plan(model, "FFFFF", 1)
    pipe.transformer = graphs.as_transformer(interval=1)
    assert not torch.equal(painted, paint(pipe))


# Engines, and the doors to them: the embedded DiT, of one load ------------------------------------------------------


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """The embedded transformer, and two LoRAs of it."""
    folder, model = (
        tmp_path_factory.mktemp("embedded"),
        DiTTransformer2DModel.from_pretrained(ASSETS / "dit/transformer"),
    )
    some = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][::3]
    return model, [written(folder / f"{n}.safetensors", pairs(model, some, n), alpha=None) for n in (1, 2)]


@pytest.fixture(scope="module")
def adapted(embedded):
    with load(embedded("adapted"), threads=1) as denoiser:
        yield denoiser


def test_an_engine_with_inputs_is_the_model_and_the_one_with_the_lora_in_its_weights(embedded, adapted, loras):
    model, (path, _) = loras
    made = random_trajectory(adapted, len(PLAN), {"batch": 2})
    conditioning = {name: torch.from_numpy(value) for name, value in made.conditioning.items()}
    inputs = torch.from_numpy(made.latents), torch.from_numpy(made.timesteps), conditioning
    expected = oracle.replay(updated(model, pairs_in(path), 0.5), *inputs, PLAN, ORDER)
    limit = allowed(model, expected, PLAN, ORDER)
    seen = drawn(open_slot(adapted, inputs), inputs, PLAN, adapted.adapter(f"{path}:0.5"))
    oracle.assert_close("inputs", seen, expected, limit)
    with load(embedded("digits"), threads=1, lora=f"{path}:0.5", check=False) as fused:
        oracle.assert_close("fused", run(fused, inputs, PLAN, ORDER), seen, 2 * limit)
    with load(embedded("adapted"), threads=1, lora=f"{path}:0.5") as usual:  # the check at load runs with it
        assert torch.equal(run(usual, inputs, PLAN, ORDER), seen) and not usual.lora.weights


def pairs_in(path):
    """Module -> (B, A) of a file as `written` writes it."""
    tensors = load_file(path)
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    sides = {module: (tensors[f"{module}.lora_B.weight"], tensors[f"{module}.lora_A.weight"]) for module in modules}
    return {module.removeprefix("transformer."): pair for module, pair in sides.items()}


def test_run_draws_with_the_lora_it_is_given(embedded, adapted, loras, tmp_path, capsys):
    _, (path, _) = loras
    out = tmp_path / "latents.safetensors"
    given = ["run", str(embedded("adapted")), "--lora", f"{path}:0.5", "--label", "7", "--steps", "4"]
    assert main([*given, "--threads", "1", "--out", str(out)]) == 0
    assert "layers changed by inputs" in capsys.readouterr().out
    request = replace(label_request(adapted, [7], [0]), lora=adapted.adapter(f"{path}:0.5"))
    made = sample(adapted, request, adapted.forecasts(steps=4))
    assert torch.equal(load_file(out)["latents"], torch.from_numpy(made.latents))


def test_a_server_loads_once_and_draws_each_request_with_its_lora(embedded, adapted, loras):
    """Three at a time over two slots, each as it is drawn alone."""
    _, (one, other) = loras
    given = {"one": f"{one}:0.5", "other": str(other)}
    models = load_models([embedded("adapted")], limits=Limits(slots=2), loras=given)
    wishes = {"one": f"{one}:0.5", "other:-0.25": f"{other}:-0.25", None: None}
    try:
        assert [model.name for model in models] == ["dit-tiny"]
        with serving(models) as port, ThreadPoolExecutor(3) as pool:
            bodies = [{"prompt": "7", "seed": 1, "steps": 4} | ({"lora": name} if name else {}) for name in wishes]
            answers = list(pool.map(lambda body: asked(port, GENERATIONS, body), bodies))
            for (status, _, text), lora in zip(answers, wishes.values(), strict=True):
                request = label_request(adapted, [7], [1])
                request = replace(request, lora=lora and adapted.adapter(lora))
                assert status == 200
                drawn_alone, _ = alone(adapted, request, steps=4)
                assert (picture_in(json.loads(text)["data"][0]["b64_json"]) == drawn_alone).all()
            assert len({text for _, _, text in answers}) == 3
            for wrong in ("blue", "one:strong", "one:nan"):
                status, _, text = asked(port, GENERATIONS, {"prompt": "7", "lora": wrong})
                error = json.loads(text)["error"]
                assert (status, error["param"]) == (400, "lora")
                assert (
                    f"lora is `{wrong}` for dit-tiny, expected one or other, or one of them with a" in error["message"]
                )
    finally:
        models.close()
    with pytest.raises(Refusal, match="lora is `one` for dit-tiny, expected none, since it is served with none; leave"):
        takes_of(adapted.manifest).check(Wish("7", lora="one"))


@pytest.mark.slow
def test_engines_that_hold_their_weights_take_them_too(tiny, once):
    """TensorRT-RTX's parser and builder: `build` refuses a network whose inputs are not the contract's."""
    pytest.importorskip("tensorrt_rtx")
    options = options_of(engine="tensorrt-rtx", precision="bf16", lora_rank=R, engine_options={"gpu-arch": "8.6"})

    def write(folder):
        return export.write_bundle(export.draft(trace_of("dit", tiny("dit").folder, options), options), folder, "dit")

    manifest = open_bundle(once("tensorrt-rtx-low-rank", write)).manifest
    assert {(t.dtype, t.shape) for g in manifest.graphs.values() for t in g.inputs if t.role == LORA} == {
        ("bfloat16", manifest.lora.shape)
    }
    assert f"--lora-rank {R}" in manifest.command()


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
