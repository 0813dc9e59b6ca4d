"""Answers as ASGI sends them, and what ends a wait for one: the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from typing import Any, TypeVar

from taylorseer_export.errors import ServeError
from taylorseer_export.serve.api.problems import problem_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Scope = MutableMapping[str, Any]

_T = TypeVar("_T")


class Answer:
    """A whole answer.

    Args:
        body: Its bytes.
        status: Of HTTP.
        content_type: Of the body.
        headers: Besides.
    """

    def __init__(
        self,
        body: bytes,
        status: int = 200,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.body, self.status = body, status
        self.headers = {"content-type": content_type, "content-length": str(len(body)), **(headers or {})}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(start(self.status, self.headers))
        await send({"type": "http.response.body", "body": self.body})


def told(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """A value as JSON."""
    return Answer(json.dumps(value).encode(), status, headers=headers)


def refused(error: BaseException, params: Mapping[str, str] | None = None) -> Answer:
    """An error, in the shape of `problem_of`."""
    problem = problem_of(error, params)
    return told(problem.body, problem.status, problem.headers)


def start(status: int, headers: Mapping[str, str]) -> Message:
    """The message that begins an answer."""
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": raw}


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` returns; it is cancelled as soon as the client has left. The body was read before.

    Raises:
        ServeError: The client has left.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ServeError("the client left, expected it to wait for its answer; send it again", "CANCELLED")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
