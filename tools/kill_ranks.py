"""Kill one of two ranks in mid-loop at random steps, and see that the other one ends in one sentence.

    python tools/kill_ranks.py [--times 20] [--seed 0] [--torchrun [--dry-run]]

40 full steps of the tiny FLUX of the tests on two ranks, which are processes: forks with eager graphs, shared out by
gathers; with `--torchrun` those that it starts for `replay`, with compiled graphs that exchange heads, and the outcome
is filed under tools/results. Prints a line for each time and the longest wait; exits with 1 where a sentence does not
name the rank, took longer than the group's timeout, or left a process.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import torch
from record import circumstances, dirty_option, write_record
from safetensors.torch import save_file
from tiny_models import MODELS
from torch import distributed

from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.cli import main as command
from taylorseer_export.compile.eager import eager_modules
from taylorseer_export.compile.export import Options, describe, draft, write_bundle
from taylorseer_export.families import FAMILIES
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.eager import EagerRunner
from taylorseer_export.runtime.group import Group
from taylorseer_export.runtime.slot import Slot

STEPS, TIMEOUT = 40, 20.0
_DYING = "dies as rank"


def killed(draft, inputs, plan, rank, step, timeout=20.0):
    """Two ranks as processes, of which one is killed at a step: (what the other one said, seconds until it did).

    The processes are forks of this one, which keeps the store.
    """
    manifest, modules = describe(draft, "eager"), eager_modules(draft)
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = get_context("fork")
    steps, said = context.Queue(), context.Queue()

    def one(mine):
        torch.set_num_threads(1)  # a fork has none of the threads that would share the work
        try:
            group = Group(distributed.TCPStore("127.0.0.1", store.port), mine, 2, timeout=timeout)
            slot, latents = begun(Denoiser(manifest, EagerRunner(modules, manifest.graphs), group=group), inputs, plan)
            for number, latent in enumerate(latents):
                steps.put((mine, number))
                slot.step(latent)
        except Exception as error:
            said.put(str(error))

    processes = [context.Process(target=one, args=(mine,), daemon=True) for mine in range(2)]
    try:
        for process in processes:
            process.start()
        while steps.get(timeout=timeout) != (rank, step):
            pass
        processes[rank].kill()
        begin = monotonic()
        return said.get(timeout=2 * timeout), monotonic() - begin
    finally:
        for process in processes:
            process.kill()
            process.join()


def begun(denoiser, inputs, plan, order=None, **options):
    """(slot, latents) of the share of one rank in a request."""
    latents, timesteps, conditioning = (
        inputs[0].numpy(),
        inputs[1],
        {n: value.numpy() for n, value in inputs[2].items() if n not in denoiser.others},
    )
    share = denoiser.share
    slot = denoiser.slot(denoiser.sizes(latents.shape[1:], conditioning), own=True)
    mine, given = share.latents(latents), share.conditioning(conditioning)
    slot.start(given, replace(denoiser.forecasts(plan=plan, order=order), **options), timesteps.float().numpy())
    return slot, mine


def killed_under_torchrun(arguments, rank, step, timeout=TIMEOUT):
    """Two ranks that torchrun starts for a command, of which one is killed before a step.

    Returns:
        What the other one said, seconds until it did, and how many of the processes are left.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = [__file__, "--worker", str(rank), str(step), *map(str, arguments), "--rank-timeout", str(timeout)]
    with subprocess.Popen(
        [*torchrun, *worker], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        pids, said, died, seconds = [], "nothing", None, float("inf")
        for line in process.stdout:
            if _DYING in line:
                died = monotonic()
            elif line.startswith("runs as "):
                pids.append(int(line.split()[-1]))
            elif line.startswith("taylorseer-export: ") and died is not None:
                said, seconds = line.removeprefix("taylorseer-export: ").strip(), monotonic() - died
        process.wait()
    left = sum(Path(f"/proc/{pid}").exists() for pid in pids)
    if left:
        os.killpg(process.pid, signal.SIGKILL)
    return said, seconds, left


def _work(given) -> int:
    """A rank under torchrun: the command itself, but for the one that dies before a step."""
    rank, step, mine, run = int(given[0]), int(given[1]), int(os.environ["RANK"]), Slot.run
    print("runs as", os.getpid(), flush=True)

    def run_or_die(slot):
        if mine == rank and slot.plan is not None and len(slot.plan) > 2 and len(slot.executed) == step:
            print(f"{os.getpid()} {_DYING} {rank}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        run(slot)

    Slot.run = run_or_die
    return command(given[2:])


def written(folder, inputs):
    """Command line of a replay of all full steps, of a bundle for two ranks that is written into a folder."""
    family, build, _ = MODELS["plain"]
    build().save_pretrained(folder / "model")
    how = {"order": 1, "interval": 4, "warmup": 2, "granularity": "residual"}
    options = Options(engine="inductor", parallel="ulysses", degree=2, **how)
    bundle = write_bundle(draft(open_checkpoint(str(folder / "model"), FAMILIES[family]), options), folder, "ranks")
    latents, timestep, conditioning = inputs
    tensors = {"latents": latents, "timestep": timestep, **conditioning}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "in.safetensors")
    files = ["--inputs", folder / "in.safetensors", "--outputs", folder / "out.safetensors"]
    return ["replay", bundle, *files, "--plan", "F" * STEPS, "--threads", 1]


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        return _work(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torchrun", action="store_true", help="real ranks with compiled graphs, and a record")
    parser.add_argument("--dry-run", action="store_true", help="file no record")
    dirty_option(parser)
    given = parser.parse_args()
    files = given.torchrun and not given.dry_run
    record = circumstances(Path(__file__).parent / "results" if files else None, given.allow_dirty)
    family, build, inputs_of = MODELS["plain"]
    model, options = build(), Options(order=1, interval=4, warmup=2, engine="inductor", parallel="gather", degree=2)
    inputs, chance, begun_at = inputs_of(model, STEPS), random.Random(given.seed), time.monotonic()
    seen, wrong = [], 0
    with TemporaryDirectory() as folder:
        if given.torchrun:
            arguments = written(Path(folder), inputs)
        else:
            model.save_pretrained(folder)
            made = draft(open_checkpoint(folder, FAMILIES[family]), options)
        for _ in range(given.times):
            rank, step, left = chance.randrange(2), chance.randrange(1, STEPS - 2), 0
            if given.torchrun:
                said, seconds, left = killed_under_torchrun(arguments, rank, step)
            else:
                said, seconds = killed(made, inputs, "F" * STEPS, rank, step, TIMEOUT)
            good = f"rank {rank} of 2 has died or is late" in said and seconds < TIMEOUT and not left
            wrong += not good
            seen.append({"rank": rank, "step": step, "seconds": round(seconds, 2), "left": left, "said": said})
            print(f"{'ok   ' if good else 'WRONG'} rank {rank} at step {step:2}: {seconds:.1f} s; {said}", flush=True)
    longest = max(one["seconds"] for one in seen)
    print(f"{given.times - wrong} of {given.times} as they should be, the longest after {longest:.1f} s")
    if files:
        found = {"times": given.times, "clean": given.times - wrong, "longest_seconds": longest, "timeout": TIMEOUT}
        found |= {"took_seconds": round(time.monotonic() - begun_at), "kills": seen}
        print("filed", write_record("kill-ranks", {**record, **found}, allow_dirty=given.allow_dirty).name)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
