"""What several commands do on the terminal and around it: open a bundle, read and write tensors, show progress."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from taylorseer_export.bundle.atomic import check_open, replacing
from taylorseer_export.commands.ranks import joined
from taylorseer_export.errors import ConfigError

if TYPE_CHECKING:
    from taylorseer_export.method import Forecasts, Guard, RequestOptions
    from taylorseer_export.runtime.denoiser import Denoiser

# dtype by its name in safetensors -> in numpy.
_NUMPY = {"F16": "f2", "F32": "f4", "F64": "f8", "BOOL": "?"} | {
    f"{kind}{bits}": f"{kind.lower()}{bits // 8}" for kind in "IU" for bits in (8, 16, 32, 64)
}


def open_denoiser(given: argparse.Namespace, one_latent: str = "", ranks: bool = False) -> Denoiser:
    """The bundle that was named, loaded as was asked.

    Args:
        given: The command line.
        one_latent: A verb that serves no bundle of several latents.
        ranks: Whether the command may be run by several ranks, and has `rank_option`.
    """
    from taylorseer_export.bundle.latents import refuse_several
    from taylorseer_export.bundle.store import open_bundle
    from taylorseer_export.runtime.denoiser import load
    from taylorseer_export.runtime.share import check_ranks

    if given.no_cuda_graphs and not given.device.is_gpu:
        raise ConfigError("--no-cuda-graphs is given for the CPU, expected it with --device cuda; leave it out")
    lora, bundle = getattr(given, "lora", ()), open_bundle(given.bundle)
    guidance = getattr(given, "parallel", None) == "guidance"
    if one_latent := "--parallel guidance" if guidance else one_latent:
        refuse_several(bundle.manifest, one_latent)
    group = joined(given) if ranks or guidance else None
    if not guidance:
        check_ranks(bundle.manifest, group)
    denoiser = load(
        bundle, given.device, given.threads, None, not given.no_cuda_graphs, lora=lora, group=group, guidance=guidance
    )
    denoiser.share.owned = True
    if lora:
        from taylorseer_export.bundle.memory import lora_bytes, size

        changed, usual = denoiser.lora, denoiser.usual
        if usual is None:
            print(f"lora: {len(changed.weights)} weights changed, {size(changed.bytes)} of memory, no operation added")
        else:
            print(
                f"lora: {usual.layers} layers changed by inputs, {size(lora_bytes(denoiser.manifest))} for each request"
            )
        if unread := (changed if usual is None else usual).unread:
            print(f"left out: updates of {len(unread)} weights that no graph reads, {unread[0]} first")
    return denoiser


def request_options(given: argparse.Namespace, steps: int | None = None) -> RequestOptions:
    """What was typed about forecasts; `steps` where something else than an option says how long the loop is."""
    from dataclasses import fields

    from taylorseer_export.method import RequestOptions

    values = {field.name: getattr(given, field.name, None) for field in fields(RequestOptions)}
    return RequestOptions(
        **{**values, "accumulate": given.accumulate, "steps": values["steps"] if steps is None else steps}
    )


def forecasts_of(denoiser: Denoiser, given: argparse.Namespace, steps: int | None = None) -> Forecasts:
    """The forecasts that the options ask for; arguments as of `request_options`."""
    return denoiser.forecasts(**vars(request_options(given, steps)))


def report_guard(guard: Guard, planned: str, executed: str, errors: Sequence[float]) -> None:
    """The errors that a guard decided by, and a warning where it decided nothing."""
    from taylorseer_export.runtime.probe import warning_of

    seen = [error for error in errors if error == error]
    if seen:
        print(f"errors    {min(seen):.4g} to {max(seen):.4g}, median {sorted(seen)[len(seen) // 2]:.4g}")
    warning = warning_of(guard, planned, executed, errors)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)


def values_per_picture(name: str, values: list[Any], count: int) -> list[Any]:
    """One value for every picture: as given, or one for all."""
    if len(values) not in (1, count):
        raise ConfigError(f"{name} has {len(values)} values, expected 1 or {count}; give one for each picture")
    return values if len(values) == count else values * count


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file as numpy has them; bfloat16, which it lacks, as the same numbers in float32.

    Raises:
        ConfigError: It is missing, no safetensors file, or has a tensor in a dtype that holds no plain numbers.
    """
    import numpy as np
    from safetensors import SafetensorError, deserialize

    from taylorseer_export.runtime.runner import from_bits

    if not path.is_file():
        seen = "no file" if path.exists() else "missing"
        raise ConfigError(f"{path} is {seen}, expected a safetensors file; check --inputs")
    try:
        held = deserialize(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} is not readable ({error}), expected float32 safetensors; write it again") from error
    read = {}
    for name, tensor in held:
        dtype, shape, data = tensor["dtype"], tensor["shape"], tensor["data"]
        if dtype == "BF16":
            read[name] = from_bits(np.frombuffer(data, np.uint16)).reshape(shape)
        elif dtype in _NUMPY:
            read[name] = np.frombuffer(data, _NUMPY[dtype]).reshape(shape).copy()
        else:
            raise ConfigError(
                f"tensor `{name}` of {path} is {dtype}, expected float32 or another dtype of plain numbers; write it so"
            )
    return read


