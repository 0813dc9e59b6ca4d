"""The commands: one file each, with a `SUMMARY`, its `options(parser)` and `run(given) -> exit code`."""

from __future__ import annotations

from types import ModuleType

from taylorseer_export.commands import (
    auto,
    bench,
    calibrate,
    client,
    comfy,
    evaluate,
    inspect,
    replay,
    run,
    serve,
    taps,
    triton,
    verify,
)

VERBS: dict[str, ModuleType] = {
    "auto": auto,
    "run": run,
    "replay": replay,
    "calibrate": calibrate,
    "evaluate": evaluate,
    "verify": verify,
    "bench": bench,
    "inspect": inspect,
    "taps": taps,
    "serve": serve,
    "triton": triton,
    "client": client,
    "comfy": comfy,
}
