"""A double of the names of ComfyUI that the nodes use, and of a sampler that drives them.

It is written from ComfyUI's behaviour as its users see it; `test_comfy_real.py` compares the signature of every name
with the real one, and the tests of the nodes run over either: `modules()` gives what stands under which name.
"""

from __future__ import annotations

import copy
import types
import uuid
from types import SimpleNamespace

import torch

# comfy.patcher_extension ---------------------------------------------------------------------------------------------


class WrappersMP:
    OUTER_SAMPLE = "outer_sample"
    DIFFUSION_MODEL = "diffusion_model"


class CallbacksMP:
    ON_LOAD = "on_load_after"


class WrapperExecutor:
    """What a wrapper gets first: called, it goes on with the next one; `class_obj` is who samples."""

    def __init__(self, original, class_obj, wrappers, idx=0):
        self.original, self.class_obj, self.wrappers, self.idx = original, class_obj, wrappers, idx

    def execute(self, *args, **kwargs):
        if self.idx == len(self.wrappers):
            return self.original(*args, **kwargs)
        return self.wrappers[self.idx](self, *args, **kwargs)

    def __call__(self, *args, **kwargs):
        return WrapperExecutor(self.original, self.class_obj, self.wrappers, self.idx + 1).execute(*args, **kwargs)


# comfy.model_patcher -------------------------------------------------------------------------------------------------


class ModelPatcher:
    def __init__(self, model, load_device, offload_device, size=0, weight_inplace_update=False):
        self.model, self.load_device, self.offload_device, self.size = model, load_device, offload_device, size
        self.model_options = {"transformer_options": {}}
        self.wrappers, self.callbacks, self.object_patches, self.parent = {}, {}, {}, None
        if not hasattr(model, "model_loaded_weight_memory"):
            model.model_loaded_weight_memory = 0

    def clone(self):
        made = type(self)(self.model, self.load_device, self.offload_device, self.size)
        made.model_options = copy.deepcopy(self.model_options)
        made.object_patches, made.parent = dict(self.object_patches), self
        made.wrappers = {kind: {key: [*own] for key, own in keys.items()} for kind, keys in self.wrappers.items()}
        made.callbacks = dict(self.callbacks)
        return made

    def add_wrapper_with_key(self, wrapper_type, key, wrapper):
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, wrapper_type, key):
        self.wrappers.get(wrapper_type, {}).pop(key, None)

    def get_wrappers(self, wrapper_type, key):
        return self.wrappers.get(wrapper_type, {}).get(key, [])

    def get_all_callbacks(self, call_type):
        return [one for own in self.callbacks.get(call_type, {}).values() for one in own]

    def add_object_patch(self, name, obj):
        self.object_patches[name] = obj

    def get_model_object(self, name):
        return self.object_patches.get(name, getattr(self.model, name))

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        return []

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        if self.model.model_loaded_weight_memory == 0:
            self.load(device_to)
        return self.model.model_loaded_weight_memory

    def partially_unload(self, device_to, memory_to_free=0):
        raise NotImplementedError

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        raise NotImplementedError

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            self.model.to(device_to)
            self.model.device, self.model.model_loaded_weight_memory = device_to, 0

    def detach(self, unpatch_all=True):
        if unpatch_all:
            self.unpatch_model(self.offload_device, unpatch_weights=unpatch_all)
        return self.model


# comfy.supported_models ----------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """What stands around a network: velocities, sigmas from 0 to 1, the conditioning by the names of the network."""

    def __init__(self, told, multiplier, names):
        super().__init__()
        self.told, self.names, self.device = told, names, None
        self.model_sampling = SimpleNamespace(timestep=lambda sigma: sigma * multiplier)

    def extra_conds(self, entry):
        parts = {"c_crossattn": entry["cross_attn"], "y": entry.get("pooled_output")}
        parts["guidance"] = torch.tensor([entry.get("guidance", 3.5)])
        parts |= {name: entry[name] for name in ("attention_mask", "clip_fea", "ref_latents") if name in entry}
        return {name: parts[name] for name in self.names if parts.get(name) is not None}

    def joined(self, x):
        """With the channels that a picture would have, which is none."""
        embedding = getattr(self.diffusion_model, "patch_embedding", None)
        more = 0 if embedding is None else embedding.weight.shape[1] - x.shape[1]
        return torch.cat([x, x.new_zeros(len(x), more, *x.shape[2:])], 1)

    def apply_model(self, x, t, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        dtype = self.diffusion_model.dtype
        given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in kwargs.items()}
        velocity = self.diffusion_model(
            self.joined(x).to(dtype),
            self.model_sampling.timestep(t).float(),
            context=c_crossattn.to(dtype),
            control=control,
            transformer_options=transformer_options,
            **given,
        )
        return x - velocity.float() * t.reshape(-1, *[1] * (x.ndim - 1))


def supported(multiplier, *names):
    class Supported:
        def __init__(self, unet_config):
            self.unet_config = unet_config

        def set_inference_dtype(self, dtype, manual_cast_dtype):
            self.dtype = dtype

        def get_model(self, state_dict, prefix="", device=None):
            assert self.unet_config["disable_unet_model_creation"]
            return Model(self.unet_config, multiplier, ("c_crossattn", *names))

    return Supported


# comfy.samplers ------------------------------------------------------------------------------------------------------


def sample_euler(model, x, sigmas, extra_args=None, callback=None):
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        if callback is not None:
            callback(i, denoised, x, len(sigmas) - 1)
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def sample_heun(model, x, sigmas, extra_args=None, callback=None):
    for i in range(len(sigmas) - 1):
        slope = (x - model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)) / sigmas[i]
        ahead, step = x + slope * (sigmas[i + 1] - sigmas[i]), sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] > 0:
            other = (ahead - model(ahead, sigmas[i + 1] * x.new_ones(len(x)), **extra_args)) / sigmas[i + 1]
            ahead = x + (slope + other) / 2 * step
        x = ahead
    return x


