"""Requests to served models over HTTP, gRPC and gRPC streaming, with NVIDIA's own client library."""

from __future__ import annotations

import queue
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal

import numpy as np

from taylorseer_export.errors import ConfigError, ServeError

Protocol = Literal["http", "grpc", "stream"]
LONGEST = 600.0  # seconds that a request may take where nothing else is said
_LAST_PORT = 65535
_GRACE = 5.0  # seconds beyond the deadline for the server to say that it has passed


class Client:
    """A connection to a server, kept for many requests, one at a time.

    Args:
        url: `host:port` of the protocol.
        protocol: `http`, `grpc`, or `stream`, which is gRPC with an answer per step.

    Raises:
        ConfigError: tritonclient is not installed, or `url` is something else.
    """

    def __init__(self, url: str, protocol: Protocol = "grpc") -> None:
        self._url, self._protocol = url, protocol
        self._library = client_library("http" if protocol == "http" else "grpc")
        check_url(url, "--url")
        self._client = self._connected()
        self._declared: dict[str, list[dict[str, Any]]] = {}

    def infer(
        self,
        model: str,
        values: Mapping[str, Any],
        timeout: float = LONGEST,
        on_step: Callable[[int, dict[str, np.ndarray]], object] | None = None,
    ) -> dict[str, np.ndarray]:
        """Send one request and wait for its answer, but not for ever: a model that has died answers nothing.

        Args:
            model: Its name; for `stream` one that ends with `-stream`.
            values: Inputs by name; text as `str`, numbers and arrays as they are. They are converted to the types that
                the server says the model has; it is asked once.
            timeout: Seconds after which the server gives the request up, above 0. Shortly after, so does this side.
            on_step: With `stream`: called with the number of steps done and the outputs after each.

        Returns:
            The outputs by name.

        Raises:
            ConfigError: The model has no such input.
            ServeError: The server is not there, did not answer in time, or answered with an error.
        """
        until = time.monotonic() + timeout + _GRACE
        try:
            with self._bounded(until):
                if model not in self._declared:
                    form = {} if self._protocol == "http" else {"as_json": True, "client_timeout": _left(until)}
                    self._declared[model] = self._client.get_model_metadata(model, **form)["inputs"]
                inputs = [input_of(self._library, self._declared[model], name, value) for name, value in values.items()]
                if self._protocol == "stream":
                    return self._stream(model, inputs, timeout, until, on_step)
                bound = {} if self._protocol == "http" else {"client_timeout": _left(until)}
                return outputs_of(self._client.infer(model, inputs, timeout=round(1e6 * timeout), **bound))
        except (self._library.InferenceServerException, OSError) as error:
            if isinstance(error, TimeoutError) or "DEADLINE_EXCEEDED" in str(_status(error)):
                raise ServeError(
                    f"{self._url} did not answer in {timeout:g} s, expected an answer by then; give it more, or look "
                    "whether the model is alive",
                    "UNAVAILABLE",
                ) from error
            raise _said(self._url, error) from error

    def _connected(self) -> Any:
        # Its own limit over HTTP is of each read and 60 s; `_bounded` has that of a request.
        wait = {"network_timeout": None} if self._protocol == "http" else {}
        return self._library.InferenceServerClient(self._url, **wait)

    @contextmanager
    def _bounded(self, until: float) -> Iterator[None]:
        """Over HTTP: raise `TimeoutError` where the library waits when the time has come. gRPC has deadlines itself."""
        if self._protocol != "http":
            yield
            return
        import gevent

        limit = gevent.Timeout(_left(until))
        try:
            with limit:
                yield
        except gevent.Timeout as error:
            if error is not limit:
                raise
            self._client = self._connected()  # the answer may still come: not on a connection that is used again
            raise TimeoutError from error

    def _stream(
        self, model: str, inputs: list[Any], timeout: float, until: float, on_step: Any
    ) -> dict[str, np.ndarray]:
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client.start_stream(lambda result, error: answers.put((result, error)), stream_timeout=_left(until))
        whole = False
        try:
            self._client.async_stream_infer(model, inputs, timeout=round(1e6 * timeout))
            while True:
                try:
                    result, error = answers.get(timeout=_left(until))
                except queue.Empty:
                    raise TimeoutError from None
                if error is not None:
                    raise error
                made = outputs_of(result)
                if on_step:
                    on_step(int(made["step"][0]), made)
                if "executed" in made:
                    whole = True
                    return made
        finally:
            self._client.stop_stream(cancel_requests=not whole)

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_url(url: str, option: str) -> None:
    """Refuse what is no `host:port`.

    Raises:
        ConfigError: It is something else; says the option.
    """
    found = re.fullmatch(r"[^\s/@?#]+:([0-9]{1,5})", url)
    if not found or not url.isprintable() or int(found[1]) > _LAST_PORT:
        raise ConfigError(f"{option} is {url}, expected host:port without a scheme, like 127.0.0.1:8001; correct it")


def infer(
    url: str,
    model: str,
    values: Mapping[str, Any],
    protocol: Protocol = "grpc",
    timeout: float = LONGEST,
    on_step: Callable[[int, dict[str, np.ndarray]], object] | None = None,
) -> dict[str, np.ndarray]:
    """Send one request over a connection of its own; the arguments are those of `Client` and its `infer`."""
    with Client(url, protocol) as client:
        return client.infer(model, values, timeout, on_step)


def _left(until: float) -> float:
    """Seconds until then, by the monotonic clock; hardly any if it has passed."""
    return max(1e-3, until - time.monotonic())


def outputs_of(result: Any) -> dict[str, np.ndarray]:
    """The outputs of an answer by name."""
    response = result.get_response()
    listed = response["outputs"] if isinstance(response, dict) else response.outputs
    names = [entry["name"] if isinstance(entry, dict) else entry.name for entry in listed]
    return {name: result.as_numpy(name) for name in names}


def input_of(library: Any, declared: list[dict[str, Any]], name: str, value: Any) -> Any:
    """An input of a request.

    Args:
        library: Of the protocol.
        declared: Names and types of those that the model has.
        name, value: As of `Client.infer`.

    Raises:
        ConfigError: The model has no such input.
    """
    known = {entry["name"]: entry["datatype"] for entry in declared}
    if name not in known:
        raise ConfigError(f"input is `{name}`, expected one that the model has ({', '.join(known)}); leave it out")
    if known[name] == "BYTES":
        array = np.array([value.encode() if isinstance(value, str) else value], np.object_)
    else:
        from tritonclient.utils import triton_to_np_dtype

        array = np.atleast_1d(np.asarray(value, triton_to_np_dtype(known[name])))
    made = library.InferInput(name, list(array.shape), known[name])
    made.set_data_from_numpy(array)
    return made


def _said(url: str, error: Any) -> ServeError:
    """The server's error as one of ours; a server that does not answer at all is unavailable."""
    status = _status(error) or "UNAVAILABLE"
    message = getattr(error, "message", lambda: None)() or str(error)
    text = " ".join(str(message).split())
    return ServeError(f"{url} answered `{text}`, expected an answer; change the request or the server", str(status))


def _status(error: Any) -> Any:
    return getattr(error, "status", lambda: None)()


def client_library(protocol: str) -> Any:
    """NVIDIA's client of `http` or `grpc`.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        if protocol == "http":
            import tritonclient.http as library
        else:
            import tritonclient.grpc as library
    except ImportError as error:
        raise ConfigError(
            "tritonclient is not installed, expected it to reach a server; pip install 'taylorseer-export[triton]'"
        ) from error
    return library
