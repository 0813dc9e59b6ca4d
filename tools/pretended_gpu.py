"""A GPU that is not there: what torch and Triton ask of one before they compile for it, answered from a data sheet.

Needs torch's CUDA build, which installs and imports without a driver, and the headers of the CUDA toolkit. Kernels are
compiled down to machine code by the real compilers and never run; tensors on it are fake. Whoever pretends cannot take
it back: torch keeps what it asked while it compiles, so one process compiles for one GPU. What it does before that, a
trace or an export, is the same for all: `in_a_fork` compiles it for one after the other.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

_WARP = 32


@dataclass(frozen=True)
class Gpu:
    """What the compilers ask of a GPU.

    Attributes:
        name: As the driver says it.
        capability: (major, minor) compute capability.
        multiprocessors: Their number.
        threads: Most threads of a multiprocessor at a time.
        shared: Most bytes of shared memory that a block can ask for.
        l2: Bytes of the second-level cache.
        memory: Bytes of memory.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    threads: int
    shared: int
    l2: int
    memory: int

    @property
    def number(self) -> int:
        """The capability as one number, like 90."""
        return 10 * self.capability[0] + self.capability[1]

    def properties(self) -> SimpleNamespace:
        """Under torch's names."""
        return SimpleNamespace(
            name=self.name,
            major=self.capability[0],
            minor=self.capability[1],
            multi_processor_count=self.multiprocessors,
            max_threads_per_multi_processor=self.threads,
            max_threads_per_block=1024,
            regs_per_multiprocessor=1 << 16,
            warp_size=_WARP,
            shared_memory_per_block=48 << 10,
            shared_memory_per_block_optin=self.shared,
            shared_memory_per_multiprocessor=self.shared + 1024,
            L2_cache_size=self.l2,
            total_memory=self.memory,
        )


# Compute capability -> the GPU of it that serves diffusion models most.
GPUS = {
    "8.0": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 2048, 163 << 10, 40 << 20, 80 << 30),
    "8.9": Gpu("NVIDIA L40S", (8, 9), 142, 1536, 99 << 10, 96 << 20, 48 << 30),
    "9.0": Gpu("NVIDIA H200", (9, 0), 132, 2048, 227 << 10, 60 << 20, 141 << 30),
    "10.0": Gpu("NVIDIA B200", (10, 0), 148, 2048, 227 << 10, 126 << 20, 180 << 30),
    "12.0": Gpu("NVIDIA GeForce RTX 5090", (12, 0), 170, 1536, 99 << 10, 96 << 20, 32 << 30),
}


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
        registers: Of a thread.
        spilled: 32-bit words of a thread beside its registers.
        shared: Bytes of shared memory of a block.
    """

    registers: int
    spilled: int
    shared: int


@dataclass
class Pretence:
    """The GPU that this process believes in, and what one compilation for it left.

    Attributes:
        gpu: May be changed until the first compilation.
        kernels: Name -> kernel.
        bytes: What scheduled kernels read and write, by whose they are: `triton`, or those of `libraries`.
        others: GPUs that each kernel, as it was written for `gpu`, is compiled for as well.
        kernels_of: Name of such a GPU -> its kernels.
    """

    gpu: Gpu
    kernels: dict[str, Kernel] = field(default_factory=dict)
    bytes: Counter[str] = field(default_factory=Counter)
    others: tuple[Gpu, ...] = ()
    kernels_of: dict[str, dict[str, Kernel]] = field(default_factory=dict)


def why_not() -> str | None:
    """Why nothing can be compiled for a GPU here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA build, and cannot compile for a GPU"
    if torch.cuda.is_available():
        return "a GPU is there: what is for it is tested on it"
    home = _toolkit()
    if home is None:
        return "the headers of the CUDA toolkit are missing: pip install nvidia-cuda-cccl nvidia-cuda-nvcc"
    return None


