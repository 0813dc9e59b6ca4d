"""`run`: sample with a bundle.

What a request is made from stands in the manifest: class labels, prompts that the bundle's own encoders read, or the
tensors that a pipeline passes to the transformer, under their diffusers names; `negative_NAME` beside NAME turns
guidance on. A bundle with a decoder makes pictures or videos, any other one latents.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from taylorseer_export.commands.options import bundle_options, lora_option, parallel_option, plan_options
from taylorseer_export.commands.ranks import rank_option
from taylorseer_export.commands.terminal import (
    check_out,
    open_denoiser,
    progress,
    read_tensors,
    report_guard,
    request_options,
    require_extra,
    values_per_picture,
    write_tensors,
)
from taylorseer_export.errors import ConfigError
from taylorseer_export.values import finite, real, seed, size, whole

if TYPE_CHECKING:
    import numpy as np

    from taylorseer_export.bundle.manifest import Manifest, PartName
    from taylorseer_export.embedded.edits import Given
    from taylorseer_export.runtime.denoiser import Denoiser
    from taylorseer_export.runtime.sampling import Loop, Request

_VIDEOS = {  # by what they show, as of `embedded/driving.py` and `controlling.py`
    "pose": "of a pose that drives what is made of --image",
    "face": "of a face that drives it",
    "background": "that --image is put into",
    "mask": "that is white where --image comes, or where --video is made anew",
    "video": "to go by",
}
SUMMARY = "Sample with a bundle: a picture, a video, or tensors."


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    bundle_options(parser)
    lora_option(parser)
    rank_option(parser)
    parallel_option(parser)
    plan_options(parser)
    parser.add_argument("--label", type=whole(0), nargs="+", help="classes to draw (models of classes)")
    parser.add_argument("--prompt", nargs="+", help="what to draw (bundles with text encoders)")
    parser.add_argument(
        "--image",
        type=Path,
        nargs="+",
        help="picture to edit, to animate or to begin with (whole bundles that take one; some take several)",
    )
    for name, what in _VIDEOS.items():
        parser.add_argument(
            f"--{name}",
            type=Path,
            help=f"video {what}: a file, or a folder of its frames as pictures (whole bundles that take one)",
        )
    parser.add_argument(
        "--strength",
        type=real(0),
        help="share of the steps that run after beginning with --image (default: 0.6, as diffusers)",
    )
    parser.add_argument("--negative-prompt", help="what guidance leads away from (default: as the family's pipeline)")
    parser.add_argument(
        "--prompt-tokens",
        type=whole(1),
        metavar="N",
        help="most tokens of a prompt, diffusers' max_sequence_length (default: the pipeline's)",
    )
    parser.add_argument(
        "--n", type=whole(1), help="pictures of each prompt or label, of seeds that follow (default: 1)"
    )
    parser.add_argument(
        "--inputs",
        type=Path,
        help="safetensors with the conditioning, under diffusers' argument names; `negative_NAME` for guidance, "
        "`condition` for what image-to-video joins to the noise (not for models of classes; default: random)",
    )
    parser.add_argument("--seed", type=seed, nargs="+", default=[0], help="seeds of the noise (default: 0)")
    parser.add_argument(
        "--size",
        type=size,
        metavar="HxW or FxHxW",
        help="size of the picture or video in pixels (default: the bundle's)",
    )
    parser.add_argument("--guidance-scale", type=finite, help="guidance scale, dimensionless (default: the bundle's)")
    parser.add_argument(
        "--fps", type=whole(1), help="frames per second that a video is shown at (default: as the family's videos)"
    )
    parser.add_argument("--out", type=Path, help="picture.png, video.webp, video.gif, video.mp4 or latents.safetensors")
    parser.add_argument(
        "--previews",
        type=whole(0),
        default=0,
        metavar="N",
        help="previews of each picture while it is drawn, NAME-preview-K.png beside it; over several ranks they are "
        "written at its end (default: 0)",
    )


def run(given: argparse.Namespace) -> int:
    """The command itself; returns the exit code."""
    from taylorseer_export.embedded.video import MP4
    from taylorseer_export.runtime.following import follow

    if given.out:
        film = given.out.suffix.lower() == MP4
        if given.out.suffix != ".safetensors":
            require_extra(*(("video", "av") if film else ("sample", "PIL")))
        check_out(given.out, picture=given.out.suffix != ".safetensors" and not film)
    with open_denoiser(given, "run", ranks=True) as denoiser:
        return 0 if follow(denoiser) else _sampled(given, denoiser)


def _sampled(given: argparse.Namespace, denoiser: Denoiser) -> int:
    """What one process does, of several ranks the first; of those that run a branch of guidance each does it."""
    import numpy as np

    from taylorseer_export.embedded import requests
    from taylorseer_export.embedded.driving import with_videos
    from taylorseer_export.embedded.edits import given_picture, steps_that_run, use_of
    from taylorseer_export.embedded.picture import read_picture
    from taylorseer_export.embedded.video import check_video, read_video
    from taylorseer_export.method import forecasts_from_options
    from taylorseer_export.runtime import sampling
    from taylorseer_export.runtime.schedulers import own_scheduler
    from taylorseer_export.runtime.tensors import extents_of

    first = denoiser.share.first  # of the ranks: it writes what one process writes
    videos = {name: path for name in _VIDEOS if (path := getattr(given, name)) is not None}
    if given.image or videos:
        require_extra("whole", "PIL")
    pictures = [read_picture(path) for path in given.image or ()]
    picture = given_picture(denoiser.manifest, pictures[0] if pictures else None, given.strength, pictures[1:])
    picture = with_videos(denoiser.manifest, picture, {n: read_video(path, f"--{n}") for n, path in videos.items()})
    options, picture = steps_that_run(request_options(given), denoiser, picture)
    forecasts = forecasts_from_options(options, denoiser.defaults, denoiser.profiles)
    guard = forecasts.guard
    manifest = denoiser.manifest
    require_extra("sample", *([] if own_scheduler(manifest) else ["torch", "diffusers"]))
    require_extra("sample", *(["PIL"] if not given.out and manifest.sampling.pictures else []))
    _check_fps(manifest, given)
    _check_previews(manifest, given, len(forecasts))
    needed: list[PartName] = [] if given.inputs else ["text"]
    needed += ["encode"] if given.image or use_of(manifest) == "controls" else []
    needed += [] if not first or (given.out and given.out.suffix == ".safetensors") else ["decode"]
    denoiser.open_parts(needed)  # before the work, and not in its times
    began = time.perf_counter()
    request, names = _request(denoiser, given, picture)
    del picture  # the request has its videos in its own size
    request = replace(request, previews=given.previews)
    encode_ms, decode_ms = 1e3 * (time.perf_counter() - began), 0.0
    rate = requests.frame_rate(manifest)
    drawn = f"{manifest.family}-{manifest.name}.{'png' if rate is None else 'webp'}"
    out = given.out or Path(drawn if manifest.sampling.pictures else "latents.safetensors")
    if rate is not None and out.suffix != ".safetensors":
        frames = extents_of(manifest, request.latents.shape)[0] - request.ahead
        frames = manifest.sampling.time_scale * (frames - 1) + 1
        check_video(out, frames - requests.frames_dropped(manifest))
    files = _files(out, manifest, len(request.latents))
    previews = [[_preview(path, k) for path in files] for k in range(1, given.previews + 1)]
    for path in [*files, *chain.from_iterable(previews)]:
        check_out(path)
    steps = len(forecasts) * request.loops
    shown, due = 0, sampling.preview_steps(steps, given.previews)
    seen: list[np.ndarray] = []  # over ranks, of which the others would wait while one decodes

    def show(estimate: np.ndarray) -> None:
        nonlocal shown
        _write(previews[shown], requests.pictures_of(denoiser, request, estimate), manifest, names, None)
        shown += 1

    with progress("sampling", steps, quiet=not first) as advance:

        def stepped(loop: Loop) -> None:
            if loop.step in due and first:
                (seen.append if denoiser.share.groups else show)(loop.estimate())
            advance(loop.step, steps, f"{shown} of {given.previews} previews" if due else "")

        result = sampling.sample(denoiser, request, forecasts, on_step=stepped)
    for estimate in seen:
        show(estimate)
    if not first:
        return 0
    if out.suffix == ".safetensors":
        write_tensors(out, {"latents": result.latents}, {"plan": result.executed})
    else:
        began = time.perf_counter()
        made = requests.pictures(denoiser, request, result)
        decode_ms = 1e3 * (time.perf_counter() - began)
        _write(files, made, manifest, names, given.fps or rate)
    kinds = np.array(list(result.executed))
    times = np.array(result.milliseconds)
    forecast = times[kinds == "."]
    how = f"guard {guard}" if guard else "as planned"
    print(f"plan      {result.executed} ({result.executed.count('F')} of {steps} steps full, {how})")
    if guard:
        report_guard(guard, result.planned, result.executed, result.errors)
    print(
        f"times     prepare {result.prepare_ms:.1f} ms, full {np.median(times[kinds == 'F']):.2f} ms"
        + (f", forecast {np.median(forecast):.2f} ms" if len(forecast) else "")
        + f", loop {times.sum():.0f} ms"
        + (f"; encode {encode_ms:.1f} ms" if "text" in manifest.parts else "")
        + (f", decode {decode_ms:.1f} ms" if "decode" in manifest.parts else "")
    )
    if shown:
        print(f"previews  {' '.join(map(str, chain.from_iterable(previews)))}")
    print(f"wrote     {' '.join(map(str, files))}")
    return 0


def _check_fps(manifest: Manifest, given: argparse.Namespace) -> None:
    """Refuse what only a video has, for a bundle that makes none."""
    from taylorseer_export.embedded.requests import frame_rate
    from taylorseer_export.embedded.video import MP4

    video = frame_rate(manifest) is not None
    if given.fps is not None and not video:
        raise ConfigError(
            f"--fps is {given.fps} for {manifest.family}-{manifest.name}, expected a bundle that makes "
            "videos; leave it out"
        )
    if given.out and given.out.suffix.lower() == MP4 and not video:
        raise ConfigError(
            f"--out is {given.out} for {manifest.family}-{manifest.name}, expected one for pictures or "
            "NAME.safetensors, since this bundle makes no videos; change the extension"
        )


def _check_previews(manifest: Manifest, given: argparse.Namespace, steps: int) -> None:
    """Refuse previews of what is no picture, and more than there are steps that show one."""
    from taylorseer_export.embedded.requests import frame_rate

    if not given.previews:
        return
    latents = manifest.sampling.pictures is None or (given.out and given.out.suffix == ".safetensors")
    if latents or frame_rate(manifest) is not None:
        raise ConfigError(
            f"--previews is {given.previews} for {'latents' if latents else 'a video'} of {manifest.family}-"
            f"{manifest.name}, expected a picture; leave it out"
        )
    if given.previews >= steps:
        raise ConfigError(
            f"--previews is {given.previews} for {steps} steps, expected at most {steps - 1}, since after the last one "
            "there is the picture; ask for fewer"
        )


def _write(files: list[Path], made: np.ndarray, manifest: Manifest, names: list[str], rate: int | None) -> None:
    """Write pictures, or videos of so many frames per second, to the files of `_files`."""
    from taylorseer_export.embedded.picture import grid, plain, write_picture
    from taylorseer_export.embedded.video import write_video

    if manifest.sampling.pictures != "decoder":  # one table of pictures as small as those of the embedded models
        scale = max(1, 256 // made.shape[1])
        write_picture(files[0], grid([list(made)], scale, (), names if len(names) > 1 else ()))
        return
    for path, one in zip(files, made, strict=True):
        if rate is None:
            write_picture(path, plain(one))
        else:
            write_video(path, one, rate)


def _files(out: Path, manifest: Manifest, count: int) -> list[Path]:
    """What is written: a file for each picture of a decoder, `name-1.png` and so on; one file of anything else."""
    if count == 1 or out.suffix == ".safetensors" or manifest.sampling.pictures != "decoder":
        return [out]
    return [out.with_name(f"{out.stem}-{k + 1}{out.suffix}") for k in range(count)]


def _preview(path: Path, number: int) -> Path:
    """The file of a preview, beside that of its picture."""
    return path.with_name(f"{path.stem}-preview-{number}{path.suffix}")


# What a request is made from -> the options that say it.
_OPTIONS = {
    "labels": ("label",),
    "prompts": ("prompt", "inputs", "image", *_VIDEOS, "strength", "negative_prompt", "prompt_tokens"),
    "tensors": ("inputs",),
}


def _request(denoiser: Denoiser, given: argparse.Namespace, picture: Given | None) -> tuple[Request, list[str]]:
    """The request, and a name for each picture of it where it has one."""
    manifest = denoiser.manifest
    source = manifest.sampling.source
    for option in dict.fromkeys(("label", *chain.from_iterable(_OPTIONS.values()))):
        if getattr(given, option) is not None and option not in _OPTIONS[source]:
            known = " or ".join(f"--{name}" for name in _OPTIONS[source][:2])
            raise ConfigError(
                f"--{option.replace('_', '-')} is given for family {manifest.family}, expected {known}, since this "
                f"bundle draws from {source}; leave it out"
            )
    if given.out and given.out.suffix != ".safetensors" and manifest.sampling.pictures is None:
        raise ConfigError(
            f"--out is {given.out} for family {manifest.family}, expected NAME.safetensors, since only its own VAE "
            "makes a picture of its latents; change it"
        )
    if given.n is not None:
        _repeat(given)
    count = max(len(given.label or ()), len(given.prompt or ()), len(given.seed))
    seeds = values_per_picture("--seed", given.seed, count)
    if source == "prompts":
        return _of_prompts(denoiser, given, seeds, picture)
    return (_of_labels if source == "labels" else _of_tensors)(denoiser, given, seeds)


def _repeat(given: argparse.Namespace) -> None:
    """Ask for `--n` pictures of each prompt or label: with the seeds that follow the one given."""
    if len(given.seed) > 1:
        raise ConfigError(f"--n is {given.n} with {len(given.seed)} seeds, expected one seed; leave --n out")
    for option in ("label", "prompt"):
        if values := getattr(given, option):
            setattr(given, option, [value for value in values for _ in range(given.n)])
    count = max(len(given.label or ()), len(given.prompt or ()), given.n)
    given.seed = [given.seed[0] + k % given.n for k in range(count)]


def _of_labels(denoiser: Denoiser, given: argparse.Namespace, seeds: list[int]) -> tuple[Request, list[str]]:
    from taylorseer_export.embedded.requests import label_request
    from taylorseer_export.runtime.tensors import latent_sizes

    latent_sizes(denoiser.manifest, given.size)  # there is one: any other is refused
    labels = values_per_picture("--label", given.label or list(range(10))[: len(seeds)], len(seeds))
    return label_request(denoiser, labels, seeds, given.guidance_scale), [f"label {label}" for label in labels]


def _of_prompts(
    denoiser: Denoiser, given: argparse.Namespace, seeds: list[int], picture: Given | None
) -> tuple[Request, list[str]]:
    from taylorseer_export.embedded.requests import prompt_request

    if given.prompt and given.inputs:
        raise ConfigError("--prompt and --inputs are both given, expected one of them; leave one out")
    if given.inputs:
        tensors = read_tensors(given.inputs)
        names = [f"seed {seed}" for seed in seeds]
        more = (given.size, given.guidance_scale)
        return prompt_request(denoiser, tensors, seeds, *more, given=picture), names
    prompts = values_per_picture("--prompt", given.prompt or ["a red circle left of a blue square"], len(seeds))
    how = (given.size, given.guidance_scale, given.negative_prompt, given.prompt_tokens)
    request = prompt_request(denoiser, prompts, seeds, *how, given=picture)
    return request, list(prompts)


def _of_tensors(denoiser: Denoiser, given: argparse.Namespace, seeds: list[int]) -> tuple[Request, list[str]]:
    """From the tensors of `--inputs`, or from random ones, which is said."""
    from taylorseer_export.runtime.tensors import latent_sizes, tensor_request
    from taylorseer_export.runtime.trajectory import random_conditioning

    sizes, sides = latent_sizes(denoiser.manifest, given.size)
    if given.inputs:
        values = read_tensors(given.inputs)
    else:
        print("no --inputs: the conditioning is random, so the result shows that the loop runs and is no picture")
        typical = {name: dimension.typical for name, dimension in denoiser.manifest.dimensions.items()}
        values = random_conditioning(denoiser, {**typical, **sizes, "batch": 1}, guided=True)
    return tensor_request(denoiser, values, seeds, sizes, sides, given.guidance_scale), []
