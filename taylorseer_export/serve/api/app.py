"""The images API as an ASGI app: which path is answered by what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.serve.api.answers import Answer, refused, told
from taylorseer_export.serve.api.entrance import Entrance
from taylorseer_export.serve.api.fields import PARAMS
from taylorseer_export.serve.api.images import Images
from taylorseer_export.serve.api.metrics import Metrics
from taylorseer_export.serve.api.models import Model, Models
from taylorseer_export.serve.api.problems import Refusal
from taylorseer_export.serve.api.settings import Settings
from taylorseer_export.serve.api.traces import Traces
from taylorseer_export.serve.api.videos import Videos

if TYPE_CHECKING:
    from starlette.requests import Request

_PAINTERS = 2  # threads that decode and write pictures
_PATHS = ("/v1/images/generations", "/v1/images/edits", "/v1/videos", "/v1/models", "/health", "/metrics")
# The page has its script and its style within, shows pictures that it was sent, and talks to this server alone.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)

Handler = Callable[[Any], Awaitable[Any]]


def app_of(models: Models, settings: Settings | None = None, traces: Traces | None = None) -> Entrance:
    """The app over models that are ready. It closes them and the traces when its server ends.

    Args:
        models: Who draws.
        settings: Limits and keys.
        traces: Who has spans of requests and pictures, if anyone.

    Raises:
        ConfigError: starlette, python-multipart or prometheus-client is not installed.
    """
    starlette = _starlette()
    settings = settings or Settings()
    metrics = Metrics(models)
    pool = ThreadPoolExecutor(_PAINTERS, "painter")

    def drawn(model: str, times: dict[str, float | None]) -> None:
        metrics.drawn(model, times)
        if traces is not None:
            traces.drawn(model, times)

    images = Images(models, settings, pool, drawn)
    videos = Videos(models, settings, pool, drawn)
    page = files("taylorseer_export.serve.api").joinpath("page.html").read_bytes()

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        await videos.close()
        await asyncio.to_thread(models.close)
        pool.shutdown(wait=False, cancel_futures=True)
        if traces is not None:
            await asyncio.to_thread(traces.close)

    async def listed(request: Request) -> Answer:
        return told({"object": "list", "data": [_entry(model) for model in models]})

    async def one(request: Request) -> Answer:
        return told(_entry(models.named(request.path_params["name"])))

    async def health(request: Request) -> Answer:
        return _health(models, settings)

    async def metered(request: Request) -> Answer:
        return Answer(await asyncio.to_thread(metrics.text), content_type=metrics.content_type)

    async def shown(request: Request) -> Answer:
        more = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff"}
        return Answer(page, content_type="text/html; charset=utf-8", headers=more)

    routes = [
        starlette.route("/v1/images/generations", _answering(images.generations), "POST"),
        starlette.route("/v1/images/edits", _answering(images.edits), "POST"),
        starlette.route("/v1/videos", _answering(videos.create), "POST"),
        starlette.route("/v1/videos", _answering(videos.listed), "GET"),
        starlette.route("/v1/videos/{id}", _answering(videos.one), "GET"),
        starlette.route("/v1/videos/{id}", _answering(videos.delete), "DELETE"),
        starlette.route("/v1/videos/{id}/content", _answering(videos.content), "GET"),
        starlette.route("/v1/models", _answering(listed), "GET"),
        starlette.route("/v1/models/{name:path}", _answering(one), "GET"),
        starlette.route("/health", _answering(health), "GET"),
        starlette.route("/metrics", _answering(metered), "GET"),
        starlette.route("/", _answering(shown), "GET"),
    ]
    return Entrance(starlette.app(routes, lifespan), settings, _PATHS, metrics.answered, traces)


def _answering(handler: Handler) -> Handler:
    """A handler whose errors are answers."""

    async def answered(request: Any) -> Any:
        try:
            return await handler(request)
        except Exception as error:
            return refused(error, PARAMS)

    return answered


def _entry(model: Model) -> dict[str, Any]:
    """A model as the OpenAI API lists it; what else is known of it stands under a name of its own."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "taylorseer-export",
        "taylorseer": dict(model.description),
    }


def _health(models: Models, settings: Settings) -> Answer:
    told_of = {model.name: model.health(settings.stall) for model in models}
    ill = [one["status"] for one in told_of.values() if one["status"] != "ok"]
    return told({"status": ill[0] if ill else "ok", "models": told_of}, 503 if ill else 200)


class _Starlette:
    """What is used of starlette."""

    def __init__(self) -> None:
        import python_multipart  # noqa: F401  starlette needs it for forms, and says so at the first one alone
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        self._app, self._route, self._error = Starlette, Route, HTTPException

    def route(self, path: str, handler: Handler, method: str) -> Any:
        return self._route(path, handler, methods=[method])

    def app(self, routes: list[Any], lifespan: Any) -> Any:
        async def elsewhere(request: Request, error: Any) -> Answer:
            """A path that is none, or that takes another method."""
            code = "not_found" if error.status_code == 404 else "method_not_allowed"
            path = request.url.path[:128]
            message = f"{request.method} {path} is not answered here, expected one of {', '.join(_PATHS)}; correct it"
            return refused(Refusal(message, error.status_code, code=code, headers=error.headers))

        handlers: dict[Any, Any] = {self._error: elsewhere}
        return self._app(routes=routes, lifespan=lifespan, exception_handlers=handlers)


def _starlette() -> _Starlette:
    try:
        return _Starlette()
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed, expected it for the images API; pip install 'taylorseer-export[serve]'"
        ) from error