def _toolkit() -> Path | None:
    """The folder of the CUDA toolkit, as the packages of NVIDIA lay it beside torch."""
    beside = Path(torch.__file__).parents[1] / "nvidia" / f"cu{(torch.version.cuda or '').split('.')[0]}"
    found = os.environ.get("CUDA_HOME")
    candidates = [Path(found)] if found else [beside]
    return next((home for home in candidates if (home / "include" / "nv" / "target").is_file()), None)


def pretend(gpu: Gpu, scratch: Path, link: bool = True) -> Pretence:
    """Make torch and Triton believe in `gpu`, for the rest of this process; returns where all that will be seen.

    Args:
        gpu: The GPU.
        scratch: Folder that gets a driver library without content, to link against.
        link: Whether the C++ of a wrapper is compiled, or written alone; kernels are compiled always.
    """
    late = {"torch._inductor", "torch._dynamo.device_interface"} & sys.modules.keys()
    assert not late, f"{late} is loaded already, expected to pretend first; torch keeps what it asked of the machine"
    pretence = Pretence(gpu)
    _answer_for_torch(pretence)
    _answer_for_triton(pretence)
    _toolkit_paths(scratch)
    _watch(pretence, link)
    return pretence


def in_a_fork(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns in a copy of this process, which torch can tell what it likes; an error if it ends early."""
    with tempfile.TemporaryFile("w+") as answer:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                json.dump(work(), answer)
                answer.flush()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answer.seek(0)
        return json.load(answer) if status == 0 else {"error": f"its process ended with {status}"}


def _answer_for_torch(pretence: Pretence) -> None:
    from torch._subclasses import fake_tensor

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device=None: pretence.gpu.properties(),
        "get_device_capability": lambda device=None: pretence.gpu.capability,
        "get_device_name": lambda device=None: pretence.gpu.name,
        "is_bf16_supported": lambda including_emulation=True: True,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "_lazy_init": lambda: None,
        "get_rng_state": lambda device=0: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=0: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    fake_tensor.init_gpu_context = lambda device: None
    # These methods turn to the driver before the dispatcher sees that their tensor is fake.
    torch.Tensor.__invert__ = lambda value: torch.bitwise_not(value)
    item = torch.Tensor.__getitem__
    torch.Tensor.__getitem__ = lambda value, at: _indexed(item, value, at)
    torch.Tensor.contiguous = lambda value, memory_format=torch.contiguous_format: torch.ops.aten.contiguous(
        value, memory_format=memory_format
    )
    # So does a move to `cuda` without a number, which asks for the current one.
    move = torch.ops.aten.to.device
    moved = move._op
    move._op = lambda value, device, *how, **named: moved(value, _numbered(device), *how, **named)
    attention = torch.ops.aten.scaled_dot_product_attention.default
    attention.py_impl(torch._C.DispatchKey.CompositeImplicitAutograd)(_attention)


def _indexed(real: Any, value: torch.Tensor, at: Any) -> torch.Tensor:
    """The entries at tensors of indices, of whole dimensions beside them; all else as `real` takes it."""
    parts = at if isinstance(at, tuple) else (at,)
    chosen = [part if isinstance(part, torch.Tensor) else None for part in parts]
    whole = (part == slice(None) for part, one in zip(parts, chosen, strict=True) if one is None)
    if all(one is None for one in chosen) or not all(whole):
        return real(value, at)
    return torch.ops.aten.index(value, chosen)


def _numbered(device: torch.device) -> torch.device:
    """The device with the number of the only GPU, where it is one."""
    return torch.device("cuda", 0) if torch.device(device).type == "cuda" else device


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """As torch takes it on a GPU of half precision: flash attention, or the memory-efficient one where there is a mask.

    Torch asks the driver itself, and writes attention out in products and a softmax where there is none.
    """
    assert not enable_gqa and query.dtype in (torch.bfloat16, torch.float16), "expected attention of half precision"
    width = query.shape[-1]
    scale = width**-0.5 if scale is None else scale
    if mask is None:
        wide = [torch.nn.functional.pad(t, (0, -width % 8)) if width % 8 else t for t in (query, key, value)]
        out = torch.ops.aten._scaled_dot_product_flash_attention(*wide, dropout, is_causal, scale=scale)[0]
        return out.narrow(-1, 0, width)  # an index would turn to the driver
    bias = torch.where(mask, 0.0, float("-inf")).to(query.dtype) if mask.dtype == torch.bool else mask
    keys = bias.shape[-1]
    bias = torch.nn.functional.pad(bias, (0, -keys % 16)).narrow(-1, 0, keys)  # its rows must be aligned
    bias = bias.expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, False, dropout, is_causal, scale=scale
    )[0]


def _answer_for_triton(pretence: Pretence) -> None:
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Utilities:
        def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
            kernel = resources(binary)
            return 0, 0, kernel.registers, kernel.spilled, 1024

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {
                "max_shared_mem": pretence.gpu.shared,
                "max_num_regs": 1 << 16,
                "multiprocessor_count": pretence.gpu.multiprocessors,
                "warpSize": _WARP,
            }

    class Driver:
        utils = Utilities()

        def launcher_cls(self, source: object, metadata: object) -> Any:
            return lambda *given, **named: None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", pretence.gpu.number, _WARP)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: object = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

    driver.set_active(Driver())
    triton_helpers.set_driver_to_gpu = lambda: None


def _toolkit_paths(scratch: Path) -> None:
    """Headers and libraries for the C++ compiler; the driver's library, that only a driver brings, is an empty one."""
    home = _toolkit()
    assert home is not None, "bug in taylorseer-export: nobody asked why_not()"
    os.environ["CUDA_HOME"] = str(home)
    subprocess.run(["g++", "-shared", "-o", scratch / "libcuda.so", "-x", "c++", "/dev/null"], check=True)
    for variable, folders in (("LIBRARY_PATH", (scratch, home / "lib")), ("CPATH", (home / "include",))):
        known = [os.environ[variable]] if os.environ.get(variable) else []
        os.environ[variable] = os.pathsep.join([*map(str, folders), *known])


def _watch(pretence: Pretence, link: bool) -> None:
    """Let kernels be compiled and not timed, and note what came of them."""
    import torch.utils.cpp_extension  # with what it reads of the machine
    from torch._inductor import config, cpu_vec_isa, graph
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner, NoTritonConfigsError
    from torch._inductor.scheduler import ExternKernelSchedulerNode
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

    graph.is_same_tensor = lambda one, other: one is other  # it would compare addresses
    config.compile_threads = 1
    config.always_keep_tensor_constants = True  # a weight of few numbers would be read, and written into the kernel
    config.shape_padding = False  # what it pays is timed
    config.use_static_triton_launcher = False  # it loads the kernel onto the GPU
    deduce = joint_graph.UniformValueConstantFolder._deduce_value
    save, compile_forms, tune, codegen, compile_graph = (
        CachingAutotuner.save_gpu_kernel,
        CachingAutotuner._precompile_worker,
        PythonWrapperCodegen.generate_and_run_autotune_block,
        GraphLowering.codegen,
        torch._inductor.aot_compile,
    )

    def bench(self: Any, launcher: Any, *given: Any, **named: Any) -> float:
        """Instead of a time: of several forms of a kernel the first that spills least is taken."""
        return float(launcher.n_spills)

    def compiling_forms(self: Any) -> None:
        """One form after the other until one spills nothing, which is the one that would be taken."""
        forms, done = list(self.configs or ()), []
        if self.compile_results or len(forms) < 2:
            return compile_forms(self)
        for form in forms:
            self.configs = [form]
            try:
                compile_forms(self)
            except NoTritonConfigsError:  # too large for this GPU
                continue
            done, self.compile_results = [*done, *self.compile_results], []
            if not resources(done[-1].kernel.asm["cubin"]).spilled:
                break
        if not done:
            self.configs = forms
            return compile_forms(self)
        self.compile_results, self.configs = done, None

    def saving(self: Any, stream: object, launcher: Any) -> None:
        found, name = Kernel(launcher.n_regs, launcher.n_spills, launcher.shared), self.inductor_meta["kernel_name"]
        pretence.kernels[name], own = found, self.device_props
        for gpu in pretence.others:
            self.device_props = own._replace(cc=gpu.number, major=gpu.capability[0])
            kernel = resources(self._precompile_config(launcher.config).kernel.asm["cubin"])
            assert kernel.shared <= gpu.shared, f"a kernel of {kernel.shared} bytes of shared memory for {gpu.name}"
            pretence.kernels_of.setdefault(gpu.name, {})[name] = kernel
        self.device_props = own
        save(self, stream, launcher)

    def tuning(self: Any) -> None:
        with FakeTensorMode(allow_non_fake_inputs=True):
            tune(self)

    def counting(self: Any) -> Any:
        """Bytes that its own count has, and those of the weights, which it leaves out."""
        made = codegen(self)
        for node in self.scheduler.nodes:
            whose = "libraries" if isinstance(node, ExternKernelSchedulerNode) else "triton"
            weights = {read.name for read in node.read_writes.reads} & self.constants.keys()
            held = sum(self.constants[name].numel() * self.constants[name].itemsize for name in weights)
            pretence.bytes[whose] += int(node.get_read_write_buffers_sizes()) + held
        return made

    def compiling(module: Any, inputs: Any, **named: Any) -> Any:
        with _disable_current_modes():
            _adopt(module)
            named["options"] |= {"aot_inductor.package_cpp_only": not link, "aot_inductor.precompile_headers": link}
            return compile_graph(module, inputs, **named)

    class Here(TorchDispatchMode):
        """What is made, is made on the device that is there."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = dict(kwargs or {})
            return func(*args, **({**given, "device": torch.device("cpu")} if given.get("device") else given))

    def deducing(self: Any, node: Any) -> Any:
        """A tensor of one value is made and read, to be written into the graph as that value."""
        with Here():
            return deduce(self, node)

    def on_the_cpu(make: Any) -> Any:
        """The examples of patterns are on a device that does not count: they are on the one that is there."""
        return lambda device=None: make(torch.device("cpu"))

    joint_graph.lazy_init, post_grad.lazy_init = on_the_cpu(joint_graph.lazy_init), on_the_cpu(post_grad.lazy_init)
    # What torch makes once in a process, whatever it compiles for, so that forks need not make it again.
    cpu_vec_isa.valid_vec_isa_list()
    joint_graph.lazy_init()
    post_grad.lazy_init()
    joint_graph.UniformValueConstantFolder._deduce_value = deducing
    CachingAutotuner.bench = bench
    CachingAutotuner._precompile_worker = compiling_forms
    torch._inductor.aot_compile = compiling
    CachingAutotuner.save_gpu_kernel = saving
    PythonWrapperCodegen.generate_and_run_autotune_block = tuning
    GraphLowering.codegen = counting


def _adopt(module: torch.fx.GraphModule) -> None:
    """Give the weights of an exported module the mode of its inputs: a compilation knows one mode of fake tensors."""
    mode = next(node.meta["val"].fake_mode for node in module.graph.nodes if node.op == "placeholder")
    for path, value in [*module.named_buffers(), *module.named_parameters()]:
        owner, _, name = path.rpartition(".")
        with mode:
            made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        setattr(module.get_submodule(owner), name, made)


@lru_cache(256)
def resources(binary: bytes) -> Kernel:
    """Registers, spills and shared memory of machine code, as NVIDIA's own tool reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return usage(text)


def usage(text: str) -> Kernel:
    """The numbers in what that tool prints."""
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    # The driver calls the whole stack spills; sine and cosine of large angles work there too, for no lack of registers.
    return Kernel(numbers["REG"], (numbers["STACK"] + numbers["LOCAL"]) // 4, numbers["SHARED"])
