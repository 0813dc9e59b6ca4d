"""Load on a real Triton server: throughput and latency against offered load, ways to serve side by side.

    python tools/bench_triton.py --file

Serial serving does one request at a time, every engine call on all cores. Batched serving has slots and shared engine
calls, one thread per call and a call per core; `instances` is the same with a process per core, which share no lock of
Python. All servers are up at the same time and take turns, so noise of the machine hits all alike; a server without
requests uses no core. First one client takes turns with the same loop in
this process, caption and picture included: the median difference of such pairs is the overhead. Then offered load is a
number of clients that each wait for their answer (closed), and requests per second that come whether or not earlier
ones are answered (open), at shares of what serial serving managed. Latency is from sending to the whole answer, over
gRPC, in milliseconds; clients keep their connections.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, circumstances, dirty_option, write_record
from tqdm import tqdm
from triton_server import Server, embedded_repository, missing

from taylorseer_export.embedded.requests import pictures, prompt_request
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.sampling import sample
from taylorseer_export.serve.client import Client
from taylorseer_export.serve.repository import Deployment, write_repository

MODEL = "flux-tiny"
CAPTION = "a red circle left of a blue square"
SETTINGS = {
    "serial": Deployment(models=("picture",), slots=1, workers=1, threads=0, batch=1, queue=1000),
    "batched": Deployment(models=("picture",), slots=4, workers=0, threads=1, queue=1000),
    "instances": Deployment(
        models=("picture",), instances=len(os.sched_getaffinity(0)), slots=4, workers=1, threads=1, queue=1000
    ),
}
STAGES = ("encode", "loop", "decode")
SHARES = (0.5, 0.8, 1.0, 1.3)  # of the serial throughput, for open load


def request(client: Client, seed: int) -> float:
    """Milliseconds of one picture."""
    began = time.perf_counter()
    client.infer(MODEL, {"prompt": CAPTION, "seed": seed})
    return 1e3 * (time.perf_counter() - began)


def closed(server: Server, clients: int, count: int) -> dict[str, Any]:
    """`clients` senders with a connection each, sending the next request when the last is answered."""
    seeds, times = iter(range(count)), []

    def send() -> None:
        with Client(server.grpc) as client:
            for seed in seeds:
                times.append(request(client, seed))

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as senders:
        for sent in [senders.submit(send) for _ in range(clients)]:
            sent.result()
    return {"clients": clients, **summary(times, count / (time.perf_counter() - began))}


def opened(server: Server, rate: float, count: int) -> dict[str, Any]:
    """Requests at random moments, `rate` per second on average."""
    choose, times, threads = random.Random(0), [], []
    began = due = time.perf_counter()

    def send(seed: int) -> None:
        with Client(server.grpc) as client:
            times.append(request(client, seed))

    for seed in range(count):
        due += choose.expovariate(rate)
        time.sleep(max(0.0, due - time.perf_counter()))
        threads.append(threading.Thread(target=send, args=(seed,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return {"offered_per_s": rate, **summary(times, count / (time.perf_counter() - began))}


def summary(times: list[float], throughput: float) -> dict[str, Any]:
    percentiles = {f"p{q}_ms": float(np.percentile(times, q)) for q in (50, 90, 99)}
    return {"requests": len(times), "throughput_per_s": throughput, **percentiles}


def lone(server: Server, folder: Path, threads: int, count: int) -> dict[str, float]:
    """One client in turns with the same picture in this process, whose stages add up. Medians, in milliseconds."""
    alone, served, stages = [], [], []
    with load(folder, threads=threads) as denoiser, Client(server.grpc) as client:
        request(client, 0)
        for seed in range(count):
            began = time.perf_counter()
            asked = prompt_request(denoiser, [CAPTION], [seed])
            encoded = time.perf_counter()
            result = sample(denoiser, asked, denoiser.forecasts())
            looped = time.perf_counter()
            pictures(denoiser, asked, result)
            ended = time.perf_counter()
            alone.append(1e3 * (ended - began))
            stages.append((1e3 * (encoded - began), 1e3 * (looped - encoded), 1e3 * (ended - looped)))
            served.append(request(client, seed))
    in_process = statistics.median(alone)
    return {
        "in_process_ms": in_process,
        "served_ms": statistics.median(served),
        "overhead_ms": statistics.median(s - a for s, a in zip(served, alone, strict=True)),
        "overhead_allowed_ms": 0.03 * in_process + 5,
        **{f"{stage}_ms": statistics.median(times[k] for times in stages) for k, stage in enumerate(STAGES)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=80, help="of every point (default: %(default)s)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3, help="turns of the servers (default: %(default)s)")
    parser.add_argument("--file", action="store_true", help="write the record into tools/results")
    dirty_option(parser)
    given = parser.parse_args()
    if reason := missing():
        raise SystemExit(reason)
    where = circumstances(RESULTS if given.file else None, given.allow_dirty)
    import torch

    torch.set_num_threads(1)  # as in the server
    with tempfile.TemporaryDirectory() as scratch:
        engines = Path(scratch) / "engines"  # exported anew: what is measured is this commit's
        embedded_repository(Path(scratch), engines, models=("denoiser",))
        bundle = engines / MODEL
        for name, deployment in SETTINGS.items():
            write_repository(bundle, Path(scratch) / name, deployment)
        with ExitStack() as stack:
            started = {name: stack.enter_context(Server(Path(scratch) / name)) for name in SETTINGS}
            servers = {name: server.wait_ready() for name, server in started.items()}
            for server in servers.values():
                closed(server, 4, 12)  # first calls
            pairs = {name: lone(servers[name], bundle, SETTINGS[name].threads, given.requests) for name in SETTINGS}
            points: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
            with tqdm(total=given.rounds * len(given.clients) * len(SETTINGS), desc="closed") as bar:
                for _ in range(given.rounds):
                    for clients in given.clients:
                        for name, server in servers.items():
                            points[name].append(closed(server, clients, given.requests))
                            bar.update()
            best = statistics.median(p["throughput_per_s"] for p in points["serial"] if p["clients"] == 1)
            for share in tqdm(SHARES, desc="open"):
                for name, server in servers.items():
                    points[name].append(opened(server, share * best, given.requests))
    record = {**where, "model": MODEL, "lone": pairs, "points": points}
    for clients in given.clients:
        turns = {n: [p["throughput_per_s"] for p in points[n] if p.get("clients") == clients] for n in SETTINGS}
        record[f"gain_{clients}_clients"] = {
            name: statistics.median(own / serial for own, serial in zip(found, turns["serial"], strict=True))
            for name, found in turns.items()
        }
    print(table(record))
    if given.file:
        print(f"filed {write_record('triton', record, allow_dirty=given.allow_dirty)}")
    print(json.dumps({key: value for key, value in record.items() if key.startswith(("gain", "lone"))}))


def table(record: dict[str, Any]) -> str:
    rows = [f"{'serving':10}{'load':>16}{'per s':>9}{'p50 ms':>9}{'p90':>9}{'p99':>9}"]
    for name, points in record["points"].items():
        for p in points:
            load_ = f"{p['clients']} clients" if "clients" in p else f"{p['offered_per_s']:.1f} per s"
            rows.append(
                f"{name:10}{load_:>16}{p['throughput_per_s']:9.1f}{p['p50_ms']:9.1f}{p['p90_ms']:9.1f}{p['p99_ms']:9.1f}"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
