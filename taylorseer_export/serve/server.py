"""The server's arguments, in one place, and the program that starts a server with them.

    python -m taylorseer_export.serve.server --model-repository=models/ [more options of tritonserver]

Whoever reaches a Triton server's ports can, by default, map any shared memory of its machine (`shared-memory`), write
files where it can (`trace`, `logging`) and, under explicit model control, make it load code and take models away
(`model-repository`). So models are loaded at the start and never again, and those four groups of calls ask for a header
whose value is a secret. Inference, metadata and health stay open.

A program of its own, because a server that was killed leaves the memory that it shared with its models in /dev/shm.
It sweeps that, and then the process becomes the server.

Source: https://github.com/triton-inference-server/server, docs/customization_guide: deploy.md, inference_protocols.md.
"""

from __future__ import annotations

import os
import secrets
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from taylorseer_export.errors import ConfigError, TaylorSeerError

RESTRICTED = ("model-repository", "shared-memory", "trace", "logging")  # Triton's names, over HTTP and gRPC alike
HEADER = "taylorseer-admin"  # over HTTP; over gRPC Triton puts `triton-grpc-protocol-` before it
SECRET = "TAYLORSEER_ADMIN"  # the variable with the header's value
REGION = "taylorseer_shm_"  # begins the name of every file of shared memory; Triton adds a unique end, from 24.04 on
SHARED_MEMORY = Path("/dev/shm")
_MAPPING = 1.0  # seconds in which a server has mapped a file that it made
_PROCESSES = Path("/proc")
_LOAD_SECONDS, _EXIT_SECONDS = 600, 60


def server_arguments(repository: Path | str, secret: str) -> tuple[str, ...]:
    """What tritonserver is started with, everywhere.

    Args:
        repository: The model repository: all of its models are served, so it holds those alone that shall be.
        secret: Value of the header that opens the restricted calls.
    """
    restricted = f"{','.join(RESTRICTED)}:{HEADER}={secret}"
    return (
        f"--model-repository={repository}",
        "--model-control-mode=none",
        f"--http-restricted-api={restricted}",
        f"--grpc-restricted-protocol={restricted}",
        "--allow-sagemaker=false",
        "--allow-vertex-ai=false",
        "--disable-auto-complete-config",
        "--strict-readiness=true",
        "--exit-on-error=true",
        f"--exit-timeout-secs={_EXIT_SECONDS}",
        f"--backend-config=python,shm-region-prefix-name={REGION}",
        f"--backend-config=python,stub-timeout-seconds={_LOAD_SECONDS}",
    )


def completed_arguments(given: Sequence[str], secret: str) -> list[str]:
    """The given options of tritonserver, with those of `server_arguments` that are not among them.

    Raises:
        ConfigError: There is no `--model-repository=DIR`, or an option is not written `--name=value`.
    """
    for option in given:
        if not option.startswith("--"):
            raise ConfigError(f"option is `{option}`, expected --name=value in one word; write it so")
    named = {_name(option): option for option in given}
    repository = named.get("--model-repository", "").partition("=")[2]
    if not repository:
        raise ConfigError("--model-repository is missing, expected --model-repository=DIR; add it")
    return [*(o for o in server_arguments(repository, secret) if _name(o) not in named), *given]


def start_lines(repository: Path | str) -> list[str]:
    """How to start a server over a repository, for a shell: by this program, and what that comes to."""
    arguments = server_arguments(repository, f"${{{SECRET}:?}}")  # without a secret the shell refuses
    return [
        f"next: python -m taylorseer_export.serve.server {shlex.quote(arguments[0])}",
        f"which draws a secret and runs, where {SECRET} has one:",
        "  tritonserver "
        + " ".join(f'"{argument}"' if "$" in argument else shlex.quote(argument) for argument in arguments),
    ]


def abandoned_regions(prefix: str = REGION) -> list[Path]:
    """Files of shared memory with this prefix that are ours and that no process has mapped.

    A server or a model whose memory this process may not read is taken to have mapped all of them; what its name is
    anybody may read.
    """
    own = [path for path in SHARED_MEMORY.glob(f"{prefix}*") if _is_ours(path)]
    if not own:
        return []
    mapped: set[str] = set()
    for process in _PROCESSES.glob("[0-9]*"):
        maps = _read(process / "maps")
        # Its name anybody may read: `tritonserver`, or `triton_python_b` for a model's.
        if maps is None and (_read(process / "comm") or "").startswith("triton"):
            return []
        mapped.update(line.split(maxsplit=5)[-1] for line in (maps or "").splitlines())
    return [path for path in own if str(path) not in mapped]


def sweep(prefix: str = REGION) -> list[Path]:
    """Remove what servers that were killed left in /dev/shm; never what a process still uses. Returns what it was."""
    swept = abandoned_regions(prefix)
    if swept:  # a server that starts beside this one makes a file first and maps it then
        time.sleep(_MAPPING)
        still = set(abandoned_regions(prefix))
        swept = [path for path in swept if path in still]
    for path in swept:
        path.unlink(missing_ok=True)
    return swept


def main(given: Sequence[str]) -> int:
    """Sweep, then become tritonserver; returns only if that cannot be."""
    try:
        arguments = completed_arguments(given, os.environ.get(SECRET) or secrets.token_hex(16))
    except TaylorSeerError as error:
        print(error, file=sys.stderr)
        return 2
    for path in sweep():
        print(f"removed {path}, shared memory of a server that was killed", file=sys.stderr)
    try:
        os.execvp("tritonserver", ["tritonserver", *arguments])
    except OSError as error:
        print(f"tritonserver does not start ({error.strerror}), expected it on the path; install it", file=sys.stderr)
        return 1


def _name(option: str) -> str:
    """`--name`, with the backend and its setting where it has them: `--backend-config=python,x`."""
    name, _, value = option.partition("=")
    return f"{name}={value.partition('=')[0]}" if name == "--backend-config" else name


def _read(path: Path) -> str | None:
    """A file of a process: empty if it has ended, None if it is closed to us."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    except PermissionError:
        return None


def _is_ours(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.geteuid()
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
