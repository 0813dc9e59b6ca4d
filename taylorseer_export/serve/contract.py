"""What the served models take and return: one table for the configuration, the server and the client.

Two roles. `denoiser`: latents and conditioning in, the latents at the end of a whole loop out, the bundle's own
scheduler running in the server. `picture`: a caption or label in, a picture or a video out, for bundles that bring what
it needs.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from taylorseer_export.bundle.manifest import Manifest, Tensor
from taylorseer_export.bundle.profile import Profile
from taylorseer_export.embedded.animating import animated
from taylorseer_export.embedded.conditioning import ConditioningCache
from taylorseer_export.embedded.edits import given_picture, most_pictures, steps_that_run, use_of
from taylorseer_export.embedded.requests import (
    channels_drawn,
    frame_rate,
    frames_dropped,
    label_request,
    pictures_of,
    prompt_request,
    size_of,
    usual_size,
)
from taylorseer_export.errors import ConfigError
from taylorseer_export.method import Forecasts, Plan, RequestOptions, forecasts_from_options
from taylorseer_export.runtime.contract import defaults_of, request_constants
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.driven import driven_of
from taylorseer_export.runtime.runner import host_dtype
from taylorseer_export.runtime.sampling import Loop, Request, preview_steps
from taylorseer_export.runtime.sections import frames_of_section, sections_of
from taylorseer_export.runtime.tensors import (
    BLANK,
    CONDITION,
    NEGATIVE,
    channel_axis,
    condition_shape,
    joined_to,
    latent_sizes,
    noise_shape,
)
from taylorseer_export.serve.times import STAGES

Role = Literal["picture", "denoiser"]
LONGEST_TEXT = 4096  # characters of a caption or a plan; what must be longer is refused before it is read
_SIDES = ("frames", "height", "width")
DRAWN = ("picture", "video")
TOLD_TIMES = (*STAGES, "decode")
_WIDEST = 4  # bytes of a character in UTF-8

_TYPES = {"float32": "FP32", "float16": "FP16", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}


class Port(NamedTuple):
    """One input or output of a served model. `datatype` as Triton names it; -1 in `dims` is any extent."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    optional: bool = False


class Ask(NamedTuple):
    """A request as the service takes it."""

    request: Request
    forecasts: Forecasts


_NUMBERS = ("steps", "interval", "warmup", "order", "guard_order", "cap")
_WORDS = ("plan", "profile", "dialect", "form", "guard")
_OPTIONS = (
    *(Port(name, "INT32", (1,), True) for name in _NUMBERS),
    *(Port(name, "BYTES", (1,), True) for name in _WORDS),
    Port("threshold", "FP64", (1,), True),
    Port("accumulate", "BOOL", (1,), True),
)
_LORA = Port("lora", "BYTES", (1,), True)
_SCALE = Port("guidance_scale", "FP64", (1,), True)  # numbers as Python has them: every door rounds them alike
_SIZE = (Port("height", "INT32", (1,), True), Port("width", "INT32", (1,), True))
_FRAMES = Port("frames", "INT32", (1,), True)
_STREAMED = (Port("previews", "INT32", (1,), True), Port("progress", "BOOL", (1,), True))


def roles(manifest: Manifest) -> tuple[Role, ...]:
    """What a bundle can be served as."""
    draws = manifest.sampling.pictures is not None and manifest.sampling.source != "tensors"
    draws = draws and driven_of(manifest) is None  # requests bring no videos
    return ("picture", "denoiser") if draws else ("denoiser",)


