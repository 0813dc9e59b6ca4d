"""TensorRT plans from our ONNX graphs: one path for `tensorrt` 10 and 11, tied to the GPU that builds them, and for
`tensorrt_rtx`, which builds for the compute capabilities it is given on a machine that may have no GPU at all.

Networks are strongly typed: every precision is the graph's own, and a missing cast is an error of the parser.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from taylorseer_export.bundle.atomic import replacing
from taylorseer_export.bundle.contract import unlike
from taylorseer_export.bundle.manifest import Dimension, Engine
from taylorseer_export.bundle.tensorrt import dtype_names, extents, library, library_name, logger
from taylorseer_export.compile.draft import BaseDraft, Options
from taylorseer_export.compile.engines import Progress, library_versions
from taylorseer_export.compile.onnx import write_graphs
from taylorseer_export.compile.weights import WEIGHTS
from taylorseer_export.errors import BuildError, ConfigError
from taylorseer_export.graph.cut import Cut

_OLDEST = (8, 0)  # the first compute capability with bfloat16
_FLAGS = {
    "version-compatible": "VERSION_COMPATIBLE",
    "refit": "REFIT",
    "strip-plan": "STRIP_PLAN",
    "weight-streaming": "WEIGHT_STREAMING",
}
# Option -> (attribute of the builder's config, enumeration of its values or None for a number).
_SETTINGS = {
    "builder-optimization-level": ("builder_optimization_level", None),
    "max-aux-streams": ("max_aux_streams", None),
    "profiling-verbosity": ("profiling_verbosity", "ProfilingVerbosity"),
    "hardware-compatibility-level": ("hardware_compatibility_level", "HardwareCompatibilityLevel"),
}


def check(options: Options) -> None:
    """Refuse a device that is no GPU, a machine that cannot build, and an option that this release does not take.

    Raises:
        ConfigError: An option cannot be honoured.
        BuildError: The library is not installed, or there is no GPU and it needs one.
    """
    refuse_cpu(options)
    trt = library(options.engine, BuildError)
    if options.engine != "tensorrt-rtx":
        this_gpu(options.engine)
    configure(trt, trt.Builder(logger(trt)), options)


def refuse_cpu(options: Options) -> None:
    """Refuse a device that these engines do not run on."""
    if options.device == "cpu":
        raise ConfigError(
            f"--device is cpu, expected cuda for --engine {options.engine}; leave it out, or use --engine onnxruntime"
        )


def engine(options: Options) -> Engine:
    """What the plans are tied to.

    Raises:
        BuildError: The library is not installed, or there is no GPU and it needs one.
    """
    trt, name = library(options.engine, BuildError), library_name(options.engine)
    device = {"devices": "cuda"}
    if options.engine == "tensorrt-rtx":
        device["compute_capability"] = " ".join(architectures(trt, options.engine_options))
    else:
        device |= this_gpu(options.engine, options.engine_options.get("hardware-compatibility-level", "none"))
    return Engine(
        kind=options.engine,  # type: ignore[arg-type]
        versions={name: trt.__version__, **library_versions(options.engine, "onnx", "torch", "diffusers")},
        device={**device, **_cuda_of(name)},
    )


def graph_file(graph: str) -> str:
    """File of a graph's plan in its bundle."""
    return f"{graph}.plan"