def check_out(path: Path, option: str = "--out", picture: bool = False) -> None:
    """Refuse a file that could not be written, before the work whose result goes there.

    Args:
        path: What the user named.
        option: How.
        picture: Whether it gets a picture, and so needs the extension of a format that can be written here.

    Raises:
        ConfigError: It is a folder or no file, its folder is missing or closed, or its extension says no format.
    """
    shown = path if path.name else path / "."
    if path.is_dir():
        raise ConfigError(f"{option} {shown} is a folder, expected a file to write; name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"folder {path.parent} is missing, expected it for {path.name}; create it")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{option} {path} is no regular file, expected one, or none yet; choose another name")
    check_open(path.parent, path.name, "choose another one")
    if picture:
        from taylorseer_export.embedded.picture import check_format

        check_format(path, option)


def write_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """Write whole or not at all."""
    from safetensors.numpy import save_file

    with replacing(path) as partial:
        save_file(tensors, partial, metadata)


def require_extra(extra: str, *modules: str) -> None:
    """Refuse early when an optional library is missing, or older than the extra asks for."""
    from importlib.metadata import PackageNotFoundError, requires, version
    from importlib.util import find_spec

    for module in modules:
        if find_spec(module) is None:
            raise ConfigError(
                f"{module} is not installed, expected it for this command; pip install 'taylorseer-export[{extra}]'"
            )
    try:
        asked = requires("taylorseer-export") or []
    except PackageNotFoundError:  # run from its sources
        return
    for line in asked:
        found = re.match(rf"([\w-]+)>=([\d.]+);.*extra == ['\"]{extra}['\"]", line)
        if found and found[1] in modules and _numbers(version(found[1])) < _numbers(found[2]):
            raise ConfigError(
                f"{found[1]} is {version(found[1])}, expected at least {found[2]}; pip install --upgrade "
                f"'taylorseer-export[{extra}]'"
            )


def _numbers(version: str) -> tuple[int, ...]:
    """`2.11.0+cpu` as (2, 11, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0]))


class Advance(Protocol):
    """Moves a bar to what is done of all, with a note behind it."""

    def __call__(self, done: int, of: int, note: str = "") -> None: ...


@contextmanager
def progress(label: str, total: int, quiet: bool = False) -> Iterator[Advance]:
    """A bar on standard error that appears once the work has taken half a second."""
    from tqdm import tqdm

    with tqdm(total=total, desc=label, leave=False, delay=0.5, disable=quiet or None, file=sys.stderr) as bar:

        def advance(done: int, of: int, note: str = "") -> None:
            bar.total = of
            if note:
                bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)

        yield advance


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """The bar of an export: weights by bytes, then graphs by count."""
    with progress("writing", 1) as advance:

        def report(stage: str, done: int, total: int) -> None:
            advance(done, total)

        yield report
