"""The memory of one slot, and the engine calls bound to it.

Buffers are allocated and bound once, and never move. What a request is, and which of the calls a step replays, is the
slot's to know.

Shapes: S steps, B batch, W width of a table, M = order + 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from taylorseer_export.bundle.low_rank import LORA
from taylorseer_export.bundle.manifest import GraphName, Tensor
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.errors import StepError
from taylorseer_export.runtime.adapter import Adapter
from taylorseer_export.runtime.contract import Contract
from taylorseer_export.runtime.group import Group
from taylorseer_export.runtime.probe import Probe
from taylorseer_export.runtime.runner import Buffer, Call, Runner
from taylorseer_export.runtime.schedule import ForecastStep, FullStep


class _Prepared(NamedTuple):
    """The prepare graph bound for one number of steps: `clocks` `[S]` go in, `tables` `[S, B, W]` come out."""

    clocks: dict[str, Buffer]
    tables: dict[str, Buffer]
    call: Call


class Memory:
    """Taylor buffers, inputs, outputs and step tables of one slot, and the calls bound to them.

    Args:
        contract: Of the bundle.
        runner: The loaded engines.
        sizes: Of every dimension but the steps.
        group: The ranks that run it, where it is shared out.

    Attributes:
        buffers: Name -> buffer of every tensor of the graphs in the loop, but the Taylor buffers.
        taylor: Sets of Taylor buffers, site -> buffer `[M, ...]`: one, or two with derivatives, where a full step reads
            one set and writes the other.
        calls: Graph -> its bound calls: of `full` and `rest` one for each entry that it may write, of `forecast` one
            for each set that it may read.
        prediction: The buffer of `noise_pred`.
        others: Further latent -> the buffer of its prediction.
        numbers: Graph -> the buffer of what the schedule gives it: weights of a forecast, scales of an update.
        probe: What measures the errors of a guard; None in a bundle without guards.
        adapted: The LoRA whose low-rank weights are in place; None for zeros.
    """

    def __init__(
        self, contract: Contract, runner: Runner, sizes: Mapping[str, int], group: Group | None = None
    ) -> None:
        self._contract, self._runner, self._sizes = contract, runner, dict(sizes)
        graphs, self._layout = contract.manifest.graphs, contract.manifest.state.layout
        self.buffers: dict[str, Buffer] = {}
        looped = [t for name, g in graphs.items() if name != "prepare" for t in (*g.inputs, *g.outputs)]
        for tensor in (*looped, *contract.constants.values(), *([contract.lora] if contract.lora else [])):
            if tensor.role not in ("taylor_in", "taylor_out", "probe_in") and tensor.name not in self.buffers:
                self.buffers[tensor.name] = self._new(tensor)
        self.prediction, *others = (self.buffers[name] for name in contract.predictions.values())
        self.others = dict(zip(contract.others, others, strict=True))
        self.numbers: dict[GraphName, Buffer] = {
            name: self.buffers[tensor.name]
            for name in ("full", "forecast", "rest")
            if name in graphs
            for tensor in graphs[name].inputs
            if tensor.role == "weights"
        }
        self.taylor = [self._taylor_buffers() for _ in range(2 if self._layout == "derivatives" else 1)]
        self.calls: dict[GraphName, list[Call]] = {"full": self._bind_full("full"), "forecast": self._bind_forecast()}
        self.probe: Probe | None = None
        if "probe" in graphs:
            self.calls["rest"] = self._bind_full("rest")
            self.probe = Probe(contract.manifest, runner, self.buffers, self._new, group)
        self.adapted: Adapter | None = None
        self._prepared: _Prepared | None = None
        self._number_tables: dict[GraphName, Buffer] = {}

    def call(self, graph: GraphName, step: FullStep | ForecastStep) -> Call:
        """The bound call of a graph of the loop that reads and writes what a step does."""
        calls = self.calls[graph]
        return calls[step.entry % len(calls)]

    def clear(self) -> None:
        """What an earlier request left in the Taylor buffers, infinities included, must not reach the next one."""
        for buffers in self.taylor:
            for buffer in buffers.values():
                buffer.clear()

    def adapt(self, lora: Adapter | None) -> None:
        """Put the low-rank weights of a LoRA in place, zeros for None, unless they are there.

        Raises:
            StepError: The bundle has no such inputs, or they are of another shape; nothing has changed.
        """
        if lora == self.adapted:
            return
        buffer = self.buffers.get(LORA)
        if buffer is None or (lora is not None and lora.matrices.shape != buffer.shape):
            raise StepError(
                "lora is given, expected none, since the bundle has no low-rank inputs; export again with --lora-rank"
                if buffer is None
                else "lora is of another bundle, expected one that was read for this one; ask its own adapter() for it"
            )
        self.adapted = None
        buffer.clear()  # whatever ends a copy halfway leaves what None says
        if lora is not None:
            try:
                buffer.write(lora.values())
            except BaseException:
                buffer.clear()
                raise
        self.adapted = lora

    def source(self, tensor: Tensor, step: FullStep | ForecastStep) -> Buffer:
        """Where a step reads an input of its graph."""
        if tensor.role != "taylor_in":
            return self.buffers[tensor.name]
        entry = step.entry + isinstance(step, FullStep)  # a full step reads what it does not write
        return self.taylor[entry % len(self.taylor)][_site(tensor)]

    def target(self, tensor: Tensor, step: FullStep | ForecastStep) -> Buffer:
        """Where a step writes an output of its graph."""
        if tensor.role != "taylor_out":
            return self.buffers[tensor.name]
        if self._layout == "derivatives":
            return self.taylor[step.entry][_site(tensor)]
        return self.taylor[0][_site(tensor)].entry(step.entry)

    def prepare(self, times: Mapping[str, np.ndarray]) -> dict[str, Buffer]:
        """Run the prepare graph for some steps; what is constant for the request lands in `buffers`.

        Args:
            times: Inputs of role step, `[S]` each, as of `Contract.times`.

        Returns:
            Tables `[S, B, W]` by name; they stay on the device.
        """
        name = self._contract.timestep.name
        if self._prepared is None or self._prepared.clocks[name].shape != times[name].shape:
            self._prepared = self._bind_prepare(len(times[name]))
        for name, clock in self._prepared.clocks.items():
            clock.write(times[name])
        self._prepared.call()
        return self._prepared.tables

    def number_tables(self, steps: Sequence[FullStep | ForecastStep]) -> dict[GraphName, Buffer]:
        """Send what the schedule gives the graphs at every step, all at once.

        Returns:
            Graph -> `[S, N]`, the numbers of each step that runs it, in the rows of the others zeros.
        """
        for graph, buffer in self.numbers.items():
            shape = (len(steps), *buffer.shape)
            rows = np.zeros(shape, np.float32)
            for row, step in zip(rows, steps, strict=True):
                if isinstance(step, ForecastStep) == (graph == "forecast"):
                    row[:] = step.numbers
            if graph not in self._number_tables or self._number_tables[graph].shape != shape:
                self._number_tables[graph] = self._runner.buffer(shape, "float32")
            self._number_tables[graph].write(rows)
        return self._number_tables

    # Binding -------------------------------------------------------------------------------------------------------

    def _new(self, tensor: Tensor) -> Buffer:
        return self._runner.buffer(resolve(tensor.shape, self._sizes), tensor.dtype)

    def _taylor_buffers(self) -> dict[str, Buffer]:
        """Site -> buffer `[M, ...]`."""
        inputs = self._contract.manifest.graphs["forecast"].inputs
        return {_site(t): self._new(t) for t in inputs if t.role == "taylor_in"}

    def _buffers_of(self, tensors: Sequence[Tensor], taylor: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """Tensor -> its buffer; Taylor buffers by their site in `taylor`."""
        roles = ("taylor_in", "taylor_out")
        return {t.name: taylor[_site(t)] if t.role in roles else self.buffers[t.name] for t in tensors}

    def _bind_forecast(self) -> list[Call]:
        """One bound call per set of buffers that a forecast step may read."""
        graph = self._contract.manifest.graphs["forecast"]
        outputs = self._buffers_of(graph.outputs, {})
        return [self._runner.bind("forecast", self._buffers_of(graph.inputs, read), outputs) for read in self.taylor]

    def _bind_full(self, name: GraphName) -> list[Call]:
        """One bound call of `full` or `rest` per entry that a full step may write."""
        graph = self._contract.manifest.graphs[name]
        if self._layout == "derivatives":
            a, b = self.taylor
            pairs = [(b, a), (a, b)]
        else:
            (ring,) = self.taylor
            entries = self._contract.defaults.capacity.order + 1
            pairs = [(ring, {site: buffer.entry(k) for site, buffer in ring.items()}) for k in range(entries)]
        return [
            self._runner.bind(name, self._buffers_of(graph.inputs, read), self._buffers_of(graph.outputs, written))
            for read, written in pairs
        ]

    def _bind_prepare(self, steps: int) -> _Prepared:
        """Bind the prepare graph for `steps` timesteps; kept until a request of another length comes."""
        graph, sizes = self._contract.manifest.graphs["prepare"], {**self._sizes, "steps": steps}
        clocks = {t.name: self._runner.buffer((steps,), t.dtype) for t in graph.inputs if t.role == "step"}
        rows = [t for t in graph.outputs if t.role == "step"]
        tables = {t.name: self._runner.buffer(resolve(t.shape, sizes), t.dtype) for t in rows}
        inputs = {t.name: clocks[t.name] if t.role == "step" else self.buffers[t.name] for t in graph.inputs}
        outputs = {t.name: tables[t.name] if t.role == "step" else self.buffers[t.name] for t in graph.outputs}
        return _Prepared(clocks, tables, self._runner.bind("prepare", inputs, outputs))


def _site(tensor: Tensor) -> str:
    """Site of a Taylor buffer."""
    assert tensor.site is not None, f"bug in taylorseer-export: `{tensor.name}` has no site"
    return tensor.site
