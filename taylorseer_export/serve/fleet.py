"""Triton servers as clients of many requests see them: which models each of them has, and requests that do not block.

Over gRPC alone: it has streams, and a call that is cancelled is cancelled at the server.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from taylorseer_export.errors import ConfigError, ServeError
from taylorseer_export.serve.client import check_url, client_library, input_of, outputs_of
from taylorseer_export.serve.refusals import FAILED, Late, NoServer, unavailable
from taylorseer_export.serve.repository import BUNDLE, DESCRIPTION

STREAM = "-stream"  # ends the name of a model that answers after every step
_PROBE = 5.0  # seconds in which a server says what it has
_AGAIN_MS = 2000  # longest wait before a server that was away is tried again
_ADMIN = "triton-grpc-protocol-taylorseer-admin"
_UNBOUNDED = -1  # bytes of a message
_DIED = "is not healthy"  # says Triton of a model whose process is gone, and goes on to call it ready
_MOURNED = 60.0  # seconds in which such a model is taken not to be ready, unless it draws or is seen to load
_UNKNOWN = "unknown model"  # says Triton of one that it no longer has
_FAILED = f"{FAILED} at this request, expected an answer; its log says why"
LOG = logging.getLogger("taylorseer_export.serve.api")

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Served:
    """A picture model as one server has it.

    Attributes:
        name: Of the model.
        streams: Whether it answers after every step.
        inputs: By name, their types as Triton names them.
        needed: Names of those that may not be left out.
        description: As written, see `contract.description`.
        bundle: Hash of the bundle's manifest, which has those of all its files.
        slots, places: Of all of its instances together: requests under way, and with those that wait.
    """

    name: str
    streams: bool
    inputs: Mapping[str, str]
    needed: frozenset[str]
    description: Mapping[str, Any]
    bundle: str
    slots: int
    places: int

    @property
    def base(self) -> str:
        """The name of the bundle."""
        return self.name.removesuffix(STREAM) if self.streams else self.name


class Server:
    """One server, asked by two: by a thread which models it has, and by an event loop for pictures.

    Args:
        url: `host:port` of gRPC. Where a name has several addresses, requests go to each in turn.
        names: The models to look for, by the names of their bundles; all that its repository index lists if empty.
        secret: Opens the index of a server that restricts it.

    Attributes:
        url: As given.
        known: The picture models that were ready at some time, by name.
        ready: Names of those that were when it was asked last.
        in_flight: Requests that wait for it.
        last: When it got the last one, by the monotonic clock (seconds).

    Raises:
        ConfigError: tritonclient is not installed, or `url` is something else.
    """

    def __init__(self, url: str, names: Sequence[str] = (), secret: str = "") -> None:
        check_url(url, "--triton")
        self.url, self._names, self._secret = url, names, secret
        self._library = client_library("grpc")
        self._asker = self._library.InferenceServerClient(url, channel_args=_channel())
        self._client: Any = None
        self.known: dict[str, Served] = {}
        self.ready: frozenset[str] = frozenset()
        self.in_flight, self.last = 0, 0.0
        self._died: dict[str, float] = {}  # models by name, and when that was noticed

    def look(self) -> None:
        """Ask what it has; blocks for seconds at most.

        Raises:
            NoServer: It does not answer; nothing of it is ready.
            ConfigError: It restricts its index, or a model of ours was written before it described itself.
        """
        try:
            found = [served_of(self._config(name)) for name in self._listed()]
        except self._library.InferenceServerException as error:
            self.ready, self._died = frozenset(), {}
            raise self._away(error) from error
        except ConfigError:
            self.ready = frozenset()
            raise
        own = {one.name: one for one in found if one is not None}
        late = time.monotonic() - _MOURNED
        self._died = {name: when for name, when in self._died.items() if name in own and when > late}
        self.known, self.ready = {**self.known, **own}, frozenset(own.keys() - self._died.keys())

    def _listed(self) -> list[str]:
        """Names of the models that are ready."""
        if self._names:
            names = [name + end for name in self._names for end in ("", STREAM)]
            return [name for name in names if self._asker.is_model_ready(name, client_timeout=_PROBE)]
        headers = {_ADMIN: self._secret} if self._secret else None
        try:
            index = self._asker.get_model_repository_index(headers, as_json=True, client_timeout=_PROBE)
        except self._library.InferenceServerException as error:
            if "restricted" not in str(error.message()):
                raise
            raise ConfigError(
                f"repository index of {self.url} is restricted, expected --models or the secret in TAYLORSEER_ADMIN; "
                "name the models"
            ) from error
        return [entry["name"] for entry in index.get("models", []) if entry.get("state") == "READY"]

    def _config(self, name: str) -> dict[str, Any]:
        answered = self._asker.get_model_config(name, as_json=True, client_timeout=_PROBE)
        config: dict[str, Any] = answered["config"]
        return config

    async def ask(
        self,
        model: Served,
        values: Mapping[str, Any],
        timeout: float,
        on_answer: Callable[[Outputs], object],
        request_id: str = "",
    ) -> Outputs:
        """Send a request and wait for its last answer; it is cancelled at the server where this is cancelled here.

        Args:
            model: Of `known`.
            values: Inputs by name, as of `Client.infer`.
            timeout: Seconds after which the server gives it up. This side does not.
            on_answer: Of a model that streams: called with the outputs of every answer but the last.
            request_id: By which the server names it in its log and its traces.

        Raises:
            ConfigError: The request is wrong.
            Unavailable: It was given up, or not taken; `NoServer` where this server is not there.
            ServeError: It failed.
        """
        declared = [{"name": name, "datatype": kind} for name, kind in model.inputs.items()]
        inputs = [input_of(self._library, declared, name, value) for name, value in values.items()]
        microseconds = max(1, math.ceil(1e6 * timeout))
        asked = {"model_name": model.name, "inputs": inputs, "timeout": microseconds, "request_id": request_id}
        self.in_flight, self.last = self.in_flight + 1, time.monotonic()
        try:
            if model.streams:
                made = await self._streamed(asked, on_answer)
            else:
                made = outputs_of(await self._requests().infer(**asked))
        except self._library.InferenceServerException as error:
            if _DIED in str(error.message()):
                self._died = {**self._died, model.name: time.monotonic()}
                self.ready = self.ready - {model.name}
                raise self._away(error) from error
            raise self._said(error) from error
        else:
            self._died = {name: when for name, when in self._died.items() if name != model.name}
            return made
        finally:
            self.in_flight -= 1

    async def _streamed(self, asked: dict[str, Any], on_answer: Callable[[Outputs], object]) -> Outputs:
        import grpc

        # Without the header `triton_grpc_error`, by which errors have a status: from Triton 24.08 to 26.03 an error in
        # that mode can end the whole server (its stream is freed while the model's last flag is still to come).
        call = self._requests().stream_infer(_once(asked))
        last: Outputs = {}
        try:
            async for result, error in call:
                if error is not None:
                    raise error
                last = outputs_of(result)
                if "executed" not in last:
                    on_answer(last)
        except grpc.RpcError as error:
            raise self._library.InferenceServerException(error.details(), str(error.code())) from error
        except BaseException:
            call.cancel()
            raise
        if "executed" not in last:
            LOG.error("%s ended a stream of %s before its last answer", self.url, asked["model_name"])
            raise ServeError(_FAILED, "INTERNAL")
        return last

    def _requests(self) -> Any:
        """The client of the event loop that runs; made there."""
        if self._client is None:
            from tritonclient.grpc import aio

            self._client = aio.InferenceServerClient(self.url, channel_args=_channel())
        return self._client

    def _said(self, error: Any) -> ServeError | ConfigError:
        """The server's error as one of ours, in its own words where these are for who asked."""
        status, message = _status(error), str(error.message() or error)
        known = unavailable(message)
        if known is not None:
            return known
        ours = ", expected " in message
        refused = ours and not message.startswith(FAILED)
        if status == "INVALID_ARGUMENT" or (refused and not status):  # errors of streams have none
            return ConfigError(message)
        if status == "DEADLINE_EXCEEDED":
            return Late("request is late, expected its end in its time; give it more")
        if status in ("UNAVAILABLE", "NOT_FOUND") or _UNKNOWN in message:
            return self._away(error)
        if status == "CANCELLED":
            return ServeError(message, "CANCELLED")
        LOG.error("%s failed at a request: %s", self.url, message)
        # Of what is not ours nothing is told but that it happened.
        return ServeError(message if ours else _FAILED, "INTERNAL")

    def _away(self, error: Any) -> NoServer:
        why = error.message() or error
        return NoServer(f"no server answers at {self.url} ({why}), expected one that is ready; look at it")

    async def close_requests(self) -> None:
        """End the connection of the event loop; called on it."""
        if self._client is not None:
            await self._client.close()

    def close(self) -> None:
        """End the connection by which it is asked what it has."""
        self._asker.close()


