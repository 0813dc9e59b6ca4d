"""Checkpoints: where a model's config and weights come from, read one tensor at a time.

Tracing needs shapes and no numbers, so a model is built as a skeleton of fake tensors; the weights travel later,
tensor by tensor, from the checkpoint's safetensors to the bundle. A 24 GB checkpoint costs one tensor of memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from taylorseer_export.errors import CheckpointError
from taylorseer_export.families.family import Family

EMBEDDED = "embedded"
_SINGLE = "diffusion_pytorch_model.safetensors"
_HASH_BLOCK = 1 << 22


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers checkpoint of one family.

    Attributes:
        reference: What the user named; `embedded` for the model that ships with this package.
        family: Its declaration.
        folder: The folder that holds config.json and the safetensors of the transformer.
        config: config.json without its private entries.
        files: Tensor name -> the safetensors file that holds it.
        weightless: Whether this is a config alone, which can be traced and described but not written.
    """

    reference: str
    family: Family
    folder: Path
    config: dict[str, Any]
    files: dict[str, Path]
    weightless: bool = False

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
        return _read_json(path) if path.is_file() else {}

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        """The scheduler's config that comes with the checkpoint, or nothing."""
        path = self.root / "scheduler" / "scheduler_config.json"
        return _read_json(path) if path.is_file() else {}

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
        from accelerate import init_empty_weights
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        try:
            with init_empty_weights(include_buffers=False):
                model: nn.Module = self.model_class.from_config(self.config).eval()
        except Exception as error:
            raise CheckpointError(
                f"{self.folder / 'config.json'} does not describe a {self.family.model_class} ({error}), expected its "
                "diffusers config; download the checkpoint again"
            ) from error
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
        for name, buffer in model.named_buffers():  # those computed by the model keep the dtype it gave them
            if name in self.files and buffer.is_floating_point():
                buffer.data = buffer.data.to(dtype)
        return model

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The real model with its weights, in eval mode; needs memory for all of it."""
        model: nn.Module = self.model_class.from_pretrained(self.folder, torch_dtype=dtype, local_files_only=True)
        return model.eval()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read from disk."""
        with safe_open(self.files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def sha256(self, progress: Callable[[int], object] | None = None) -> str:
        """Hash of the weight files, in name order; `progress` is called with the bytes just read."""
        digest = hashlib.sha256()
        for path in sorted(set(self.files.values())):
            with path.open("rb") as file:
                while block := file.read(_HASH_BLOCK):
                    digest.update(block)
                    if progress:
                        progress(len(block))
        return digest.hexdigest()

    def _check_tensors(self, model: nn.Module) -> None:
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        found = _shapes(self.files)
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


def open_checkpoint(reference: str | None, family: Family) -> Checkpoint:
    """Find a checkpoint: the embedded one (`None`), a diffusers folder, or a hub id.

    Raises:
        CheckpointError: Nothing is there, a file is missing or damaged, or it is another family's.
    """
    if reference is None:
        folder = Path(__file__).parent.parent / "assets" / family.name
        if not folder.is_dir():
            raise CheckpointError(
                f"family {family.name} has no embedded model, expected --model; "
                f"pass a diffusers folder or a hub id like {family.reference}"
            )
        return _open_folder(EMBEDDED, family, folder)
    path = Path(reference).expanduser()
    if path.exists():
        return _open_folder(reference, family, path)
    if reference.count("/") != 1 or reference.startswith((".", "/", "~")):
        raise CheckpointError(
            f"--model is {reference}, expected an existing diffusers folder or a hub id like {family.reference}; "
            "check the path"
        )
    return _open_folder(reference, family, _download(reference, family))


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


def _open_folder(reference: str, family: Family, folder: Path) -> Checkpoint:
    folder = folder / "transformer" if (folder / "transformer" / "config.json").exists() else folder
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json, expected a diffusers folder of a {family.model_class}; check --model"
        )
    config = _read_json(folder / "config.json")
    name = config.get("_class_name", family.model_class)
    if name != family.model_class:
        raise CheckpointError(
            f"{folder / 'config.json'} is of class {name}, expected {family.model_class} for family {family.name}; "
            "check --model and the family"
        )
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    return Checkpoint(reference, family, folder, config, _tensor_files(folder))


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, for a single file or a sharded checkpoint.

    The names that diffusers writes come first; a folder may hold variants such as `.fp16.safetensors` beside them.
    """
    index, single = folder / f"{_SINGLE}.index.json", folder / _SINGLE
    if not index.is_file() and not single.is_file():
        indices, singles = sorted(folder.glob("*.safetensors.index.json")), sorted(folder.glob("*.safetensors"))
        if len(indices) != 1 and len(singles) != 1:
            raise CheckpointError(
                f"{folder} has {len(singles)} safetensors files and {len(indices) or 'no'} index, expected {_SINGLE} "
                "or shards with an index.json; download the checkpoint again"
            )
        index, single = (indices[0], single) if len(indices) == 1 else (index, singles[0])
    if not index.is_file():
        return dict.fromkeys(_names(single), single)
    files = {str(name): folder / str(file) for name, file in dict(_read_json(index).get("weight_map", {})).items()}
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise CheckpointError(
                f"shard {path} is missing, expected every file that {index.name} lists; download it again"
            )
    return files


def _shapes(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, from the headers alone; a tensor that its file does not hold is left out."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(set(files.values())):
        wanted = {name for name, file in files.items() if file == path}
        with _opened(path) as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in wanted & set(file.keys())}
    return shapes


def _names(path: Path) -> tuple[str, ...]:
    with _opened(path) as file:
        return tuple(file.keys())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}), expected a complete safetensors file; download it again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} is not readable JSON ({error}), expected a diffusers config; download it again"
        ) from error
    return value
