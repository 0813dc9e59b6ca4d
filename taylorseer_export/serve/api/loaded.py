"""Models that are loaded in this process: bundles with their slots, warm before the first request.

The threads of a service post what happens to its pictures; the event loop waits for it. Nothing here blocks either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from taylorseer_export.bundle.device import CPU, Device
from taylorseer_export.embedded.edits import Given
from taylorseer_export.embedded.requests import frame_rate, size_of, warm_parts
from taylorseer_export.errors import ConfigError, RankError, ServeError, TaylorSeerError
from taylorseer_export.method import RequestOptions, forecasts_from_options
from taylorseer_export.runtime.adapter import Adapter
from taylorseer_export.runtime.denoiser import Denoiser, load
from taylorseer_export.runtime.following import follow
from taylorseer_export.runtime.group import Group
from taylorseer_export.runtime.sampling import Loop, preview_steps
from taylorseer_export.serve import contract
from taylorseer_export.serve.api.busy import Busy, Choice, chosen
from taylorseer_export.serve.api.models import Done, Event, Failed, Models, Order, Queued, Stepped, retry_in, twice
from taylorseer_export.serve.api.prompts import check_draws, picture_for, picture_of, request_of
from taylorseer_export.serve.api.wishes import takes_of
from taylorseer_export.serve.reader import Reader
from taylorseer_export.serve.repository import slot_bytes
from taylorseer_export.serve.service import Limits, Service
from taylorseer_export.serve.times import Times


class Sender:
    """Who sent one order, as the service knows its callers.

    Args:
        model: Who draws.
        order: The picture.
        post: Takes what happens, from any thread.
    """

    def __init__(self, model: Loaded, order: Order, post: Callable[[Event], None]) -> None:
        self._model, self._order, self._post = model, order, post
        self.times, self.left = Times(), False

    def leave(self) -> None:
        """Nobody waits any more: its slot is free within a step."""
        self.left = True

    def cancelled(self) -> bool:
        self.times.turn()
        return self.left

    def queued(self) -> None:
        """It was read and has a place."""
        self._post(Queued(self._order.number))

    def advanced(self, loop: Loop) -> None:
        took, steps = self.times.step(), len(loop.plan)
        preview = loop.step in preview_steps(steps, self._order.previews)
        if not preview and not self._order.progress:
            return
        picture = self._picture(loop, loop.estimate()) if preview else None
        self._post(Stepped(self._order.number, loop.step, steps, str(loop.plan), took, picture))

    def finished(self, loop: Loop, executed: str) -> None:
        self.times.step()
        times, picture = self.times.stages(executed), self._picture(loop, loop.latents)
        self._post(Done(self._order.number, str(loop.plan), executed, times, picture))

    def failed(self, error: TaylorSeerError) -> None:
        self._post(Failed(self._order.number, error))

    def refused(self, error: Exception) -> None:
        """It could not be read, or has no place."""
        self._post(Failed(self._order.number, error))

    def _picture(self, loop: Loop, latents: np.ndarray) -> Callable[[], np.ndarray]:
        return partial(picture_of, self._model.denoiser, loop.request, latents)


class Loaded:
    """One bundle that draws, with its slots and its reader. Closes the denoiser when it is closed.

    Args:
        denoiser: The loaded bundle.
        limits: Of its service.
        busy: When it takes a faster profile for requests that leave it the choice; never if left out.
        loras: Name -> what requests may choose, of a bundle that takes it with each request.

    Attributes:
        name, video, created, takes, description, hurried, counted: As of `Model`.
        profiles: Of the bundle, by name, as they were when it was loaded.

    Raises:
        ConfigError: The bundle makes no pictures or videos of prompts, PyAV is missing for these, or it has no such
            profile.
        BundleError: A profile is damaged.
    """

    counted = ("requests", "steps", "calls", "seconds", "fallbacks", "conditioning", "prepared", "full")

    def __init__(
        self,
        denoiser: Denoiser,
        limits: Limits,
        busy: Busy | None = None,
        loras: Mapping[str, Adapter] | None = None,
    ) -> None:
        check_draws(denoiser.manifest)
        self._loras = dict(loras or {})
        self.takes = takes_of(denoiser.manifest)._replace(loras=tuple(self._loras))
        self.name = self.takes.name
        self.video = frame_rate(denoiser.manifest) is not None
        self.created = int(time.time())
        self.denoiser, self.profiles = denoiser, dict(denoiser.profiles)
        self._busy, self.hurried = busy, 0
        if busy is not None:
            busy.check(self.name, denoiser.forecasts().plan, self.profiles)
        self.description = contract.description(denoiser.manifest, self.profiles, self._loras)
        self.service = Service(denoiser, limits)
        self.service.warm_up()
        self.reader = Reader(limits.slots + limits.queue)

    @property
    def retry_after(self) -> int:
        """Seconds until a place in the queue may be free, by the mean time of the requests so far; 1 to 60."""
        counts = self.service.snapshot()
        spent = counts.get("seconds.full", 0.0) + counts.get("seconds.forecast", 0.0)
        return retry_in(spent, counts.get("requests.done", 0.0))

    @property
    def waiting(self) -> int:
        """Pictures that wait to be read or for a slot."""
        return self.reader.waiting + self.service.waiting

    def usual_size(self, picture: np.ndarray | None) -> tuple[int, int]:
        """As of `Model`."""
        height, width = size_of(self.denoiser.manifest, None if picture is None else Given(picture))[-2:]
        return height, width

    def choose(self, options: RequestOptions) -> Choice:
        """The profile of a request that comes now."""
        return chosen(self._busy, options, self.waiting)

    @property
    def places(self) -> int:
        """Slots, and places in the queue."""
        return self.service.limits.slots + self.service.limits.queue

    def draw(self, order: Order, post: Callable[[Event], None]) -> Callable[[], object]:
        """Hand an order to the reader; as of `Model`."""
        sender = Sender(self, order, post)
        self.reader.hand_over(partial(self._read, order, sender), sender.refused, order.left)
        return sender.leave

    def _read(self, order: Order, sender: Sender, left: float | None) -> None:
        """Make a request of it and queue it; runs on the reader's thread."""
        if sender.left:
            raise ServeError("the client left, expected it to wait for its answer; send it again", "CANCELLED")
        options, given = picture_for(self.denoiser, self.takes, order.wish, order.options)
        forecasts = forecasts_from_options(options, self.denoiser.defaults, self.profiles)
        request = request_of(self.denoiser, order.wish, self.service.conditioning, given)
        request = replace(request, previews=order.previews)
        if order.wish.lora is not None:
            name, strength = self.takes.lora(order.wish.lora)
            request = replace(request, lora=self._loras[name].at(strength))
        sender.times.read()
        self.service.submit(request, forecasts, sender, left)
        sender.queued()

    def health(self, stall: float) -> dict[str, Any]:
        """`stalled` while an engine call takes longer than it may, `broken` where a rank is gone."""
        stalled = round(self.service.stalled, 1)
        broken = self.service.broken is not None
        return {
            "status": "broken" if broken else "stalled" if stalled > stall else "ok",
            "stalled_seconds": stalled,
            "slots": self.service.limits.slots,
            "slots_in_use": self.service.slots_in_use,
            "queue": self.service.waiting,
        }

    def counts(self) -> Mapping[str, float]:
        """Those of the service."""
        return self.service.snapshot()

    def gauges(self) -> Mapping[str, float]:
        """Of the service."""
        return {
            "slots": self.service.limits.slots,
            "slots_in_use": self.service.slots_in_use,
            "queue": self.service.waiting,
            "conditioning_bytes": self.service.conditioning.counts.bytes,
            "stalled_seconds": self.service.stalled,
        }

    def ends(self, end: Callable[[RankError], object]) -> None:
        """Call `end`, from any thread, where a rank is gone."""
        self.service.ends(end)

    def close(self) -> None:
        """Finish what is under way, then release the engines."""
        self.reader.close()
        self.service.close()
        self.denoiser.close()


