"""Whether the models of a server are alive: for the liveness probe of a cluster, on the standard library alone.

    python -m taylorseer_export.serve.probe --url 127.0.0.1:8002 [MODEL ...]

`/v2/health/ready` stays 200 when the process of a model is killed, as by the kernel for its memory, and when an engine
call hangs; the server starts no other process. So every process reports at the metrics endpoint when it last did
anything, and a dead one cannot: what is old is dead.

Exit code 0: all are alive. 1: one is not, none is there, or the server does not answer in time.
"""

from __future__ import annotations

import argparse
import http.client
import re
import sys
import time
from collections.abc import Mapping, Sequence

from taylorseer_export.errors import ServeError

BEAT = "heartbeat_timestamp_seconds"
PROGRESS = "progress_timestamp_seconds"
_LINE = re.compile(r"^taylorseer_(\w+)\{([^}]*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_LONGEST = 16_000_000  # bytes of metrics


def page(url: str, seconds: float) -> str:
    """The metrics of a server, all of them within `seconds`.

    Raises:
        ServeError: It does not answer, or not in time.
    """
    until = time.monotonic() + seconds
    host, _, port = url.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ServeError(f"--url is {url}, expected host:port, like 127.0.0.1:8002; correct it", "UNAVAILABLE")
    connection = http.client.HTTPConnection(host, int(port), timeout=seconds)
    try:
        connection.request("GET", "/metrics")
        response, parts, size = connection.getresponse(), [], 0
        while part := response.read1(65536):
            parts.append(part)
            size += len(part)
            left = until - time.monotonic()
            if left <= 0 or size > _LONGEST:
                raise TimeoutError("it has not sent all of them")
            if connection.sock is not None:
                connection.sock.settimeout(left)
        if response.status != 200:
            raise ServeError(
                f"{url} answered {response.status}, expected 200; give the port of the metrics", "UNAVAILABLE"
            )
        return b"".join(parts).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        said = str(error) or type(error).__name__
        raise ServeError(
            f"{url} does not send its metrics in {seconds:g} s ({said}), expected a server that is up; restart it",
            "UNAVAILABLE",
        ) from error
    finally:
        connection.close()


def times(text: str, name: str) -> dict[tuple[str, str], float]:
    """(model, instance) -> the time that a metric of `text` says."""
    found = {}
    for metric, labels, value in _LINE.findall(text):
        if metric == name:
            label = dict(_LABEL.findall(labels))
            found[label.get("model", ""), label.get("instance", "")] = float(value)
    return found


def complaints(
    beats: Mapping[tuple[str, str], float],
    progress: Mapping[tuple[str, str], float],
    models: Sequence[str],
    now: float,
    oldest: float,
    longest: float,
) -> list[str]:
    """What is wrong, a sentence each.

    Args:
        beats, progress: From `times`.
        models: That must be there; any, if empty.
        now: The same clock as theirs. Unit: seconds.
        oldest: Age of a report from which its process is dead. Unit: seconds.
        longest: Age of the last turn of work from which a process hangs. Unit: seconds.
    """
    there = {model for model, _ in beats}
    missing = [model for model in models if model not in there] if models else [] if there else ["any"]
    said = [f"model {model} does not report, expected its heartbeat; restart the server" for model in missing]
    for times_of, bound, what in ((beats, oldest, "its heartbeat"), (progress, longest, "its last turn of work")):
        for (model, instance), seen in sorted(times_of.items()):
            age = now - seen
            if (not models or model in models) and age > bound:
                said.append(
                    f"{what} is {age:.1f} s old in {instance}, expected at most {bound:g} s; restart the server"
                )
    return said


def main(given: Sequence[str]) -> int:
    """Print what is wrong; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m taylorseer_export.serve.probe", description="Are models alive?")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="that must be there (default: any)")
    parser.add_argument("--url", default="127.0.0.1:8002", help="host:port of the metrics (default: %(default)s)")
    parser.add_argument(
        "--oldest",
        type=float,
        default=10.0,
        help="age of a heartbeat that is too old, in seconds (default: %(default)g)",
    )
    parser.add_argument(
        "--longest", type=float, default=300.0, help="seconds that one engine call may take (default: %(default)g)"
    )
    parser.add_argument(
        "--timeout", type=float, default=5.0, help="seconds for the server to answer (default: %(default)g)"
    )
    asked = parser.parse_args(given)
    try:
        text = page(asked.url, asked.timeout)
    except ServeError as error:
        print(error, file=sys.stderr)
        return 1
    said = complaints(times(text, BEAT), times(text, PROGRESS), asked.models, time.time(), asked.oldest, asked.longest)
    for sentence in said:
        print(sentence, file=sys.stderr)
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
