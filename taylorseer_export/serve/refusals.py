"""Why a server takes no request or gives one up, where a door answers each reason in its own way.

To Triton all of them are `UNAVAILABLE`, and their sentences tell them apart; over HTTP they are 429, 504 and 503.
"""

from __future__ import annotations

from typing import ClassVar

from taylorseer_export.errors import ServeError


class Unavailable(ServeError):
    """A request that may be sent again.

    Attributes:
        begins: How every sentence of this reason begins.
    """

    begins: ClassVar[tuple[str, ...]] = ()

    def __init__(self, message: str) -> None:
        super().__init__(message, "UNAVAILABLE")


class QueueFull(Unavailable):
    """As many requests wait as may wait; nothing was queued."""

    begins = ("queue is full",)


class Late(Unavailable):
    """The time of a request has passed."""

    begins = ("request is late",)


class Stopping(Unavailable):
    """The server ends and takes nothing more."""

    begins = ("the server is stopping", "the server stopped")


def stopped(why: Exception) -> Stopping:
    """To whoever waits for a picture that ranks draw which are no longer together."""
    return Stopping(f"the server stopped ({why}), expected it to run on; send it again when it does")


class NoServer(Unavailable):
    """No server that is ready has the model."""

    begins = ("no server",)


FAILED = "the server failed"
"""How the sentence of a request begins that failed by no fault of its sender: errors of streams have no status."""


def unavailable(message: str) -> Unavailable | None:
    """The reason that a sentence of a server gives; None where it is none of ours."""
    for reason in (QueueFull, Late, Stopping, NoServer):
        if message.startswith(reason.begins):
            return reason(message)
    return None