def build(draft: BaseDraft, folder: Path, progress: Progress) -> None:
    """Write the graphs as ONNX, build each into a plan, and keep the ONNX only where a stripped plan needs its weights.

    Raises:
        BuildError: A graph has no ONNX form, the parser or the builder refuses it, or an option is not in this release.
    """
    options = draft.options
    trt = library(options.engine, BuildError)
    log = logger(trt)
    builder = trt.Builder(log)
    files = write_graphs(draft, folder, progress)
    for cut in draft.graphs:
        network, parser = parse(trt, builder, log, files[cut.name])
        check_network(trt, draft, cut, network)
        config = configure(trt, builder, options)
        add_profile(builder, config, cut, draft.dimensions())
        monitor = _monitor(trt, cut.name, progress)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        if monitor.stopped is not None:
            raise monitor.stopped
        if plan is None:
            raise BuildError(
                f"graph `{cut.name}` was not built by {library_name(options.engine)} {trt.__version__} ({log.last()}), "
                "expected a plan; raise --workspace or leave out the option that it names"
            )
        with (folder / graph_file(cut.name)).open("wb") as file:
            file.write(memoryview(plan))
        _keep_timings(config, options)
        del parser  # it holds the weights that the network reads
    if "strip-plan" not in options.engine_options:
        for path in (*files.values(), folder / WEIGHTS):
            path.unlink()


def architectures(trt: Any, given: Mapping[str, Any]) -> list[str]:
    """The compute capabilities to build for: those of `--gpu-arch`, else all that this release knows from 8.0 on.

    Raises:
        ConfigError: This release builds for no such capability.
    """
    known = {}
    for name in trt.ComputeCapability.__members__:
        if name.startswith("SM"):
            known[f"{name[2:-1]}.{name[-1]}"] = name
    wanted = str(given.get("gpu-arch", "")).split(",") if "gpu-arch" in given else None
    for entry in wanted or ():
        if entry not in known:
            raise ConfigError(
                f"--gpu-arch is {entry}, expected capabilities that {trt.__name__} {trt.__version__} builds for "
                f"({', '.join(known)}); choose among them, or use --engine tensorrt on that GPU"
            )
    return wanted or [entry for entry in known if tuple(map(int, entry.split("."))) >= _OLDEST]


def this_gpu(kind: str, level: str = "none") -> dict[str, str]:
    """What a plan built on this machine is tied to, by its hardware compatibility level.

    Raises:
        BuildError: There is no GPU.
    """
    if not torch.cuda.is_available():
        raise BuildError(
            f"this machine has no GPU that torch {torch.__version__} sees, expected the one the engines are for, on "
            f"which --engine {kind} builds; build there, or use --engine tensorrt-rtx"
        )
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    if level == "ampere-plus":
        return {"compute_capability": "8.0+"}
    limits = {"compute_capability": capability}
    return limits if level == "same-compute-capability" else {**limits, "gpu": torch.cuda.get_device_name()}


