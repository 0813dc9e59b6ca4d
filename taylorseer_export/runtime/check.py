"""The check at load: what the engines write on typical inputs is finite and in range, before anyone relies on it.

Weights that overflow float16, a build that went wrong, buffers bound to the wrong names: an engine with such a fault
loads and runs. Two steps show it. On the CPU they are of the smallest sizes that the bundle takes, which cost little
beside reading the weights once; on a GPU of its typical sizes, whose kernels the first request then finds made.

Shapes: B batch, S steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from taylorseer_export.bundle.device import CPU, Device
from taylorseer_export.bundle.manifest import GraphName, Tensor
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.errors import BundleError
from taylorseer_export.method import Forecasts, Guard, Plan
from taylorseer_export.runtime.adapter import Adapter
from taylorseer_export.runtime.contract import Contract
from taylorseer_export.runtime.places import value_from_fill
from taylorseer_export.runtime.runner import Buffer, Runner
from taylorseer_export.runtime.slot import Slot

_ANY_ERROR = 1e30  # a threshold that every error is under
# Largest finite value. What stands there was cut off: no sound computation ends on it.
_LARGEST = {"float16": 65504.0, "bfloat16": (2 - 2.0**-7) * 2.0**127, "float32": (2 - 2.0**-23) * 2.0**127}


def check_engines(
    contract: Contract, runner: Runner, device: Device = CPU, seed: int = 0, lora: Adapter | None = None
) -> None:
    """Run a full step, and a forecast step that repeats it, and look at every tensor that the graphs write.

        |value| < largest finite value of its dtype,        |forecast - full| <= max |full|

    The forecast step reuses the features of the full step on the same latents and timestep, so it would give the same
    prediction if nothing were rounded. Off by as much as the prediction itself, it did not read what was written.
    Tensors that are constant for a request may hold infinities, as attention masks do, and no NaN.

    Args:
        contract, runner: Of the loaded bundle.
        device: Where its engines are.
        seed: Of the inputs: latents and conditioning of unit variance, and the timestep in the middle.
        lora: What its requests get that bring none.

    Raises:
        BundleError: Names graph and tensor, and says what was seen.
    """
    manifest = contract.manifest
    end = "typical" if device.is_gpu else "minimum"
    sizes = {name: getattr(d, end) for name, d in manifest.dimensions.items()}
    generator = np.random.default_rng(seed)
    conditioning = random_constants(contract, sizes, generator)
    latents, *beside = (
        generator.standard_normal(resolve(tensor.shape, sizes)).astype(np.float32)
        for tensor in (contract.latent, *contract.others.values())
    )
    others = dict(zip(contract.others, beside, strict=True))
    # Schedulers of diffusers count timesteps from 1000 where their config does not say otherwise.
    last = manifest.sampling.config.get("num_train_timesteps") or 1000
    middle = last / 2 / manifest.sampling.timestep_divisor
    slot = Slot(contract, runner, contract.sizes(latents.shape, conditioning), lora)
    guards = [None, *(Guard(rule, _ANY_ERROR) for rule in manifest.state.guards[:1])]
    # Known ahead, the next timesteps of both would differ.
    ahead = np.full(2, middle, np.float32) if contract.next_timestep is None else None
    for guard in guards:
        slot.start(conditioning, Forecasts(Plan("F."), 0, guard=guard), ahead)
        _check_two_steps(contract, slot, latents, others, middle if ahead is None else None)


def _check_two_steps(
    contract: Contract, slot: Slot, latents: np.ndarray, others: Mapping[str, np.ndarray], timestep: float | None
) -> None:
    manifest = contract.manifest
    prepared = {tensor.name for tensor in manifest.graphs["prepare"].outputs}
    predictions = []
    for _ in range(2):
        slot.stage(latents, timestep, others=others, next_timestep=timestep)
        graph = slot.graph
        tensors = manifest.graphs[graph]
        read = [(tensor, slot.source(tensor)) for tensor in tensors.inputs if tensor.name in prepared]
        written = [(tensor, slot.target(tensor)) for tensor in tensors.outputs]
        for tensor, buffer in read:
            _check(contract, "prepare", tensor, buffer)
        slot.run()
        for tensor, buffer in written:
            _check(contract, graph, tensor, buffer)
        predictions.append([value.astype(np.float64) for value in (slot.finish(), *slot.others.values())])
    for name, full, forecast in zip(contract.predictions.values(), *predictions, strict=True):
        off, most = np.abs(forecast - full).max(), np.abs(full).max()
        if off >= most and off > 0:
            raise BundleError(
                f"output `{name}` of graph `forecast` is off by {off:.3g} where it repeats a full step of up to "
                f"{most:.3g}, expected the same up to rounding; export again with `{manifest.command()}`, and report "
                "it if it stays"
            )


def random_constants(
    contract: Contract, sizes: Mapping[str, int], generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """Constant inputs of these sizes: places of tokens in order, labels and embeddings of unit variance at random."""
    made = {}
    for name, tensor in contract.constants.items():
        shape, value = resolve(tensor.shape, sizes), value_from_fill(tensor, sizes)
        if value is None and tensor.dtype == "int64":
            low = tensor.values[0] if tensor.values else 0
            value = generator.integers(low, low + 2, shape)
        made[name] = generator.standard_normal(shape).astype(np.float32) if value is None else value
    return made


def _check(contract: Contract, graph: GraphName, tensor: Tensor, buffer: Buffer) -> None:
    """Refuse values that are no numbers, or that stand at the end of their dtype's range."""
    if tensor.dtype not in _LARGEST:
        return
    values = np.abs(buffer.read().astype(np.float64))
    bad = np.isnan(values) if tensor.role == "constant" else ~(values < _LARGEST[tensor.dtype])
    if not bad.any():
        return
    manifest = contract.manifest
    finite = values[np.isfinite(values)]
    largest = f", the others up to {finite.max():.3g}" if finite.size else ""
    fix = (
        f"export again with `{manifest.command(precision='bf16')}`, whose range is wider"
        if manifest.precision == "fp16"
        else f"check the weights of {manifest.model.reference}, and export again with `{manifest.command()}`"
    )
    raise BundleError(
        f"output `{tensor.name}` of graph `{graph}` has {int(bad.sum())} of {bad.size} values that are NaN, infinite "
        f"or cut off on typical inputs{largest}, expected numbers below {_LARGEST[tensor.dtype]:.3g} "
        f"({tensor.dtype}); {fix}"
    )
