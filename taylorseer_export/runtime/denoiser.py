"""The denoiser: the engines of one bundle, checked, loaded, and ready to serve requests through slots."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from taylorseer_export.bundle.device import CPU, Device
from taylorseer_export.bundle.manifest import Manifest, PartName
from taylorseer_export.bundle.profile import Profiles
from taylorseer_export.bundle.store import Bundle, Progress, open_bundle
from taylorseer_export.errors import BundleError, first_line
from taylorseer_export.method import Forecasts, RequestOptions, forecasts_from_options
from taylorseer_export.runtime.adapter import Adapter, adapter
from taylorseer_export.runtime.check import check_engines
from taylorseer_export.runtime.contract import Contract, lora_input
from taylorseer_export.runtime.decoding import Decoder, open_decoder
from taylorseer_export.runtime.engines import open_runner
from taylorseer_export.runtime.frames import FrameEncoder, open_picture_encoder
from taylorseer_export.runtime.group import Group, together
from taylorseer_export.runtime.guidance import GuidedShare, check_branches
from taylorseer_export.runtime.lora import Merged, merged
from taylorseer_export.runtime.parts import Encoder, Part, open_part
from taylorseer_export.runtime.runner import Runner
from taylorseer_export.runtime.share import Share, check_ranks, ranks_of
from taylorseer_export.runtime.slot import Slot
from taylorseer_export.runtime.whole import WholeSlot

if TYPE_CHECKING:
    from taylorseer_export.runtime.dropin import DropIn


def load(
    folder: str | Path | Bundle,
    device: str | Device = CPU,
    threads: int = 0,
    progress: Progress | None = None,
    cuda_graphs: bool = True,
    check: bool = True,
    devices: Mapping[PartName, str | Device] | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    group: object = None,
    guidance: bool = False,
) -> Denoiser:
    """Check a bundle, load its engines, and check what they compute.

    Args:
        folder: The bundle; one that is open is not checked byte by byte again.
        device: `cpu`, `cuda` or `cuda:N`. Without a number it is torch's current GPU, for ONNX Runtime the first.
        threads: CPU threads of each engine; 0 leaves it to the engine.
        progress: Called with the bytes just checked.
        cuda_graphs: Whether calls on a GPU are replayed as CUDA graphs.
        check: Whether two steps on typical inputs show that the engines are sound; see `check_engines`. Left out, what
            overflows is first seen in a picture.
        devices: Where parts of the pipeline run that are not to run where the denoiser does, by name. They are loaded
            when they are first asked for.
        lora: LoRAs that are added to the weights of this load, `FILE` or `FILE:SCALE`, under diffusers' names; see
            `lora.py`; with low-rank inputs those that requests get which bring none, see `adapter.py`. A profile stays
            what it was calibrated without them.
        group: The ranks that run a bundle which is shared out, all of which load it at the same time: a `Group`, or a
            process group of torch.distributed. Left out, those that torchrun started. See `following.py` for rank 0
            with the others following; slots and the drop-in are called alike on all ranks.
        guidance: Whether each half of the ranks runs one branch of guidance; see `guidance.py`.

    Raises:
        BundleError: The bundle is missing, damaged, too new, not for this machine, or its engines overflow.
        ConfigError: The device is none, or a GPU that is not here; or a LoRA does not fit the bundle or its engines.
    """
    asked = Device.parse(device)
    bundle = folder if isinstance(folder, Bundle) else open_bundle(Path(folder), progress)
    ranks = ranks_of(bundle.manifest, group, asked, guidance)
    if guidance:
        check_branches(bundle.manifest, ranks)
    else:
        check_ranks(bundle.manifest, ranks)
    if ranks is not None:
        ranks.agree({"bundle": hashlib.sha256(bundle.manifest.to_json()).hexdigest()})
    given = (lora,) if isinstance(lora, str | Path) else tuple(lora)
    taken = bundle.manifest.lora is not None  # by inputs, so that the weights stay
    adapted = Merged() if taken else merged(given, bundle)
    usual = adapter_of(bundle.manifest, given) if taken and given else None
    if ranks is not None:
        ranks.agree({"lora": _hash(adapted.weights if usual is None else {"lora": usual.matrices})})
    runner = open_runner(bundle, asked, threads, cuda_graphs, adapted.weights, ranks)
    places = {name: Device.parse(place) for name, place in (devices or {}).items()}
    denoiser = Denoiser(bundle.manifest, runner, bundle, runner.device, threads, places, ranks, guidance)
    denoiser.lora, denoiser.usual, denoiser.share.owned = adapted, usual, ranks is not group
    if check:
        try:
            with together(ranks):
                check_engines(denoiser.share.contract, runner, denoiser.device, lora=usual)
        except MemoryError as error:
            denoiser.close()
            raise BundleError(
                f"memory is full while {bundle.folder} is checked ({first_line(error)}), expected room for its buffers "
                "at its smallest sizes; free memory, or export again with a smaller --size or --batch"
            ) from error
        except BaseException:
            denoiser.close()
            raise
    return denoiser


def _hash(values: Mapping[str, np.ndarray]) -> str:
    """Of the numbers that LoRAs bring, whatever the order in which they were read."""
    found = hashlib.sha256()
    for name in sorted(values):
        found.update(name.encode())
        found.update(np.ascontiguousarray(values[name]).data)
    return found.hexdigest()


def adapter_of(manifest: Manifest, lora: str | Path | Sequence[str | Path]) -> Adapter:
    """The LoRA of a request, as `Denoiser.adapter` reads it."""
    given, tensor = (lora,) if isinstance(lora, str | Path) else tuple(lora), lora_input(manifest)
    return adapter(given, manifest.lora, "" if tensor is None else tensor.dtype)


class Denoiser:
    """Engines of one bundle, ready to serve requests through slots.

    Args:
        manifest: The contract; of one rank, where the bundle is shared out.
        runner: The loaded engines.
        bundle: The bundle it was opened from, if any.
        device: Where the engines are.
        threads: CPU threads of each engine of a part; 0 leaves it to the engine.
        devices: Where parts of the pipeline run, by name; where the denoiser does if left out.
        group: The ranks that run it, where it is shared out.
        guidance: Whether each half of them runs one branch of guidance.

    Attributes:
        manifest, contract: Of whole requests, shared out or not.
        share: Which rows of a request are this rank's: all of them where nothing is shared out.
        lora: The weights that LoRAs changed when it was loaded.
        usual: Where LoRAs are inputs, what requests get that bring none of their own.
    """

    def __init__(
        self,
        manifest: Manifest,
        runner: Runner,
        bundle: Bundle | None = None,
        device: Device = CPU,
        threads: int = 0,
        devices: Mapping[PartName, Device] | None = None,
        group: Group | None = None,
        guidance: bool = False,
    ) -> None:
        own = Contract(manifest)
        self.share = GuidedShare(own, group) if guidance else Share(own, group)
        self.manifest, self.runner, self.bundle, self.device = self.share.whole, runner, bundle, device
        self._threads, self._devices = threads, devices or {}
        self.lora = Merged()
        self.usual: Adapter | None = None
        self.contract = self.share.contract if self.manifest is manifest else Contract(self.manifest)
        self.latent, self.timestep = self.contract.latent, self.contract.timestep
        self.next_timestep = self.contract.next_timestep
        self.others = self.contract.others
        self.constants, self.defaults = self.contract.constants, self.contract.defaults

    @property
    def profiles(self) -> Profiles:
        """The bundle's calibrated plans and weights, by name."""
        return Profiles(self.bundle)

    def forecasts(self, **options: Any) -> Forecasts:
        """The forecasts of a request; the options are those of `RequestOptions`, and the bundle's defaults fill them.

        Raises:
            ConfigError: The options contradict each other or the bundle.
            BundleError: The profile named is damaged, or of another model.
        """
        return forecasts_from_options(RequestOptions(**options), self.defaults, self.profiles)

    def sizes(self, latents: tuple[int, ...], conditioning: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Dimension sizes that a request's shapes imply; raises what `Contract.sizes` raises."""
        return self.contract.sizes(latents, conditioning)

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Refuse sizes that the bundle does not take, as `Contract.check_sizes` does."""
        self.contract.check_sizes(sizes)

    def slot(self, sizes: Mapping[str, int], own: bool = False) -> Slot:
        """A new slot for requests of these sizes; its buffers are allocated and bound now.

        Args:
            sizes: Of every dimension but the steps, of the whole.
            own: Whether it is given this rank's share of latents and conditioning, see `share`; else the whole ones,
                and returns whole predictions, see `WholeSlot`. The same where nothing is shared out.

        Raises:
            StepError: A size is out of range; nothing was allocated.
        """
        self.check_sizes(sizes)
        if self.share.ranks > 1 and not own:
            return WholeSlot(self.share, self.runner, sizes, self.usual)
        mine = Slot(self.share.contract, self.runner, self.share.sizes(sizes), self.usual, self.share.group)
        return self.share.decide(mine)

    def adapter(self, lora: str | Path | Sequence[str | Path]) -> Adapter:
        """A LoRA for requests of this bundle, `FILE` or `FILE:STRENGTH`; raises what `adapter` of `adapter.py` raises.

        replace(request, lora=denoiser.adapter("style.safetensors:0.8"))
        """
        return adapter_of(self.manifest, lora)

    def as_transformer(self, **options: Any) -> DropIn:
        """As the transformer of a diffusers pipeline; the options are those of `DropIn`."""
        from taylorseer_export.runtime.dropin import DropIn

        self.share.expect_calls("a drop-in")
        return DropIn(self, **options)

    @cached_property
    def encoder(self) -> Encoder:
        """What makes conditioning of prompts, loaded when it is first asked for; raises what `open_part` raises."""
        return Encoder(self._bundle, open_part(self._bundle, "text", self._place("text"), self._threads))

    @cached_property
    def picture_encoder(self) -> Part | FrameEncoder:
        """What makes conditioning of a picture, loaded when it is first asked for; raises what `open_part` raises."""
        return open_picture_encoder(self._bundle, self._place("encode"), self._threads)

    @cached_property
    def decoder(self) -> Decoder:
        """What makes pictures or videos of latents, loaded when first asked for; raises what `open_decoder` raises."""
        return open_decoder(self._bundle, self._place("decode"), self._threads)

    def open_parts(self, names: Collection[PartName] = ("text", "encode", "decode")) -> None:
        """Load these parts, as far as the bundle has them, rather than when the first request asks for them."""
        wanted = self.manifest.parts.keys() & set(names)
        if "text" in wanted:
            self.encoder  # noqa: B018
        if "encode" in wanted:
            self.picture_encoder  # noqa: B018
        if "decode" in wanted:
            self.decoder  # noqa: B018

    @property
    def _bundle(self) -> Bundle:
        assert self.bundle is not None, "bug in taylorseer-export: parts of a denoiser that was opened from no bundle"
        return self.bundle

    def _place(self, name: PartName) -> Device:
        return self._devices.get(name, self.device)

    def close(self) -> None:
        """Release the engines; on a rank 0 that leads, the others are let go."""
        self.share.close()
        self.runner.close()
        for name in ("encoder", "picture_encoder", "decoder"):
            if name in vars(self):
                vars(self).pop(name).close()

    def __enter__(self) -> Denoiser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
