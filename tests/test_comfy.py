"""The nodes for ComfyUI, over its double, or over the real one where `COMFYUI_PATH` says where that lies."""

# Shapes: N batch, C channels, F frames, H and W latent pixels

import asyncio
import shutil
import sys
from importlib import import_module

import comfy_studio
import oracle
import pytest
import torch
from harness import allowed
from recorder import Recorder

from taylorseer_export.bundle.store import open_bundle
from taylorseer_export.errors import ConfigError, StepError
from taylorseer_export.method import Plan, RequestOptions

# Name of `MODELS` -> latents of one sample, and the guidance scale of two branches; 1 where there is one.
LATENTS = {
    "flux": ((4, 8, 12), 1.0),
    "sd3": ((4, 8, 12), 2.0),
    "qwen-image": ((4, 1, 8, 12), 2.0),
    "wan": ((4, 2, 4, 6), 2.0),
    "wan-image": ((4, 2, 4, 6), 2.0),
    "hunyuan": ((4, 2, 4, 6), 1.0),
}
STEPS, PLAN, ORDER = 7, "FF..F..", 1


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """ComfyUI's folder of models; its modules are importable."""
    models = tmp_path_factory.mktemp("models")
    comfy_studio.enter(models)
    asyncio.run(import_module("taylorseer_export.comfy").comfy_entrypoint())
    yield models / "taylorseer"
    if not comfy_studio.REAL:
        theirs = ("comfy", "comfy_api", "folder_paths", "taylorseer_export.comfy")
        for name in [n for n in sys.modules if n in theirs or n.startswith(tuple(f"{t}." for t in theirs))]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def nodes(studio):
    return import_module("taylorseer_export.comfy.nodes")


@pytest.fixture(scope="module")
def loaded(studio, nodes, bundles):
    """Name of `MODELS` -> its MODEL from the loader."""

    def make(name):
        if not (studio / name).exists():
            shutil.copytree(bundles(name), studio / name)
        (patcher,) = nodes.LoadBundle.execute(name).args
        return patcher

    return make


def planned(nodes, patcher, **options):
    (made,) = nodes.ChoosePlan.execute(patcher, **options).args
    return made


def sigmas_of(steps):
    return torch.cat([torch.linspace(1.0, 1.0 / steps, steps), torch.zeros(1)])


def conditioning_of(tiny, name, seed=0):
    """[[text, the rest]], of one row as ComfyUI's encoders make it."""
    _, _, inputs = tiny(name).inputs(1, seed=seed)
    own = {"pooled_projections": "pooled_output", "encoder_attention_mask": "attention_mask"}
    rest = {theirs: inputs[ours][:1] for ours, theirs in own.items() if ours in inputs}
    image = inputs.get("encoder_hidden_states_image")
    return [[inputs["encoder_hidden_states"][:1], {**rest, **({} if image is None else {"clip_fea": image[:1]})}]]


def sampled(patcher, tiny, name, sampler="euler", steps=STEPS, count=2, seed=0, apart=False, shape=None, **changes):
    """Latents that a guider of ComfyUI ends with."""
    from comfy.samplers import CFGGuider, ksampler

    own, scale = LATENTS[name]
    noise = torch.randn(count, *(shape or own), generator=torch.Generator().manual_seed(seed))
    guider = CFGGuider(patcher)
    guider.apart = apart
    guider.set_conds(conditioning_of(tiny, name), conditioning_of(tiny, name, 1))
    guider.set_cfg(scale)
    sigmas = changes.pop("sigmas", sigmas_of(steps))
    return guider.sample(noise, torch.zeros_like(noise), ksampler(sampler), sigmas, **changes)


def recorded(patcher, **options):
    """A recorder of the drop-in that loops with these options run through."""
    network = patcher.model.diffusion_model
    network.open(torch.device("cpu"))
    return Recorder(network.dropin(RequestOptions(**options)))


