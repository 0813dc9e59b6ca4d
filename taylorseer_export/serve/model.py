"""The model file that Triton's Python backend runs: `1/model.py` of every served model is a copy of this one.

It translates: tensors to requests and back, errors to status codes, counts to metrics. `execute` copies the tensors and
returns; a reader makes requests of them, and answers are sent from the service's threads when they are ready, so that
later requests join the steps under way.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import triton_python_backend_utils as triton

from taylorseer_export.bundle.device import Device
from taylorseer_export.embedded.requests import warm_parts
from taylorseer_export.errors import ServeError, TaylorSeerError
from taylorseer_export.method import Plan
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.sampling import Loop
from taylorseer_export.serve import contract
from taylorseer_export.serve.loras import chosen
from taylorseer_export.serve.probe import BEAT, PROGRESS
from taylorseer_export.serve.reader import Reader
from taylorseer_export.serve.service import Limits, Service
from taylorseer_export.serve.times import Times

_FINAL = triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL
# Seconds between messages to the server, which would cost more than a small step if each step sent its own.
_METRICS_EVERY = 0.25
_CANCELLATIONS_EVERY = 0.02
_LIMITS = ("slots", "queue", "batch", "workers", "slot_bytes", "conditioning_cache")


class TritonPythonModel:
    """One instance: one bundle, its engines and its slots."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load, check and warm up; Triton calls the model ready when this returns, and unavailable if it raises."""
        config = json.loads(args["model_config"])
        options = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        self._role: contract.Role = options["role"]
        self._streams = config["model_transaction_policy"]["decoupled"]
        try:
            if find_spec("torch") is not None:  # most bundles are served without
                import torch

                torch.set_num_threads(1)  # outside of engines it runs some schedulers, whose sums are small
            bundle = Path(args["model_repository"], args["model_version"], "bundle")
            # Of several GPUs the server says which one this instance has.
            device = Device.parse(options["device"]).at(int(args["model_instance_device_id"]))
            self._denoiser = load(bundle, device, int(options["threads"]))
            warm = tuple(tuple(map(int, text.split("x"))) for text in options["warm"].split())
            for pixels in (None, *warm) if self._role == "picture" else ():
                warm_parts(self._denoiser, pixels)
            if any(port.name == "image" for port in contract.inputs(self._denoiser.manifest, self._role)):
                self._denoiser.open_parts(["encode"])
            self._profiles = dict(self._denoiser.profiles)
            # Beside the bundle, whose files are all in its manifest.
            scales, files = json.loads(options["loras"]), bundle.with_name("loras")
            given = {name: f"{files / name}.safetensors:{scale}" for name, scale in scales.items()}
            self._loras = {name: self._denoiser.adapter(file) for name, file in given.items()}
            limits = {name: int(options[name]) for name in _LIMITS}
            self._service = Service(self._denoiser, Limits(**limits, warm=warm))
            self._service.warm_up()
        except TaylorSeerError as error:
            raise triton.TritonModelException(str(error)) from error
        for call in self._service.unequal:
            triton.Logger.log_warn(f"calls of {call} give other bits shared than alone and are not shared")
        self._inputs = contract.inputs(self._denoiser.manifest, self._role, self._streams)
        self._reader = Reader(self._service.limits.slots + self._service.limits.queue)
        self._metrics = Metrics(self._service, args["model_name"], args["model_instance_name"])
        self._watch = Watch()
        gc.collect()
        gc.freeze()  # what is loaded now lives as long as the process: no collection of a request need look at it

    def execute(self, requests: list[Any]) -> None:
        """Hand requests over; each is answered through its own sender."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                tensors = ((port.name, triton.get_input_tensor_by_name(request, port.name)) for port in self._inputs)
                values = {name: tensor.as_numpy().copy() for name, tensor in tensors if tensor is not None}
                read, refuse = partial(self._read, sender, values, Times()), partial(send_error, sender)
                self._reader.hand_over(read, refuse, 1e-6 * request.timeout() or None)
            except Exception as error:  # of this request; the others go on
                send_error(sender, error)

    def _read(self, sender: Any, values: dict[str, Any], times: Times, timeout: float | None) -> None:
        """Make a request of the tensors and queue it."""
        wanted = contract.wanted(values) if self._streams else None
        lora = None
        if "lora" in values:
            manifest, text = self._denoiser.manifest, contract.text_of(values, "lora")
            name, strength = chosen(text, self._loras, f"{manifest.family}-{manifest.name}")
            lora = self._loras[name].at(strength)
        ask = contract.ask(self._denoiser, self._role, values, self._profiles, self._service.conditioning)
        ask = ask._replace(request=replace(ask.request, lora=lora))
        caller = Caller(self._denoiser, self._role, sender, wanted, times, self._watch)
        times.read()
        self._service.submit(ask.request, ask.forecasts, caller, timeout)
        caller.queued(ask.request.planned(ask.forecasts.plan))

    def finalize(self) -> None:
        """Finish what is under way, then release the engines."""
        self._reader.close()
        self._service.close()
        self._watch.close()
        self._metrics.close()
        self._denoiser.close()


class Caller:
    """The sender of one request, as the service knows it.

    Args:
        denoiser, role: Of the model.
        sender: Triton's.
        wanted: The answers before the last; None where the model sends none.
        times: That run since the request came.
        watch: Who asks whether its sender has left.
    """

    def __init__(
        self,
        denoiser: Any,
        role: contract.Role,
        sender: Any,
        wanted: contract.Wanted | None,
        times: Times,
        watch: Watch,
    ) -> None:
        self._denoiser, self._role, self._sender, self._wanted = denoiser, role, sender, wanted
        self._times, self._watch = times, watch
        self._left, self._answered = False, False
        self._line, self._pen = Lock(), Lock()  # to ask over, to write with

    def cancelled(self) -> bool:
        self._times.turn()
        if self not in self._watch.callers:  # before it is given a slot
            self._watch.callers.add(self)
            self.ask()
        return self._left

    def ask(self) -> None:
        """Ask the server whether the sender has left; takes a message there and back.

        The server dies if it is asked about a request that has its final answer.
        """
        with self._line:
            self._left = self._left or (not self._answered and bool(self._sender.is_cancelled()))

    def queued(self, plan: Plan) -> None:
        """It has a place: who asks for few answers is told, unless the service was quicker."""
        if self._wanted is None or self._wanted.previews is None:
            return
        with self._pen:
            if not self._answered:
                try:
                    self._send(lambda: contract.queued(plan), 0)
                except Exception as lost:  # the service has the request, and will answer it
                    triton.Logger.log_error(f"that a request has a place could not be sent ({lost})")

    def advanced(self, loop: Loop) -> None:
        took = self._times.step()
        told, pictured = (False, False) if self._wanted is None else self._wanted.of(loop.step, len(loop.plan))
        if told:
            with self._pen:
                self._send(lambda: contract.preview(self._denoiser, self._role, loop, took, pictured), 0)

    def finished(self, loop: Loop, executed: str) -> None:
        took = self._times.step()
        stages = self._times.stages(executed)
        self._hang_up()
        self._send(lambda: contract.answer(self._denoiser, self._role, loop, executed, took, stages), _FINAL)

    def failed(self, error: TaylorSeerError) -> None:
        self._hang_up()
        send_error(self._sender, error)

    def _hang_up(self) -> None:
        """Before the final answer: no question and no other answer is under way, and none will be."""
        with self._line, self._pen:
            self._answered = True
        self._watch.callers.discard(self)

    def _send(self, answer: Callable[[], dict[str, Any]], flags: int) -> None:
        try:
            tensors = [triton.Tensor(name, value) for name, value in answer().items()]
            self._sender.send(triton.InferenceResponse(tensors), flags=flags)
        except Exception as error:
            if not flags:
                raise
            send_error(self._sender, error)


def send_error(sender: Any, error: Exception) -> None:
    """Answer a request with an error: its status if it has one, the caller's fault if it is one of ours."""
    if isinstance(error, ServeError):
        status = error.status
    else:
        status = "INVALID_ARG" if isinstance(error, TaylorSeerError) else "INTERNAL"
    try:
        sender.send(
            triton.InferenceResponse(error=triton.TritonError(str(error), getattr(triton.TritonError, status))),
            flags=_FINAL,
        )
    except Exception as lost:
        triton.Logger.log_error(f"an answer could not be sent ({lost}): {error}")