class KSAMPLER:
    def __init__(self, sampler_function):
        self.sampler_function = sampler_function


def ksampler(sampler_name):
    return KSAMPLER({"euler": sample_euler, "heun": sample_heun}[sampler_name])


class CFGGuider:
    apart = False  # whether each branch is called for itself, as where memory is short

    def __init__(self, model_patcher):
        self.model_patcher, self.cfg = model_patcher, 1.0

    def set_conds(self, positive, negative):
        pairs = {"positive": positive, "negative": negative}
        self.original_conds = {
            name: [{**extra, "cross_attn": text, "uuid": uuid.uuid4(), "model_conds": {}} for text, extra in entries]
            for name, entries in pairs.items()
        }

    def set_cfg(self, cfg):
        self.cfg = cfg

    def sample(
        self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None
    ):
        self.conds = {name: [dict(entry) for entry in entries] for name, entries in self.original_conds.items()}
        self.model_options = copy.deepcopy({**self.model_patcher.model_options, "wrappers": None})
        transformer_options = self.model_options["transformer_options"]
        transformer_options["wrappers"] = self.model_patcher.wrappers
        around = [one for own in self.model_patcher.wrappers.get("outer_sample", {}).values() for one in own]
        run = WrapperExecutor(self.outer_sample, self, around).execute
        return run(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed)

    def outer_sample(self, noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed):
        self.model_patcher.partially_load(self.model_patcher.load_device)
        x = sigmas[0] * noise + (1 - sigmas[0]) * latent_image
        return sampler.sampler_function(self.predict_noise, x, sigmas, extra_args={}, callback=callback)

    def predict_noise(self, x, timestep):
        names = ["positive", "negative"] if self.cfg != 1 else ["positive"]
        entries = [(name, entry) for name in names for entry in self.conds[name]][::-1]
        made = {name: [] for name in names}
        batches = [[one] for one in entries] if self.apart else [entries]
        for batch in batches:
            parts = [self.model_patcher.model.extra_conds(entry) for _, entry in batch]
            whole = {n: torch.cat([part[n].expand(len(x), *part[n].shape[1:]) for part in parts]) for n in parts[0]}
            options = {**self.model_options["transformer_options"], "uuids": [entry["uuid"] for _, entry in batch]}
            x_all, t_all = torch.cat([x] * len(batch)), torch.cat([timestep] * len(batch))
            answers = self.model_patcher.model.apply_model(x_all, t_all, transformer_options=options, **whole)
            for (name, _), answer in zip(batch, answers.chunk(len(batch)), strict=True):
                made[name].append(answer)
        positive, *rest = (sum(made[name]) / len(made[name]) for name in names)
        return positive if not rest else rest[0] + (positive - rest[0]) * self.cfg


# comfy_api.latest, folder_paths --------------------------------------------------------------------------------------


class Widget:
    """An input or output of a node."""

    def __init__(self, id=None, **options):
        self.id, self.options = id, options


class Schema:
    def __init__(self, node_id, display_name=None, category="sd", inputs=None, outputs=None, **flags):
        self.node_id, self.display_name, self.category = node_id, display_name, category
        self.inputs, self.outputs, self.flags = inputs or [], outputs or [], flags


class NodeOutput:
    def __init__(self, *args, ui=None, expand=None, block_execution=None):
        self.args, self.ui = args, ui


class ComfyNode:
    pass


class ComfyExtension:
    pass


class PreviewText:
    def __init__(self, value, **kwargs):
        self.value = value


def modules(models):
    """Name -> module, as ComfyUI has them.

    Args:
        models: ComfyUI's folder of models.
    """
    kinds = {
        kind: SimpleNamespace(Input=Widget, Output=Widget)
        for kind in ("Model", "Latent", "Combo", "Int", "Float", "String")
    }
    places = {}

    def add_model_folder_path(folder_name, full_folder_path, is_default=False):
        places.setdefault(folder_name, []).append(full_folder_path)

    contents = {
        "comfy": {},
        "comfy.model_management": {
            "get_torch_device": lambda: torch.device("cpu"),
            "unet_offload_device": lambda: torch.device("cpu"),
        },
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
        "comfy.patcher_extension": {"WrappersMP": WrappersMP, "CallbacksMP": CallbacksMP},
        "comfy.samplers": {"CFGGuider": CFGGuider, "ksampler": ksampler},
        "comfy.supported_models": {
            "Flux": supported(1.0, "y", "guidance"),
            "FluxSchnell": supported(1.0, "y", "guidance"),
            "SD3": supported(1000.0, "y"),
            "QwenImage": supported(1.0),
            "WAN21_T2V": supported(1000.0, "clip_fea"),
            "WAN21_I2V": supported(1000.0, "clip_fea"),
            "HunyuanVideo": supported(1000.0, "y", "guidance", "attention_mask"),
        },
        "comfy_api": {},
        "comfy_api.latest": {
            "io": SimpleNamespace(ComfyNode=ComfyNode, Schema=Schema, NodeOutput=NodeOutput, **kinds),
            "ui": SimpleNamespace(PreviewText=PreviewText),
            "ComfyExtension": ComfyExtension,
        },
        "folder_paths": {
            "models_dir": str(models),
            "get_folder_paths": lambda folder_name: places.get(folder_name, []),
            "add_model_folder_path": add_model_folder_path,
        },
    }
    made = {}
    for name, entries in contents.items():
        made[name] = types.ModuleType(name)
        vars(made[name]).update(entries)
        if "." in name:
            parent, _, own = name.rpartition(".")
            setattr(made[parent], own, made[name])
    return made
