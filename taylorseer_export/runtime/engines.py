"""Which runner serves which kind of engine, and the checks that come before any engine is touched.

Each runner's module has `open_runner(bundle, device, threads, cuda_graphs)`, with `weights` where these may be changed
at load, and with `group` where its engines send between ranks by themselves. It checks what its engines are tied to
(library and version, compute capability, driver) against this machine, and only then loads a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from taylorseer_export.bundle.device import CPU, Device
from taylorseer_export.bundle.driver import check_number
from taylorseer_export.bundle.store import Bundle
from taylorseer_export.errors import BundleError, ConfigError
from taylorseer_export.runtime.runner import Runner

if TYPE_CHECKING:
    from taylorseer_export.runtime.group import Group

# Kind of engine -> the module that runs it.
_RUNNERS = {
    "onnxruntime": "taylorseer_export.runtime.onnxruntime",
    "inductor": "taylorseer_export.runtime.inductor",
    "tensorrt": "taylorseer_export.runtime.tensorrt",
    "tensorrt-rtx": "taylorseer_export.runtime.tensorrt",
    "torch-tensorrt": "taylorseer_export.runtime.tensorrt",
}


# Kinds whose weights can be others than the bundle's when they are loaded.
_OPEN = ("onnxruntime", "inductor")
# Kinds that send between ranks by themselves; torch finds the group by its name.
_SENDING = ("tensorrt", "tensorrt-rtx", "torch-tensorrt")


def open_runner(
    bundle: Bundle,
    device: Device = CPU,
    threads: int = 0,
    cuda_graphs: bool = True,
    weights: Mapping[str, np.ndarray] | None = None,
    group: Group | None = None,
) -> Runner:
    """Load the engines of a checked bundle.

    Args:
        bundle: The bundle.
        device: Where they are to run.
        threads: CPU threads of each engine; 0 leaves it to the engine.
        cuda_graphs: Whether calls on a GPU are replayed as CUDA graphs; the runner counts the calls that are not.
        weights: Tensor name -> bits that take the place of the bundle's, as `Merged` has them.
        group: The ranks, where the bundle is shared out.

    Raises:
        BundleError: The engines are not for this device, machine or version; says how to rebuild them here.
        ConfigError: There is no GPU of that number, or the engines hold their weights and `weights` are given.
    """
    engine = bundle.manifest.engine
    if engine.kind not in _RUNNERS:
        raise BundleError(
            f"{bundle.folder} holds engines of kind {engine.kind}, expected one that this version runs "
            f"({', '.join(_RUNNERS)}); export again with `taylorseer-export {bundle.manifest.family} "
            "--engine onnxruntime`"
        )
    devices = engine.device.get("devices", "cpu").split()
    if device.kind not in devices:
        raise BundleError(
            f"device is `{device}`, expected one that {bundle.folder} was built for ({', '.join(devices)}); "
            f"choose one of those, or export again with `{bundle.manifest.command(device.kind)}`"
        )
    check_number(device)
    if weights and (engine.kind not in _OPEN or engine.options.get("provider") == "tensorrt"):
        raise ConfigError(
            f"lora is given for engines of kind {engine.kind}, which hold their weights, expected one of "
            f"{', '.join(_OPEN)} (without --provider tensorrt); export again with --lora FILE"
        )
    change: dict[str, Any] = {"weights": weights} if weights else {}
    if group is not None and engine.kind in _SENDING:
        change["group"] = group
    runner: Runner = import_module(_RUNNERS[engine.kind]).open_runner(bundle, device, threads, cuda_graphs, **change)
    return runner


def check_version(bundle: Bundle, library: str, installed: str, parts: int = 3) -> None:
    """Refuse engines built with another version of a library than is installed.

    Args:
        bundle: The bundle.
        library: Name of the library, as `pip` and the manifest know it.
        installed: Its version here.
        parts: How many leading parts of the version must agree.

    Raises:
        BundleError: They differ.
    """
    built = bundle.manifest.engine.versions.get(library, "none")
    wanted = built.split(".")[:parts]
    if installed.split(".")[:parts] != wanted:
        shown = built if parts >= len(built.split(".")) else f"{'.'.join(wanted)}.x"
        raise BundleError(
            f"{library} is {installed}, expected {shown}, with which {bundle.folder} was built; "
            f"pip install '{library}=={built}', or export again here with `{bundle.manifest.command()}`"
        )