class Watch:
    """Asks again and again which of the requests under way are cancelled, so that no step waits for the answer.

    Attributes:
        callers: Of the requests under way.
    """

    def __init__(self) -> None:
        self.callers: set[Caller] = set()
        self._stop = Event()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(_CANCELLATIONS_EVERY):
            for caller in tuple(self.callers):
                caller.ask()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


class Metrics:
    """The counts of a service at Triton's own metrics endpoint, labelled with the model."""

    def __init__(self, service: Service, model: str, instance: str) -> None:
        self._service, self._model = service, model
        self._sent: dict[str, float] = {}
        counter, gauge = triton.MetricFamily.COUNTER, triton.MetricFamily.GAUGE
        self._families = {
            name: triton.MetricFamily(name=f"taylorseer_{name}", description=text, kind=kind)
            for name, text, kind in (
                ("steps_total", "Denoising steps, by kind", counter),
                ("calls_total", "Engine calls of denoising steps, by kind", counter),
                ("step_seconds_total", "Time in engine calls, by kind (seconds)", counter),
                ("full_steps_total", "Full steps of finished requests, planned and executed", counter),
                ("requests_total", "Requests, by outcome", counter),
                ("fallbacks_total", "Engine calls that were not shared or no CUDA graph as asked, by kind", counter),
                ("conditioning_total", "Prompts, by whether what they become was kept (hit, miss)", counter),
                (
                    "prepared_total",
                    "Requests, by whether their slot was prepared for the same (hit, miss)",
                    counter,
                ),
                ("conditioning_bytes", "Memory of what is kept of prompts (bytes)", gauge),
                ("slots", "Slots", gauge),
                ("slots_in_use", "Slots that hold a request", gauge),
                ("queue", "Requests that wait for a slot", gauge),
                (BEAT, "When this process last reported, in its own wall time (seconds)", gauge),
                (PROGRESS, "When it last did a turn of work or had none to do (seconds)", gauge),
            )
        }
        self._metrics: dict[tuple[str, str, str], Any] = {}
        self._own = ("instance", instance)  # gauges of several processes would overwrite each other; counts add up
        for kind in ("full", "forecast"):
            for family in ("steps_total", "calls_total", "step_seconds_total"):
                self._metric(family, "kind", kind)
        for outcome in ("done", "failed", "cancelled", "late", "refused"):
            self._metric("requests_total", "outcome", outcome)
        for outcome in ("hit", "miss"):
            self._metric("conditioning_total", "outcome", outcome)
            self._metric("prepared_total", "outcome", outcome)
        for kind in ("shared", "cuda_graph"):
            self._metric("fallbacks_total", "kind", kind)
        self._metric("slots", *self._own).set(service.limits.slots)
        self._update()
        self._stop = Event()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _metric(self, family: str, label: str = "", value: str = "") -> Any:
        key = (family, label, value)
        if key not in self._metrics:
            labels = {"model": self._model} | ({label: value} if label else {})
            self._metrics[key] = self._families[family].Metric(labels=labels)
        return self._metrics[key]

    def _run(self) -> None:
        while not self._stop.wait(_METRICS_EVERY):
            self._update()

    def _update(self) -> None:
        now = time.time()
        self._metric(BEAT, *self._own).set(now)
        self._metric(PROGRESS, *self._own).set(now - self._service.stalled)
        self._metric("conditioning_bytes", *self._own).set(self._service.conditioning.counts.bytes)
        self._metric("slots_in_use", *self._own).set(self._service.slots_in_use)
        self._metric("queue", *self._own).set(self._service.waiting)
        for name, count in self._service.snapshot().items():
            increase = count - self._sent.get(name, 0)
            if increase:
                self._metric(*_place(name)).increment(increase)
                self._sent[name] = count

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._update()
        self._metrics.clear()  # before their families
        self._families.clear()


def _place(name: str) -> tuple[str, ...]:
    """`steps.full` -> family, label and value of its metric."""
    group, _, value = name.partition(".")
    if group in ("planned", "executed"):
        return ("full_steps_total", "when", group)
    family = "step_seconds_total" if group == "seconds" else f"{group}_total"
    return (family, "outcome" if group in ("requests", "conditioning", "prepared") else "kind", value)
