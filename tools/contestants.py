"""What `bench.py` compares: our engines, the untapped model in one, eager diffusers, its TaylorSeer hook, cache-dit.

Random weights of a trained model's scale, smooth teacher-forced inputs; time does not depend on the values.
"""

from __future__ import annotations

import argparse
import math
import operator
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import dit_inputs, flux_inputs, mid_flux, tiny_dit

from taylorseer_export.bundle.manifest import Graph, Tensor
from taylorseer_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from taylorseer_export.compile.export import Draft, Options, draft, write_bundle
from taylorseer_export.compile.onnx import write_onnx
from taylorseer_export.compile.program import example_inputs, quiet_libraries, size_of
from taylorseer_export.compile.weights import WEIGHTS, write_weights
from taylorseer_export.families import FAMILIES
from taylorseer_export.graph.casts import explicit_casts
from taylorseer_export.graph.cut import Cut
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.onnxruntime import OnnxRuntimeRunner
from taylorseer_export.runtime.slot import Slot

SITES = list(FAMILIES["flux"].sites)
# What diffusers' hook is told. `sites` is our list, word for word; the attention returns image and text rows, and
# both are forecast. A hook cannot drop what feeds a forecast module, so the single blocks still compute attention and
# MLP on every step. `tuned` names those as modules to skip (they return zeros, which only proj_out would have read)
# and forecasts the text MLP too: the most that the hook can save on this model.
HOOKS = {
    "sites": {"cache_identifiers": SITES},
    "tuned": {
        "cache_identifiers": [*SITES, r"transformer_blocks\.\d+\.ff_context"],
        "skip_predict_identifiers": [r"single_transformer_blocks\.\d+\.(attn|proj_mlp|act_mlp)"],
    },
}
INSTALL_CACHE_DIT = "pip install -c tools/constraints.txt cache-dit"


class Loop:
    """One contestant: a denoising loop that is advanced a few steps at a time and timed step by step.

    Attributes:
        start_ms: Time to begin each loop (`prepare` for our engines).
        step_ms: Per loop, the time of each step.
        outputs: `noise_pred` of each step of the latest loop.
    """

    def __init__(self, steps: int, start: Callable[[], Any], step: Callable[[int], np.ndarray], warm: int = 2) -> None:
        self.steps, self.warm, self._start, self._step = steps, warm, start, step
        self.start_ms: list[float] = []
        self.step_ms: list[list[float]] = []
        self.outputs: list[np.ndarray] = []

    def begin(self) -> None:
        began = time.perf_counter()
        self._start()
        self.start_ms.append(1e3 * (time.perf_counter() - began))
        self.step_ms.append([])
        self.outputs = []

    def advance(self, count: int) -> int:
        """Run up to `count` steps of the loop; returns how many it ran."""
        done = len(self.outputs)
        for step in range(done, min(done + count, self.steps)):
            began = time.perf_counter()
            output = self._step(step)
            self.step_ms[-1].append(1e3 * (time.perf_counter() - began))
            self.outputs.append(output)
        return len(self.outputs) - done

    def warm_up(self) -> None:
        """Run the first steps once and forget them."""
        self.begin()
        self.advance(self.warm)
        self.start_ms, self.step_ms, self.outputs = [], [], []

    def loop_ms(self) -> list[float]:
        return [start + sum(steps) for start, steps in zip(self.start_ms, self.step_ms, strict=True)]

    def times(self, kinds: str = "", kind: str = "") -> list[float]:
        """All step times, or those of the steps where the plan `kinds` has `kind`."""
        return [t for steps in self.step_ms for k, t in enumerate(steps) if not kind or kinds[k] == kind]


