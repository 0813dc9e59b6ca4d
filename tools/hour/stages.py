"""The stages, in the order in which they prove: what each needs, may take and proves."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

GIB = 1 << 30
BASE = ("torch", "numpy", "pydantic", "safetensors", "tqdm")
MODELS = (*BASE, "diffusers")
TESTS = (*MODELS, "transformers", "pytest", "hypothesis", "filelock", "onnxruntime", "onnxscript")


@dataclass(frozen=True)
class Stage:
    """One thing that the hour proves.

    Attributes:
        name: On the command line.
        seconds: Its hard end.
        proves: In one line.
        packages: Modules that it imports.
        gpu_bytes: Free memory of the GPU that it needs at full size.
        entry: `module:function` of the code, called with (arguments, report).
        program: A program on the path that it starts.
    """

    name: str
    seconds: int
    proves: str
    packages: tuple[str, ...] = MODELS
    gpu_bytes: int = 0
    entry: str = ""
    program: str = ""

    def call(self, args: Any, report: Any) -> None:
        """Run it in this process."""
        module, function = self.entry.split(":")
        code: Callable[..., None] = getattr(import_module(module), function)
        code(args, report)

    def why_not(self, site: Path | None = None) -> str:
        """Why it cannot run here, with what lies in `site`, without importing anything; empty where it can."""
        if self.program and shutil.which(self.program) is None:
            return f"{self.program} is not on the path, expected a server for this stage; nothing carries one"
        path = [*([str(site)] if site else []), *sys.path]
        lost = [name for name in self.packages if PathFinder.find_spec(name, path) is None]
        if lost:
            return (
                f"{', '.join(lost)} not installed, expected for this stage; carry it (--carry), install it (--wheels)"
            )
        return ""


STAGES = (
    Stage("facts", 90, "what machine this is: GPU, driver, clocks as found, copies, products, a compiler that works",
          ("torch", "numpy"), entry="hour.facts:run"),
    Stage("engines", 400, "every engine that is installed, on tiny models: numbers, plans, CUDA graphs, no allocation",
          TESTS, 2 * GIB, "hour.suites:engines"),
    Stage("captures", 120, "streams and captures: slots opened while others run, captures that fail, threads at once",
          TESTS, 2 * GIB, "hour.suites:captures"),
    Stage("flux", 420, "FLUX.1-dev at full size beside its compiled self, diffusers' hook and cache-dit",
          MODELS, 90 * GIB, "hour.suites:contest"),
    Stage("dit", 150, "DiT-XL/2 at full size beside its compiled self", MODELS, 16 * GIB, "hour.suites:contest"),
    Stage("wan", 300, "Wan 2.1 1.3B, 81 frames of 480 by 832, beside its compiled self",
          MODELS, 60 * GIB, "hour.suites:contest"),
    Stage("wan-14b", 240, "Wan 2.1 14B, 33 frames of 480 by 832, beside its compiled self",
          MODELS, 60 * GIB, "hour.suites:contest"),
    Stage("fp8", 300, "FLUX.1-dev with fp8 weights at full size beside itself in bfloat16: bytes, steps, error",
          MODELS, 100 * GIB, "hour.few_bits:run"),
    Stage("serving", 240, "several slots at once: shared calls, two workers, every answer as alone",
          MODELS, 4 * GIB, "hour.serving:run"),
    Stage("triton", 300, "the same behind a real Triton server", (*TESTS, "tritonclient"), 4 * GIB,
          "hour.suites:triton", program="tritonserver"),
)  # fmt: skip
NAMES = tuple(stage.name for stage in STAGES)


def stage_of(name: str) -> Stage:
    """The stage of that name."""
    return STAGES[NAMES.index(name)]


def listing() -> str:
    """The stages for a reader."""
    rows = []
    for stage in STAGES:
        memory = f", {stage.gpu_bytes // GIB} GiB of the GPU" if stage.gpu_bytes else ""
        needed = f"needs {', '.join(stage.packages)}{', ' + stage.program if stage.program else ''}{memory}"
        rows += [f"{stage.name:9} {stage.seconds:4} s  {stage.proves}",
                 f"{'':17}{needed}"]  # fmt: skip
    return "\n".join(rows)
