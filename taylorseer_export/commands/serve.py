"""`serve`: the images API of OpenAI, over HTTP, for bundles that draw, here or on Triton servers."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from taylorseer_export.commands.options import device_option, service_options
from taylorseer_export.commands.ranks import joined, rank_option
from taylorseer_export.commands.terminal import require_extra
from taylorseer_export.errors import ConfigError
from taylorseer_export.values import memory, real, whole

if TYPE_CHECKING:
    from taylorseer_export.runtime.group import Group
    from taylorseer_export.serve.api.busy import Busy
    from taylorseer_export.serve.api.models import Models

SUMMARY = "Serve bundles, or Triton servers that have them, over HTTP as the OpenAI API defines it for images."

_LAST_PORT = 65535
# Options of bundles that are loaded here.
_LOADED = "device slots queue batch workers threads memory_budget conditioning_cache warm stall lora".split()
_BUSY = ("busy_queue", "busy_profile")
_OF_ONE = "triton slots batch workers warm".split()  # what several ranks that serve one bundle do not take


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "bundles", type=Path, nargs="*", metavar="BUNDLE", help="folders of bundles; requests name one as their `model`"
    )
    parser.add_argument(
        "--triton",
        nargs="+",
        metavar="HOST:PORT",
        default=(),
        help="Triton servers (gRPC) that have the models, in the place of bundles: nothing is loaded here",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        default=(),
        help="with --triton: bundles by their names there, the first for requests that name none (default: all that "
        "the servers list, which takes the secret in TAYLORSEER_ADMIN where they restrict it)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument(
        "--port", type=whole(0, _LAST_PORT), default=8000, help="port, 0 for a free one (default: %(default)s)"
    )
    device_option(parser)
    rank_option(parser)
    service_options(parser, "bundle")
    parser.add_argument(
        "--lora",
        metavar="NAME=FILE[:SCALE]",
        action="append",
        default=[],
        help="a LoRA that requests choose: by `lora` where the bundle was exported with --lora-rank, which is loaded "
        "once; of any other a further model BUNDLE+NAME, loaded with it, which they choose as their `model`; may be "
        "repeated, with one bundle (default: none)",
    )
    parser.add_argument(
        "--busy-queue",
        type=whole(0),
        metavar="N",
        help="pictures that may wait for a bundle; while more do, requests without a plan of their own take "
        "--busy-profile (default: they never do)",
    )
    parser.add_argument("--busy-profile", metavar="NAME", help="a faster profile, which every bundle must have")
    parser.add_argument(
        "--timeout",
        type=real(0),
        default=600.0,
        help="most seconds of a request, from its arrival (default: %(default)g)",
    )
    parser.add_argument(
        "--most-pictures", type=whole(1), default=10, help="most pictures of one request (default: %(default)s)"
    )
    parser.add_argument(
        "--most-bytes", type=memory, metavar="SIZE", default=1 << 20, help="most bytes of a JSON body (default: 1MiB)"
    )
    parser.add_argument(
        "--most-form-bytes",
        type=memory,
        metavar="SIZE",
        default=64 << 20,
        help="most bytes of a form with pictures (default: 64MiB)",
    )
    parser.add_argument(
        "--stall",
        type=real(0),
        default=300.0,
        help="seconds of one engine call after which /health says that it is stalled (default: %(default)g)",
    )
    parser.add_argument(
        "--api-key-file",
        type=Path,
        help="file of keys, one per line; others come from the variable TAYLORSEER_API_KEYS (default: open to all)",
    )


def run(given: argparse.Namespace) -> int:
    """The command itself; returns the exit code."""
    _check(given)
    extra, own = ("front", ("tritonclient",)) if given.triton else ("serve", ())
    require_extra(extra, *own, "starlette", "uvicorn", "python_multipart", "prometheus_client", "PIL")
    from taylorseer_export.serve.api.process import address_of, bound, serve
    from taylorseer_export.serve.api.settings import Settings, read_keys
    from taylorseer_export.serve.api.traces import traces_of

    settings = Settings(
        timeout=given.timeout,
        most_pictures=given.most_pictures,
        body=given.most_bytes,
        form=given.most_form_bytes,
        stall=given.stall,
        keys=read_keys(given.api_key_file),
    )
    busy, traces = _busy(given), traces_of()
    group = joined(given)
    if group is not None:
        _check_ranks(given, group)
        if group.rank:
            return _follow(given, group)
    with bound(given.host, given.port) as listener:
        models = _models(given, busy, group)

        def ready() -> None:
            names = ", ".join(model.name for model in models)
            names += f" of {', '.join(given.triton)}" if given.triton else ""
            names += f" on {group.size} ranks, one picture at a time," if group is not None else ""
            who = f"{len(settings.keys)} keys" if settings.keys else "no key: whoever reaches it may draw"
            print(f"serving {names} at {address_of(listener)} ({who}); Ctrl-C ends it", flush=True)

        failed = serve(models, settings, listener, ready, traces)
    if failed is not None:
        raise failed
    return 0


def _follow(given: argparse.Namespace, group: Group) -> int:
    """What ranks other than 0 do: they hear of requests from it alone."""
    from taylorseer_export.runtime.denoiser import load
    from taylorseer_export.runtime.following import follow

    with load(given.bundles[0], given.device, given.threads, group=group) as denoiser:
        follow(denoiser)
    return 0


def _check_ranks(given: argparse.Namespace, group: Group) -> None:
    """Refuse what several ranks do not serve.

    Raises:
        ConfigError: It is not one bundle, or an option of several requests at a time is given.
    """
    usual = argparse.ArgumentParser()
    options(usual)
    changed = [name for name in _OF_ONE if getattr(given, name) != usual.get_default(name)]
    if changed or len(given.bundles) != 1:
        seen = f"--{changed[0]} is given" if changed else f"{len(given.bundles)} bundles are given"
        raise ConfigError(
            f"{seen} on {group.size} ranks, expected one bundle and none of --{' --'.join(_OF_ONE)}: they draw one "
            "picture at a time; leave it out"
        )


def _models(given: argparse.Namespace, busy: Busy | None, group: Group | None = None) -> Models:
    """Loaded here, or found on Triton servers."""
    if given.triton:
        from taylorseer_export.serve.api.fleet import open_models
        from taylorseer_export.serve.server import SECRET

        return open_models(given.triton, given.models, os.environ.get(SECRET, ""))
    from taylorseer_export.serve.api.loaded import load_models
    from taylorseer_export.serve.loras import named
    from taylorseer_export.serve.service import Limits

    names = ("slots", "queue", "batch", "workers", "conditioning_cache", "warm")
    limits = Limits(**{name: getattr(given, name) for name in names})
    budget, loras = given.memory_budget, named(given.lora)
    return load_models(given.bundles, given.device, given.threads, limits, budget, busy, loras, group)


def _check(given: argparse.Namespace) -> None:
    """Refuse options of the one kind of models beside the other.

    Raises:
        ConfigError: They are given so, or no models are.
    """
    if bool(given.bundles) == bool(given.triton):
        seen = f"{given.bundles[0]} beside --triton" if given.bundles else "missing"
        raise ConfigError(f"BUNDLE is {seen}, expected bundles or --triton HOST:PORT; give one of them")
    if not given.triton:
        if given.models:
            raise ConfigError(
                f"--models is {given.models[0]} without --triton, expected it beside that; a bundle's name is its own"
            )
        return
    usual = argparse.ArgumentParser()
    options(usual)
    for name in (*_LOADED, *_BUSY):
        if getattr(given, name) != usual.get_default(name):
            why = (
                "how long the queues of Triton's models are is not known here"
                if name in _BUSY
                else "it belongs to models that are loaded here, and `taylorseer-export triton` sets it for others"
            )
            raise ConfigError(
                f"--{name.replace('_', '-')} is given beside --triton, expected none, since {why}; leave it out"
            )


def _busy(given: argparse.Namespace) -> Busy | None:
    """When the server is busy and what it does then; None where it never is.

    Raises:
        ConfigError: One of the two options is given without the other.
    """
    from taylorseer_export.serve.api.busy import Busy

    if given.busy_queue is None and given.busy_profile is None:
        return None
    if given.busy_profile is None:
        raise ConfigError(
            f"--busy-queue is {given.busy_queue} alone, expected --busy-profile beside it; name a profile"
        )
    if given.busy_queue is None:
        raise ConfigError(
            f"--busy-profile is {given.busy_profile[:64]} alone, expected --busy-queue beside it; say how many may wait"
        )
    return Busy(given.busy_queue, given.busy_profile)
