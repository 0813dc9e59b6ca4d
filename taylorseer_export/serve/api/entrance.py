"""What every request passes first: its id, its key, and the line in the log."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Awaitable, Callable

from taylorseer_export.serve.api.answers import Message, Receive, Scope, Send, refused
from taylorseer_export.serve.api.problems import LOG, Refusal
from taylorseer_export.serve.api.settings import OPEN, Settings
from taylorseer_export.serve.api.traces import Traces

App = Callable[[Scope, Receive, Send], Awaitable[None]]

_ID = "x-request-id"


class Entrance:
    """An app behind it.

    Args:
        app: Who answers.
        settings: Whose keys are asked for.
        paths: That are counted by their names; all others are one.
        answered: Told the path and the status of every answer.
        traces: Who has a span of every request, if anyone.
    """

    def __init__(
        self,
        app: App,
        settings: Settings,
        paths: tuple[str, ...],
        answered: Callable[[str, int], object],
        traces: Traces | None = None,
    ) -> None:
        self._app, self._settings, self._paths, self._answered = app, settings, paths, answered
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, path, status = time.perf_counter(), scope["path"], 0
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(_ID, "")
        request_id = given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"], state["notes"] = request_id, ""

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (_ID.encode(), request_id.encode())]
            await send(message)

        known = next((one for one in self._paths if path == one or path.startswith(f"{one}/")), "other")
        answer = self._app if path in OPEN or self._settings.allows(headers.get("authorization", "")) else _stranger
        try:
            if self._traces is None:
                await answer(scope, receive, told)
            else:
                with self._traces.answer(scope["method"], known, request_id, headers) as span:
                    try:
                        await answer(scope, receive, told)
                    finally:
                        self._traces.answered(span, status)
        finally:
            self._answered(known, status)
            took = 1e3 * (time.perf_counter() - began)
            shown = path[:128] if path.isascii() and path.isprintable() else known
            LOG.info("%s %s %s %d %.0f ms %s", request_id, scope["method"], shown, status, took, state["notes"])


async def _stranger(scope: Scope, receive: Receive, send: Send) -> None:
    message = "the API key is missing or wrong, expected `Authorization: Bearer KEY`; send one that the server knows"
    answer = refused(Refusal(message, 401, code="invalid_api_key", headers={"www-authenticate": "Bearer"}))
    await answer(scope, receive, send)
