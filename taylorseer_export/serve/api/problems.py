"""What went wrong, in the words and status codes of the OpenAI API.

{"error": {"message": …, "type": …, "param": …, "code": …}}
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from taylorseer_export.errors import ConfigError, ServeError, StepError, TaylorSeerError
from taylorseer_export.serve.refusals import FAILED, Late, NoServer, QueueFull, Stopping

LOG = logging.getLogger("taylorseer_export.serve.api")
CLIENT_LEFT = 499  # of no standard; stands in the log alone, since nobody reads the answer

_TYPES = {401: "invalid_request_error", 429: "rate_limit_error"}


class Refusal(ServeError):
    """A request that is answered with an error.

    Args:
        message: The sentence.
        status: Of HTTP.
        param: The field that it is about.
        code: For programs.
        headers: That the answer has besides.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, "INVALID_ARG")
        self.http, self.param, self.code, self.headers = status, param, code, dict(headers or {})


class Problem(NamedTuple):
    """An error as it is answered."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def problem_of(error: BaseException, params: Mapping[str, str] | None = None) -> Problem:
    """How an error is answered.

    Args:
        error: Of ours, or any other; of those nothing is told but that they happened.
        params: First word of a sentence -> the field that it is about.
    """
    status, param, code, headers = 500, None, "internal_error", {}
    message = str(error)
    if isinstance(error, Refusal):
        status, param, code, headers = error.http, error.param, error.code or "", error.headers
    elif isinstance(error, QueueFull):
        status, code = 429, "rate_limit_exceeded"
    elif isinstance(error, Late | TimeoutError):
        status, code = 504, "timeout"
        message = message or "request is late, expected its end in its time; give it more"
    elif isinstance(error, Stopping):
        status, code = 503, "server_stopping"
    elif isinstance(error, NoServer):
        status, code = 503, "server_unavailable"
    elif isinstance(error, ServeError) and error.status == "CANCELLED":
        status, code = CLIENT_LEFT, "cancelled"
    elif isinstance(error, ConfigError | StepError):
        first = re.match(r"(?:input )?[`-]*(\w+)", message)
        status, code, param = 400, "invalid_value", (params or {}).get(first[1]) if first else None
    elif not isinstance(error, TaylorSeerError):
        LOG.error("a request failed", exc_info=error)
        message = f"{FAILED} at this request, expected an answer; its log says why"
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    told = {"message": message, "type": kind, "param": param, "code": code or None}
    return Problem(status, {"error": told}, headers)
