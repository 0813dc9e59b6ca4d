"""The models of a server: bundles that are loaded, warm, and found by their names."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from taylorseer_export.bundle.device import CPU, Device
from taylorseer_export.embedded.requests import frame_rate, warm_parts
from taylorseer_export.errors import ConfigError
from taylorseer_export.method import RequestOptions
from taylorseer_export.runtime.denoiser import Denoiser, load
from taylorseer_export.serve.api.busy import Busy, Choice, chosen
from taylorseer_export.serve.api.problems import Refusal
from taylorseer_export.serve.api.prompts import check_draws, description_of
from taylorseer_export.serve.reader import Reader
from taylorseer_export.serve.repository import slot_bytes
from taylorseer_export.serve.service import Limits, Service

_MOST_RETRY = 60  # seconds


class Model:
    """One bundle that draws, with its slots and its reader. Closes the denoiser when it is closed.

    Args:
        denoiser: The loaded bundle.
        limits: Of its service.
        busy: When it takes a faster profile for requests that leave it the choice; never if left out.

    Attributes:
        name: `FAMILY-NAME` of the bundle.
        video: Whether it makes videos.
        created: When it was loaded (Unix time, seconds).
        profiles: Of the bundle, by name, as they were then.
        description: For clients, see `description_of`.
        hurried: Requests that took the faster profile and have a place; counted on the event loop.

    Raises:
        ConfigError: The bundle makes no pictures or videos of prompts, PyAV is missing for these, or it has no such
            profile.
        BundleError: A profile is damaged.
    """

    def __init__(self, denoiser: Denoiser, limits: Limits, busy: Busy | None = None) -> None:
        check_draws(denoiser.manifest)
        self.name = f"{denoiser.manifest.family}-{denoiser.manifest.name}"
        self.video = frame_rate(denoiser.manifest) is not None
        self.created = int(time.time())
        self.denoiser, self.profiles = denoiser, dict(denoiser.profiles)
        self._busy, self.hurried = busy, 0
        if busy is not None:
            busy.check(self.name, denoiser.forecasts().plan, self.profiles)
        self.description = description_of(denoiser)
        self.service = Service(denoiser, limits)
        self.service.warm_up()
        self.reader = Reader(limits.slots + limits.queue)

    @property
    def retry_after(self) -> int:
        """Seconds until a place in the queue may be free, by the mean time of the requests so far; 1 to 60."""
        counts = self.service.snapshot()
        spent = counts.get("seconds.full", 0.0) + counts.get("seconds.forecast", 0.0)
        each = spent / max(1.0, counts.get("requests.done", 0.0))
        return min(_MOST_RETRY, max(1, math.ceil(each)))

    @property
    def waiting(self) -> int:
        """Pictures that wait to be read or for a slot."""
        return self.reader.waiting + self.service.waiting

    def choose(self, options: RequestOptions) -> Choice:
        """The profile of a request that comes now."""
        return chosen(self._busy, options, self.waiting)

    def close(self) -> None:
        """Finish what is under way, then release the engines."""
        self.reader.close()
        self.service.close()
        self.denoiser.close()


class Models:
    """Models by name; the first is the one that requests get that name none.

    Raises:
        ConfigError: Two have one name.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = {model.name: model for model in models}
        if len(self._models) < len(models):
            raise _twice([model.name for model in models])

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def named(self, name: str | None, video: bool | None = None) -> Model:
        """The model of that name, or the first.

        Args:
            name: As asked for.
            video: Whether it makes videos; either will do if None.

        Raises:
            Refusal: There is none.
        """
        able = [model for model in self if video in (None, model.video)]
        what, other = ("videos", "/v1/images/generations") if video else ("pictures", "/v1/videos")
        if not able:
            raise Refusal(
                f"model is {'missing' if name is None else f'`{name[:64]}`'}, expected one that makes {what}, and none "
                f"here does; ask {other}",
                404,
                "model",
                "model_not_found",
            )
        if name is None:
            return able[0]
        if name not in self._models:
            raise Refusal(
                f"model is `{name[:64]}`, expected {' or '.join(self._models)}; choose one of those",
                404,
                "model",
                "model_not_found",
            )
        found = self._models[name]
        if found not in able:
            raise Refusal(
                f"model is `{name}`, expected {' or '.join(model.name for model in able)}, which makes {what}; choose "
                f"one of those, or ask {other}",
                400,
                "model",
            )
        return found

    def close(self) -> None:
        """Close all of them."""
        for model in self:
            model.close()


def load_models(
    folders: Sequence[Path],
    device: Device = CPU,
    threads: int = 1,
    limits: Limits | None = None,
    memory_budget: int | None = None,
    busy: Busy | None = None,
) -> Models:
    """Load bundles and warm them up, or none of them.

    Args:
        folders: The bundles.
        device: Where to run.
        threads: CPU threads of one engine call; 0 leaves it to the engine.
        limits: Of each; their `slot_bytes` follow from the budget, and `batch` 0 chooses by the device.
        memory_budget: Bytes of the weights, Taylor buffers and step tables of one; None for the usual room.
        busy: As in `Model`, for all of them.

    Raises:
        BundleError: A bundle is missing, damaged or not for this machine.
        ConfigError: One makes no pictures or lacks the profile, two have one name, or calls are to be shared on a GPU.
    """
    asked = limits or Limits()
    if device.is_gpu and asked.batch > 1:
        raise ConfigError(
            f"--batch is {asked.batch} on {device}, expected 1: engine calls are shared on the CPU alone; leave it out"
        )
    batch = asked.batch or (1 if device.is_gpu else asked.slots)
    models: list[Model] = []
    try:
        for folder in folders:
            denoiser = load(folder, device, threads)
            try:
                manifest = denoiser.manifest
                check_draws(manifest)
                for size in (None, *asked.warm):  # ready means that a prompt can be drawn
                    warm_parts(denoiser, size)
                if f"{manifest.family}-{manifest.name}" in [model.name for model in models]:
                    raise _twice([f"{manifest.family}-{manifest.name}"])
                room = slot_bytes(manifest, asked.slots, memory_budget)
                own = replace(asked, batch=batch, slot_bytes=room)
                models.append(Model(denoiser, own, busy))
            except BaseException:
                denoiser.close()
                raise
        return Models(models)
    except BaseException:
        for model in models:
            model.close()
        raise


def _twice(names: Sequence[str]) -> ConfigError:
    name = next((name for name in names if list(names).count(name) > 1), names[0])
    return ConfigError(
        f"BUNDLE is {name} twice, expected bundles of different names; leave one out, or export it again with --name"
    )
