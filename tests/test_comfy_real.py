"""The nodes in a real ComfyUI, which `COMFYUI_PATH` names, and the double held to it: `make comfy`."""

import asyncio
import inspect
from dataclasses import replace
from importlib import import_module

import comfy_double
import comfy_studio
import oracle
import pytest
import torch
from harness import FLOAT32

from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.sampling import Loop, sample
from taylorseer_export.runtime.tensors import tensor_request

pytestmark = pytest.mark.skipif(not comfy_studio.REAL, reason="needs a ComfyUI; COMFYUI_PATH names none")
STEPS = 6


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    comfy_studio.enter(models)
    asyncio.run(import_module("taylorseer_export.comfy").comfy_entrypoint())
    return import_module("taylorseer_export.comfy.nodes")


@pytest.fixture(scope="module")
def own(nodes, tiny):
    """ComfyUI's MODEL of the tiny FLUX, with its weights under ComfyUI's names."""
    import comfy.model_detection
    import comfy.model_patcher
    import comfy.supported_models

    model = tiny("flux").model
    config = model.config
    width = config.num_attention_heads * config.attention_head_dim
    told = {
        "image_model": "flux",
        "guidance_embed": True,
        "in_channels": config.in_channels // 4,
        "out_channels": config.in_channels // 4,
        "patch_size": 2,
        "vec_in_dim": config.pooled_projection_dim,
        "context_in_dim": config.joint_attention_dim,
        "hidden_size": width,
        "mlp_ratio": 4.0,
        "num_heads": config.num_attention_heads,
        "depth": config.num_layers,
        "depth_single_blocks": config.num_single_layers,
        "axes_dim": list(config.axes_dims_rope),
        "theta": 10000,
        "qkv_bias": True,
        "dtype": torch.float32,
    }
    made = comfy.supported_models.Flux(told)
    made.set_inference_dtype(torch.float32, None)
    whole = made.get_model({})
    weights = comfy.model_detection.convert_diffusers_mmdit(dict(model.state_dict()), "")
    missing, unexpected = whole.diffusion_model.load_state_dict(weights, strict=False)
    assert not missing and not unexpected
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(whole, load_device=cpu, offload_device=cpu)


@pytest.fixture(scope="module")
def ours(nodes, bundles):
    from taylorseer_export.bundle.store import open_bundle
    from taylorseer_export.comfy.network import model_of
    from taylorseer_export.method import RequestOptions

    def make(**options):
        return nodes.sampled_by(model_of(open_bundle(bundles("flux"))), RequestOptions(**options))

    return make


def conditioning(tiny, guidance=3.5):
    _, _, inputs = tiny("flux").inputs(1)
    rest = {"pooled_output": inputs["pooled_projections"], "guidance": guidance}
    return [[inputs["encoder_hidden_states"], rest]]


def sampled(patcher, tiny, sampler, shape=(2, 4, 8, 12), sigmas=None, latent=None, **options):
    """Latents of ComfyUI's own sampler, of its own noise for seed 3."""
    import comfy.sample
    import comfy.samplers

    latent = torch.zeros(shape) if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, 3)
    guider = comfy.samplers.CFGGuider(patcher)
    positive = conditioning(tiny)
    guider.set_conds(positive, positive)
    if sigmas is None:
        sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", STEPS)
    made = comfy.samplers.ksampler(sampler) if isinstance(sampler, str) else sampler
    return guider.sample(noise, latent, made, sigmas, disable_pbar=True, **options)


