"""A checkpoint once it is found: the model's config and weights under diffusers' names, read one tensor at a time.

Tracing needs shapes and no numbers, so a model is built as a skeleton of fake tensors; the weights travel later,
tensor by tensor, from the checkpoint's safetensors to the bundle. A 24 GB checkpoint costs one tensor of memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from taylorseer_export.checkpoint.files import Header, headers, opened, read_json
from taylorseer_export.checkpoint.formats import FLOATS
from taylorseer_export.checkpoint.gguf import GgufTensor
from taylorseer_export.checkpoint.lora import Lora
from taylorseer_export.checkpoint.original import Converted, Unread
from taylorseer_export.checkpoint.packed import Packed, is_fp8
from taylorseer_export.checkpoint.quantised import Quantised, joined
from taylorseer_export.errors import CheckpointError
from taylorseer_export.families.family import Derived, Family

EMBEDDED = "embedded"
_HASH_BLOCK = 1 << 22
_CASTS = {  # dtype of a cast without scales, by its name in safetensors -> what a reader would call it
    "F8_E4M3": "plain float8_e4m3fn",
    "F8_E5M2": "plain float8_e5m2",
    "F8_E4M3FNUZ": "plain float8_e4m3fnuz",
    "F8_E5M2FNUZ": "plain float8_e5m2fnuz",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of one family, under diffusers' tensor names.

    Attributes:
        reference: What the user named; `embedded` for the model that ships with this package.
        family: Its declaration.
        folder: The folder that holds the safetensors of the transformer.
        config: config.json without its private entries.
        files: Tensor name in the files -> the file that holds it, of all weights; `packed` has their scales.
        weightless: Whether this is a config alone, which can be traced and described but not written.
        variant: Which of several precisions in the folder, as diffusers names its files.
        config_file: Where the config was read from, if not from the folder.
        converted: How the tensors of another layout become those of diffusers.
        taken: The published models of this package whose config was taken, since the tensors fit it and no other.
        loras: What is added to the weights, in this order.
        lora_skip: What of them is left out on purpose.
        aside: Other parts of the pipeline that the files hold and that are not read -> their number of tensors.
        packed: Tensor name in the files -> where it lies and how, of those in a quantised format and of all of GGUF.
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
    lora_skip: tuple[str, ...] = ()
    aside: Mapping[str, int] = field(default_factory=dict)
    packed: Mapping[str, Packed | GgufTensor] = field(default_factory=dict)

    @property
    def embedded(self) -> bool:
        return self.reference == EMBEDDED

    @property
    def root(self) -> Path:
        """The pipeline folder: beside `transformer/` lie `scheduler/` and the other components."""
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

    @cached_property
    def guider(self) -> dict[str, Any]:
        """The config of what a pipeline guides with, where that is a component of it, or nothing."""
        path = self.root / "guider" / "guider_config.json"
        return read_json(path) if path.is_file() else {}

    @property
    def latent_scale(self) -> int:
        """Pixels per latent pixel along each side: what the VAE beside it makes, else what the published models' do."""
        return int(self.card.get("latent_scale") or self._scale_of_vae() or self.family.latent_scale)

    def _scale_of_vae(self) -> int | None:
        """Where its config says it, by the rule of diffusers' pipelines: each level but the last halves the sides."""
        path = self.root / "vae" / "config.json"
        config = read_json(path) if path.is_file() else {}
        levels, ratio = config.get("block_out_channels"), config.get("spatial_compression_ratio")
        return ratio or (2 ** (len(levels) - 1) if isinstance(levels, list) and levels else None)

    @property
    def latent_size(self) -> tuple[int, ...]:
        """The size of the latent that estimates are quoted at: (height, width), or (frames, height, width)."""
        size = self.card.get("latent_size") or self.config.get("sample_size") or self.family.latent_size
        sizes = [*self.family.latent_size[:-2], size, size] if isinstance(size, int) else size
        count = len(self.family.latent_size)
        if (
            not isinstance(sizes, list | tuple)
            or len(sizes) != count
            or any(type(s) is not int or s < 1 for s in sizes)
        ):
            raise CheckpointError(
                f"sample_size of {self.config_file or self.folder / 'config.json'} is {str(size)[:40]}, expected "
                f"{count} whole numbers (latent pixels); correct it or remove it"
            )
        return tuple(sizes)

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
            model = self.empty_model()
        if not self.weightless:
            self.check_tensors(model)
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
    def headers(self) -> dict[str, Header]:
        """Tensor name in the files -> shape and dtype, of those in a quantised format once they are dequantised."""
        plain = {name: path for name, path in self.files.items() if name not in self.packed}
        return headers(plain) | {name: one.header for name, one in self.packed.items() if name in self.files}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape, of all that the checkpoint has."""
        if self.converted is not None:
            return self.converted.shapes
        return {name: header.shape for name, header in self.headers.items()}

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The real model with its weights, in eval mode; needs memory for all of it."""
        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # of what the model computes when it is built
        try:
            model = self.empty_model()
        finally:
            torch.set_default_dtype(usual)
        self.check_tensors(model)
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

    def quantised(self, name: str) -> Quantised | None:
        """One tensor in the quantised format that the files have it in, by its name in diffusers, cut and joined.

        None where they hold numbers that need no scales, or where the tensor cannot be kept as it is: an update is
        added to it, its conversion does more than cut and join rows, the parts of it differ in format or in a scale
        of the whole tensor, or the format is one that no engine takes (GGUF, ConvRot).
        """
        if name in self.derived or any(name in lora.updates for lora in self.loras):
            return None
        if self.converted is None:
            return self._kept(name)
        if not self.converted.along_rows(name):
            return None
        parts = {source: self._kept(source) for source in sorted(self.converted.sources[name])}
        kept = {source: part for source, part in parts.items() if part is not None}
        return joined(kept, partial(self.converted.tensor, name)) if len(kept) == len(parts) else None

    def _kept(self, name: str) -> Quantised | None:
        """One tensor of the files as it is; a plain cast to fp8 has a scale of 1."""
        if name in self.packed:
            return self.packed[name].kept()
        return Quantised("fp8", self._read(name), torch.ones(())) if is_fp8(self.headers[name].dtype) else None

    def said_of_formats(self, precision: str) -> str | None:
        """One sentence on the formats of weights that are not numbers of the usual precisions; None without any.

        Args:
            precision: What the export makes of them.
        """
        found: dict[str, int] = {}
        for name, header in self.headers.items():
            packed = self.packed.get(name)
            label = packed.label if packed else _CASTS.get(header.dtype, "")
            found |= {label: found.get(label, 0) + 1} if label else {}
        if not found:
            return None
        total = len(self.files)
        parts = " and ".join(f"{label}, {count} of {total} tensors" for label, count in sorted(found.items()))
        how = "cast" if found.keys() <= {*_CASTS.values()} else "dequantised"
        return f"weights: {parts}, {how} to {precision}"

    def sha256(self, progress: Callable[[int], object] | None = None) -> str:
        """Hash of the weight files, in name order, and of the LoRAs; `progress` is called with the bytes just read."""
        digest = hashlib.sha256()
        files = set(self.files.values()).union(*(one.paths for one in self.packed.values()))
        for path in (*sorted(files), *(lora.path for lora in self.loras)):
            with path.open("rb") as file:
                while block := file.read(_HASH_BLOCK):
                    digest.update(block)
                    if progress:
                        progress(len(block))
        if self.loras:
            digest.update(repr([lora.scale for lora in self.loras]).encode())
        return digest.hexdigest()

    def _read(self, name: str) -> torch.Tensor:
        if name in self.packed:
            return self.packed[name].dequantised()
        with opened(self.files[name], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def empty_model(self) -> nn.Module:
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

    def check_tensors(self, model: nn.Module) -> None:
        expected = model.state_dict()
        found = self.shapes
        differences = [f"`{n}` is missing" for n in expected if n not in found]
        strangers = [f"`{n}` is not known" for n in found if n not in expected]
        others = [
            f"`{n}` is {list(found[n])}, expected {list(value.shape)}"
            for n, value in expected.items()
            if n in found and found[n] != tuple(value.shape)
        ]
        others += [
            f"`{n}` is {kinds}, expected floating point"
            for n, value in expected.items()
            if n in found and value.is_floating_point() and (kinds := " and ".join(sorted(self._dtypes(n) - FLOATS)))
        ]
        differences += [*strangers, *others]
        if differences:
            shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
            kind = Unread if len(differences) == len(strangers) else CheckpointError
            raise kind(
                f"checkpoint {self.folder} has {len(differences)} tensors that do not fit its config ({shown}), "
                f"expected those of {self.family.model_class}; check --model and the family"
            )

    def _dtypes(self, name: str) -> set[str]:
        """The dtypes of what makes a tensor, by their names in safetensors."""
        sources = {name} if self.converted is None else self.converted.sources[name]
        return {self.headers[source].dtype for source in sources}


def _kept_in_float32(model: nn.Module, name: str) -> bool:
    """Whether diffusers loads this parameter in float32 whatever the precision of the rest."""
    kept: Sequence[str] = getattr(model, "_keep_in_fp32_modules", None) or ()
    return any(part in kept for part in name.split("."))
