"""Engine calls shared by several slots: inputs are gathered into one batch, outputs go back to each slot.

Slots can share a call when their next steps run the same graph on the same sizes, and agree in everything that has no
sample dimension: the weights of a forecast, the scales of an update, position ids.

A shared call reads the weights once for all, and pays for it by gathering. A forecast step reads few weights and all
of the Taylor buffers, so gathering costs more than it saves (three times the step, on the embedded FLUX): a graph is
shared only if the Taylor buffers it reads are smaller than its weights.

Whether an engine gives a sample the same bits in a batch as alone depends on its kernels. It is not assumed: the first
call of every kind, size and count is made both ways and compared, and a combination that differs is never shared.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from taylorseer_export.bundle.low_rank import LORA
from taylorseer_export.bundle.manifest import GraphName, Tensor
from taylorseer_export.bundle.shapes import names, resolve
from taylorseer_export.errors import StepError
from taylorseer_export.runtime.adapter import Adapter
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.memory import Memory
from taylorseer_export.runtime.runner import Buffer, Call
from taylorseer_export.runtime.schedule import ForecastStep, FullStep
from taylorseer_export.runtime.slot import Slot

BATCH = "batch"
_SHARED: frozenset[GraphName] = frozenset({"full", "forecast", "rest"})

# A buffer's parts by sample: one part each, or one for each entry of a Taylor buffer.
_Parts = list[list[Buffer]]
# Where the memory of a slot has a tensor at a step: `Memory.source` or `Memory.target`.
_Place = Callable[[Memory, Tensor, FullStep | ForecastStep], Buffer]


_Pair = tuple[Buffer, Buffer]


class _Bound(NamedTuple):
    """One graph bound for a number of samples: per tensor its buffer, and its parts by sample.

    `pairs` are those parts beside the parts of a slot's memory, by way, place in the call, and entry of Taylor buffers.
    `adapted` holds the LoRA that is in place, nothing before the first call.
    """

    call: Call
    inputs: dict[str, Buffer]
    outputs: dict[str, Buffer]
    parts: dict[str, _Parts]
    pairs: WeakKeyDictionary[Memory, dict[tuple[_Place, int, int], list[_Pair]]]
    adapted: list[Adapter | None]


class SharedCalls:
    """Runs the staged step of several slots as one engine call; for use by one thread at a time.

    Args:
        denoiser: The loaded bundle.

    Attributes:
        unequal: What was found to differ from running alone and is not shared: (graph, sizes, samples).
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.unequal: set[Hashable] = set()
        self._equal: set[Hashable] = set()
        self._bound: dict[Hashable, _Bound] = {}
        self._pays: dict[Hashable, bool] = {}
        graphs = denoiser.manifest.graphs
        tensors = [t for name in _SHARED & graphs.keys() for t in (*graphs[name].inputs, *graphs[name].outputs)]
        fixed = BATCH not in denoiser.manifest.dimensions
        # The most samples of one call; 1 where samples do not lie side by side in every tensor.
        self.most = 1 if fixed or not all(map(_separable, tensors)) else denoiser.manifest.dimensions[BATCH].maximum

    def key(self, slot: Slot, ids: Hashable) -> Hashable:
        """Slots with equal keys may share the call of their upcoming step; None where it does not pay.

        Args:
            slot: With a request under way.
            ids: What stands for the request's inputs without a sample dimension, from `ids_of`.
        """
        step, name = slot.upcoming, slot.graph
        graph = slot.contract.manifest.graphs[name]
        kind = (name, *slot.sizes.items())
        if kind not in self._pays:
            state = sum(
                slot.memory.source(tensor, step).nbytes for tensor in graph.inputs if tensor.role == "taylor_in"
            )
            self._pays[kind] = state <= graph.weights_bytes
        if not self._pays[kind]:
            return None
        # The numbers go to all samples of a call; full steps of the snapshots layout have none.
        numbers = step.numbers.tobytes() if any(tensor.role == "weights" for tensor in graph.inputs) else b""
        return name, frozenset(slot.sizes.items() - {(BATCH, slot.sizes[BATCH])}), numbers, ids

    def run(self, slots: Sequence[Slot]) -> bool:
        """Run the staged step of every slot in one call.

        Returns:
            Whether it was done; otherwise nothing has changed and each slot has to `run` alone: the engine refused the
            call, an answer is not finite, or calls of this size were found to differ.
        """
        graph = slots[0].graph
        samples = sum(slot.sizes[BATCH] for slot in slots)
        sizes = {**slots[0].sizes, BATCH: samples}
        combination = (graph, tuple(sorted(sizes.items())))
        if combination in self.unequal:
            return False
        bound = self._bound.get(combination) or self._bind(graph, sizes)
        self._bound[combination] = bound
        self._gather(graph, slots, bound)
        try:
            bound.call()
        except StepError:
            return False
        if not all(np.isfinite(bound.outputs[name].read()).all() for name in slots[0].contract.predictions.values()):
            return False
        if combination in self._equal:
            self._scatter(graph, slots, bound)
            return True
        for slot in slots:
            slot.run()
        (self._equal if self._same(graph, slots, bound) else self.unequal).add(combination)
        return True

    def _bind(self, graph: GraphName, sizes: dict[str, int]) -> _Bound:
        contract, runner = self.denoiser.manifest.graphs[graph], self.denoiser.runner
        inputs = {t.name: runner.buffer(resolve(t.shape, sizes), t.dtype) for t in contract.inputs}
        outputs = {t.name: runner.buffer(resolve(t.shape, sizes), t.dtype) for t in contract.outputs}
        buffers = {**inputs, **outputs}
        parts = {t.name: _parts(t, buffers[t.name]) for t in (*contract.inputs, *contract.outputs) if BATCH in t.shape}
        return _Bound(runner.bind(graph, inputs, outputs), inputs, outputs, parts, WeakKeyDictionary(), [])

    def _gather(self, graph: GraphName, slots: Sequence[Slot], bound: _Bound) -> None:
        inputs, first = self.denoiser.manifest.graphs[graph].inputs, slots[0]
        for tensor in inputs:
            if tensor.role == LORA and bound.adapted != [first.memory.adapted]:  # large, and seldom another
                bound.adapted.clear()
                bound.inputs[tensor.name].copy(first.memory.source(tensor, first.upcoming))
                bound.adapted.append(first.memory.adapted)
            elif tensor.role != LORA and BATCH not in tensor.shape:
                bound.inputs[tensor.name].copy(first.memory.source(tensor, first.upcoming))
        for shared, own in self._pairs(inputs, slots, bound, Memory.source):
            shared.copy(own)

    def _scatter(self, graph: GraphName, slots: Sequence[Slot], bound: _Bound) -> None:
        outputs = self.denoiser.manifest.graphs[graph].outputs
        for shared, own in self._pairs(outputs, slots, bound, Memory.target):
            own.copy(shared)

    def _same(self, graph: GraphName, slots: Sequence[Slot], bound: _Bound) -> bool:
        outputs = self.denoiser.manifest.graphs[graph].outputs
        pairs = self._pairs(outputs, slots, bound, Memory.target)
        return all(shared.read().tobytes() == own.read().tobytes() for shared, own in pairs)

    def _pairs(self, tensors: Sequence[Tensor], slots: Sequence[Slot], bound: _Bound, place: _Place) -> list[_Pair]:
        """Part by part of the tensors with samples: where the shared call has it, and where its slot does.

        What belongs to a slot at one place of the call is found once: that takes longer than to copy it.
        """
        found: list[_Pair] = []
        first = 0
        for slot in slots:
            step, samples = slot.upcoming, slot.sizes[BATCH]
            known, where = bound.pairs.setdefault(slot.memory, {}), (place, first, step.entry)
            if where not in known:
                known[where] = [
                    pair
                    for tensor in tensors
                    if BATCH in tensor.shape
                    for ours, own in zip(
                        bound.parts[tensor.name][first : first + samples],
                        _parts(tensor, place(slot.memory, tensor, step)),
                        strict=True,
                    )
                    for pair in zip(ours, own, strict=True)
                ]
            found += known[where]
            first += samples
        return found


def ids_of(denoiser: Denoiser, conditioning: Mapping[str, np.ndarray], lora: Adapter | None = None) -> Hashable:
    """The inputs of a request that all samples of a batch have in common, as something to compare."""
    shared = [name for name, tensor in denoiser.constants.items() if BATCH not in tensor.shape]
    return lora, *((name, np.asarray(conditioning[name]).tobytes()) for name in shared)


def _separable(tensor: Tensor) -> bool:
    """Whether samples lie side by side: along the first dimension, or the second of a Taylor buffer."""
    if any(BATCH in names(entry) for entry in tensor.shape if entry != BATCH):
        return False
    if tensor.role == "carried" and BATCH not in tensor.shape:
        return False  # of a latent, and so of each request its own
    return BATCH not in tensor.shape or tensor.shape.index(BATCH) <= 1


def _parts(tensor: Tensor, buffer: Buffer) -> _Parts:
    """The parts of a tensor by sample."""
    if tensor.shape.index(BATCH) == 0:
        return [[buffer.entry(k)] for k in range(buffer.shape[0])]
    return [[buffer.entry(m).entry(k) for m in range(buffer.shape[0])] for k in range(buffer.shape[1])]
