"""The TensorRT runner: plans of `tensorrt` and `tensorrt_rtx`, bound by name to torch tensors that never move.

A captured CUDA graph holds the state of the execution context it was captured from, so every bound call has a context
of its own. Contexts are cheap, because they bring no scratch memory: all share one block, since no two run at a time.
TensorRT-RTX compiles for the GPU at hand when a context is made, keeps that in a cache on disk, and captures by itself.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from taylorseer_export.bundle.atomic import replacing
from taylorseer_export.bundle.contract import unlike
from taylorseer_export.bundle.device import Device
from taylorseer_export.bundle.driver import driver_cuda
from taylorseer_export.bundle.manifest import Graph
from taylorseer_export.bundle.store import Bundle
from taylorseer_export.bundle.tensorrt import dtype_names, extents, library, library_name, logger
from taylorseer_export.errors import BundleError, StepError, first_line
from taylorseer_export.runtime.engines import check_version
from taylorseer_export.runtime.group import Group
from taylorseer_export.runtime.runner import Buffer, Call, check_binding
from taylorseer_export.runtime.torch_runner import TorchRunner, current, located

# Graphs that never send, as tests hold for every model.
_ALONE = ("prepare", "forecast")


def open_runner(
    bundle: Bundle, device: Device, threads: int, cuda_graphs: bool = True, group: Group | None = None
) -> TensorRTRunner:
    """Load the plans of a bundle, after library, driver and GPU were found to be those it was built for.

    Raises:
        BundleError: Says what the bundle needs and how to build it for this machine.
    """
    trt = library(bundle.manifest.engine.kind, BundleError)
    check_library(bundle, trt.__version__)
    check_gpu(bundle, device)
    return TensorRTRunner(trt, bundle, device, cuda_graphs, group)


def check_library(bundle: Bundle, installed: str) -> None:
    """Refuse another version than the one that built the plans; a version-compatible plan runs on later ones too.

    Raises:
        BundleError: Names both versions.
    """
    engine = bundle.manifest.engine
    name = library_name(engine.kind)
    built = engine.versions.get(name, "0")
    if "version-compatible" not in engine.options or _numbers(installed) < _numbers(built):
        check_version(bundle, name, installed, parts=4)


def check_gpu(bundle: Bundle, device: Device) -> None:
    """Refuse a machine without the driver that the plans need, and a GPU that is none of theirs.

    Raises:
        BundleError: Names what is here, what is needed, and the command that builds for here.
    """
    import torch

    limits, command = bundle.manifest.engine.device, bundle.manifest.command()
    wanted = limits.get("compute_capability", "none")
    if not torch.cuda.is_available():
        raise BundleError(
            f"this machine has no GPU that torch {torch.__version__} sees, expected one of compute capability "
            f"{wanted.replace(' ', ' or ')} for {bundle.folder}; run it there, or export again with "
            f"`taylorseer-export {bundle.manifest.family} --engine onnxruntime`"
        )
    release = limits.get("cuda", "0")
    if driver_cuda() < int(release):
        raise BundleError(
            f"the NVIDIA driver serves CUDA {driver_cuda()}, expected {release} or newer for {bundle.folder}; "
            f"upgrade the driver, or export again here with `{command}`"
        )
    gpu = located(device).number
    here, name = torch.cuda.get_device_capability(gpu), torch.cuda.get_device_name(gpu)
    arch = {"gpu_arch": "{}.{}".format(*here)} if bundle.manifest.engine.kind == "tensorrt-rtx" else {}
    seen = "{}.{}".format(*here)
    least = wanted.removesuffix("+") if wanted.endswith("+") else None
    if here < _numbers(least) if least else seen not in wanted.split():
        raise BundleError(
            f"compute capability is {seen}, expected {wanted.replace(' ', ' or ')}, for which {bundle.folder} was "
            f"built; export again here with `{bundle.manifest.command(**arch)}`"
        )
    if limits.get("gpu", name) != name:
        raise BundleError(
            f"the GPU is {name}, expected {limits['gpu']}, for which {bundle.folder} was "
            f"built; export again here with `{command}`, or with --hardware-compatibility-level ampere-plus there"
        )


class TensorRTRunner(TorchRunner):
    """Runs the plans of a bundle.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        bundle: The bundle.
        device: The GPU; without a number torch's current one. Its plans, contexts and scratch belong to it.
        cuda_graphs: Whether calls are captured. Streamed weights cannot be, and count as fallbacks.
        group: The ranks, where the bundle is shared out; all of them bind the same calls in the same order, since a
            context takes their communicator from all at once.

    Raises:
        BundleError: A plan is refused, or its tensors are not those of the manifest.
    """

    alignment = 256  # bytes; what the library reads at once

    def __init__(
        self, trt: Any, bundle: Bundle, device: Device, cuda_graphs: bool = True, group: Group | None = None
    ) -> None:
        self._given = bundle.manifest.engine.options
        cuda_graphs = cuda_graphs and "weight-streaming" not in self._given
        self._captures_itself = bundle.manifest.engine.kind == "tensorrt-rtx" and cuda_graphs
        graphs: dict[str, Graph] = dict(bundle.manifest.graphs.items())
        super().__init__({}, graphs, device, cuda_graphs and not self._captures_itself)
        if self._captures_itself:
            self._record = _warm
        self._trt, self._log, self._bundle, self._group = trt, logger(trt), bundle, group
        with current(self.device):
            self._runtime = trt.Runtime(self._log)
            self._engines = {name: self._loaded(name) for name in graphs}
        self._caches: dict[str, Any] = {}
        self._scratch: Buffer | None = None
        self._lane: Any = None

    def bind(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        contract, engine = self.graphs[graph], self._engines[graph]
        aliased = getattr(engine, "get_aliased_input_tensor", lambda name: None)  # since release 10.15
        aliases = {t.name: str(source) for t in contract.outputs if (source := aliased(t.name))}
        check_binding(contract, inputs, outputs, aliases)
        buffers = {t.name: inputs[t.name] for t in contract.inputs} | {
            t.name: outputs[t.name] for t in contract.outputs
        }
        with current(self.device):
            call = self._bound(graph, inputs, buffers)
        return self.call_on_device(graph, buffers, call)

    def _bound(self, graph: str, inputs: Mapping[str, Buffer], buffers: Mapping[str, Buffer]) -> Call:
        """A launch of a context of its own, which has the shapes and addresses of these buffers."""
        contract, context = self.graphs[graph], self._context(graph)
        for tensor in contract.inputs:
            if not context.set_input_shape(tensor.name, inputs[tensor.name].shape):
                raise StepError(
                    f"input `{tensor.name}` of graph `{graph}` is {list(inputs[tensor.name].shape)}, expected a shape "
                    f"within its profile ({self._log.last()}); use such a size, or export again with --size"
                )
        for name, buffer in buffers.items():
            if not context.set_tensor_address(name, buffer.address):
                raise StepError(
                    f"tensor `{name}` of graph `{graph}` is at {buffer.address:#x}, expected an address that the "
                    f"engine takes ({self._log.last()}); check that its rows fill multiples of {self.alignment} bytes"
                )
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            raise StepError(
                f"shapes of graph `{graph}` are {first_line(error)}, expected sizes that go together; check that they "
                "lie in the bundle's ranges"
            ) from error
        assert not missing, f"bug in taylorseer-export: {missing} are not bound"
        scratch = self._scratch_of(context.update_device_memory_size_for_shapes())
        context.set_device_memory(scratch.address, scratch.nbytes)
        return partial(self._run, graph, context, (scratch, buffers))

    def close(self) -> None:
        super().close()
        for graph, cache in self._caches.items():
            if (compiled := cache.serialize()) is None:
                continue  # compiled again next time
            path = self._cache_file(graph)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial_file:
                partial_file.write_bytes(memoryview(compiled))
        self._caches.clear()
        self._engines.clear()
        self._scratch = None

    def _run(self, graph: str, context: Any, held: object) -> None:
        """Queue the graph behind what was queued before it; `held` is the memory that the context has addresses of."""
        if not self._on_a_stream(context.execute_async_v3):
            raise StepError(
                f"graph `{graph}` failed ({self._log.last()}), expected it to run; "
                "check that the sizes lie in the bundle's ranges"
            )

    def _on_a_stream(self, launch: Callable[[int], bool]) -> bool:
        """Launch on the current stream, or beside it where that is the default one, which can neither overlap nor be
        captured."""
        if not self.device.is_gpu:
            return launch(0)
        import torch

        here = torch.cuda.current_stream()
        if here != torch.cuda.default_stream():
            return launch(here.cuda_stream)
        self._lane = self._lane or torch.cuda.Stream()
        self._lane.wait_stream(here)
        done = launch(self._lane.cuda_stream)
        here.wait_stream(self._lane)
        return done

    def _scratch_of(self, size: int) -> Buffer:
        """The block that contexts share. A larger one is only for calls bound from now on: captures keep addresses."""
        if self._scratch is None or self._scratch.nbytes < size:
            self._scratch = self.buffer((max(size, 1),), "uint8")
        return self._scratch

    def _context(self, graph: str) -> Any:
        """A context without memory of its own.

        Raises:
            StepError: The library makes none, which it says with None.
        """
        context = self._made_context(graph)
        if context is None:
            raise StepError(
                f"an execution context of graph `{graph}` is not made ({self._log.last()}), expected one for each "
                "bound call; free memory of the GPU, or use fewer slots"
            )
        if self._group is not None and graph not in _ALONE:
            if not context.set_communicator(self._group.communicator()):
                raise StepError(
                    f"an execution context of graph `{graph}` does not take the communicator of {self._group.size} "
                    f"ranks ({self._log.last()}), expected it to send between them; see that each rank has a GPU of "
                    "its own, of compute capability 8.0 or more"
                )
        return context

    def _made_context(self, graph: str) -> Any:
        trt, engine = self._trt, self._engines[graph]
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._bundle.manifest.engine.kind != "tensorrt-rtx":
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if self._captures_itself:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # By default kernels for the shapes at hand are made aside and come in when they are done: between two steps of
        # a loop, whose bits they change. `prepare` runs once for a request and does not wait for any.
        made = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = made.NONE if graph == "prepare" else made.EAGER
        if graph not in self._caches:
            self._caches[graph] = config.create_runtime_cache()
            file = self._cache_file(graph)
            if file.is_file():  # one of another driver or GPU is refused by the library, and written anew
                self._caches[graph].deserialize(file.read_bytes())
        if not config.set_runtime_cache(self._caches[graph]):
            return None
        return engine.create_execution_context(config)

    def _cache_file(self, graph: str) -> Path:
        """Where what TensorRT-RTX compiled for this GPU is kept: the user's cache, as the bundle is not to change."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return home / "taylorseer-export" / f"{self._bundle.manifest.cache_key}-{graph}.rtx"

    def _loaded(self, graph: str) -> Any:
        """The engine of one plan, its weights in place and its tensors compared with the contract."""
        trt, bundle = self._trt, self._bundle
        path = bundle.path(self.graphs[graph].file)
        again = f"export again here with `{bundle.manifest.command()}`"
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            if problem := invalid(trt, self._runtime, plan):
                raise BundleError(f"{path} is not valid here ({problem}), expected a plan of this release; {again}")
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BundleError(
                f"{path} is refused by {trt.__name__} {trt.__version__} ({self._log.last()}), expected a plan it can "
                f"load; {again}"
            )
        if "strip-plan" in self._given:
            bundle.check_listed(f"{graph}.onnx")
            refitter = trt.Refitter(engine, self._log)
            weights = trt.OnnxParserRefitter(refitter, self._log)
            if not (weights.refit_from_file(str(bundle.path(f"{graph}.onnx"))) and refitter.refit_cuda_engine()):
                raise BundleError(
                    f"{path} does not take its weights from {graph}.onnx ({self._log.last()}), expected all; {again}"
                )
        if "weight-streaming" in self._given:
            budget = self._budget(engine)
            engine.weight_streaming_budget_v2 = budget  # the property keeps from us whether it was taken
            if engine.weight_streaming_budget_v2 != budget:
                raise BundleError(
                    f"{path} streams its weights within {engine.weight_streaming_budget_v2} bytes, expected {budget} "
                    f"({self._log.last()}); free memory of the GPU"
                )
        if problem := self._unlike(graph, engine):
            raise BundleError(f"{path}: {problem}, as in the manifest; {again}")
        return engine

    def _budget(self, engine: Any) -> int:
        """Bytes of weights that stay on the GPU where weights are streamed.

        The library's Python interface gives its own choice as a number of 32 bits, which wraps for larger weights.
        Half of what is free leaves room for the other engines.
        """
        size: int = engine.streamable_weights_size
        if size < 1 << 31:
            return int(engine.get_weight_streaming_automatic_budget())
        import torch

        free, _ = torch.cuda.mem_get_info(self.device.number)
        return max(0, min(size, (free - engine.device_memory_size_v2) // 2))

    def _unlike(self, graph: str, engine: Any) -> str | None:
        """How the tensors and ranges of an engine differ from the manifest; None if they agree."""
        trt, contract, dimensions = self._trt, self.graphs[graph], self._bundle.manifest.dimensions
        ours = dtype_names(trt)
        seen: dict[Any, dict[str, tuple[str, tuple[int, ...]]]] = {m: {} for m in trt.TensorIOMode.__members__.values()}
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            dtype = engine.get_tensor_dtype(name)
            entry = (ours.get(dtype, str(dtype)), tuple(engine.get_tensor_shape(name)))
            seen[engine.get_tensor_mode(name)][name] = entry
            if (place := engine.get_tensor_location(name)) != trt.TensorLocation.DEVICE:
                return f"`{name}` is read in memory of the {place.name.lower()}, expected that of the device"
        problem = unlike(contract, seen[trt.TensorIOMode.INPUT], seen[trt.TensorIOMode.OUTPUT], dimensions)
        if problem:
            return problem
        for tensor in contract.inputs:
            low, _, high = (tuple(shape) for shape in engine.get_tensor_profile_shape(tensor.name, 0))
            least, _, most = extents(tensor, dimensions)
            if any(a > b for a, b in zip((*low, *most), (*least, *high), strict=True)):
                return (
                    f"profile of `{tensor.name}` is {list(low)} to {list(high)}, expected {list(least)} to {list(most)}"
                )
        return None


def _warm(graph: str, call: Call) -> Call:
    """Takes the place of the recorder where the library captures by itself: it compiles and captures on a first run."""
    call()
    return call


def invalid(trt: Any, runtime: Any, plan: Any) -> str | None:
    """Why the header of a plan says that it does not run here; None where it does, or the library cannot tell."""
    if not hasattr(runtime, "get_engine_validity"):
        return None
    verdict, reasons = runtime.get_engine_validity(plan[: runtime.engine_header_size])
    if verdict != trt.EngineValidity.INVALID:
        return None
    members = trt.EngineInvalidityDiagnostics.__members__.items()
    named = [name.lower().replace("_", " ") for name, member in members if reasons & int(member.value)]
    return ", ".join(named) or "the library gives no reason"


def _numbers(version: str) -> tuple[int, ...]:
    """`10.9.0.34` as numbers that compare; what is no number ends it."""
    parts = []
    for part in version.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)
