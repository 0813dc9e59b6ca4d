"""The commands: one file each, with a `SUMMARY`, its `options(parser)` and `run(given) -> exit code`."""

from __future__ import annotations

from types import ModuleType

from taylorseer_export.commands import bench, calibrate, inspect, replay, run, verify

VERBS: dict[str, ModuleType] = {
    "run": run,
    "replay": replay,
    "calibrate": calibrate,
    "verify": verify,
    "bench": bench,
    "inspect": inspect,
}
