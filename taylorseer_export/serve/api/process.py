"""The server itself: one process, one event loop, the models in threads behind it."""

from __future__ import annotations

import gc
import logging
import socket
from collections.abc import Callable
from typing import Any

from taylorseer_export.errors import ConfigError, RankError
from taylorseer_export.serve.api.app import app_of
from taylorseer_export.serve.api.models import Models
from taylorseer_export.serve.api.problems import LOG
from taylorseer_export.serve.api.settings import Settings
from taylorseer_export.serve.api.traces import Traces

_STOP = 60  # seconds in which requests under way are finished
_BACKLOG = 2048


def bound(host: str, port: int) -> socket.socket:
    """A socket of this address, which takes no connections yet.

    Args:
        host: A name or an address of this machine.
        port: 0 chooses a free one.

    Raises:
        ConfigError: It is in use, or none of this machine.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, number)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except OSError:
            made.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port} is not to be had ({error.strerror or error}), expected a free address of "
            "this machine; choose another"
        ) from error
    return made


def address_of(listener: socket.socket) -> str:
    """The address of a socket as a URL has it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server_of(models: Models, settings: Settings, traces: Traces | None = None) -> Any:
    """A uvicorn server of the API that has not started; it closes models and traces when it ends.

    Raises:
        ConfigError: A library of the extra `serve` is not installed.
    """
    uvicorn = _uvicorn()
    app = app_of(models, settings, traces)
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,  # the front writes a line with the request's id
            proxy_headers=False,
            server_header=False,
            backlog=_BACKLOG,
            ws="none",
            timeout_graceful_shutdown=_STOP,
        )
    )


def serve(
    models: Models,
    settings: Settings,
    listener: socket.socket,
    ready: Callable[[], object],
    traces: Traces | None = None,
) -> RankError | None:
    """Serve until SIGINT or SIGTERM; then take nothing more and finish what is under way. A second one cuts that short.

    So it does, too, where a model can draw no more because a rank is gone.

    Args:
        models: Loaded and warm; closed at the end.
        settings: Limits and keys.
        listener: From `bound`.
        ready: Called before the first request is taken.
        traces: As in `app_of`.

    Returns:
        Why it ended, where a rank is gone: all who waited have been answered with that.

    Raises:
        ConfigError: A library of the extra `serve` is not installed.
    """
    server, errors = server_of(models, settings, traces), []

    def end(error: RankError) -> None:
        errors.append(error)
        server.should_exit = True

    models.ends(end)
    _log_to_stderr()
    gc.collect()
    gc.freeze()  # what is loaded now lives as long as the process: no collection of a request need look at it
    listener.listen(_BACKLOG)  # who comes now waits until the loop runs
    ready()
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn sends the signal that ended it once more, when all is done
        LOG.info("stopped")
    return errors[0] if errors else None


def _log_to_stderr() -> None:
    """A line per request, where nobody has said otherwise."""
    if not LOG.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        LOG.addHandler(handler)
        LOG.setLevel(logging.INFO)


def _uvicorn() -> Any:
    try:
        import uvicorn
    except ImportError as error:
        raise ConfigError(
            "uvicorn is not installed, expected it for the images API; pip install 'taylorseer-export[serve]'"
        ) from error
    return uvicorn