# The same as the model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("name", LATENTS)
def test_every_step_is_the_oracle_s(loaded, nodes, tiny, name, apart):
    """Full steps are the untouched model's, forecasts the formula's, in each branch of guidance; one batch or two."""
    patcher = planned(nodes, loaded(name), interval=3, warmup=2, order=ORDER)
    seen = recorded(patcher, interval=3, warmup=2, order=ORDER)
    assert torch.isfinite(sampled(patcher, tiny, name, apart=apart)).all()
    assert len(seen.calls) == 1 + (LATENTS[name][1] != 1)
    assert {len(calls) for calls in seen.calls.values()} == {STEPS}
    seen.assert_plan(tiny(name).model, PLAN, ORDER)


def test_odd_sides_are_filled_up_as_comfyui_does(loaded, tiny, nodes):
    """And cropped again: the model sees the first row and column once more behind the last."""
    patcher = planned(nodes, loaded("flux"), interval=1)
    seen = recorded(patcher, interval=1)
    made = sampled(patcher, tiny, "flux", steps=2, shape=(4, 7, 9))
    assert made.shape == (2, 4, 7, 9)
    ((latents, *_),) = [calls[0] for calls in seen.calls.values()]
    first = torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(0))
    tokens = latents.reshape(2, 4, 5, 4, 2, 2)  # rows, columns, channels, and 2 x 2 pixels
    for row, column in ((0, 0), (3, 2), (1, 4), (3, 4)):
        for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
            expected = first[:, :, (2 * row + y) % 7, (2 * column + x) % 9]
            assert torch.equal(tokens[:, row, column, :, y, x], expected)
    seen.assert_plan(tiny("flux").model, "FF", 2)


def test_image_to_image_runs_the_last_sigmas(loaded, nodes, tiny):
    patcher = planned(nodes, loaded("flux"), plan="F.F")
    seen = recorded(patcher, plan="F.F")
    sampled(patcher, tiny, "flux", sigmas=sigmas_of(6)[3:])
    ((*_, timestep, _, _),) = [calls[0] for calls in seen.calls.values()]
    assert torch.allclose(timestep, sigmas_of(6)[3])
    seen.assert_plan(tiny("flux").model, "F.F", 2)


def test_a_second_order_sampler_s_calls_are_steps(loaded, nodes, tiny):
    patcher = planned(nodes, loaded("flux"), interval=3, warmup=2, order=ORDER)
    seen = recorded(patcher, interval=3, warmup=2, order=ORDER)
    sampled(patcher, tiny, "flux", "heun", steps=4)
    seen.assert_plan(tiny("flux").model, PLAN, ORDER)  # of four sigmas three are asked about twice


def test_the_plan_of_the_bundle_holds_where_none_is_chosen(loaded, nodes, tiny):
    patcher = loaded("flux")
    sampled(patcher, tiny, "flux")
    own = patcher.model.diffusion_model.bundle.manifest.plan
    _, text = nodes.Report.execute(patcher, {"samples": None}).args
    assert text.splitlines()[0] == f"plan {Plan.regular(STEPS, own.interval, own.warmup, own.dialect)}"


# One bundle, many samplers -------------------------------------------------------------------------------------------


def test_two_samplers_share_the_engines_and_each_reports_its_own(loaded, nodes, tiny):
    patcher = loaded("flux")
    first, second = planned(nodes, patcher, plan="F.F"), planned(nodes, patcher, plan="FF.F", order=1)
    alone = [sampled(first, tiny, "flux", steps=3), sampled(second, tiny, "flux", steps=4)]
    again = [sampled(first, tiny, "flux", steps=3), sampled(second, tiny, "flux", steps=4)]
    assert all(map(torch.equal, alone, again))
    for one, plan, full in ((first, "F.F", 2), (second, "FF.F", 3)):
        samples, text = nodes.Report.execute(one, {"samples": 1}).args
        assert samples == {"samples": 1}
        said, *times = text.splitlines()
        assert said == f"plan {plan}"
        assert [line.partition(",")[0] for line in times] == [
            f"{full} of {len(plan)} calls full",
            f"1 of {len(plan)} calls forecast",
        ]


def test_engines_are_released_and_loaded_again(loaded, nodes, tiny):
    patcher = planned(nodes, loaded("flux"), plan="F.F")
    before = sampled(patcher, tiny, "flux", steps=3)
    network = patcher.model.diffusion_model
    assert patcher.model.model_loaded_weight_memory == patcher.size > 0
    assert patcher.partially_unload(torch.device("cpu"), 1) == 0
    patcher.detach()
    assert network._denoiser is None and not network._dropins and patcher.model.model_loaded_weight_memory == 0
    assert torch.equal(sampled(patcher, tiny, "flux", steps=3), before)


