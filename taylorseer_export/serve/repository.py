"""A Triton model repository from a bundle: self-contained, versioned, and checked against Triton's own protobuf.

    <out>/<family>-<name>/             picture model, where the bundle can make one
        config.pbtxt
        1/model.py  1/bundle/…         a later bundle becomes version 2; Triton serves the newest
        1/loras/…                      what requests choose of
    <out>/<family>-<name>-stream/      the same, a response per step
    <out>/<family>-<name>-denoiser/    latents in, latents out
    <out>/<family>-<name>-denoiser-stream/

Every model is a process with its own engines and slots, and all of them are served, so write only those that are used.
Their copies of the bundle are hard links to one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taylorseer_export.bundle.atomic import aside, flush, sweep
from taylorseer_export.bundle.device import CPU, Device
from taylorseer_export.bundle.latents import refuse_several
from taylorseer_export.bundle.manifest import MANIFEST, Manifest
from taylorseer_export.bundle.memory import CONDITIONING_ROOM, request_bytes, size
from taylorseer_export.bundle.profile import PROFILES, profile_names, read_profile
from taylorseer_export.bundle.store import Bundle, open_bundle
from taylorseer_export.errors import ConfigError
from taylorseer_export.runtime.lora import file_and_scale
from taylorseer_export.runtime.tensors import latent_sizes
from taylorseer_export.serve import contract
from taylorseer_export.serve.loras import files_of

# Parameters of a picture model that clients read: what it draws, and which bundle it is of.
DESCRIPTION, BUNDLE = "description", "bundle"
MODELS = ("picture", "picture-stream", "denoiser", "denoiser-stream")
_ROOM = 4  # a slot takes requests of up to this many times the typical bytes, where no memory budget says otherwise


@dataclass(frozen=True)
class Deployment:
    """How a bundle is served.

    Attributes:
        device: Where to run; a GPU by its number is one of `gpus`.
        gpus: The GPUs that have instances, by the numbers that the server knows them by; all that it has if empty.
        models: Of `MODELS`; all that the bundle can be served as if empty.
        instances: Processes of every model, each with its own engines and slots; on a GPU so many for each of them.
        slots, queue, batch, workers: As in `Limits`, for each instance; `batch` 0 chooses by the device.
        threads: CPU threads of one engine call; 0 is one per core.
        memory_budget: Bytes of the weights, Taylor buffers and step tables of one instance; None for the usual room.
        conditioning_cache, warm: As in `Limits`, for each instance.
        loras: Name -> `FILE` or `FILE:SCALE`, of which requests choose one by their input `lora`.
    """

    device: Device = CPU
    gpus: tuple[int, ...] = ()
    models: tuple[str, ...] = ()
    instances: int = 1
    slots: int = 4
    queue: int = 64
    batch: int = 0
    workers: int = 0
    threads: int = 1
    memory_budget: int | None = None
    conditioning_cache: int = CONDITIONING_ROOM
    warm: Sequence[tuple[int, ...]] = ()
    loras: Mapping[str, str] = field(default_factory=dict)


def write_repository(folder: Path, out: Path, deployment: Deployment) -> list[Path]:
    """Write the models of a bundle into a repository, each whole or not at all.

    Args:
        folder: The bundle; every byte of it and of its profiles is checked.
        out: The repository; models of other bundles in it are left alone.
        deployment: How to serve it.

    Returns:
        The folder of every version written.

    Raises:
        BundleError: The bundle or a profile is missing or damaged.
        ConfigError: It cannot be served so, or a LoRA does not fit it.
    """
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    refuse_several(manifest, "Triton")
    for profile in profile_names(bundle):
        read_profile(bundle, profile)
    profiles, loras = profile_names(bundle), files_of(manifest, deployment.loras)
    configs = {name: config(manifest, name, deployment, profiles) for name in _models(manifest, deployment)}
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)  # what a killed process left would be taken for a model
    with aside(out / _model_name(manifest, "")) as partial:
        staged: list[Path] = []
        for name, text in configs.items():
            place = partial / _model_name(manifest, name)
            _copy(bundle, place / "1" / "bundle", staged[0] / "1" / "bundle" if staged else None)
            shutil.copyfile(Path(__file__).with_name("model.py"), place / "1" / "model.py")
            if loras:
                (place / "1" / "loras").mkdir()
            for lora, (path, _) in loras.items():
                shutil.copyfile(path, place / "1" / "loras" / f"{lora}.safetensors")
            (place / "config.pbtxt").write_text(text, encoding="utf-8")
            staged.append(place)
        flush(partial)
        return [_put(place, out / place.name) for place in staged]


def _put(staged: Path, model: Path) -> Path:
    """Put a model in its place, or its version beside those that are there; the folder of the version."""
    if not model.exists():
        staged.rename(model)
        return model / "1"
    versions = [int(path.name) for path in model.iterdir() if re.fullmatch("[0-9]+", path.name)]
    version = model / str(max(versions, default=0) + 1)
    (staged / "1").rename(version)
    (staged / "config.pbtxt").replace(model / "config.pbtxt")
    return version


def config(manifest: Manifest, model: str, deployment: Deployment, profiles: Sequence[str] = ()) -> str:
    """The `config.pbtxt` of one of `MODELS`, written and read back by Triton's own protobuf.

    Args:
        manifest: Of the bundle.
        model: Which of them.
        deployment: How to serve it.
        profiles: Names of those that the bundle has.

    Raises:
        ConfigError: tritonclient is not installed, or the deployment does not fit the bundle.
    """
    schema, text_format = _protobuf()
    role: contract.Role = "denoiser" if model.startswith("denoiser") else "picture"
    made = schema.ModelConfig(name=_model_name(manifest, model), backend="python", max_batch_size=0)
    streams = model.endswith("-stream")
    for ports, entries in (
        (contract.inputs(manifest, role, streams), made.input),
        (contract.outputs(manifest, role), made.output),
    ):
        for port in ports:
            entry = entries.add(name=port.name, data_type=_data_type(schema, port.datatype), dims=port.dims)
            if port.optional:
                entry.optional = True
    made.model_transaction_policy.decoupled = streams
    group = schema.ModelInstanceGroup
    kind = group.KIND_GPU if deployment.device.is_gpu else group.KIND_CPU
    made.instance_group.add(kind=kind, count=deployment.instances, gpus=_gpus(deployment))
    made.version_policy.latest.num_versions = 1
    for name, value in _options(manifest, role, deployment).items():
        made.parameters[name].string_value = value
    if role == "picture":  # for clients that hold no bundle
        told = contract.description(manifest, profiles, deployment.loras)
        made.parameters[DESCRIPTION].string_value = json.dumps(told)
        made.parameters[BUNDLE].string_value = hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()
    text: str = text_format.MessageToString(made)
    assert text_format.Parse(text, schema.ModelConfig()) == made, (
        "bug in taylorseer-export: config.pbtxt reads otherwise"
    )
    return text


def slot_bytes(manifest: Manifest, slots: int, budget: int | None) -> int:
    """Bytes that one slot may have.

        slot = (budget - weights) / slots

    Without a budget it is room for a request of four times the typical size.

    Raises:
        ConfigError: That is less than a request of the bundle's typical size needs.
    """
    sizes = {name: d.typical for name, d in manifest.dimensions.items()}
    branches = 2 if manifest.sampling.guidance == "branches" else 1  # of a guided request, each with a slot of its own
    typical = branches * request_bytes(manifest, sizes)
    if budget is None:
        return _ROOM * typical
    weights = sum(file.size for file in manifest.files.values())
    if (budget - weights) // slots < typical:
        raise ConfigError(
            f"--memory-budget is {size(budget)}, expected at least {size(weights + slots * typical)} "
            f"({size(weights)} of weights and {slots} slots of {size(typical)}); raise it, or lower --slots"
        )
    return (budget - weights) // slots


def _gpus(deployment: Deployment) -> tuple[int, ...]:
    """The GPUs that the server is to place instances on; none stands for all that it has.

    Raises:
        ConfigError: Some are named for the CPU, or twice.
    """
    device = deployment.device
    if deployment.gpus and not device.is_gpu:
        raise ConfigError(f"--gpus is given with --device {device}, expected it with --device cuda; leave one out")
    if deployment.gpus and device.index is not None:
        raise ConfigError(f"--gpus is given with --device {device}, expected one of them; leave one out")
    return deployment.gpus if device.index is None else (device.index,)


def _options(manifest: Manifest, role: contract.Role, deployment: Deployment) -> dict[str, str]:
    """What the model file reads: everything that is not Triton's own."""
    devices = manifest.engine.device.get("devices", "cpu").split()
    if deployment.device.kind not in devices:
        raise ConfigError(
            f"--device is {deployment.device}, expected one that the bundle was built for ({', '.join(devices)}); "
            "choose one of those, or export again"
        )
    shares = not deployment.device.is_gpu  # what gathering and scattering cost on a GPU was never measured
    if deployment.batch > 1 and not shares:
        raise ConfigError(
            f"--batch is {deployment.batch} on {deployment.device}, expected 1: engine calls are shared on the CPU "
            "alone; leave it out"
        )
    for pixels in deployment.warm:
        latent_sizes(manifest, pixels, "--warm")
    values: dict[str, Any] = {
        "role": role,
        "device": deployment.device.kind,
        "threads": deployment.threads,
        "slots": deployment.slots,
        "queue": deployment.queue,
        "batch": deployment.batch or (deployment.slots if shares else 1),
        "workers": deployment.workers,
        "slot_bytes": slot_bytes(manifest, deployment.slots, deployment.memory_budget),
        "conditioning_cache": deployment.conditioning_cache,
        "warm": " ".join("x".join(map(str, pixels)) for pixels in deployment.warm),
        "loras": json.dumps({name: file_and_scale(given)[1] for name, given in deployment.loras.items()}),
    }
    return {name: str(value) for name, value in values.items()}


