"""Requests to served models over HTTP, gRPC and gRPC streaming, with NVIDIA's own client library."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal

import numpy as np

from taylorseer_export.errors import ConfigError, ServeError

Protocol = Literal["http", "grpc", "stream"]
_LONGEST_WAIT = 600.0  # seconds without any word from the server


class Client:
    """A connection to a server, kept for many requests, one at a time.

    Args:
        url: `host:port` of the protocol.
        protocol: `http`, `grpc`, or `stream`, which is gRPC with an answer per step.

    Raises:
        ConfigError: tritonclient is not installed.
    """

    def __init__(self, url: str, protocol: Protocol = "grpc") -> None:
        self._url, self._protocol = url, protocol
        self._library = _library("http" if protocol == "http" else "grpc")
        self._client = self._library.InferenceServerClient(url)
        self._declared: dict[str, list[dict[str, Any]]] = {}

    def infer(
        self,
        model: str,
        values: Mapping[str, Any],
        timeout: float | None = None,
        on_step: Callable[[int, dict[str, np.ndarray]], object] | None = None,
    ) -> dict[str, np.ndarray]:
        """Send one request and wait for its answer.

        Args:
            model: Its name; for `stream` one that ends with `-stream`.
            values: Inputs by name; text as `str`, numbers and arrays as they are. They are converted to the types that
                the server says the model has; it is asked once.
            timeout: Seconds after which the server gives the request up; never if left out.
            on_step: With `stream`: called with the number of steps done and the outputs after each.

        Returns:
            The outputs by name.

        Raises:
            ConfigError: The model has no such input.
            ServeError: The server is not there, or answered with an error.
        """
        microseconds = None if timeout is None else round(1e6 * timeout)
        try:
            if model not in self._declared:
                form = {} if self._protocol == "http" else {"as_json": True}
                self._declared[model] = self._client.get_model_metadata(model, **form)["inputs"]
            inputs = [_input(self._library, self._declared[model], name, value) for name, value in values.items()]
            if self._protocol == "stream":
                return self._stream(model, inputs, microseconds, on_step)
            return _outputs(self._client.infer(model, inputs, timeout=microseconds))
        except (self._library.InferenceServerException, OSError) as error:
            raise _said(self._url, error) from error

    def _stream(self, model: str, inputs: list[Any], timeout: int | None, on_step: Any) -> dict[str, np.ndarray]:
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client.start_stream(lambda result, error: answers.put((result, error)))
        try:
            self._client.async_stream_infer(model, inputs, timeout=timeout)
            while True:
                result, error = answers.get(timeout=_LONGEST_WAIT)
                if error is not None:
                    raise error
                made = _outputs(result)
                if on_step:
                    on_step(int(made["step"][0]), made)
                if "executed" in made:
                    return made
        finally:
            self._client.stop_stream()

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def infer(
    url: str,
    model: str,
    values: Mapping[str, Any],
    protocol: Protocol = "grpc",
    timeout: float | None = None,
    on_step: Callable[[int, dict[str, np.ndarray]], object] | None = None,
) -> dict[str, np.ndarray]:
    """Send one request over a connection of its own; the arguments are those of `Client` and its `infer`."""
    with Client(url, protocol) as client:
        return client.infer(model, values, timeout, on_step)


def _outputs(result: Any) -> dict[str, np.ndarray]:
    response = result.get_response()
    listed = response["outputs"] if isinstance(response, dict) else response.outputs
    names = [entry["name"] if isinstance(entry, dict) else entry.name for entry in listed]
    return {name: result.as_numpy(name) for name in names}


def _input(library: Any, declared: list[dict[str, Any]], name: str, value: Any) -> Any:
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
    status = getattr(error, "status", lambda: None)() or "UNAVAILABLE"
    message = getattr(error, "message", lambda: None)() or str(error)
    text = " ".join(str(message).split())
    return ServeError(f"{url} answered `{text}`, expected an answer; change the request or the server", str(status))


def _library(protocol: str) -> Any:
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
