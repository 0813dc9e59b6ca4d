"""The models of a server, found by their names, and what its doors ask of one: whoever draws, they ask the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from taylorseer_export.errors import ConfigError, RankError
from taylorseer_export.method import RequestOptions
from taylorseer_export.serve.api.busy import Choice
from taylorseer_export.serve.api.problems import Refusal
from taylorseer_export.serve.api.wishes import Takes, Wish

_MOST_RETRY = 60  # seconds


class Order(NamedTuple):
    """One picture that is asked of a model.

    Attributes:
        number: Of the picture in its request, from 0.
        wish: What it is to be.
        options: Of its forecasts.
        stream: Whether its client is answered while it is drawn, and so before it is done.
        previews: How many are due, spread evenly over the loop.
        progress: Whether every step is told of; where it is not, the event loop sleeps but for previews.
        left: Seconds after which it is given up.
        request_id: Of the request.
    """

    number: int
    wish: Wish
    options: RequestOptions
    stream: bool
    previews: int
    progress: bool
    left: float
    request_id: str = ""


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
        picture: Makes the one where the loop thinks it will end, where a preview is due; may take long.
    """

    number: int
    step: int
    steps: int
    planned: str
    milliseconds: float
    picture: Callable[[], np.ndarray] | None


class Done(NamedTuple):
    """All steps are done.

    Attributes:
        number: Of the picture, from 0.
        planned, executed: The plan as asked and as run.
        times: Of the stages, in milliseconds; of `decode` what has been done already.
        picture: Makes it: `[H, W, 3]` uint8, `[F, H, W, 3]` of a video; may take long.
    """

    number: int
    planned: str
    executed: str
    times: dict[str, float | None]
    picture: Callable[[], np.ndarray]

    def times_with(self, decoding: float) -> dict[str, float | None]:
        """Of the stages, with so many seconds more of decoding and of writing the file."""
        return {**self.times, "decode": round((self.times.get("decode") or 0.0) + 1e3 * decoding, 3)}


class Failed(NamedTuple):
    """No picture will come."""

    number: int
    error: Exception


Event = Queued | Stepped | Done | Failed


class Model(Protocol):
    """Who draws.

    Attributes:
        created: Since when it is here (Unix time, seconds).
        hurried: Requests that took the faster profile of a busy server; counted on the event loop.
    """

    created: int
    hurried: int

    @property
    def counted(self) -> Collection[str]:
        """Groups of `counts` that it counts."""
        ...

    @property
    def name(self) -> str:
        """`FAMILY-NAME` of the bundle."""
        ...

    @property
    def video(self) -> bool:
        """Whether it makes videos."""
        ...

    @property
    def takes(self) -> Takes:
        """What a wish may hold."""
        ...

    @property
    def description(self) -> Mapping[str, Any]:
        """For clients, see `contract.description`."""
        ...

    @property
    def places(self) -> int:
        """Pictures that it may hold at one time, those that wait included."""
        ...

    @property
    def retry_after(self) -> int:
        """Seconds until a place in the queue may be free; 1 to 60."""
        ...

    def usual_size(self, picture: np.ndarray | None) -> tuple[int, int]:
        """(height, width) in pixels of what is made where nobody asks for another.

        Args:
            picture: `[H, W, C]` that it is made from, if any.

        Raises:
            Refusal: It is not known here.
        """
        ...

    def choose(self, options: RequestOptions) -> Choice:
        """The profile of a request that comes now."""
        ...

    def draw(self, order: Order, post: Callable[[Event], None]) -> Callable[[], object]:
        """Take an order; called on the event loop, and returns at once.

        Args:
            order: The picture.
            post: Takes what happens, from any thread: `Queued` once, when the picture has a place, then steps that are
                to be told of, then `Done`; or `Failed` in the place of what is missing.

        Returns:
            What ends it, since nobody waits for it any more; to be called on the event loop. Nothing happens where it
            has ended.
        """
        ...

    def health(self, stall: float) -> dict[str, Any]:
        """Its `status`, `ok` or another, and what else is known of it.

        Args:
            stall: Seconds that one turn of work may take.
        """
        ...

    def counts(self) -> Mapping[str, float]:
        """What happened since the start, as `Service.counts` names it."""
        ...

    def gauges(self) -> Mapping[str, float]:
        """What is now, by the names of metrics without `taylorseer_`."""
        ...

    def close(self) -> None:
        """Finish what is under way, then release what it holds."""
        ...


def retry_in(spent: float, done: int | float) -> int:
    """Seconds until a place may be free where so many pictures took so many seconds: the mean of one, 1 to 60."""
    return min(_MOST_RETRY, max(1, math.ceil(spent / max(1, done))))


class Models:
    """Models by name; the first is the one that requests get that name none.

    Raises:
        ConfigError: Two have one name.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = {model.name: model for model in models}
        if len(self._models) < len(models):
            raise twice([model.name for model in models])

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

    def ends(self, end: Callable[[RankError], object]) -> None:
        """Call `end`, from any thread, where a model that ranks draw can draw no more."""
        for model in self:
            if (listen := getattr(model, "ends", None)) is not None:
                listen(end)

    def close(self) -> None:
        """Close all of them."""
        for model in self:
            model.close()


def twice(names: Sequence[str]) -> ConfigError:
    """That two models have one name."""
    name = next((name for name in names if list(names).count(name) > 1), names[0])
    return ConfigError(
        f"BUNDLE is {name} twice, expected bundles of different names; leave one out, or export it again with --name"
    )