def _models(manifest: Manifest, deployment: Deployment) -> list[str]:
    possible = [model for model in MODELS if model.removesuffix("-stream") in contract.roles(manifest)]
    for model in deployment.models:
        if model not in possible:
            raise ConfigError(
                f"--models has `{model}`, expected some of {', '.join(possible)}, which this bundle can be served as; "
                "leave it out"
            )
    return [model for model in possible if model in (deployment.models or possible)]


def _model_name(manifest: Manifest, model: str) -> str:
    suffix = model.replace("picture", "").lstrip("-")
    return f"{manifest.family}-{manifest.name}" + (f"-{suffix}" if suffix else "")


def _copy(bundle: Bundle, target: Path, twin: Path | None) -> None:
    """The files that the manifest lists and the profiles; a twin in the same repository is linked to, not copied."""
    for name in (*bundle.manifest.files, MANIFEST, *(f"{PROFILES}/{name}.json" for name in profile_names(bundle))):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if twin is not None:
            os.link(twin / name, target / name)
        else:
            shutil.copyfile(bundle.folder / name, target / name)


def _data_type(schema: Any, datatype: str) -> int:
    return int(schema.DataType.Value("TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"))


def _protobuf() -> tuple[Any, Any]:
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise ConfigError(
            "tritonclient is not installed, expected it for Triton's protobuf; pip install 'taylorseer-export[triton]'"
        ) from error
    return model_config_pb2, text_format