def description(manifest: Manifest, profiles: Collection[str], loras: Collection[str] = ()) -> dict[str, Any]:
    """What a client may want to know of a model that draws, before it asks for a picture; plain JSON.

    Args:
        manifest: Of the bundle.
        profiles: Names of those that it has.
        loras: Names of those that a request may choose of.
    """
    defaults = defaults_of(manifest)
    labels = manifest.sampling.source == "labels"
    frames, (height, width) = [1] if labels else usual_size(manifest)[:-2], _usual(manifest)
    return {
        "draws": manifest.sampling.source,
        "classes": int(manifest.model.config["num_embeds_ada_norm"]) if labels else None,
        "takes_pictures": use_of(manifest) is not None,
        "frames": frames[0] if frames else 1,
        "frame_rate": frame_rate(manifest),
        "frames_dropped": frames_dropped(manifest),
        "time_scale": None if frame_rate(manifest) is None else _frames_more(manifest),
        "size": f"{width}x{height}",
        "multiple_of": None if labels else manifest.sampling.latent_scale * manifest.pipeline.packing,
        "steps": defaults.steps,
        "most_steps": defaults.most_steps,
        "plan": str(forecasts_from_options(RequestOptions(), defaults).plan),
        "order": defaults.order,
        "guards": list(defaults.capacity.guards),
        "profiles": list(profiles),
        "loras": list(loras),
    }


def _frames_more(manifest: Manifest) -> int:
    """The frames in which videos grow, behind their first."""
    return manifest.sampling.time_scale if sections_of(manifest) is None else frames_of_section(manifest)


def inputs(manifest: Manifest, role: Role, streams: bool = False) -> tuple[Port, ...]:
    """What a model takes; with `streams` one that answers after every step."""
    asked = _OPTIONS if manifest.lora is None else (*_OPTIONS, _LORA)
    asked = (*asked, _SCALE) if manifest.sampling.guidance in ("batched", "branches") else asked
    if role == "picture":
        labels = manifest.sampling.source == "labels"
        what: tuple[Port, ...] = (Port("label", "INT64", (1,)) if labels else Port("prompt", "BYTES", (1,)),)
        guided = manifest.sampling.guidance in ("batched", "branches")
        if manifest.sampling.source == "prompts":
            what = (*what, *((Port("negative_prompt", "BYTES", (1,), True),) if guided else (_SCALE,)))
        if (use := use_of(manifest)) is not None:
            begins = use == "begins"
            optional = use in ("begins", "controls")
            more = [Port(name, "UINT8", (-1, -1, 3), True) for name in _named(most_pictures(manifest))[1:]]
            what = (*what, Port("image", "UINT8", (-1, -1, 3), optional), *more)
            what = (*what, Port("strength", "FP64", (1,), True)) if begins else what
        size = _SIZE if frame_rate(manifest) is None else (_FRAMES, *_SIZE)
        return (*what, *size, Port("seed", "INT64", (1,), True), *asked, *(_STREAMED if streams else ()))
    latents, beside = _latents(manifest)
    pictured = _pictured(manifest)
    constants = [
        Port(name, _datatype(t), _dims(t), name in pictured) for name, t in request_constants(manifest).items()
    ]
    blank = bool(manifest.pipeline.attributes.get(BLANK))
    joined = () if beside is None else (Port(CONDITION, "FP32", beside, blank or CONDITION in pictured),)
    joined = (*joined, Port("image", "UINT8", (-1, -1, 3), True)) if pictured else joined
    sigmas = (Port("sigmas", "FP32", (-1,), True),) if "FlowMatch" in manifest.sampling.scheduler else ()
    negative = [Port(NEGATIVE + c.name, c.datatype, c.dims, True) for c in constants]
    twins = negative if manifest.sampling.guidance == "branches" else ()
    return (Port("latents", "FP32", latents), *constants, *joined, *twins, *sigmas, *asked)


def outputs(manifest: Manifest, role: Role) -> tuple[Port, ...]:
    """What a model returns: `step` steps of `planned` are done, the last of them in `step_ms`.

    `executed`, the plan as run, `frame_rate`, frames per second of a video, and `times_ms`, those of `TOLD_TIMES` with
    0 for a step that there was none of, come with the last step alone.
    """
    latents, _ = _latents(manifest)
    made = drawn(manifest) if role == "picture" else Port("denoised", "FP32", latents)
    words = (Port("planned", "BYTES", (1,)), Port("executed", "BYTES", (1,)))
    times = (Port("step_ms", "FP32", (1,)), Port("times_ms", "FP32", (len(TOLD_TIMES),)))
    rate = (Port("frame_rate", "INT32", (1,)),) if made.name == "video" else ()
    return (made, *rate, Port("step", "INT32", (1,)), *words, *times)


