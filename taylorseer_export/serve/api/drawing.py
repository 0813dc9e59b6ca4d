"""The pictures of one request, from the queue of a service to their latents.

The threads of the service post what happens; the event loop waits for it. Nothing here blocks either.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from taylorseer_export.errors import ServeError, TaylorSeerError
from taylorseer_export.method import forecasts_from_options
from taylorseer_export.runtime.sampling import Loop, Request, preview_steps
from taylorseer_export.serve.api.answers import Receive, unless_gone
from taylorseer_export.serve.api.fields import Asked
from taylorseer_export.serve.api.models import Model
from taylorseer_export.serve.api.problems import Refusal
from taylorseer_export.serve.api.prompts import Wish, picture_for, request_of
from taylorseer_export.serve.refusals import Late, QueueFull

_GRACE = 1.0  # seconds beyond the deadline for the service to say how far a request came


class Queued(NamedTuple):
    """A picture waits for a slot."""

    number: int


class Stepped(NamedTuple):
    """A step is done, not the last one.

    Attributes:
        number: Of the picture, from 0.
        step, steps: Done, and of all.
        planned: The plan.
        milliseconds: Of this step, with the wait of those that it shared a call with.
        request: The picture's.
        latents: Where the loop thinks it will end, where a preview is due.
    """

    number: int
    step: int
    steps: int
    planned: str
    milliseconds: float
    request: Request
    latents: np.ndarray | None


class Done(NamedTuple):
    """All steps are done.

    Attributes:
        number: Of the picture, from 0.
        planned, executed: The plan as asked and as run.
        times: Of the stages, in milliseconds.
        request: The picture's.
        latents: At the end of the loop.
    """

    number: int
    planned: str
    executed: str
    times: dict[str, float | None]
    request: Request
    latents: np.ndarray


class Failed(NamedTuple):
    """No picture will come."""

    number: int
    error: Exception


Event = Queued | Stepped | Done | Failed


class Sender:
    """Who sent one picture, as the service knows its callers.

    Args:
        number: Of the picture.
        post: Takes what happens, from any thread.
        previews: How many are due, spread evenly over the loop.
        progress: Whether every step is told of; where it is not, the event loop sleeps but for previews.
    """

    def __init__(self, number: int, post: Callable[[Event], None], previews: int, progress: bool) -> None:
        self.number, self._post, self._previews, self._progress = number, post, previews, progress
        self.left = False
        self._received = self._read = time.perf_counter()
        self._turns: list[float] = []  # when the service asked: as it gave a slot, then before every step
        self._steps: list[float] = []  # milliseconds

    def cancelled(self) -> bool:
        self._turns.append(time.perf_counter())
        return self.left

    def queued(self) -> None:
        """It was read and has a place."""
        self._post(Queued(self.number))

    def read(self) -> None:
        """It was read; next it is given to the service."""
        self._read = time.perf_counter()

    def advanced(self, loop: Loop) -> None:
        self._steps.append(1e3 * (time.perf_counter() - self._turns[-1]))
        steps = len(loop.plan)
        latents = loop.estimate() if loop.step in preview_steps(steps, self._previews) else None
        if latents is None and not self._progress:
            return
        self._post(Stepped(self.number, loop.step, steps, str(loop.plan), self._steps[-1], loop.request, latents))

    def finished(self, loop: Loop, executed: str) -> None:
        self._steps.append(1e3 * (time.perf_counter() - self._turns[-1]))
        times = self._times(executed)
        self._post(Done(self.number, str(loop.plan), executed, times, loop.request, loop.latents))

    def failed(self, error: TaylorSeerError) -> None:
        self._post(Failed(self.number, error))

    def refused(self, error: Exception) -> None:
        """It could not be read, or has no place."""
        self._post(Failed(self.number, error))

    def _times(self, executed: str) -> dict[str, float | None]:
        seated, first, *_ = self._turns
        by_kind = {kind: [t for t, k in zip(self._steps, executed, strict=True) if k == kind] for kind in "F."}
        times = {
            "read": 1e3 * (self._read - self._received),
            "queue": 1e3 * (seated - self._read),
            "prepare": 1e3 * (first - seated),
            "full_step": statistics.median(by_kind["F"]) if by_kind["F"] else None,
            "forecast_step": statistics.median(by_kind["."]) if by_kind["."] else None,
            "loop": 1e3 * (time.perf_counter() - first),
        }
        return {name: None if value is None else round(value, 3) for name, value in times.items()}


class Drawing:
    """The pictures of one request; made and used on the event loop.

    Args:
        model: Who draws.
        asked: What.
        until: When it is given up, by the clock of the event loop (seconds).
        pictures, mask: As in `Wish`.

    Attributes:
        choice: The profile that all of them are drawn with.
    """

    def __init__(
        self,
        model: Model,
        asked: Asked,
        until: float,
        pictures: Sequence[np.ndarray] = (),
        mask: np.ndarray | None = None,
    ) -> None:
        self.model, self.asked, self.until = model, asked, until
        self._pictures, self._mask = pictures, mask
        # Before its own pictures wait, and once for all of them.
        self.choice = model.choose(asked.options)
        self._options = replace(asked.options, profile=self.choice.used)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._early: deque[Event] = deque()
        self._loop = asyncio.get_running_loop()
        previews = asked.partial_images if asked.stream else 0
        self._senders = [Sender(number, self._post, previews, asked.progress) for number in range(asked.n)]

    def send(self) -> None:
        """Hand all of them to the model's reader."""
        left = max(0.0, self.until - self._loop.time())
        for sender in self._senders:
            self.model.reader.hand_over(partial(self._read, sender), sender.refused, left)

    async def take_places(self, receive: Receive) -> None:
        """Send all of them and wait until each has a place; where one has none or the client leaves, all are left.

        Args:
            receive: Of the client.

        Raises:
            Refusal: The queue is full.
            TaylorSeerError: One of them is refused, or the client left.
        """
        self.send()
        try:
            await unless_gone(receive, self.queued())
        except QueueFull as error:
            self.leave()
            wait = {"retry-after": str(self.model.retry_after)}
            raise Refusal(str(error), 429, None, "rate_limit_exceeded", wait) from error
        except BaseException:
            self.leave()
            raise
        self.model.hurried += self.choice.why is not None

    def leave(self) -> None:
        """Nobody waits for them any more: each frees its slot within a step. Those that are done are not touched."""
        for sender in self._senders:
            sender.left = True

    async def queued(self) -> None:
        """Wait until each has a place.

        Raises:
            TaylorSeerError: One of them is refused.
        """
        waiting = {sender.number for sender in self._senders}
        while waiting:
            event = await self._next()
            if isinstance(event, Queued):
                waiting.discard(event.number)
            else:  # the service may be quicker than the reader that gave it the picture
                self._early.append(event)

    async def events(self) -> AsyncIterator[Stepped | Done]:
        """What happens, until all are done.

        Raises:
            TaylorSeerError: One of them failed.
        """
        missing = len(self._senders)
        while missing:
            event = self._early.popleft() if self._early else await self._next()
            assert isinstance(event, Stepped | Done), "bug in taylorseer-export: a picture is queued twice"
            missing -= isinstance(event, Done)
            yield event

    async def _next(self) -> Event:
        try:
            async with asyncio.timeout_at(self.until + _GRACE):
                event = await self._events.get()
        except TimeoutError as error:
            raise Late("request is late, expected its end in its time; give it more") from error
        if isinstance(event, Failed):
            raise event.error
        return event

    def _read(self, sender: Sender, left: float | None) -> None:
        """Make a request of it and queue it; runs on the reader's thread."""
        asked, model = self.asked, self.model
        if sender.left:
            raise ServeError("the client left, expected it to wait for its answer; send it again", "CANCELLED")
        wish = Wish(
            asked.prompt,
            asked.seeds[sender.number],
            asked.size,
            asked.negative_prompt,
            asked.guidance_scale,
            self._pictures,
            self._mask,
            asked.strength,
        )
        options, given = picture_for(model.denoiser, wish, self._options)
        forecasts = forecasts_from_options(options, model.denoiser.defaults, model.profiles)
        request = request_of(model.denoiser, wish, model.service.conditioning, given)
        sender.read()
        model.service.submit(request, forecasts, sender, left)
        sender.queued()

    def _post(self, event: Event) -> None:
        with suppress(RuntimeError):  # the loop was closed, by a stop that did not wait
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