def load_models(
    folders: Sequence[Path],
    device: Device = CPU,
    threads: int = 1,
    limits: Limits | None = None,
    memory_budget: int | None = None,
    busy: Busy | None = None,
    loras: Mapping[str, str] | None = None,
    group: Group | None = None,
) -> Models:
    """Load bundles and warm them up, or none of them.

    Args:
        folders: The bundles.
        device: Where to run.
        threads: CPU threads of one engine call; 0 leaves it to the engine.
        limits: Of each; their `slot_bytes` follow from the budget, and `batch` 0 chooses by the device.
        memory_budget: Bytes of the weights, Taylor buffers and step tables of one; None for the usual room.
        busy: As in `Loaded`, for all of them.
        loras: Name -> `FILE` or `FILE:SCALE`. A bundle with low-rank inputs is loaded once, and requests choose one by
            their `lora`; of any other each adds a model `<bundle>+<name>` that they may ask for.
        group: The ranks that draw, of which this is rank 0 and leads the others. They draw one picture at a time.

    Raises:
        BundleError: A bundle is missing, damaged or not for this machine.
        ConfigError: One makes no pictures or lacks the profile, two have one name, calls are to be shared on a GPU, or
            LoRAs are given for several bundles, do not fit the one, or would be loads of their own on ranks.
    """
    if loras and len(folders) != 1:
        raise ConfigError(f"--lora is given with {len(folders)} bundles, expected one; serve each by itself")
    asked = limits or Limits()
    if device.is_gpu and asked.batch > 1:
        raise ConfigError(
            f"--batch is {asked.batch} on {device}, expected 1: engine calls are shared on the CPU alone; leave it out"
        )
    if group is not None:
        asked = replace(asked, slots=1, batch=1, workers=1)
    batch = asked.batch or (1 if device.is_gpu else asked.slots)
    models: list[Loaded] = []
    try:
        adapted = [(folder, name, lora) for folder in folders for name, lora in (loras or {}).items()]
        for folder, name, lora in [*((folder, "", ()) for folder in folders), *adapted]:
            if name and models[0].takes.loras:  # it is loaded, and takes them with each request
                break
            denoiser = load(folder, device, threads, lora=lora, group=group)
            try:
                follow(denoiser)
                if name:
                    called = {"name": f"{denoiser.manifest.name}+{name}"}
                    denoiser.manifest = denoiser.manifest.model_copy(update=called)
                manifest = denoiser.manifest
                if loras and group is not None and manifest.lora is None:
                    raise ConfigError(
                        f"--lora is given for {manifest.family}-{manifest.name} on {group.size} ranks, expected one "
                        "that takes a LoRA with each request, since they load it once; export it with --lora-rank"
                    )
                check_draws(manifest)
                for size in (None, *asked.warm):  # ready means that a prompt can be drawn
                    warm_parts(denoiser, size)
                if f"{manifest.family}-{manifest.name}" in [model.name for model in models]:
                    raise twice([f"{manifest.family}-{manifest.name}"])
                room = slot_bytes(denoiser.share.contract.manifest, asked.slots, memory_budget)
                own = replace(asked, batch=batch, slot_bytes=room)
                taken = loras if loras and manifest.lora is not None else {}
                models.append(Loaded(denoiser, own, busy, {key: denoiser.adapter(file) for key, file in taken.items()}))
            except BaseException:
                denoiser.close()
                raise
        return Models(models)
    except BaseException:
        for model in models:
            model.close()
        raise
