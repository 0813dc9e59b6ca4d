"""Kill one of two ranks in mid-loop at random steps, and see that the other one ends in one sentence.

    python tools/kill_ranks.py [--times 20] [--seed 0]

The tiny FLUX of the tests, shared out by gathers, 40 full steps; ranks are processes. Prints a line for each time and
the longest wait; exits with 1 where a sentence does not name the rank, or took longer than the group's timeout.
"""

import argparse
import random
import sys
from dataclasses import replace
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from time import monotonic

import torch
from tiny_models import MODELS
from torch import distributed

from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile.eager import eager_modules
from taylorseer_export.compile.export import Options, describe, draft
from taylorseer_export.families import FAMILIES
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.eager import EagerRunner
from taylorseer_export.runtime.group import Group

STEPS, TIMEOUT = 40, 20.0


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
        {n: value.numpy() for n, value in inputs[2].items()},
    )
    share = denoiser.share
    slot = denoiser.slot(denoiser.sizes(latents.shape[1:], conditioning), own=True)
    mine, given = share.latents(latents), share.conditioning(conditioning)
    slot.start(given, replace(denoiser.forecasts(plan=plan, order=order), **options), timesteps.float().numpy())
    return slot, mine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    family, build, inputs_of = MODELS["plain"]
    model, options = build(), Options(order=1, interval=4, warmup=2, engine="inductor", parallel="gather", degree=2)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        made = draft(open_checkpoint(folder, FAMILIES[family]), options)
        inputs, chance, longest, wrong = inputs_of(model, STEPS), random.Random(given.seed), 0.0, 0
        for _ in range(given.times):
            rank, step = chance.randrange(2), chance.randrange(1, STEPS - 2)
            said, seconds = killed(made, inputs, "F" * STEPS, rank, step, TIMEOUT)
            good = f"rank {rank} of 2 has died or is late" in said and seconds < TIMEOUT
            longest, wrong = max(longest, seconds), wrong + (not good)
            print(f"{'ok   ' if good else 'WRONG'} rank {rank} at step {step:2}: {seconds:.1f} s; {said}", flush=True)
    print(f"{given.times - wrong} of {given.times} as they should be, the longest after {longest:.1f} s")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
