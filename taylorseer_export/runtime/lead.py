"""Rank 0 leads: what it tells the ranks that follow it (`following.py`), and how a request begins on all of them.

A rank that follows waits for rank 0 no longer than the group's timeout, so rank 0 gives a sign of life several times in
that time; so does it learn of a rank that has died while nobody asks for anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Lock, Thread
from typing import Any, Protocol
from zlib import crc32

import numpy as np

from taylorseer_export.errors import RankError, StepError, first_line
from taylorseer_export.runtime.branches import Branches
from taylorseer_export.runtime.group import Group, Left

END = b"end"
_SIGNS = 4  # in the time after which rank 0 is given up


class Led(Protocol):
    """What is asked of a loop that all ranks run."""

    request: Any
    forecasts: Any
    plan: Any
    step: int
    latents: np.ndarray
    conditioning: list[dict[str, np.ndarray]]
    model_timesteps: np.ndarray

    @property
    def begins(self) -> bool:
        """As of `Loop`."""

    def begin(self, branches: Branches) -> None:
        """As of `Loop`."""

    def model_input(self) -> np.ndarray:
        """As of `Loop`."""

    def accept(self, prediction: np.ndarray) -> None:
        """As of `Loop`."""


class Lead:
    """What rank 0 tells those that follow: requests, one at a time, signs of life between them, and the end.

    Args:
        group: The ranks.
        encoded: (request, forecasts, the LoRA that the others have) -> what is sent.

    Attributes:
        error: Why nothing more is done together; None as long as all are there.
        busy: Whether a request is under way.
        lora: What the others have of the last request that brought one, so that it is not sent again.
        failed: Called with that, from a thread of its own, where it is learned between requests.
    """

    def __init__(self, group: Group, encoded: Callable[[Any, Any, Any], bytes]) -> None:
        self._group, self._encoded = group, encoded
        self.error: RankError | None = None
        self.lora: Any = None
        self.failed: Callable[[RankError], object] | None = None
        self._lock, self._over, self.busy = Lock(), Event(), False
        self._thread = Thread(target=self._give_signs, daemon=True)
        self._thread.start()

    def announce(self, request: Any, forecasts: Any) -> None:
        """Let all ranks begin a request.

        Raises:
            ConfigError: It is of a kind that is not sent.
            RankError: One of them is not there, or another request is under way.
        """
        data = self._encoded(request, forecasts, self.lora)
        with self._lock:
            if self.error is None and self.busy:
                raise RankError(
                    "rank 0 begins a request while one is under way, expected one at a time; end it, or start all again"
                )
            self._tell(data)
            self.busy, self.lora = True, request.lora or self.lora

    def done(self) -> None:
        """The request under way is at its end on all ranks."""
        self.busy = False

    def close(self) -> None:
        """Let the others go. Where a request was left in its middle they go by themselves, for rank 0 does not come."""
        self._over.set()
        with self._lock, suppress(RankError):
            if not self.busy and self.error is None:
                self._tell(END)
        self._thread.join()

    def _tell(self, data: bytes) -> None:
        if self.error is not None:
            raise RankError(self.error)
        try:
            self._group.broadcast(data)
        except RankError as error:
            self.error = error
            raise

    def _give_signs(self) -> None:
        while not self._over.wait(self._group.timeout / _SIGNS):
            try:
                with self._lock:
                    if not self.busy and not self._over.is_set():
                        self._tell(b"")
            except RankError as error:
                if self.failed is not None:
                    self.failed(error)
                return


@contextmanager
def beginning(group: Group | None, lead: Lead | None, loop: Led) -> Iterator[None]:
    """In the block a loop begins, on all ranks or on none.

    Args:
        group: The ranks; None where there is one.
        lead: What tells the others, on a rank 0 that leads. Where none does, all have been asked for the same.
        loop: The loop.

    Raises:
        RankError: A rank is not there.
        StepError: One did not begin, or was asked for something else.
    """
    if group is None:
        yield
        return
    if loop.step == 0 and lead is not None:
        lead.announce(loop.request, loop.forecasts)
    elif loop.step == 0:
        given = {f"{name} of call {k}": v for k, one in enumerate(loop.conditioning) for name, v in one.items()}
        arrays = {"latents": loop.latents, "timesteps": loop.model_timesteps, **given}
        if (joined := loop.request.joined) is not None:
            arrays["what is joined to the noise"] = joined.value
        facts = {name: getattr(loop.request, name) for name in ("lora", "previews", "guidance_scale")}
        facts["plan"] = loop.forecasts
        group.agree({**facts, **{name: told(value) for name, value in arrays.items()}})
    try:
        with ready(group):
            yield
    except BaseException:
        if lead is not None:
            lead.done()
            lead.lora = None  # whether all have it is not known
        raise


@contextmanager
def ready(group: Group) -> Iterator[None]:
    """What all ranks do alike, each on its own: it is done on all of them, or fails on all.

    Raises:
        RankError: A rank is not there.
        StepError: It failed on another rank.
    """
    problem: Exception | None = None
    try:
        yield
    except RankError:
        raise
    except Exception as error:  # torch's of memory is a RuntimeError; whatever it is, the others wait to hear of it
        problem = error
    told = group.exchanged("" if problem is None else first_line(problem))
    if problem is not None:
        raise problem
    for rank, said in enumerate(told):
        if said:
            raise StepError(f"rank {rank} did not begin the request ({said}), expected all ranks to; mend that there")


def leave(group: Group, lead: Lead | None, loop: Led, branches: Branches, staged: bool = False) -> None:
    """Give up a request that rank 0 leads: at its next full step, where all of them ask each other, or at its end.

    Args:
        group, lead: As of `beginning`.
        loop, branches: Begun, and not at their end.
        staged: Whether the next step is staged.
    """
    group.leaving = True
    try:
        while loop.step < len(loop.plan):
            if not staged:
                branches.stage(loop.model_input())
            branches.run()
            loop.accept(branches.finish())
            staged = False
            if loop.begins:
                loop.begin(branches)
    except Left:
        if lead is not None:
            lead.done()
    finally:
        group.leaving = False


def told(value: Any) -> str:
    """Of an array its dtype, shape and a checksum."""
    array = np.ascontiguousarray(value)
    return f"{array.dtype} {list(array.shape)} {crc32(array.tobytes())}"
