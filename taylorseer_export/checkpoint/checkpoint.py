"""Checkpoints: where a model's config and weights come from, read one tensor at a time.

Tracing needs shapes and no numbers, so a model is built as a skeleton of fake tensors; the weights travel later,
tensor by tensor, from the checkpoint's safetensors to the bundle. A 24 GB checkpoint costs one tensor of memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from taylorseer_export.checkpoint.files import (
    PUBLISHED,
    opened,
    published,
    read_json,
    shapes,
    tensor_files,
    tensor_names,
)
from taylorseer_export.checkpoint.lora import Lora, open_lora
from taylorseer_export.checkpoint.original import Converted
from taylorseer_export.errors import CheckpointError
from taylorseer_export.families.family import Derived, Family, unknown

EMBEDDED = "embedded"
_HASH_BLOCK = 1 << 22


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of one family, under diffusers' tensor names.

    Attributes:
        reference: What the user named; `embedded` for the model that ships with this package.
        family: Its declaration.
        folder: The folder that holds the safetensors of the transformer.
        config: config.json without its private entries.
        files: Tensor name in the files -> the safetensors file that holds it.
        weightless: Whether this is a config alone, which can be traced and described but not written.
        variant: Which of several precisions in the folder, as diffusers names its files.
        config_file: Where the config was read from, if not from the folder.
        converted: How the tensors of another layout become those of diffusers.
        taken: The published models of this package whose config was taken, since the tensors fit it and no other.
        loras: What is added to the weights, in this order.
    """

    reference: str
    family: Family
    folder: Path
    config: dict[str, Any]
    files: dict[str, Path]
    weightless: bool = False
    variant: str | None = None
    config_file: str | None = None
    converted: Converted | None = None
    taken: tuple[str, ...] = ()
    loras: tuple[Lora, ...] = ()

    @property
    def embedded(self) -> bool:
        return self.reference == EMBEDDED

    @property
    def root(self) -> Path:
        """The pipeline folder: beside `transformer/` lie `scheduler/` and, for embedded models, `text/`."""
        return self.folder.parent if self.folder.name == "transformer" else self.folder

    @cached_property
    def card(self) -> dict[str, Any]:
        """What an embedded model says of itself; empty for any other."""
        path = self.root / "card.json"
        return read_json(path) if path.is_file() else {}

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        """The scheduler's config that comes with the checkpoint, or nothing."""
        path = self.root / "scheduler" / "scheduler_config.json"
        return read_json(path) if path.is_file() else {}

    @property
    def latent_scale(self) -> int:
        """Pixels per latent pixel along each side."""
        return int(self.card.get("latent_scale", self.family.latent_scale))

    @property
    def latent_size(self) -> tuple[int, ...]:
        """The size of the latent that estimates are quoted at: (height, width), or (frames, height, width)."""
        size = self.card.get("latent_size") or self.config.get("sample_size") or self.family.latent_size
        return (size, size) if isinstance(size, int) else tuple(int(s) for s in size)

    @cached_property
    def model_class(self) -> Any:
        import diffusers

        return getattr(diffusers, self.family.model_class)

    def skeleton(self, dtype: torch.dtype) -> nn.Module:
        """The model in eval mode with fake weights of `dtype`: it has every shape and no number.

        Raises:
            CheckpointError: The config does not build this class, or the tensors of the files do not fit it.
        """
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        with self.family.built(self.model_class):
            model = self._empty_model()
        if not self.weightless:
            self._check_tensors(model)
        fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        for path, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    kept = _kept_in_float32(model, f"{path}.{name}")
                    kind = dtype if parameter.is_floating_point() and not kept else parameter.dtype
                    with fake:
                        module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=kind), False)
            for name, buffer in module._buffers.items():  # those computed by the model keep the dtype it gave them
                if buffer is not None and buffer.is_floating_point() and f"{path}.{name}" in self.shapes:
                    module._buffers[name] = buffer.to(dtype)
        for name, part in self.derived.items():
            owner, _, leaf = name.rpartition(".")
            with fake:
                model.get_submodule(owner).register_buffer(leaf, torch.empty(part.shape, dtype=dtype))
        return model

    @cached_property
    def derived(self) -> Mapping[str, Derived]:
        """What the graphs read in the place of larger tensors, by name."""
        return self.family.derived(self.config)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape, of all that the checkpoint has."""
        return shapes(self.files) if self.converted is None else self.converted.shapes

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The real model with its weights, in eval mode; needs memory for all of it."""
        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # of what the model computes when it is built
        try:
            model = self._empty_model()
        finally:
            torch.set_default_dtype(usual)
        self._check_tensors(model)
        state = {}
        for name in self.shapes:
            value = self.tensor(name)
            kind = torch.float32 if _kept_in_float32(model, name) else dtype
            state[name] = value.to(kind) if value.is_floating_point() else value
        model.load_state_dict(state, assign=True)
        return model

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read from disk, converted and with its updates added, or derived from one."""
        if name in self.derived:
            made: torch.Tensor = self.derived[name].make(self.tensor(self.derived[name].source))
            return made
        tensor = self._read(name) if self.converted is None else self.converted.tensor(name, self._read)
        for lora in self.loras:
            tensor = lora.add_to(name, tensor)
        return tensor

    def sha256(self, progress: Callable[[int], object] | None = None) -> str:
        """Hash of the weight files, in name order, and of the LoRAs; `progress` is called with the bytes just read."""
        digest = hashlib.sha256()
        for path in (*sorted(set(self.files.values())), *(lora.path for lora in self.loras)):
            with path.open("rb") as file:
                while block := file.read(_HASH_BLOCK):
                    digest.update(block)
                    if progress:
                        progress(len(block))
        if self.loras:
            digest.update(repr([lora.scale for lora in self.loras]).encode())
        return digest.hexdigest()

    def _read(self, name: str) -> torch.Tensor:
        with opened(self.files[name], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def _empty_model(self) -> nn.Module:
        """The model in eval mode, its parameters without numbers and its computed buffers with them."""
        from accelerate import init_empty_weights

        try:
            with init_empty_weights(include_buffers=False):
                model: nn.Module = self.model_class.from_config(self.config)
        except Exception as error:
            raise CheckpointError(
                f"{self.config_file or self.folder / 'config.json'} does not describe a {self.family.model_class} "
                f"({error}), expected its diffusers config; download the checkpoint again"
            ) from error
        return model.eval()

    def _check_tensors(self, model: nn.Module) -> None:
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        found = self.shapes
        differences = [f"`{n}` is missing" for n in expected if n not in found]
        differences += [f"`{n}` is not known" for n in found if n not in expected]
        differences += [
            f"`{n}` is {list(found[n])}, expected {list(shape)}"
            for n, shape in expected.items()
            if n in found and found[n] != shape
        ]
        if differences:
            shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
            raise CheckpointError(
                f"checkpoint {self.folder} has {len(differences)} tensors that do not fit its config ({shown}), "
                f"expected those of {self.family.model_class}; check --model and the family"
            )


def _kept_in_float32(model: nn.Module, name: str) -> bool:
    """Whether diffusers loads this parameter in float32 whatever the precision of the rest."""
    kept: Sequence[str] = getattr(model, "_keep_in_fp32_modules", None) or ()
    return any(part in kept for part in name.split("."))


def open_checkpoint(
    reference: str | None,
    family: Family,
    variant: str | None = None,
    config: str | None = None,
    loras: Sequence[str] = (),
    weightless: bool = False,
) -> Checkpoint:
    """Find a checkpoint, whatever its layout.

    Args:
        reference: A diffusers folder, a hub id, a safetensors file or an original folder; None for the embedded model.
        family: What it must be a checkpoint of.
        variant: Which of several precisions the folder holds, like `fp16`.
        config: The transformer's config.json, a folder with one, or a published model by name, where none lies beside
            the weights.
        loras: Files to be added to the weights, each as `file` or `file:scale`.
        weightless: Whether a config alone will do, a config.json or a folder with one, to be described and not written.

    Raises:
        CheckpointError: Nothing is there, a file is missing or damaged, or it is another family's.
    """
    if reference is None:
        folder = Path(__file__).parent.parent / "assets" / family.name
        if variant or config:
            raise CheckpointError("--variant or --config is given without --model, expected it too; add --model")
        if not folder.is_dir():
            raise CheckpointError(
                f"family {family.name} has no embedded model, expected --model; "
                f"pass a diffusers folder or a hub id like {family.reference}"
            )
        checkpoint = _open_folder(EMBEDDED, family, folder)
    else:
        alone = _config_alone(Path(reference).expanduser())
        if alone is not None and not weightless:
            raise CheckpointError(
                f"--model is {reference}, a config without weights, expected both; add --dry-run to see its card, or "
                "download the weights"
            )
        if alone is None:
            checkpoint = _open_named(reference, family, variant, config)
        else:
            checkpoint = Checkpoint(reference, family, alone.parent, _config(alone, family), {}, weightless=True)
    known = checkpoint.shapes if loras else {}
    family = family if checkpoint.embedded else family.variant(checkpoint.reference)
    return replace(checkpoint, family=family, loras=tuple(open_lora(lora, family.lora_loader, known) for lora in loras))


def _config_alone(path: Path) -> Path | None:
    """The config.json that a path is or holds without any weights beside it, or None."""
    if path.is_file():
        return path if path.suffix == ".json" else None
    folder = path / "transformer" if (path / "transformer" / "config.json").is_file() else path
    lonely = (folder / "config.json").is_file() and not any(folder.glob("*.safetensors*"))
    return folder / "config.json" if lonely else None


def open_config(reference: str) -> Checkpoint:
    """A transformer of any class in diffusers by its config alone: it can be traced and described, not written.

    Raises:
        CheckpointError: There is no config.json, or its class is none of diffusers'.
    """
    import diffusers

    folder = Path(reference).expanduser()
    candidates = (folder / "transformer" / "config.json", folder / "config.json", folder)
    path = next((file for file in candidates if file.is_file()), candidates[1])
    entries = read_json(path)
    name = str(entries.get("_class_name"))
    if not hasattr(diffusers, name):
        raise CheckpointError(
            f"{path} is of class {name}, expected a transformer of diffusers {diffusers.__version__}; check the path"
        )
    config = {key: value for key, value in entries.items() if not key.startswith("_")}
    return Checkpoint(reference, unknown(name), path.parent, config, {}, weightless=True)


def _open_named(reference: str, family: Family, variant: str | None, config: str | None) -> Checkpoint:
    path = Path(reference).expanduser()
    if path.is_file():
        return _open_file(reference, family, path, config, variant)
    if path.exists():
        return _open_folder(reference, family, path, variant, config)
    if reference.count("/") != 1 or reference.startswith((".", "/", "~")):
        raise CheckpointError(
            f"--model is {reference}, expected an existing diffusers folder or a hub id like {family.reference}; "
            "check the path"
        )
    return _open_folder(reference, family, _download(reference, family), variant, config)


def _download(reference: str, family: Family) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = ["transformer/*", "scheduler/*", "model_index.json", "vae/config.json"]
        return Path(snapshot_download(reference, allow_patterns=patterns))
    except Exception as error:
        raise CheckpointError(
            f"hub id {reference} could not be fetched ({type(error).__name__}), expected a repository you can reach; "
            f"log in with `hf auth login`, or download it and pass the folder"
        ) from error


def _open_folder(
    reference: str, family: Family, folder: Path, variant: str | None = None, config: str | None = None
) -> Checkpoint:
    folder = folder / "transformer" if (folder / "transformer" / "config.json").exists() else folder
    if config is not None:
        return _other_layout(reference, family, folder, tensor_files(folder, variant), config, variant)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json, expected a diffusers folder of a {family.model_class}; check --model, "
            "or pass the config of an original layout with --config"
        )
    entries = _config(folder / "config.json", family)
    return Checkpoint(reference, family, folder, entries, tensor_files(folder, variant), variant=variant)


def _open_file(reference: str, family: Family, path: Path, config: str | None, variant: str | None) -> Checkpoint:
    if variant is not None:
        raise CheckpointError(f"--variant is {variant} for one file, expected a folder of several; leave it out")
    files = dict.fromkeys(tensor_names(path), path)
    if config is not None:
        return _other_layout(reference, family, path.parent, files, config, None)
    fitting = _fitting(reference, family, path.parent, files)
    if len(fitting) == 1:
        return fitting[0]
    names = " and ".join("/".join(found.taken) for found in fitting)
    known = ", ".join(file.stem for file in published(family.model_class)) or "the models of this package"
    seen = f"fit those of {names}" if fitting else f"are those of none of {known}"
    raise CheckpointError(
        f"{path} has no config and its tensors {seen}, expected --config with it; pass "
        f"{'one of those names, or ' * bool(fitting)}the config.json of {family.reference}'s transformer or its like"
    )


def _fitting(reference: str, family: Family, folder: Path, files: dict[str, Path]) -> list[Checkpoint]:
    """The checkpoint under each config of a published model whose every tensor, in name and shape, the files have."""
    found: dict[str, Checkpoint] = {}
    for path in published(family.model_class):
        try:
            one = _other_layout(reference, family, folder, files, str(path), None)
            with family.built(one.model_class):
                one._check_tensors(one._empty_model())
        except CheckpointError:
            continue
        same = json.dumps(one.config, sort_keys=True)
        taken = (*found[same].taken, path.stem) if same in found else (path.stem,)
        found[same] = replace(one, config_file=None, taken=taken)
    return list(found.values())


def _other_layout(
    reference: str, family: Family, folder: Path, files: dict[str, Path], config: str, variant: str | None
) -> Checkpoint:
    """Weights whose config lies elsewhere: in diffusers' layout already, or to be converted to it."""
    path = Path(config).expanduser()
    candidates = (path, path / "config.json", path / "transformer" / "config.json", PUBLISHED / f"{config}.json")
    entries = _config(next((candidate for candidate in candidates if candidate.is_file()), path), family)
    found = Checkpoint(reference, family, folder, entries, files, variant=variant, config_file=str(config))
    with family.built(found.model_class):
        expected = found._empty_model().state_dict().keys()
    if 2 * len(expected & files.keys()) >= len(expected):
        return found
    return replace(found, converted=Converted(family.model_class, entries, found.shapes))


def _config(path: Path, family: Family) -> dict[str, Any]:
    """The entries of a config without the private ones."""
    config = read_json(path)
    name = config.get("_class_name", family.model_class)
    if name != family.model_class:
        raise CheckpointError(
            f"{path} is of class {name}, expected {family.model_class} for family {family.name}; "
            "check --model and the family"
        )
    return {key: value for key, value in config.items() if not key.startswith("_")}