def sides_named(size: Sequence[int]) -> dict[str, int]:
    """A size of a picture or of a video in pixels, by the names of its inputs."""
    return dict(zip(_SIDES[-len(size) :], size, strict=True))


def pictures_named(pictures: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Pictures `[height, width, 3]` uint8 by the names of their inputs: `image`, `image_2` and so on."""
    return dict(zip(_named(len(pictures)), pictures, strict=True))


def _named(count: int) -> list[str]:
    return ["image", *(f"image_{number}" for number in range(2, count + 1))]


def drawn(manifest: Manifest) -> Port:
    """What a model that draws returns: `picture` `[H, W, 3]`, with transparency `[H, W, 4]`, or `video`."""
    picture, video = DRAWN
    if frame_rate(manifest) is None:
        return Port(picture, "UINT8", (-1, -1, channels_drawn(manifest)))
    return Port(video, "UINT8", (-1, -1, -1, 3))


def ask(
    denoiser: Denoiser,
    role: Role,
    values: Mapping[str, np.ndarray],
    known: Mapping[str, Profile] | None = None,
    cache: ConditioningCache | None = None,
) -> Ask:
    """Read a request.

    Args:
        denoiser: The loaded bundle.
        role: Of the model.
        values: By the names of `inputs`; what was left out is absent.
        known: Profiles of the bundle, by name.
        cache: Where what prompts become is kept; they are encoded anew if left out.

    Raises:
        ConfigError, StepError: Something is missing, unknown, out of range or contradicts something else.
    """
    sampling = denoiser.manifest.sampling
    for port in inputs(denoiser.manifest, role):
        if port.name not in values and not port.optional:
            raise ConfigError(f"input `{port.name}` is missing, expected {port.datatype} {list(port.dims)}; send it")
    strength = float(values["strength"][0]) if "strength" in values else None
    others = [values[name] for name in _named(most_pictures(denoiser.manifest))[1:] if name in values]
    given = given_picture(denoiser.manifest, values.get("image"), strength, others)
    options, given = steps_that_run(_options(values), denoiser, given)
    forecasts = forecasts_from_options(options, denoiser.defaults, known)
    scale = float(values["guidance_scale"][0]) if "guidance_scale" in values else None
    if scale is not None and not np.isfinite(scale):
        raise ConfigError(f"guidance_scale is {scale}, expected a finite number; correct it")
    if role == "denoiser":
        values = _with_picture(denoiser, values)
        scale = denoiser.manifest.guidance_of(scale)
        return Ask(_loop_request(denoiser, values, scale, _sigmas(forecasts.plan, values)), forecasts)
    seed = _whole(values, "seed") or 0
    if not 0 <= seed < 1 << 63:
        raise ConfigError(f"seed is {seed}, expected a whole number, at least 0; correct it")
    usual = _usual(denoiser.manifest) if sampling.source == "labels" else size_of(denoiser.manifest, given)
    sides = sides_named(usual)
    size = tuple(int(values[side][0]) if side in values else extent for side, extent in sides.items())
    if sampling.source == "labels":
        latent_sizes(denoiser.manifest, size, "size")  # there is one: any other is refused
        return Ask(label_request(denoiser, [int(values["label"][0])], [seed], scale), forecasts)
    negative = text_of(values, "negative_prompt") if "negative_prompt" in values else None
    prompts = [text_of(values, "prompt")]
    request = prompt_request(denoiser, prompts, [seed], size, scale, negative, cache=cache, given=given)
    return Ask(request, forecasts)


def _pictured(manifest: Manifest) -> frozenset[str]:
    """Inputs of the role `denoiser` that may be made of `image`: of a video all that it has of a picture, unless it is
    made in sections, of which that role runs one, or others drive it."""
    if use_of(manifest) != "animates" or sections_of(manifest) is not None or driven_of(manifest) is not None:
        return frozenset()
    return frozenset(t.name for t in manifest.parts["encode"].graph.outputs if t.role != "cache_out")


def _with_picture(denoiser: Denoiser, values: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The values with what `image` becomes in its place, for latents of their size."""
    manifest, pictured = denoiser.manifest, _pictured(denoiser.manifest)
    if not pictured:
        return values
    given = sorted(pictured & values.keys())
    if "image" not in values:
        if missing := sorted(pictured - values.keys()):
            raise ConfigError(
                f"input `{missing[0]}` is missing, expected it, or as `image` the picture that it is made of; send one"
            )
        return values
    if given:
        raise ConfigError(
            f"input `{given[0]}` is given beside `image`, expected one of them, since it is made of that; leave one out"
        )
    shape, sampling = values["latents"].shape, manifest.sampling
    if len(shape) != 5:
        raise ConfigError(f"input `latents` is {list(shape)}, expected {list(_latents(manifest)[0])}; send them so")
    count, _, frames, height, width = shape
    size = (sampling.time_scale * (frames - 1) + 1, sampling.latent_scale * height, sampling.latent_scale * width)
    latent_sizes(manifest, size, "size of `latents`")
    made = animated(denoiser, values["image"], size)
    rows = {name: value if name == CONDITION else np.repeat(value, count, 0) for name, value in made.items()}
    return {**{name: value for name, value in values.items() if name != "image"}, **rows}


def _loop_request(
    denoiser: Denoiser, values: Mapping[str, np.ndarray], scale: float, sigmas: np.ndarray | None
) -> Request:
    """A request of the role `denoiser`. Its guidance: two halves of a batch, or a second call on `negative_` inputs."""
    _check_finite(values)
    manifest, latents = denoiser.manifest, np.asarray(values["latents"], np.float32)
    conditioning = {name: values[name] for name in denoiser.constants if name in values}
    twins = {name: values[NEGATIVE + name] for name in conditioning if NEGATIVE + name in values}
    # Two halves of a batch over one of latents: conditional and unconditional.
    branches = {len(v) for n, v in conditioning.items() if denoiser.constants[n].shape[0] == "batch"}
    guided = manifest.sampling.guidance == "batched" and branches == {2 * len(latents)}
    negative = {**conditioning, **twins} if twins and scale != 1.0 else None
    joined = None
    if CONDITION in values or manifest.pipeline.attributes.get(BLANK):
        axis = channel_axis(manifest)
        whole = (*latents.shape[:axis], int(denoiser.latent.shape[axis]), *latents.shape[axis + 1 :])
        joined, sampled = joined_to(manifest, whole, values.get(CONDITION))
        if latents.shape != sampled:
            raise ConfigError(f"input `latents` is {list(latents.shape)}, expected {list(sampled)}; send them so")
    return Request(latents, conditioning, guided or negative is not None, scale, 0, 0, sigmas, negative, joined)


class Wanted(NamedTuple):
    """The answers before the last that a streaming model is asked for.

    Attributes:
        previews: How many have a picture, spread evenly over the loop; all of them if None.
        progress: Whether steps without a picture are told of too.
    """

    previews: int | None
    progress: bool

    def of(self, step: int, steps: int) -> tuple[bool, bool]:
        """Whether there is an answer after a step of so many, and whether it has a picture."""
        preview = self.previews is None or step in preview_steps(steps, self.previews)
        return preview or self.progress, preview


def wanted(values: Mapping[str, np.ndarray]) -> Wanted:
    """The answers that a request asks for.

    Raises:
        ConfigError: They are none.
    """
    previews = _whole(values, "previews")
    progress = "progress" in values and bool(values["progress"][0])
    if previews is not None and previews < 0:
        raise ConfigError(f"previews is {previews}, expected a whole number, at least 0; correct it")
    return Wanted(previews, progress)


def queued(plan: Plan) -> dict[str, np.ndarray]:
    """The outputs that say that a request has a place."""
    return {"step": np.array([0], np.int32), "planned": _word(str(plan))}


def preview(denoiser: Denoiser, role: Role, loop: Loop, took: float, pictured: bool = True) -> dict[str, np.ndarray]:
    """The outputs after a step that took so many milliseconds and was not the last one."""
    made = _shown(denoiser, role, loop, loop.estimate()) if pictured else {}
    return {**made, "step": np.array([loop.step], np.int32), "planned": _word(str(loop.plan)), "step_ms": _real(took)}


def answer(
    denoiser: Denoiser, role: Role, loop: Loop, executed: str, took: float, stages: Mapping[str, float | None]
) -> dict[str, np.ndarray]:
    """The outputs after the last step, of which `stages` are those of `Times`."""
    began = time.perf_counter()
    made = _shown(denoiser, role, loop, loop.latents)
    told = {**stages, "decode": 1e3 * (time.perf_counter() - began)}
    made |= {"step": np.array([loop.step], np.int32), "planned": _word(str(loop.plan)), "executed": _word(executed)}
    if role == "picture" and (rate := frame_rate(denoiser.manifest)) is not None:
        made["frame_rate"] = np.array([rate], np.int32)
    return made | {"step_ms": _real(took), "times_ms": _real(*(told[name] or 0.0 for name in TOLD_TIMES))}


def _shown(denoiser: Denoiser, role: Role, loop: Loop, latents: np.ndarray) -> dict[str, np.ndarray]:
    if role == "denoiser":
        return {"denoised": latents}
    return {drawn(denoiser.manifest).name: pictures_of(denoiser, loop.request, latents)[0]}


def _word(text: str) -> np.ndarray:
    return np.array([text.encode()], np.object_)


def _real(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def _usual(manifest: Manifest) -> tuple[int, int]:
    """(height, width) of the pictures of a bundle, in pixels."""
    if manifest.sampling.source != "labels":
        height, width = usual_size(manifest)[-2:]
        return height, width
    shape = manifest.graphs["full"].input_of("latent").shape
    height, width = (manifest.sampling.latent_scale * int(extent) for extent in shape[2:])
    return height, width


def _options(values: Mapping[str, np.ndarray]) -> RequestOptions:
    """What a request says of its forecasts; noise levels say how many steps there are."""
    given: dict[str, Any] = {name: _whole(values, name) for name in _NUMBERS if name in values}
    given |= {name: text_of(values, name) for name in _WORDS if name in values}
    if "sigmas" in values:
        given.setdefault("steps", len(values["sigmas"]))
    if "threshold" in values:
        given["threshold"] = float(values["threshold"][0])
    if "accumulate" in values:
        given["accumulate"] = bool(values["accumulate"][0])
    return RequestOptions(**given)


def _sigmas(plan: Plan, values: Mapping[str, np.ndarray]) -> np.ndarray | None:
    sigmas = values.get("sigmas")
    if sigmas is None:
        return None
    plan.check_length(len(sigmas))
    if not (np.diff(sigmas) < 0).all() or not 0 < sigmas[-1] <= sigmas[0] <= 1:
        raise ConfigError("sigmas are not falling from at most 1 to above 0, expected noise levels; sort them")
    return np.asarray(sigmas, np.float32)


def _check_finite(values: Mapping[str, np.ndarray]) -> None:
    for name, value in values.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ConfigError(
                f"input `{name}` has values that are NaN or infinite, expected finite numbers; correct it"
            )


def _whole(values: Mapping[str, np.ndarray], name: str) -> int | None:
    return int(values[name][0]) if name in values else None


def text_of(values: Mapping[str, np.ndarray], name: str) -> str:
    """What a BYTES input says; raises ConfigError where that is no text, or too long."""
    data: Any = values[name][0]
    if len(data) > _WIDEST * LONGEST_TEXT:
        raise ConfigError(f"{name} is {len(data)} bytes, expected at most {LONGEST_TEXT} characters; shorten it")
    try:
        text = data if isinstance(data, str) else bytes(data).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not readable ({error.reason}), expected UTF-8 text; encode it so") from error
    if len(text) > LONGEST_TEXT:
        raise ConfigError(f"{name} is {len(text)} characters long, expected at most {LONGEST_TEXT}; shorten it")
    return text


def _latents(manifest: Manifest) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """(dimensions of the latents that a loop samples, of what is joined to them)."""
    (latent,) = (t for t in manifest.graphs["full"].inputs if t.role == "latent")
    dims = _dims(latent)
    beside = condition_shape(manifest, dims)
    return dims if beside is None else noise_shape(manifest, dims), beside


def _datatype(tensor: Tensor) -> str:
    return _TYPES[host_dtype(tensor.dtype).name]


def _dims(tensor: Tensor) -> tuple[int, ...]:
    return tuple(extent if isinstance(extent, int) else -1 for extent in tensor.shape)