def test_an_interrupted_loop_leaves_nothing_behind(loaded, nodes, tiny):
    patcher = planned(nodes, loaded("flux"), plan="FF.F")
    whole = sampled(patcher, tiny, "flux", steps=4)

    def interrupt(step, *_):
        if step == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sampled(patcher, tiny, "flux", steps=4, callback=interrupt)
    (sampling,) = patcher.get_wrappers("outer_sample", "taylorseer")
    assert sampling.last == "the loop was interrupted"
    dropin = patcher.model.diffusion_model.dropin(sampling.options)
    assert dropin._callers.here.loop.over and not dropin._callers.here.loop.slots
    assert torch.equal(sampled(patcher, tiny, "flux", steps=4), whole)


def test_the_loader_comes_again_when_the_bundle_is_another(studio, nodes, loaded):
    loaded("flux")
    before = nodes.LoadBundle.fingerprint_inputs("flux")
    manifest = studio / "flux" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text + " ")
    assert nodes.LoadBundle.fingerprint_inputs("flux") != before
    manifest.write_text(text)
    assert nodes.LoadBundle.fingerprint_inputs("flux") == before != nodes.LoadBundle.fingerprint_inputs("flux", "cpu")


# What cannot be honoured ---------------------------------------------------------------------------------------------

REFUSED = {
    "a ControlNet": ({"control": 1}, "conditioning has a ControlNet, expected none: the engines"),
    "an area": ({"area": (2, 2, 0, 0)}, "conditioning has an area, expected none"),
    "a mask": ({"mask": 1}, "conditioning has a mask, expected none"),
    "boxes": ({"gligen": 1}, "conditioning has boxes of GLIGEN, expected none"),
    "hooks": ({"hooks": 1}, "conditioning has hooks, such as a LoRA of its own, expected none"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_conditioning_beyond_prompts_is_refused(studio, what):
    from taylorseer_export.comfy.loop import check_honoured

    extra, told = REFUSED[what]
    options = {"transformer_options": {}}
    check_honoured({"positive": [{"cross_attn": 1, "control": None}]}, options)
    with pytest.raises(ConfigError) as caught:
        check_honoured({"positive": [{}], "negative": [{}, extra]}, options)
    assert str(caught.value).startswith(told) and str(caught.value).endswith("use ComfyUI's own model")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"patches": {"attn1_patch": [1]}}, "the model has patches of the network"),
        ({"patches_replace": {"attn1": {}}}, "the model has replaced parts of the network"),
        ({"wrappers": {"diffusion_model": {"easy": [1]}}}, "the model has a wrapper of the network (easy)"),
    ],
)
def test_a_patched_network_is_refused(loaded, nodes, tiny, options, told):
    patcher = planned(nodes, loaded("flux"), plan="F.F")
    wrappers = options.pop("wrappers", {})
    patcher.wrappers.update(wrappers)
    patcher.model_options["transformer_options"].update(options)
    with pytest.raises(ConfigError) as caught:
        sampled(patcher, tiny, "flux", steps=3)
    assert str(caught.value).startswith(f"{told}, expected none")


def test_context_windows_are_refused(studio):
    from taylorseer_export.comfy.loop import check_honoured

    with pytest.raises(ConfigError, match="the model has context windows, expected none"):
        check_honoured({}, {"transformer_options": {}, "context_handler": 1})


def test_reference_latents_are_refused_by_name(loaded, nodes, tiny):
    network = loaded("flux").model.diffusion_model
    with pytest.raises(
        StepError, match="conditioning has `ref_latents`, expected only context, guidance, y, which the"
    ):
        network._inputs({"context": torch.zeros(1), "y": None, "ref_latents": [1]})
    with pytest.raises(StepError, match="is called outside a sampler, expected a loop with sigmas"):
        network(torch.zeros(1, 4, 8, 8), torch.ones(1))