def served_of(config: Mapping[str, Any]) -> Served | None:
    """A model by its configuration as JSON; None where it is no picture model of ours.

    Raises:
        ConfigError: It is one, and does not say what it draws.
    """
    parameters = {name: entry.get("string_value", "") for name, entry in config.get("parameters", {}).items()}
    name = config["name"]
    if parameters.get("role") != "picture":
        return None
    if not {DESCRIPTION, BUNDLE} <= parameters.keys():
        raise ConfigError(
            f"model {name} has no parameter `{DESCRIPTION}`, expected one that says what it draws; write its "
            "repository again with `taylorseer-export triton`"
        )
    group = config.get("instance_group", [{}])[0]
    instances = int(group.get("count", 1)) * max(1, len(group.get("gpus", [])))
    slots, queue = int(parameters["slots"]), int(parameters["queue"])
    ports = config["input"]
    return Served(
        name,
        bool(config.get("model_transaction_policy", {}).get("decoupled")),
        {port["name"]: _datatype(port["data_type"]) for port in ports},
        frozenset(port["name"] for port in ports if not port.get("optional")),
        json.loads(parameters[DESCRIPTION]),
        parameters[BUNDLE],
        instances * slots,
        instances * (slots + queue),
    )


def _datatype(data_type: str) -> str:
    """`TYPE_STRING` of a configuration as requests name it: `BYTES`."""
    return "BYTES" if data_type == "TYPE_STRING" else data_type.removeprefix("TYPE_")


def _channel() -> list[tuple[str, Any]]:
    return [
        ("grpc.max_send_message_length", _UNBOUNDED),
        ("grpc.max_receive_message_length", _UNBOUNDED),
        ("grpc.lb_policy_name", "round_robin"),
        ("grpc.max_reconnect_backoff_ms", _AGAIN_MS),
    ]


async def _once(asked: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield asked


def _status(error: Any) -> str:
    """`UNAVAILABLE` of `StatusCode.UNAVAILABLE`; empty where there is none."""
    return str(error.status() or "").rpartition(".")[2]
