"""A bundle as a MODEL of ComfyUI: engines in the place of the network, loaded and released as ComfyUI's memory asks.

ComfyUI's own class of the model stays around them: it knows the latent format, the sampling, and what a conditioning
holds. Which class that is, and what it calls the inputs of the transformer, is in the manifest.

Shapes: N samples, C channels, F frames, H and W latent pixels; packed latents are `[N, H W / s², C s²]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, NoReturn

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.supported_models
import torch

from taylorseer_export.bundle.manifest import Comfy
from taylorseer_export.bundle.shapes import match
from taylorseer_export.bundle.store import Bundle
from taylorseer_export.comfy.loop import KEY, OpenLoop
from taylorseer_export.errors import ConfigError, StepError
from taylorseer_export.method import RequestOptions
from taylorseer_export.runtime.contract import request_constants
from taylorseer_export.runtime.denoiser import Denoiser, load
from taylorseer_export.runtime.dropin import DTYPES, DropIn
from taylorseer_export.runtime.tensors import completed


class Network(torch.nn.Module):
    """The engines of a bundle under the call of ComfyUI's networks.

    Args:
        bundle: Opened; its engines are not loaded yet.
        told: What the manifest says of ComfyUI's model.

    Attributes:
        dtype: Precision of the engines, to which ComfyUI casts latents and conditioning.
    """

    def __init__(self, bundle: Bundle, told: Comfy) -> None:
        super().__init__()
        self.bundle, self.dtype = bundle, DTYPES[bundle.manifest.precision]
        self._told = told
        constants = request_constants(bundle.manifest)
        self._scaled = [name for name, tensor in constants.items() if tensor.fill == "guidance"]
        self._denoiser: Denoiser | None = None
        self._dropins: dict[RequestOptions, DropIn] = {}
        for name, shape in told.weights.items():  # ComfyUI asks how wide they are
            setattr(self, name, SimpleNamespace(weight=torch.empty(shape, device="meta")))

    def open(self, device: torch.device) -> None:
        """Load the engines there, unless they are loaded."""
        if self._denoiser is None:
            self._denoiser = load(self.bundle, str(device))

    def close(self) -> None:
        """Release the engines and all that was allocated for requests."""
        self._dropins.clear()
        if self._denoiser is not None:
            self._denoiser.close()
            self._denoiser = None

    def dropin(self, options: RequestOptions) -> DropIn:
        """What runs loops with these options; slots are kept for the next one."""
        assert self._denoiser is not None, "bug in taylorseer-export: a loop over engines that are not loaded"
        if options not in self._dropins:
            given = {entry.name: getattr(options, entry.name) for entry in fields(options)}
            self._dropins[options] = self._denoiser.as_transformer(**given)
        return self._dropins[options]

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> torch.Tensor:
        """One call, for the branches of guidance that ComfyUI put into one batch or for one of them.

        Args:
            x: `[B N, C, H, W]` or `[B N, C, F, H, W]`, B branches one after the other.
            timestep: `[B N]`, equal numbers.
            context: What the text encoders made, `[B N, T, D]`.
            control: Of a ControlNet; refused.
            transformer_options: `uuids` name the branches.
            given: The other parts of the conditioning, by ComfyUI's names.

        Raises:
            StepError: An argument is not known or missing, does not fit the bundle, or no sampler is at work.
        """
        options = transformer_options or {}
        loop: OpenLoop | None = options.get(KEY)
        if loop is None:
            raise StepError(
                "the network of a bundle is called outside a sampler, expected a loop with sigmas; sample with one of "
                "ComfyUI's samplers"
            )
        inputs = self._inputs({"context": context, "control": control, **given})
        latents, sides = self._packed(x)
        names = [str(name) for name in options["uuids"]]
        count = len(latents) // len(names)
        made = []
        for k, name in enumerate(names):
            own = slice(k * count, (k + 1) * count)
            rows = {n: value[own] if len(value) == len(latents) else value for n, value in inputs.items()}
            made.append(self._predicted(loop, name, latents[own], timestep[own], rows, sides))
        return self._unpacked(torch.cat(made), x)

    def _predicted(
        self,
        loop: OpenLoop,
        name: str,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        inputs: dict[str, torch.Tensor],
        sides: tuple[int, int] | None,
    ) -> torch.Tensor:
        known = loop.conditioning.get(name)
        if known is None:
            denoiser = self._denoiser
            assert denoiser is not None, "bug in taylorseer-export: a call of engines that are not loaded"
            scale = self.bundle.manifest.sampling.guidance_scale
            extents = match(denoiser.latent.shape, tuple(latents.shape), {}, denoiser.latent.name)
            whole, _ = completed(denoiser, inputs, extents, sides, scale)
            loop.conditioning[name] = inputs, whole
        elif known[0].keys() != inputs.keys() or not all(known[0][n].equal(inputs[n]) for n in inputs):
            raise StepError("conditioning changed within a loop, expected the same at every step; sample in parts")
        else:
            whole = known[1]
        dropin = loop.dropin(self.dropin)
        clock = dropin.denoiser.timestep.name
        with loop.timed(dropin, name, latents.device), dropin.cache_context(name):
            (made,) = dropin(latents, return_dict=False, **{clock: timestep}, **whole)
        return made * self.bundle.manifest.pipeline.prediction_sign

    def _inputs(self, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The transformer's inputs among the parts of a conditioning; every other part that is there is refused."""
        names = self._told.inputs
        known = {*names.values(), *self._told.ignored}
        for name, value in given.items():
            if value is not None and name not in known:
                raise StepError(
                    f"conditioning has `{name}`, expected only {', '.join(sorted(known))}, which the bundle was traced "
                    "with; leave out the node that adds it, or use ComfyUI's own model"
                )
        inputs = {name: given[theirs] for name, theirs in names.items() if given.get(theirs) is not None}
        factor = self.bundle.manifest.pipeline.guidance_factor
        return {name: value * factor if name in self._scaled else value for name, value in inputs.items()}

    def _packed(self, latents: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int] | None]:
        """(what the transformer takes, (rows, columns) in tokens where it is packed)."""
        side = self.bundle.manifest.pipeline.packing
        if side == 1:
            return latents, None
        flat = _picture(latents)
        height, width = flat.shape[-2:]
        # As ComfyUI's networks fill up sides that are odd.
        filled = torch.nn.functional.pad(flat, (0, -width % side, 0, -height % side), mode="circular")
        blocks = filled.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))  # [N, C, rows, s, columns, s]
        sides = blocks.shape[2], blocks.shape[4]
        return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), sides

    def _unpacked(self, tokens: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Predictions in the form of these latents."""
        side = self.bundle.manifest.pipeline.packing
        if side == 1:
            return tokens
        height, width = latents.shape[-2:]
        blocks = tokens.unflatten(1, (-(-height // side), -(-width // side))).unflatten(3, (-1, side, side))
        flat = blocks.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)[..., :height, :width]
        return flat if latents.ndim == 4 else flat.unsqueeze(2)


def _picture(latents: torch.Tensor) -> torch.Tensor:
    if latents.ndim == 4:
        return latents
    if latents.ndim != 5 or latents.shape[2] != 1:
        raise StepError(f"latents are {list(latents.shape)}, expected those of one picture [N, C, H, W]; change them")
    return latents[:, :, 0]


class BundlePatcher(comfy.model_patcher.ModelPatcher):
    """ComfyUI's handle of the model: engines are loaded whole or not at all, and their weights cannot be patched."""

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        """Load the engines."""
        device = self.load_device if device_to is None else device_to
        self.model.diffusion_model.open(device)
        self.model.to(device)  # the sampling's sigmas
        self.model.device, self.model.model_loaded_weight_memory = device, self.size
        for loaded in self.get_all_callbacks(comfy.patcher_extension.CallbacksMP.ON_LOAD):
            loaded(self, device, lowvram_model_memory, force_patch_weights, full_load)

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """Where ComfyUI takes the model off its device, release the engines."""
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            self.model.diffusion_model.close()

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0) -> int:
        """Bytes that were freed: none, so that ComfyUI releases all."""
        return 0

    def add_patches(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse a LoRA."""
        raise ConfigError(
            "a LoRA is loaded onto a bundle, expected it in the weights at export; export again with --lora FILE, and "
            "load it onto the CLIP alone here"
        )


def model_of(bundle: Bundle, on_cpu: bool = False) -> BundlePatcher:
    """The MODEL of a bundle.

    Raises:
        ConfigError: ComfyUI has no counterpart of its family, or this version of it has not.
    """
    manifest = bundle.manifest
    told = manifest.comfy
    known = getattr(comfy.supported_models, told.model, None) if told is not None else None
    if told is None or known is None:
        wanted = "a family that ComfyUI has a model of" if told is None else f"a ComfyUI that has `{told.model}`"
        raise ConfigError(
            f"bundle is of family {manifest.family}, expected {wanted}; use the images API or a diffusers pipeline"
        )
    config = known({**told.config, "disable_unet_model_creation": True})
    config.set_inference_dtype(DTYPES[manifest.precision], None)
    model = config.get_model({})
    model.diffusion_model = Network(bundle, told)
    cpu = torch.device("cpu")
    device = cpu if on_cpu else comfy.model_management.get_torch_device()
    rest = cpu if on_cpu else comfy.model_management.unet_offload_device()
    # What the parts of a pipeline need is not counted: ComfyUI brings its own.
    held = sum(file.size for name, file in manifest.files.items() if name.split("/")[0] not in manifest.parts)
    return BundlePatcher(model, load_device=device, offload_device=rest, size=held)