@pytest.mark.parametrize("shape", [(2, 4, 8, 12), (1, 4, 7, 9)], ids=["even", "odd"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_all_full_is_comfyui_s_own_model(own, ours, tiny, sampler, shape):
    """The same latents, within what float32 allows a network of this depth at every call of the loop."""
    expected = sampled(own, tiny, sampler, shape)
    calls = STEPS * (2 if sampler == "heun" else 1)
    seen = sampled(ours(interval=1), tiny, sampler, shape)
    depth, length, _ = oracle.extent(tiny("flux").model)
    limit = calls * oracle.bound(expected.double(), 1.0, FLOAT32, depth, length)
    oracle.assert_close(sampler, seen, expected.double(), limit)
    assert not torch.equal(expected, sampled(own, tiny, sampler, shape, sigmas=torch.tensor([1.0, 0.5, 0.0])))


def test_image_to_image_is_comfyui_s_own(own, ours, tiny):
    import comfy.samplers

    latent = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(8))
    sigmas = comfy.samplers.calculate_sigmas(own.get_model_object("model_sampling"), "simple", 8)[-5:]
    expected = sampled(own, tiny, "euler", sigmas=sigmas, latent=latent)
    seen = sampled(ours(plan="FFFF"), tiny, "euler", sigmas=sigmas, latent=latent)
    depth, length, _ = oracle.extent(tiny("flux").model)
    limit = 4 * oracle.bound(expected.double(), 1.0, FLOAT32, depth, length)
    oracle.assert_close("from a picture", seen, expected.double(), limit)


def test_a_plan_gives_what_run_gives(ours, tiny, bundles):
    """The request of the same noise and conditioning, by the package's own loop."""
    plan = "FF.F.F"
    denoiser = load(bundles("flux"), threads=1)
    _, _, inputs = tiny("flux").inputs(1)
    named = ("encoder_hidden_states", "pooled_projections")
    request = tensor_request(
        denoiser, {name: inputs[name].numpy() for name in named}, (0,), {"image_tokens": 24}, (4, 6), 3.5
    )
    import comfy.sample

    noise = comfy.sample.prepare_noise(torch.zeros(1, 4, 8, 12), 3)
    blocks = noise.reshape(1, 4, 4, 2, 6, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 24, 16)
    request = replace(request, latents=blocks.numpy())
    loop = Loop(denoiser, request, Forecasts(Plan(plan), 2))
    sigmas = torch.cat([torch.tensor(loop.model_timesteps, dtype=torch.float32), torch.zeros(1)])
    made = torch.from_numpy(sample(denoiser, request, Forecasts(Plan(plan), 2)).latents)
    expected = made.reshape(1, 4, 6, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, 4, 8, 12)
    patcher = ours(plan=plan, order=2)
    seen = sampled(patcher, tiny, "euler", (1, 4, 8, 12), sigmas)
    seen = patcher.model.process_latent_in(seen)  # it ends in the VAE's units
    depth, length, _ = oracle.extent(tiny("flux").model)
    limit = len(plan) * oracle.bound(expected.double(), max(oracle.gains(plan, 2)), FLOAT32, depth, length)
    oracle.assert_close("a plan", seen, expected.double(), limit)


def test_the_samplers_that_are_told_the_timesteps_ask_at_these(ours, tiny):
    """Each calls once for every sigma but the last, and at that sigma; the list is true, and no other sampler's."""
    from taylorseer_export.comfy.loop import ONCE_PER_SIGMA

    for name in sorted(ONCE_PER_SIGMA):
        patcher = ours(interval=2)
        sampled(patcher, tiny, name.removeprefix("sample_"), (1, 4, 8, 8))
        (sampling,) = patcher.get_wrappers("outer_sample", "taylorseer")
        assert f"of {STEPS} calls full" in sampling.last, name


def test_a_workflow_of_two_samplers_and_an_interrupted_one(ours, tiny):
    import comfy.model_management

    first, second = ours(plan="FF.F.F", order=1), ours(interval=1)
    before = [sampled(first, tiny, "euler"), sampled(second, tiny, "euler")]

    def interrupt(step, *_):
        if step == 2:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sampled(first, tiny, "euler", callback=interrupt)
    assert all(map(torch.equal, before, [sampled(first, tiny, "euler"), sampled(second, tiny, "euler")]))


def test_memory_management_releases_and_loads(ours, tiny):
    import comfy.model_management

    patcher = ours(interval=1)
    before = sampled(patcher, tiny, "euler")
    network = patcher.model.diffusion_model
    assert network._denoiser is not None
    comfy.model_management.unload_all_models()
    assert network._denoiser is None and patcher.loaded_size() == 0
    assert torch.equal(sampled(patcher, tiny, "euler"), before)


def test_custom_sampling_runs_through_its_node(ours, tiny):
    """SamplerCustomAdvanced, with a guider for one branch."""
    advanced = import_module("comfy_extras.nodes_custom_sampler")
    import comfy.samplers

    patcher = ours(plan="F.F")
    basic = advanced.BasicGuider()
    (guider,) = basic.get_guider(patcher, conditioning(tiny)) if hasattr(basic, "get_guider") else (None,)
    noise = advanced.Noise_RandomNoise(3)
    latent = {"samples": torch.ones(1, 4, 8, 12)}  # empty ones get as many channels as the published model has
    node = advanced.SamplerCustomAdvanced()
    made, _ = node.sample(noise, guider, comfy.samplers.ksampler("euler"), torch.tensor([1.0, 0.6, 0.3, 0.0]), latent)
    assert torch.isfinite(made["samples"]).all()
    (sampling,) = patcher.get_wrappers("outer_sample", "taylorseer")
    assert sampling.last.startswith("plan F.F")


def test_the_double_takes_what_the_real_one_takes(nodes, tmp_path):
    """Every function that the double imitates has arguments of the same names in the same order as the real one."""
    compared = 0
    for name, module in comfy_double.modules(tmp_path).items():
        real = import_module(name)
        for entry, imitated in vars(module).items():
            if entry.startswith("__") or not callable(imitated):
                continue
            compared += 1
            actual = getattr(real, entry)
            for method in [None] if not inspect.isclass(imitated) else _methods(imitated, actual):
                ours, theirs = (one if method is None else getattr(one, method) for one in (imitated, actual))
                asked, taken = _names(ours), _names(theirs)
                assert taken[: len(asked)] == asked, f"{name}.{entry}.{method}: {asked}, ComfyUI has {taken}"
    assert compared > 15


def _methods(imitated, actual):
    own = [name for name, value in vars(imitated).items() if inspect.isfunction(value) and not name.startswith("__")]
    return [name for name in own if hasattr(actual, name) and not name.startswith("_")]


def _names(function):
    """Arguments by name, without `self`, up to those that take the rest."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [entry.name for entry in parameters if entry.kind not in kinds and entry.name != "self"]


def test_the_example_workflows_fit_comfyui_s_nodes(nodes):
    """Every class is there, and takes what the workflow gives it."""
    import comfy_workflows

    import_module("utils.install_util")  # before `nodes`, which puts another module of that name on the path
    known = import_module("nodes").NODE_CLASS_MAPPINGS
    for module in ("sd3", "flux", "hunyuan", "model_advanced", "images", "preview_any"):
        extra = import_module(f"comfy_extras.nodes_{module}")
        known.update(getattr(extra, "NODE_CLASS_MAPPINGS", {}))
        if hasattr(extra, "comfy_entrypoint"):
            listed = asyncio.run(asyncio.run(extra.comfy_entrypoint()).get_node_list())
            known.update({node.define_schema().node_id: node for node in listed})
    own = {node.define_schema().node_id: node for node in asyncio.run(nodes.extension().get_node_list())}
    for family, prompt in comfy_workflows.workflows().items():
        for entry in prompt.values():
            node = {**known, **own}[entry["class_type"]]
            taken = {name for group in node.INPUT_TYPES().values() for name in group}
            assert entry["inputs"].keys() <= taken, (family, entry["class_type"])
