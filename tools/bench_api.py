"""Load on the images API: every answer checked against a run alone, and latency against offered load.

    python tools/bench_api.py --file

First 200 requests, 8 in flight, of mixed prompts, sizes and profiles, of which a fifth leave while they are drawn.
Each answer is compared with the picture that the same bundle draws in this process, bit for bit; then the server must
hold no slot and no place of its queue, and no more files than before.

Then the same servers get requests at random moments (open load), at shares of what one client after the other managed:
with what prompts become kept and not, and with `quality: auto` at a busy profile and without. They take turns, so noise
of the machine hits all alike. Prompts are drawn from a few, as those of a server are. Latency is from sending to the
whole answer, in milliseconds; clients keep their connections.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2
import numpy as np
from bench_triton import summary
from PIL import Image
from record import RESULTS, circumstances, dirty_option, write_record
from tqdm import tqdm

from taylorseer_export import cli
from taylorseer_export.embedded.caption import captions
from taylorseer_export.embedded.requests import pictures, prompt_request
from taylorseer_export.runtime.denoiser import Denoiser, load
from taylorseer_export.runtime.sampling import sample

MODEL, PROFILE = "flux-tiny", "fast"
SIZES = ((64, 64), (64, 96), (96, 64))
PROFILES = (None, PROFILE)
PROMPTS = captions(20, 3)
SHARES = (0.8, 1.5, 3.0)  # of what one client after the other managed
BUSY = ("--busy-queue", "2", "--busy-profile", PROFILE)
SETTINGS: dict[str, tuple[str, ...]] = {
    "kept": (),
    "not kept": ("--conditioning-cache", "0"),
    "kept, faster when busy": BUSY,
}
_TIMEOUT = 600.0  # seconds


class Server:
    """`taylorseer-export serve` on a free port, for the length of a block."""

    def __init__(self, bundle: Path, *options: str) -> None:
        command = [sys.executable, "-m", "taylorseer_export", "serve", str(bundle), "--port", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        found = re.search(r" at (http://\S+) ", self.process.stdout.readline())
        if found is None:
            raise SystemExit(f"the server does not start: {' '.join(command)}")
        self.url = found[1]

    @property
    def files(self) -> int:
        """Files that it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def resident_mb(self) -> float:
        """Memory that it has."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait(120)


def asked(number: int, choose: random.Random) -> dict[str, Any]:
    """The body of a request of the mix."""
    height, width = choose.choice(SIZES)
    body = {
        "model": MODEL,
        "prompt": choose.choice(PROMPTS),
        "seed": number,
        "size": f"{width}x{height}",
        "profile": choose.choice(PROFILES),
    }
    return {name: value for name, value in body.items() if value is not None}


async def drawn(client: httpx2.AsyncClient, body: dict[str, Any], leaves: float | None = None) -> np.ndarray | None:
    """The picture of a request; None where the client leaves after so many seconds."""
    try:
        async with asyncio.timeout(leaves):
            answer = await client.post("/v1/images/generations", json=body)
    except TimeoutError:
        return None
    answer.raise_for_status()
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))))


async def mixed(server: Server, count: int, flight: int) -> tuple[list[tuple[dict[str, Any], np.ndarray]], int]:
    """(requests with their pictures, requests that left) of a mix with so many in flight, of which a fifth leave."""
    choose = random.Random(0)
    bodies = [
        (asked(number, choose), choose.uniform(0.01, 0.2) if number % 5 == 4 else None) for number in range(count)
    ]
    waiting, made, left = iter(bodies), [], 0
    with tqdm(total=count, desc="mixed", unit="request") as bar:

        async def send(client: httpx2.AsyncClient) -> None:
            nonlocal left
            for body, leaves in waiting:
                picture = await drawn(client, body, leaves)
                if picture is None:
                    left += 1
                else:
                    made.append((body, picture))
                bar.update()

        async with httpx2.AsyncClient(base_url=server.url, timeout=_TIMEOUT) as client:
            await asyncio.gather(*(send(client) for _ in range(flight)))
    return made, left


def check_alone(denoiser: Denoiser, made: list[tuple[dict[str, Any], np.ndarray]]) -> None:
    """Refuse an answer that is not, bit for bit, what the bundle draws in this process."""
    for body, picture in tqdm(made, desc="alone", unit="picture"):
        width, height = map(int, body["size"].split("x"))
        request = prompt_request(denoiser, [body["prompt"]], [body["seed"]], (height, width))
        forecasts = denoiser.forecasts(profile=body.get("profile"))
        expected = pictures(denoiser, request, sample(denoiser, request, forecasts))[0]
        if not np.array_equal(picture, expected):
            raise SystemExit(f"the server draws another picture for {body}, expected what the bundle draws alone")


async def idle(server: Server) -> dict[str, float]:
    """What the server holds once nobody waits: slots and places of the queue, by its own metrics."""
    until = time.monotonic() + 60
    async with httpx2.AsyncClient(base_url=server.url) as client:
        while True:
            text = (await client.get("/metrics")).text
            held = {
                name: float(re.search(rf"^taylorseer_{name}\{{.*\}} (\S+)$", text, re.M)[1])  # type: ignore[index]
                for name in ("slots_in_use", "queue")
            }
            if not any(held.values()) or time.monotonic() > until:
                return held
            await asyncio.sleep(0.05)


async def closed(server: Server, count: int) -> dict[str, Any]:
    """One client after the other, with the median time of each stage."""
    choose, times, stages = random.Random(1), [], []
    async with httpx2.AsyncClient(base_url=server.url, timeout=_TIMEOUT) as client:
        began = time.perf_counter()
        for number in range(count):
            sent = time.perf_counter()
            body = {"model": MODEL, "prompt": choose.choice(PROMPTS), "seed": number}
            answer = await client.post("/v1/images/generations", json=body)
            answer.raise_for_status()
            stages.append(answer.json()["taylorseer"]["pictures"][0]["times_ms"])
            times.append(1e3 * (time.perf_counter() - sent))
    medians = {name: float(np.median([one[name] for one in stages])) for name in stages[0]}
    return {**summary(times, count / (time.perf_counter() - began)), "stages_ms": medians}


async def opened(server: Server, rate: float, count: int) -> dict[str, Any]:
    """Requests at random moments, `rate` per second on average; how many took the faster profile is counted."""
    choose, times, hurried = random.Random(2), [], 0

    async def send(client: httpx2.AsyncClient, number: int, prompt: str) -> None:
        nonlocal hurried
        sent = time.perf_counter()
        body = {"model": MODEL, "prompt": prompt, "seed": number, "quality": "auto"}
        answer = await client.post("/v1/images/generations", json=body)
        answer.raise_for_status()
        hurried += answer.json()["taylorseer"]["profile"]["why"] is not None
        times.append(1e3 * (time.perf_counter() - sent))

    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=server.url, timeout=_TIMEOUT, limits=limits) as client:
        began = due = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for number in range(count):
                due += choose.expovariate(rate)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.create_task(send(client, number, choose.choice(PROMPTS)))
        took = time.perf_counter() - began
    return {"offered_per_s": rate, "hurried": hurried, **summary(times, count / took)}


def exported(scratch: Path) -> Path:
    """The embedded FLUX with a profile that is twice as fast as its plan."""
    out = scratch / "engines"
    for command in (
        ["flux", "--out", str(out)],
        ["calibrate", str(out / MODEL), "--speedup", "8", "--samples", "8", "--held-out", "4", "--name", PROFILE],
    ):
        if code := cli.main(command):
            raise SystemExit(code)
    return out / MODEL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200, help="of the mix (default: %(default)s)")
    parser.add_argument("--flight", type=int, default=8, help="requests in flight in it (default: %(default)s)")
    parser.add_argument("--open", type=int, default=80, help="requests of a point of open load (default: %(default)s)")
    parser.add_argument("--bundle", type=Path, help=f"a bundle named {MODEL} with a profile {PROFILE} (default: made)")
    parser.add_argument("--file", action="store_true", help="write the record into tools/results")
    dirty_option(parser)
    given = parser.parse_args()
    where = circumstances(RESULTS if given.file else None, given.allow_dirty)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        bundle = given.bundle or exported(Path(scratch))
        queue = ("--queue", str(max(1000, given.open)))
        servers = {name: stack.enter_context(Server(bundle, *queue, *options)) for name, options in SETTINGS.items()}
        record = {**where, "model": MODEL, "mixed": asyncio.run(_mixed(servers["kept"], bundle, given))}
        points: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
        alone = {name: asyncio.run(closed(server, given.open // 4)) for name, server in servers.items()}
        best = alone["kept"]["throughput_per_s"]
        for share in tqdm(SHARES, desc="open"):
            for name, server in servers.items():
                points[name].append({"share": share, **asyncio.run(opened(server, share * best, given.open))})
    record |= {"alone": alone, "points": points}
    print(table(record))
    if given.file:
        print(f"filed {write_record('api', record, allow_dirty=given.allow_dirty)}")


async def _warm(server: Server) -> None:
    async with httpx2.AsyncClient(base_url=server.url, timeout=_TIMEOUT) as client:
        for height, width in SIZES:
            await drawn(client, {"model": MODEL, "prompt": PROMPTS[0], "seed": 0, "size": f"{width}x{height}"})


async def _mixed(server: Server, bundle: Path, given: argparse.Namespace) -> dict[str, Any]:
    await _warm(server)
    files, memory = server.files, server.resident_mb
    made, left = await mixed(server, given.requests, given.flight)
    held = await idle(server)
    with suppress(TimeoutError):  # connections of clients that left are closed by and by
        async with asyncio.timeout(30):
            while server.files > files:
                await asyncio.sleep(0.1)
    after = {"files_before": files, "files_after": server.files, "resident_mb_before": memory}
    after["resident_mb_after"] = server.resident_mb
    if any(held.values()) or server.files > files:
        raise SystemExit(f"the server holds {held} and {server.files} files, expected nothing and {files}")
    with load(bundle, threads=1) as denoiser:
        check_alone(denoiser, made)
    return {"requests": given.requests, "in_flight": given.flight, "equal": len(made), "left": left, **held, **after}


def table(record: dict[str, Any]) -> str:
    mix = record["mixed"]
    rows = [
        f"{mix['requests']} requests, {mix['in_flight']} in flight: {mix['equal']} answers equal to runs alone, "
        f"{mix['left']} left; slots held {mix['slots_in_use']:.0f}, files {mix['files_before']} before and "
        f"{mix['files_after']} after, memory {mix['resident_mb_before']:.0f} and {mix['resident_mb_after']:.0f} MB",
        f"{'serving':24}{'load':>14}{'per s':>9}{'p50 ms':>9}{'p90':>9}{'p99':>9}{'faster':>8}",
    ]
    for name, points in record["points"].items():
        for p in [record["alone"][name], *points]:
            load_ = f"{p['offered_per_s']:.1f} per s" if "offered_per_s" in p else "one by one"
            rows.append(
                f"{name:24}{load_:>14}{p['throughput_per_s']:9.1f}{p['p50_ms']:9.1f}{p['p90_ms']:9.1f}{p['p99_ms']:9.1f}"
                f"{p.get('hurried', 0):8d}"
            )
    stages = ", ".join(f"{name} {value:.1f}" for name, value in record["alone"]["kept"]["stages_ms"].items())
    return "\n".join([*rows, f"stages of a request alone, ms: {stages}"])


if __name__ == "__main__":
    main()
