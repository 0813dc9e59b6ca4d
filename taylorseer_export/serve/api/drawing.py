"""The pictures of one request, from the queue of a model to their end.

Models post what happens, from their own threads; the event loop waits for it. Nothing here blocks either.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from taylorseer_export.serve.api.answers import Receive, unless_gone
from taylorseer_export.serve.api.fields import Asked
from taylorseer_export.serve.api.models import Done, Event, Failed, Model, Order, Queued, Stepped
from taylorseer_export.serve.api.problems import Refusal
from taylorseer_export.serve.api.wishes import Wish
from taylorseer_export.serve.refusals import Late, QueueFull

_GRACE = 1.0  # seconds beyond the deadline for the model to say how far a request came


class Drawing:
    """The pictures of one request; made and used on the event loop.

    Args:
        model: Who draws.
        asked: What.
        until: When it is given up, by the clock of the event loop (seconds).
        pictures, mask: As in `Wish`.
        request_id: Of the request.

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
        request_id: str = "",
    ) -> None:
        self.model, self.asked, self.until = model, asked, until
        self._pictures, self._mask, self._id = pictures, mask, request_id
        self._ends: list[Callable[[], object]] = []
        # Before its own pictures wait, and once for all of them.
        self.choice = model.choose(asked.options)
        self._options = replace(asked.options, profile=self.choice.used)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._early: deque[Event] = deque()
        self._loop = asyncio.get_running_loop()

    def send(self) -> None:
        """Hand all of them to the model."""
        left = max(0.0, self.until - self._loop.time())
        self._ends = [self.model.draw(self._order(number, left), self._post) for number in range(self.asked.n)]

    def _order(self, number: int, left: float) -> Order:
        asked = self.asked
        wish = Wish(
            asked.prompt,
            asked.seeds[number],
            asked.size,
            asked.negative_prompt,
            asked.guidance_scale,
            self._pictures,
            self._mask,
            asked.strength,
            asked.lora,
        )
        previews = asked.partial_images if asked.stream else 0
        return Order(number, wish, self._options, asked.stream, previews, asked.progress, left, self._id)

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
        for end in self._ends:
            end()

    async def queued(self) -> None:
        """Wait until each has a place.

        Raises:
            TaylorSeerError: One of them is refused.
        """
        waiting = set(range(self.asked.n))
        while waiting:
            event = await self._next()
            if isinstance(event, Queued):
                waiting.discard(event.number)
            else:  # a service may be quicker than the reader that gave it the picture
                self._early.append(event)

    async def events(self) -> AsyncIterator[Stepped | Done]:
        """What happens, until all are done.

        Raises:
            TaylorSeerError: One of them failed.
        """
        missing = self.asked.n
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

    def _post(self, event: Event) -> None:
        with suppress(RuntimeError):  # the loop was closed, by a stop that did not wait
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