def test_a_lora_is_refused(loaded):
    with pytest.raises(ConfigError, match="a LoRA is loaded onto a bundle, expected it in the weights at export"):
        loaded("flux").add_patches({"a": 1}, 1.0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"plan": "F.X"}, "plan has `X` at step 2"),
        ({"plan": "F.F", "interval": 3}, "interval is given beside plan, expected one of them"),
        ({"order": 4}, "order is 4, expected at most 2"),
        ({"profile": "best"}, "profile is `best`, expected one of this bundle"),
        ({"threshold": 0.1}, "threshold is given without a guard"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_its_node(loaded, nodes, options, told):
    with pytest.raises(ConfigError) as caught:
        planned(nodes, loaded("flux"), **options)
    assert str(caught.value).startswith(told), caught.value


def test_a_plan_of_another_length_is_refused_before_the_first_step(loaded, nodes, tiny):
    patcher = planned(nodes, loaded("flux"), plan="FF.F")
    with pytest.raises(ConfigError, match=r"plan FF.F is 4 steps long, expected 3 "):
        sampled(patcher, tiny, "flux", steps=3)


def test_a_failing_step_says_one_sentence(loaded, nodes, tiny):
    patcher = planned(nodes, loaded("flux"), plan="F.F")
    with pytest.raises(StepError) as caught:
        sampled(patcher, tiny, "flux", steps=3, sigmas=torch.tensor([torch.nan, 0.5, 0.2, 0.0]))
    assert "NaN" in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_bundle_s_model_is_refused(nodes):
    with pytest.raises(
        ConfigError, match="model is a object, expected one of a bundle; connect `Load TaylorSeer bundle`"
    ):
        nodes.ChoosePlan.execute(object(), plan="F.F")


def test_a_family_without_a_counterpart_is_refused(nodes, bundles, monkeypatch):
    from taylorseer_export.comfy.network import model_of

    with pytest.raises(ConfigError, match="bundle is of family dit, expected a family that ComfyUI has a model of"):
        model_of(open_bundle(bundles("dit")))
    import comfy.supported_models

    monkeypatch.delattr(comfy.supported_models, "Flux")
    with pytest.raises(ConfigError, match="bundle is of family flux, expected a ComfyUI that has `Flux`"):
        model_of(open_bundle(bundles("flux")))


def test_a_bundle_that_is_gone_is_said(nodes):
    with pytest.raises(ConfigError, match=r"bundle is away, expected one of .* in models/taylorseer; put it there"):
        nodes.LoadBundle.execute("away")
    assert nodes.LoadBundle.fingerprint_inputs("away") == "default "


# The nodes as ComfyUI sees them --------------------------------------------------------------------------------------


def test_the_nodes_take_what_they_show(studio, nodes):
    """Every input of a schema is an argument of `execute`, and all names are unique."""
    import inspect

    listed = asyncio.run(nodes.extension().get_node_list())
    schemas = [node.define_schema() for node in listed]
    assert [schema.node_id for schema in schemas] == ["TaylorSeerLoadBundle", "TaylorSeerPlan", "TaylorSeerReport"]
    for node, schema in zip(listed, schemas, strict=True):
        assert [entry.id for entry in schema.inputs] == [*inspect.signature(node.execute).parameters]


def test_the_counterparts_are_those_of_the_declarations(bundles):
    """What ComfyUI calls an input is an input of the bundle, in every family that declares it."""
    for name in LATENTS:
        manifest = open_bundle(bundles(name)).manifest
        inputs = {tensor.name for graph in manifest.graphs.values() for tensor in graph.inputs}
        assert manifest.comfy is not None and manifest.comfy.inputs.keys() <= inputs


def test_the_recorder_can_fail(loaded, nodes, tiny):
    """A prediction that is a little off is found by what the tests above look with."""
    patcher = planned(nodes, loaded("flux"), interval=1)
    seen = recorded(patcher, interval=1)
    sampled(patcher, tiny, "flux", steps=2)
    ((latents, timestep, conditioning, made), *_) = next(iter(seen.calls.values()))
    model = tiny("flux").model
    expected = oracle.replay(model, latents[None], timestep[:1], conditioning, "F", 0)
    limit = allowed(model, expected, "F", 0)
    oracle.assert_close("as it is", made[None], expected, limit)
    with pytest.raises(AssertionError):
        oracle.assert_close("off", made[None] + 4 * limit.max(), expected, limit)
