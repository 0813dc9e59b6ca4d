"""The nodes: load a bundle, say how it is to be sampled, read what ran."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import comfy.patcher_extension
import folder_paths
from comfy_api.latest import ComfyExtension, io, ui

from taylorseer_export.bundle.manifest import MANIFEST
from taylorseer_export.bundle.profile import Profiles
from taylorseer_export.bundle.store import open_bundle
from taylorseer_export.comfy.loop import KEY, Sampling
from taylorseer_export.comfy.network import BundlePatcher, model_of
from taylorseer_export.errors import ConfigError
from taylorseer_export.method import RULES, RequestOptions, forecasts_from_options
from taylorseer_export.runtime.contract import Contract

FOLDER = "taylorseer"  # below ComfyUI's models
_OUTER = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE


def bundles() -> dict[str, Path]:
    """Bundles in ComfyUI's model folders, by their path there."""
    roots = [Path(root) for root in folder_paths.get_folder_paths(FOLDER)]
    found = [(root, file.parent) for root in roots for file in sorted(root.glob(f"**/{MANIFEST}"))]
    return {folder.relative_to(root).as_posix(): folder for root, folder in found}


class LoadBundle(io.ComfyNode):
    """A bundle as a MODEL, with the plan that it was exported with."""

    @classmethod
    def define_schema(cls) -> Any:
        """Its inputs and output."""
        return io.Schema(
            node_id="TaylorSeerLoadBundle",
            display_name="Load TaylorSeer bundle",
            category=KEY,
            description="The engines that `taylorseer-export` wrote, in the place of a diffusion model.",
            inputs=[
                io.Combo.Input("bundle", options=list(bundles()), tooltip=f"A folder in models/{FOLDER}."),
                io.Combo.Input("device", options=["default", "cpu"], default="default", optional=True),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, bundle: str, device: str = "default") -> str:
        """Another one when the bundle is: its manifest holds the hash of every file."""
        manifest = bundles().get(bundle, Path()) / MANIFEST
        return f"{device} {hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else ''}"

    @classmethod
    def execute(cls, bundle: str, device: str = "default") -> Any:
        """Check the bundle; its engines are loaded when a sampler needs them."""
        known = bundles()
        if bundle not in known:
            raise ConfigError(
                f"bundle is {bundle}, expected one of {', '.join(known) or 'those'} in models/{FOLDER}; put it there"
            )
        return io.NodeOutput(sampled_by(model_of(open_bundle(known[bundle]), device == "cpu"), RequestOptions()))


class ChoosePlan(io.ComfyNode):
    """Which steps are full, and how the others are forecast."""

    @classmethod
    def define_schema(cls) -> Any:
        """Its inputs and output; -1, 0 and nothing leave it to the bundle."""
        return io.Schema(
            node_id="TaylorSeerPlan",
            display_name="TaylorSeer plan",
            category=KEY,
            description="Which steps compute the whole model, and how the others are forecast.",
            inputs=[
                io.Model.Input("model"),
                io.Int.Input(
                    "interval",
                    display_name="interval (fresh_threshold)",
                    default=-1,
                    min=-1,
                    max=1000,
                    tooltip="Steps from one full step to the next; -1 leaves it to the bundle.",
                ),
                io.Int.Input(
                    "warmup",
                    display_name="warmup (first_enhance)",
                    default=-1,
                    min=-1,
                    max=1000,
                    tooltip="Full steps at the start; -1 leaves it to the bundle.",
                ),
                io.Int.Input(
                    "order",
                    display_name="order (max_order)",
                    default=-1,
                    min=-1,
                    max=4,
                    tooltip="Order of the forecasts; -1 leaves it to the bundle.",
                ),
                io.String.Input(
                    "plan",
                    default="",
                    tooltip="An explicit plan like FFF..F..F, F for a full step; as long as the loop.",
                ),
                io.String.Input("profile", default="", tooltip="Name of a calibrated plan of the bundle."),
                io.Combo.Input(
                    "guard",
                    options=["none", *RULES],
                    default="none",
                    tooltip="A rule that turns a forecast step into a full one where its error is too large.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.001,
                    tooltip="Error under which a guard lets a step be forecast; 0 leaves it to the profile.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        interval: int = -1,
        warmup: int = -1,
        order: int = -1,
        plan: str = "",
        profile: str = "",
        guard: str = "none",
        threshold: float = 0.0,
    ) -> Any:
        """A MODEL with this plan; contradictions are refused here, before anything runs."""
        options = RequestOptions(
            interval=_given(interval),
            warmup=_given(warmup),
            order=_given(order),
            plan=plan.strip() or None,
            profile=profile.strip() or None,
            guard=None if guard == "none" else guard,
            threshold=threshold or None,
        )
        patcher = _of_a_bundle(model)
        bundle = patcher.model.diffusion_model.bundle
        forecasts_from_options(options, Contract(bundle.manifest).defaults, Profiles(bundle))
        return io.NodeOutput(sampled_by(patcher, options))


class Report(io.ComfyNode):
    """What ran in the last loop of a MODEL."""

    @classmethod
    def define_schema(cls) -> Any:
        """Its inputs and outputs; the latents only say when to look."""
        return io.Schema(
            node_id="TaylorSeerReport",
            display_name="TaylorSeer report",
            category=KEY,
            description="The plan that ran, and the times of full and forecast steps.",
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that the sampler had."),
                io.Latent.Input("samples", tooltip="What the sampler made; it comes out as it is."),
            ],
            outputs=[io.Latent.Output(), io.String.Output(display_name="report")],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, model: Any, samples: Any) -> Any:
        """Read it."""
        (sampling,) = _of_a_bundle(model).get_wrappers(_OUTER, KEY)
        return io.NodeOutput(samples, sampling.last, ui=ui.PreviewText(sampling.last))


def sampled_by(patcher: BundlePatcher, options: RequestOptions) -> BundlePatcher:
    """A clone whose loops run with these options; it shares the engines."""
    clone: BundlePatcher = patcher.clone()
    clone.remove_wrappers_with_key(_OUTER, KEY)
    clone.add_wrapper_with_key(_OUTER, KEY, Sampling(options))
    return clone


def _given(number: int) -> int | None:
    return None if number < 0 else number


def _of_a_bundle(model: Any) -> BundlePatcher:
    if not isinstance(model, BundlePatcher):
        raise ConfigError(
            f"model is a {type(model).__name__}, expected one of a bundle; connect `Load TaylorSeer bundle`, perhaps "
            "through a TaylorSeer plan"
        )
    return model


class Extension(ComfyExtension):
    """The nodes of this folder."""

    async def get_node_list(self) -> list[Any]:
        """All of them."""
        return [LoadBundle, ChoosePlan, Report]


def extension() -> Extension:
    """The nodes, and the folder for bundles beside ComfyUI's other models."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    return Extension()
