"""Why a server takes no request or gives one up, where a door answers each reason in its own way.

To Triton all of them are `UNAVAILABLE`; over HTTP they are 429, 504 and 503.
"""

from __future__ import annotations

from taylorseer_export.errors import ServeError


class QueueFull(ServeError):
    """As many requests wait as may wait; nothing was queued."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "UNAVAILABLE")


class Late(ServeError):
    """The time of a request has passed."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "UNAVAILABLE")


class Stopping(ServeError):
    """The server ends and takes nothing more."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "UNAVAILABLE")