def parse(trt: Any, builder: Any, log: Any, path: Path) -> tuple[Any, Any]:
    """(network, parser) of one ONNX file; weights are read from the file it points to.

    Raises:
        BuildError: The parser's own sentence, which names the node.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(k) for k in range(parser.num_errors)]
        first = " ".join(errors[0].desc().split()) if errors else log.last()
        node = f" at node {errors[0].node_name()}" if errors and errors[0].node_name() else ""
        raise BuildError(
            f"{path.name} is refused by the parser of {trt.__name__} {trt.__version__}{node} ({first}), expected a "
            "graph it can type; choose another --precision, and report it"
        )
    return network, parser


def check_network(trt: Any, draft: BaseDraft, cut: Cut, network: Any) -> None:
    """Refuse a network whose inputs and outputs are not those of the contract.

    Raises:
        BuildError: Names the first tensor that differs.
    """
    ours = dtype_names(trt)

    def seen(tensors: list[Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {t.name: (ours.get(t.dtype, str(t.dtype)), tuple(t.shape)) for t in tensors}

    inputs = seen([network.get_input(k) for k in range(network.num_inputs)])
    outputs = seen([network.get_output(k) for k in range(network.num_outputs)])
    problem = unlike(draft.contract(cut), inputs, outputs, draft.dimensions())
    if problem:
        raise BuildError(f"network of graph `{cut.name}`: {problem}; report it")


def configure(trt: Any, builder: Any, options: Options) -> Any:
    """The builder's config with every option that was given, each read back after it was set.

    Raises:
        BuildError: This release does not have the option, or does not take the value.
    """
    given, config = options.engine_options, builder.create_builder_config()
    if "tf32" not in given:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.engine == "tensorrt-rtx":
        wanted = architectures(trt, given)
        config.num_compute_capabilities = len(wanted)
        for k, entry in enumerate(wanted):
            config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{entry.replace('.', '')}"], k)
    for option, flag in _FLAGS.items():
        if option in given:
            member = _member(trt, "BuilderFlag", flag, option)
            config.set_flag(member)
            _taken(trt, option, flag, config.get_flag(member), True)
    for option, (attribute, enumeration) in _SETTINGS.items():
        if option in given:
            value = given[option]
            if enumeration:
                value = _member(trt, enumeration, value.replace("-", "_").upper(), option)
            setattr(config, attribute, value)
            _taken(trt, option, value, getattr(config, attribute, None), value)
    for pool, size in memory_pools(options).items():
        member = _member(trt, "MemoryPoolType", pool, "pool-limit")
        config.set_memory_pool_limit(member, size)
        _taken(trt, "pool-limit", f"{pool} {size}", config.get_memory_pool_limit(member), size)
    if "timing-cache" in given:
        path = Path(given["timing-cache"])
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if not config.set_timing_cache(cache, False):
            raise BuildError(f"{path} is a timing cache of another GPU or release, expected one of here; delete it")
    return config


def memory_pools(options: Options) -> dict[str, int]:
    """Memory pool by the library's name -> its limit in bytes."""
    given = options.engine_options
    pools = {"WORKSPACE": given["workspace"]} if "workspace" in given else {}
    for entry in filter(None, given.get("pool-limit", "").split(",")):
        name, size = entry.split(":")
        pools[name.replace("-", "_").upper()] = int(size)
    return pools


def add_profile(builder: Any, config: Any, cut: Cut, dimensions: Mapping[str, Dimension]) -> None:
    """One optimisation profile from smallest over typical to largest size of every input."""
    profile = builder.create_optimization_profile()
    for tensor in cut.inputs:
        profile.set_shape(tensor.name, *extents(tensor, dimensions))
    config.add_optimization_profile(profile)


def _member(trt: Any, enumeration: str, name: str, option: str) -> Any:
    members = getattr(trt, enumeration).__members__
    if name not in members:
        raise BuildError(
            f"--{option} is {name.lower()}, expected one that {trt.__name__} {trt.__version__} has "
            f"({', '.join(members).lower()}); choose among them or leave it out"
        )
    return members[name]


def _taken(trt: Any, option: str, value: Any, seen: Any, expected: Any) -> None:
    """Refuse a setting that the library dropped without a word."""
    if seen != expected:
        raise BuildError(
            f"--{option} is {value}, expected a value that {trt.__name__} {trt.__version__} takes (it keeps {seen}); "
            "choose another or leave it out"
        )


def _keep_timings(config: Any, options: Options) -> None:
    """Write the timing cache back, whole or not at all."""
    if "timing-cache" in options.engine_options:
        path = Path(options.engine_options["timing-cache"])
        with replacing(path) as partial:
            partial.write_bytes(memoryview(config.get_timing_cache().serialize()))


def _monitor(trt: Any, graph: str, progress: Progress) -> Any:
    """Reports the steps of the outermost phase, and stops the build when reporting raises, Ctrl-C included."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.stopped: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                if phase_name in self.steps:
                    progress(f"plan of {graph}", step + 1, self.steps[phase_name])
            except BaseException as error:  # nothing may pass through the library's own code
                self.stopped = error
            return self.stopped is None

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _cuda_of(name: str) -> dict[str, str]:
    """The CUDA release that the installed library needs of a driver, where its package says so."""
    for release in ("13", "12"):
        try:
            version(f"{name}_cu{release}")
        except PackageNotFoundError:
            continue
        return {"cuda": release}
    return {}
