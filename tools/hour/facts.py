"""What machine this is: read and measured before anything leans on it."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from typing import Any

import torch

from hour.goals import Goal, holds
from hour.machine import Machine
from hour.report import Report

# As found: no clock, limit or mode is set here, and nothing is reset.
ASKED = (
    "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,clocks.max.sm,"
    "power.draw,power.limit,temperature.gpu"
)


def run(args: Any, report: Report) -> None:
    """Facts, then ceilings, then whether `torch.compile` works at all, which every later stage needs."""
    machine = Machine(args.device, args.compiles)
    found: dict[str, Any] = {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "installed": dict(sorted({d.name: d.version for d in distributions() if d.name}.items())),
        "compilers": {name: said(name, "--version") for name in ("g++", "nvcc", "ptxas") if shutil.which(name)},
        "nvidia_smi": said("nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"),
    }
    goals: list[Goal] = [holds("a C++ compiler, which AOTInductor needs", "g++" in found["compilers"])]
    if machine.cuda:
        goals.append(holds("a GPU that torch can use", torch.cuda.is_available()))
        report.write(found, goals)
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "free_bytes": torch.cuda.mem_get_info()[0],
            "gpu_bytes": properties.total_memory,
        }
    report.write(found, goals)
    found |= machine.floor()
    report.write(found, goals)
    if machine.compiles:
        goals.append(holds("torch.compile gives the numbers of the operators", compiles(machine)))
    if machine.cuda:
        found["nvidia_smi_after"] = said("nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader")
    report.write(found, goals)
    print("\n".join(f"{k}: {v}" for k, v in found.items() if k != "installed"), flush=True)


def compiles(machine: Machine) -> bool:
    """Whether a compiled sum, which becomes one generated kernel, is what its operators give."""

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x * 2 + y).sin().sum(-1)

    x, y = (torch.randn(64, 256, device=machine.device) for _ in range(2))
    return torch.allclose(machine.compiled(function)(x, y), function(x, y), atol=1e-3)


def said(*command: str) -> str:
    """What a program prints; why it does not, where it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout or done.stderr).strip()[-600:]
