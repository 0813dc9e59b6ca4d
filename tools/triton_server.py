"""A real Triton Inference Server on loopback, without Docker and without a GPU; `make triton` runs this file.

    python tools/triton_server.py                         the embedded models of engines/, until Ctrl-C
    python tools/triton_server.py --repository DIR        another repository

Its arguments are those of production (taylorseer_export/serve/server.py), but for the addresses.

The server comes from the `nvidia-pytriton` wheel, of 2024. Its bridge to numpy is of numpy 1, so `make .venv` puts
both, the wheel and numpy 1.26, into a folder of their own (`.venv/triton`). The interpreter that the server starts for
every model is found by PATH and ignores PYTHONPATH; it gets a bare environment whose .pth file lists that folder first
and then what the interpreter that started this file can import. So a model runs this tree, on numpy 1.26.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from taylorseer_export.serve.server import completed_arguments, sweep

SERVER = Path(sys.prefix) / "triton"
ROOT = Path(__file__).resolve().parent.parent
_READY_SECONDS = 180
_EXIT_SECONDS = 90  # model processes that are cut off at their end leave their shared memory behind
_LOOPBACK = "127.0.0.1"


def missing() -> str:
    """Why the server cannot run here; empty if it can."""
    if not (SERVER / "pytriton").is_dir():
        return f"{SERVER} has no server; `make .venv` installs it on Linux x86_64 with glibc 2.35 or newer"
    if not _stub().is_file():
        return f"the server has no stub for Python {sysconfig.get_python_version()}; use 3.11 to 3.13"
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        return "this Python has no shared libpython, which the server's stub links to"
    return ""


def _stub() -> Path:
    folder = SERVER / "pytriton/tritonserver/python_backend_stubs"
    return folder / sysconfig.get_python_version() / "triton_python_backend_stub"


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


class Server:
    """tritonserver as a child process; a context manager that stops it.

    Args:
        repository: The model repository.
        models: Serve these alone; all if empty. What is served is what the repository holds: it is a folder of links.
        options: Arguments for tritonserver that add to those of `server_arguments`, or take their place.

    Attributes:
        http, grpc, metrics: `127.0.0.1:<port>`.
        secret: What opens the restricted calls.
        swept: Shared memory of killed servers that was removed before this one was started.
        log: The file with everything it said.
    """

    def __init__(self, repository: Path, models: Sequence[str] = (), options: Sequence[str] = ()) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="triton-"))
        self.log = self._folder / "log.txt"
        backends = self._folder / "backends"
        shutil.copytree(SERVER / "pytriton/tritonserver/backends/python", backends / "python")
        shutil.copy2(_stub(), backends / "python")
        self._environment()
        ports = free_ports(3)
        self.http, self.grpc, self.metrics = (f"127.0.0.1:{port}" for port in ports)
        self.secret = secrets.token_hex(16)
        self.swept = sweep()
        own = [
            f"--model-repository={self._chosen(repository, models) if models else repository}",
            f"--backend-directory={backends}", "--allow-gpu-metrics=false", f"--exit-timeout-secs={_EXIT_SECONDS}",
            *(f"--{kind}-address={_LOOPBACK}" for kind in ("http", "grpc", "metrics")),
            *(f"--{kind}-port={port}" for kind, port in zip(("http", "grpc", "metrics"), ports, strict=True)),
        ]  # fmt: skip
        command = [
            str(SERVER / "pytriton/tritonserver/bin/tritonserver"),
            *completed_arguments([*own, *options], self.secret),
        ]
        libraries = f"{SERVER / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
        environment = {**os.environ, "PATH": f"{self._folder}/env/bin:{os.environ['PATH']}",
                       "LD_LIBRARY_PATH": libraries, "HF_HUB_OFFLINE": "1"}  # fmt: skip
        environment.pop("PYTHONPATH", None)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _chosen(self, repository: Path, models: Sequence[str]) -> Path:
        """A repository of these models alone."""
        (chosen := self._folder / "models").mkdir()
        for name in models:
            (chosen / name).symlink_to((repository / name).resolve())
        return chosen

    def _environment(self) -> None:
        """A bare environment: the server's own packages first, then this interpreter's."""
        venv.EnvBuilder(with_pip=False, symlinks=True).create(self._folder / "env")
        seen = [path for path in sys.path if path and "site-packages" not in path and Path(path).is_dir()]
        own = [path for path in seen if not Path(path).is_relative_to(sys.base_prefix)]
        sites = [f"import site; site.addsitedir({path!r})" for path in sys.path if path.endswith("site-packages")]
        (site,) = (self._folder / "env/lib").glob("python*/site-packages")
        lines = [str(SERVER), str(ROOT), *own, *sites]
        (site / "first.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def wait_ready(self) -> Server:
        """Until every model is ready or unavailable; raises `RuntimeError` with the log if the server dies."""
        until = time.monotonic() + _READY_SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://{self.http}/v2/health/live", timeout=5):
                    return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise RuntimeError(f"tritonserver did not come up:\n{self.said()}")

    def said(self) -> str:
        """Its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def stop(self, how: signal.Signals = signal.SIGINT) -> int:
        """End it and wait; returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=_EXIT_SECONDS + 10)
        with suppress(ProcessLookupError):  # models outlive a server that was killed
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def embedded_repository(folder: Path, engines: Path, **deployment: object) -> Path:
    """A repository in `folder` with the embedded models, exported into `engines` if they are not there."""
    from taylorseer_export.cli import main
    from taylorseer_export.serve.repository import Deployment, write_repository

    for family in ("flux", "dit"):
        bundle = engines / f"{family}-tiny"
        if not bundle.is_dir() and main([family, "--out", str(engines)]):
            raise RuntimeError(f"{family} was not exported")
        if not (folder / "models" / bundle.name).is_dir():
            write_repository(bundle, folder / "models", Deployment(**deployment))  # type: ignore[arg-type]
    return folder / "models"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repository", type=Path, help="model repository (default: the embedded models, of engines/)")
    given = parser.parse_args()
    if reason := missing():
        print(reason, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        repository = given.repository or embedded_repository(Path(scratch), Path("engines"))
        with Server(repository) as server:
            print("loading and warming up the models ...")
            server.wait_ready()
            name = "flux-tiny" if given.repository is None else "MODEL"
            print(f"\nserving on http://{server.http} and grpc://{server.grpc}, metrics on http://{server.metrics}")
            print("send a request:")
            print(f"  taylorseer-export client {name} --url {server.grpc} --prompt 'a red circle' --out circle.png")
            print(f'  curl -s {server.http}/v2/models/{name}/generate -d \'{{"prompt": "a red circle"}}\'')
            print("Ctrl-C stops it")
            try:
                server.process.wait()
            except KeyboardInterrupt:
                print("stopping")
    return 0


if __name__ == "__main__":
    sys.exit(main())