class Case:
    """The model, its checkpoint on disk, and the inputs of every step."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.family = FAMILIES["flux" if args.model == "mid-flux" else "dit"]
        if args.model == "mid-flux":
            side = math.isqrt(args.image_tokens)
            self.model = mid_flux()
            self.latents, self.timesteps, self.conditioning = flux_inputs(
                self.model, args.steps, args.batch, side, args.image_tokens // side, args.text_tokens
            )
            self.latent_size: tuple[int, int] | None = (2 * side, 2 * args.image_tokens // side)
        else:
            self.model = tiny_dit(layers=args.layers, heads=16, head_dim=72, sample_size=32, classes=1000)
            self.latents, self.timesteps, self.conditioning = dit_inputs(self.model, args.steps, args.batch)
            self.latent_size = None
        checkpoint = folder / "checkpoint"
        if not checkpoint.exists():
            self.model.save_pretrained(checkpoint)
        self.checkpoint: Checkpoint = open_checkpoint(str(checkpoint), self.family)
        self.arrays = {name: value.numpy() for name, value in self.conditioning.items()}

    def options(self, granularity: Any, layout: Any, order: int) -> Options:
        a = self.args
        return Options(order=order, interval=a.interval, warmup=a.warmup, steps=a.steps, granularity=granularity,
                       layout=layout, latent_size=self.latent_size, batch=a.batch)  # fmt: skip

    def bundle(self, granularity: str, layout: str, order: int) -> Path:
        """The bundle of one configuration, built if the folder has none."""
        name = f"{granularity}-{layout}-order{order}"
        path = self.folder / f"{self.family.name}-{name}"
        if path.exists():
            return path
        return write_bundle(draft(self.checkpoint, self.options(granularity, layout, order)), self.folder, name)

    def untapped(self) -> Loop:
        """The plain diffusers model, exported and optimised by the same code and run by the same runner."""
        kinds = {"float": "float32", "float32": "float32", "int64": "int64"}
        specs = self.family.inputs(self.checkpoint.config)
        inputs = tuple(Tensor(name=s.name, dtype=kinds[s.dtype], shape=s.shape, role=s.role) for s in specs)
        latent = next(t for t in inputs if t.role == "latent")
        shape = _with_channels(self.model, latent.shape)
        output = Tensor(name="noise_pred", dtype="float32", shape=shape, role="noise_pred")
        folder = self.folder / "untapped"
        if not folder.exists():
            folder.mkdir()
            made = draft(self.checkpoint, self.options("last", "snapshots", 0))
            module = _typed(_plain(self.checkpoint.skeleton(torch.float32), inputs), inputs, made)
            cut = Cut("untapped", module, inputs, (output,))
            state = {f"model.{n}": (v.dtype, tuple(v.shape)) for n, v in self.model.state_dict().items()}
            read = self.checkpoint.tensor
            places = write_weights(folder / WEIGHTS, state, lambda name: read(name.removeprefix("model.")))
            write_onnx(made, cut, places, folder / "untapped.onnx")
        graphs = {"untapped": Graph(file="untapped.onnx", inputs=inputs, outputs=(output,), weights_bytes=0)}
        runner = OnnxRuntimeRunner({"untapped": folder / "untapped.onnx"}, graphs, threads=self.args.threads)
        shapes = {t.name: self.arrays[t.name].shape for t in inputs if t.role == "constant"}
        shapes |= {latent.name: self.latents.shape[1:], "timestep": (self.args.batch,)}
        buffers = {t.name: runner.buffer(tuple(shapes[t.name]), t.dtype) for t in inputs}
        prediction = runner.buffer(_with_channels(self.model, tuple(self.latents.shape[1:])), "float32")
        call = runner.bind("untapped", buffers, {"noise_pred": prediction})

        def start() -> None:
            for name, values in self.arrays.items():
                buffers[name].write(values)

        def step(k: int) -> np.ndarray:
            buffers[latent.name].write(self.latents[k].numpy())
            buffers["timestep"].write(np.float32(self.timesteps[k]))
            call()
            return prediction.read()

        return Loop(self.args.steps, start, step)

    def ours(self, denoiser: Denoiser, plan: Plan, order: int) -> Loop:
        """A slot of our engine; a plan shorter than the loop gives a loop of so many steps, evenly spread."""
        latents = self.latents.numpy()
        slot: Slot = denoiser.slot(denoiser.sizes(latents.shape[1:], self.arrays))
        chosen = np.linspace(0, self.args.steps - 1, len(plan)).round().astype(int)
        timesteps = self.timesteps.float().numpy()[chosen]
        warm = str(plan).find(".") + 2 if "." in str(plan) else 2
        return Loop(len(plan), lambda: slot.start(self.arrays, Forecasts(plan, order), timesteps),
                    lambda k: slot.step(latents[chosen[k]]), warm)  # fmt: skip

    def eager(self, hook: str = "", interval: int = 0, before: int = 0, order: int = 0) -> tuple[Loop, list[int]]:
        """The diffusers model in eager mode, if asked with its TaylorSeer hook; and its count of computed steps."""
        model = self._copied()
        if hook:
            from diffusers import TaylorSeerCacheConfig

            model.enable_cache(TaylorSeerCacheConfig(
                cache_interval=interval, disable_cache_before_step=before, max_order=order,
                taylor_factors_dtype=torch.float32, **HOOKS[hook]))  # fmt: skip
        computed = [0]

        def count(*_: Any) -> None:
            computed[0] += 1

        model.transformer_blocks[0].ff.net[0].register_forward_hook(count)  # inside a site: runs if that is computed

        def start() -> None:
            computed[0] = 0
            if hook:
                model._reset_stateful_cache()

        def step(k: int) -> np.ndarray:
            with model.cache_context("cond") if hook else nullcontext():
                return self._predicted(model, k)

        warm = before + 2 if hook else 2
        return Loop(self.args.steps, start, step, warm), computed

    def cache_dit(self, plan: Plan, order: int) -> tuple[Loop, list[int]]:
        """The diffusers model in eager mode under cache-dit; and the numbers of the steps that it computed in full."""
        model = self._copied()
        cached = CacheDit(model, plan, order)
        warm = str(plan).find(".") + 2 if "." in str(plan) else 2
        loop = Loop(len(plan), cached.begin, lambda k: cached.step(k, lambda: self._predicted(model, k)), warm)
        return loop, cached.computed

    def _copied(self) -> Any:
        """A second diffusers model on the same memory."""
        model = type(self.model).from_config(self.model.config).eval()
        model.load_state_dict(self.model.state_dict(), assign=True)
        return model

    def _predicted(self, model: Any, k: int) -> np.ndarray:
        """What a diffusers model makes of step `k`."""
        inputs = {"hidden_states": self.latents[k], "timestep": self.timesteps[k].expand(self.args.batch)}
        with torch.inference_mode():
            return model(**inputs, **self.conditioning, return_dict=False)[0].numpy()


class CacheDit:
    """A diffusers model under cache-dit, on a plan of ours.

    The most that it can save on a plan: a static mask, so that it need not compare residuals; on the other steps the
    first block alone, fewer than one it does not take, and the TaylorSeer forecast of all that follows.

    Args:
        model: With double and single blocks; it is changed in place.
        plan: Which steps are computed.
        order: Of the forecasts.
        counts: Whether the blocks that ran are counted, by hooks that `torch.compile` would not take well.

    Attributes:
        computed: The steps of the latest loop that were computed in full, where they are counted.

    Raises:
        SystemExit: The library is missing.
    """

    def __init__(self, model: Any, plan: Plan, order: int, counts: bool = True) -> None:
        self._library, self._model, self._plan = cache_dit_library(), model, str(plan)
        self._ran, self.computed = 0, []
        blocks = [*model.transformer_blocks, *model.single_transformer_blocks] if counts else []
        self._blocks = len(blocks)

        def count(*_: Any) -> None:
            self._ran += 1

        self._hooks = [block.register_forward_hook(count) for block in blocks]
        self._library.enable_cache(
            model,
            cache_config=self._library.DBCacheConfig(
                Fn_compute_blocks=1,
                Bn_compute_blocks=0,
                num_inference_steps=len(plan),
                steps_computation_mask=[int(kind == "F") for kind in self._plan],
                steps_computation_policy="static",
                enable_separate_cfg=False,
            ),
            calibrator_config=self._library.TaylorSeerCalibratorConfig(taylorseer_order=order),
        )

    def begin(self) -> None:
        """Begin a loop; by itself it begins a new one a step late."""
        self.computed.clear()
        self._library.refresh_context(self._model)

    def step(self, k: int, call: Callable[[], Any]) -> Any:
        """What `call` of the model returns at step `k`.

        Raises:
            SystemExit: The step ran other blocks than the plan says.
        """
        self._ran = 0
        prediction = call()
        if not self._blocks:
            return prediction
        expected = self._blocks if self._plan[k] == "F" else 1
        if self._ran != expected:
            raise SystemExit(
                f"cache-dit ran {self._ran} of {self._blocks} blocks in step {k}, expected {expected} under plan "
                f"{self._plan}; install the version that tools/constraints.txt names, {INSTALL_CACHE_DIT}"
            )
        if self._ran == self._blocks:
            self.computed.append(k)
        return prediction

    def close(self) -> None:
        """Give the model back as it was."""
        for hook in self._hooks:
            hook.remove()
        self._library.disable_cache(self._model)


def cache_dit_library() -> Any:
    """The module `cache_dit`.

    Raises:
        SystemExit: It is not installed, or does not go with the other libraries.
    """
    try:
        import cache_dit
    except ImportError as error:
        raise SystemExit(
            f"cache-dit is missing ({error}), expected it installed for --cache-dit; {INSTALL_CACHE_DIT}"
        ) from None
    return cache_dit


def _plain(model: torch.nn.Module, inputs: tuple[Tensor, ...]) -> torch.fx.GraphModule:
    """`model` called with positional inputs, returning one tensor in a tuple."""
    graph = torch.fx.Graph()
    kwargs: dict[str, Any] = {t.name: graph.placeholder(t.name) for t in inputs}
    result = graph.call_module("model", kwargs={**kwargs, "return_dict": False})
    graph.output((graph.call_function(operator.getitem, (result, 0)),))
    return torch.fx.GraphModule({"model": model}, graph)


def _typed(module: torch.fx.GraphModule, inputs: tuple[Tensor, ...], made: Draft) -> torch.fx.GraphModule:
    """`module` traced, with every cast between float types in the graph, as an engine wants it."""
    sizes = made.graph_sizes
    free = tuple({k: torch.export.Dim.AUTO for k, entry in enumerate(t.shape) if isinstance(size_of(entry, sizes), str)}
                 for t in inputs)  # fmt: skip
    example = example_inputs(inputs, sizes, made.ranges())
    with torch.no_grad(), quiet_libraries():
        program = torch.export.export(module, example, dynamic_shapes=free, strict=False)
    traced = program.module(check_guards=False)
    explicit_casts(traced.graph)
    return traced


def _with_channels(model: Any, shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """The shape of the model's output for latents of `shape`."""
    axis = 1 if len(shape) == 4 else 2
    return (*shape[:axis], model.config.out_channels or shape[axis], *shape[axis + 1 :])


def hook_schedule(plan: Plan, interval: int, warmup: int) -> tuple[int, int, Plan]:
    """(interval, disable_cache_before_step, plan) of the hook with as many full steps as `plan`.

    The hook computes step s if s < B or (s - B - 1) % N == 0: our plan has no equal in its dialect, since its first
    stretch is one step long. Of the nearest B and N, the first pair with the same number of full steps is taken.
    """
    nearest = sorted(((n, b) for n in range(1, interval + 3) for b in range(1, warmup + 4)),
                     key=lambda p: (abs(p[0] - interval), abs(p[1] - warmup)))  # fmt: skip
    for n, b in nearest:
        other = Plan.regular(len(plan), n, b, "diffusers")
        if len(other.full_steps) == len(plan.full_steps):
            return n, b, other
    raise SystemExit(f"no schedule of diffusers' hook has {len(plan.full_steps)} full steps of {len(plan)}")
