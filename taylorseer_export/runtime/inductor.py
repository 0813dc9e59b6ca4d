"""The AOTInductor runner: a package of compiled graphs over one set of mapped weights."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from taylorseer_export.bundle.contract import NOTE, signature
from taylorseer_export.bundle.device import Device
from taylorseer_export.bundle.manifest import Graph
from taylorseer_export.bundle.store import Bundle
from taylorseer_export.errors import BundleError, first_line
from taylorseer_export.runtime.engines import check_version
from taylorseer_export.runtime.order import empty_after
from taylorseer_export.runtime.torch_runner import TorchRunner, current, located

WEIGHTS = "weights.safetensors"


def open_runner(
    bundle: Bundle,
    device: Device,
    threads: int,
    cuda_graphs: bool = True,
    weights: Mapping[str, np.ndarray] | None = None,
) -> TorchRunner:
    """Load the package of a bundle.

    Args:
        bundle: The bundle.
        device: Where to run; a GPU without a number is torch's current one.
        threads: Threads on the CPU, of the whole process; 0 leaves them as they are.
        cuda_graphs: Whether calls on a GPU are captured.
        weights: Tensor name -> bits in the place of the bundle's; bfloat16 as uint16.

    Raises:
        BundleError: torch is not installed, of another version, or the machine is not the kind it was built for.
    """
    torch = _library()
    check_version(bundle, "torch", torch.__version__)
    device = _checked_device(bundle, torch, device)
    if threads:
        torch.set_num_threads(threads)
    graphs: dict[str, Graph] = dict(bundle.manifest.graphs.items())
    package = bundle.path(next(iter(graphs.values())).file)  # one for all
    try:
        with current(device):
            held = _Weights(bundle.path(WEIGHTS), device, weights or {})
            functions = _functions(package, held, graphs, device)
    except (RuntimeError, KeyError) as error:
        raise BundleError(
            f"{package} is refused by torch {torch.__version__} ({first_line(error)}), expected a "
            f"package it can load; build it again with `{bundle.manifest.command()}`"
        ) from error
    runner = TorchRunner(functions, graphs, device, cuda_graphs)
    empty_after(held, held.tensors.values(), runner.order)  # a package keeps them when it goes itself
    return runner


def _library() -> Any:
    try:
        import torch
    except ImportError as error:
        raise BundleError(
            "torch is not installed, expected it for an inductor bundle; pip install 'taylorseer-export[inductor]'"
        ) from error
    return torch


def _checked_device(bundle: Bundle, torch: Any, asked: Device) -> Device:
    """The device with its number, where the machine code was built on one like it."""
    if asked.is_gpu and not torch.cuda.is_available():
        raise BundleError(
            f"device is `{asked}`, expected a GPU that torch can use for {bundle.folder}; install its driver, or "
            f"export again with `{bundle.manifest.command('cpu')}`"
        )
    device, here = located(asked), {"machine": platform.machine()}
    if device.is_gpu:
        here["compute_capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device.number))
    else:
        here["instructions"] = torch.backends.cpu.get_cpu_capability()
        if "int8" in bundle.manifest.engine.device:
            here["int8"] = "vnni" if torch.cpu._is_vnni_supported() else "widened"
    for name, seen in here.items():
        wanted = bundle.manifest.engine.device.get(name, "none")
        if seen != wanted:
            raise BundleError(
                f"{name.replace('_', ' ')} is {seen}, expected {wanted}, for which {bundle.folder} was built; "
                f"build it here with `{bundle.manifest.command()}`"
            )
    return device


class _Weights:
    """The tensors of all graphs; every function holds them.

    On the CPU they are mapped: the pages are shared with every other process. The `changed` ones are not.
    """

    def __init__(self, path: Path, device: Device, changed: Mapping[str, np.ndarray]) -> None:
        import torch
        from safetensors.torch import load_file

        self.tensors: dict[str, Any] = load_file(path, str(device))
        for name, bits in changed.items():
            self.tensors[name] = torch.from_numpy(bits).view(self.tensors[name].dtype).to(str(device))


def _functions(
    package: Path, weights: _Weights, graphs: Mapping[str, Graph], device: Device
) -> dict[str, Callable[..., object]]:
    """Each graph of the package as a function, all of them over the same tensors."""
    from torch._inductor.package import load_package

    # On a GPU one run at a time, by our own order: a CUDA graph cannot hold the events by which models know of theirs.
    # On the CPU as many at one time as there are threads to make them.
    runs = {"run_single_threaded": True} if device.is_gpu else {"num_runners": os.cpu_count() or 1}
    functions: dict[str, Callable[..., object]] = {}
    for name in graphs:
        model = load_package(str(package), name, device_index=_index(device), **runs)
        noted, expected = model.get_metadata().get(NOTE, "none"), signature(graphs[name])
        if noted != expected:
            raise BundleError(
                f"tensors of graph `{name}` in {package} are {noted}, expected {expected}, as in the manifest; export "
                "the bundle again"
            )
        used = {fqn: weights.tensors[fqn] for fqn in model.get_constant_fqns()}
        if used:
            model.load_constants(used, check_full_update=True, user_managed=True)
        functions[name] = partial(_boxed, model.loader, used, weights)
    return functions


def _index(device: Device) -> int:
    """As AOTInductor numbers devices: -1 stands for none, as on the CPU."""
    return device.number if device.is_gpu else -1


def _boxed(loader: Any, used: Mapping[str, Any], weights: _Weights, *tensors: Any) -> None:
    """Run a graph past the wrapper that reads its call signature every time; the weights stay alive with it.

    Autograd's kernels of collectives are Python. They leave tensors of Python with the threads that send, which need
    the interpreter to drop them, and the package holds it while it waits for those threads.
    """
    import torch

    with torch.inference_mode():
        loader.boxed_run(list(tensors))
