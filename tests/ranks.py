"""Several ranks in one process: threads, each with a group of its own over gloo, which sends as between processes."""

import threading
from collections import Counter
from contextlib import contextmanager
from multiprocessing import get_context

import numpy as np
import torch
from kill_ranks import begun
from torch import distributed
from torch._C._distributed_c10d import (
    _register_process_group,
    _set_thread_isolation_mode,
    _unregister_process_group,
)

from taylorseer_export.bundle.parallel import GROUP
from taylorseer_export.compile.eager import eager_modules
from taylorseer_export.compile.export import describe
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.eager import EagerRunner
from taylorseer_export.runtime.following import follow
from taylorseer_export.runtime.group import Group


def on_ranks(count, work, timeout=30.0):
    """What `work(group)` returned on each rank, or raised."""
    store, results = distributed.HashStore(), [None] * count

    def one(rank):
        try:
            results[rank] = work(Group(store, rank, count, timeout=timeout))
        except Exception as error:
            results[rank] = error

    with _names_by_thread():
        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results


def denoisers_on_ranks(draft, work, timeout=30.0, guidance=False):
    """What `work(denoiser)` returned on each rank of a sharded draft, with its eager graphs, or raised.

    With `guidance` each half of them runs one branch.
    """
    manifest, modules = describe(draft, "eager"), eager_modules(draft)

    def one(group):
        return work(Denoiser(manifest, EagerRunner(modules, manifest.graphs), group=group, guidance=guidance))

    shared = draft.parallel.degree if draft.parallel else 1
    return on_ranks(shared * (2 if guidance else 1), one, timeout)


@contextmanager
def following(manifest, modules, port):
    """Rank 1 of two as a process that follows, over the store at a port: a fork, which is killed at the end."""

    def one():
        torch.set_num_threads(1)  # a fork has none of the threads that would share the work
        group = Group(distributed.TCPStore("127.0.0.1", port), 1, 2, timeout=20.0)
        follow(Denoiser(manifest, EagerRunner(modules, manifest.graphs), group=group))

    process = get_context("fork").Process(target=one, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def replay_on_ranks(draft, inputs, plan, order=None, work=None, guidance=False, **options):
    """noise_pred [S, ...] of every rank of a draft, with its eager graphs; `work(group)` before each.

    With `guidance` each half of them runs half of the batch.

    With a `guard` among the options each has (noise_pred, executed steps).
    """

    def one(denoiser):
        if work is not None:
            work(denoiser.share.group)
        slot, latents = begun(denoiser, inputs, plan, order, **options)
        seen = predicted(denoiser, slot, latents, inputs)
        return (seen, slot.executed) if "guard" in options else seen

    return sound(denoisers_on_ranks(draft, one, guidance=guidance))


def predicted(denoiser, slot, latents, inputs):
    """noise_pred [S, ...] of all ranks, from this rank's latents of each step; of several latents one after the other,
    flat, as those of a model that runs alone are compared."""
    made, others = [], {n: denoiser.share.latents(inputs[2][n].numpy(), of) for n, of in denoiser.others.items()}
    for step, latent in enumerate(latents):
        beside = {name: values[step] for name, values in others.items()}
        made.append([slot.step(latent, others=beside), *slot.others.values()])
    taken = (denoiser.latent, *denoiser.others.values())
    joined = [denoiser.share.joined(np.stack(one), of) for one, of in zip(zip(*made, strict=True), taken, strict=True)]
    if len(joined) > 1:
        joined = [one.reshape(*one.shape[:2], -1) for one in joined]
    return torch.from_numpy(np.concatenate(joined, -1))


def sound(results):
    """What all ranks returned; raises what one of them did."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


class Counting(distributed.ProcessGroup):
    """A process group that counts what its rank sends through another: collectives, and bytes to other ranks."""

    def __init__(self, group):
        super().__init__(group.rank, group.size)
        self.inner, self.ranks, self.calls, self.bytes = group._handle, group.size, Counter(), 0
        _unregister_process_group(GROUP)
        _register_process_group(GROUP, self)

    def all_gather_single_coalesced(self, outputs, given, *options):
        self.calls["gather"] += 1
        self.bytes += sum(one.nbytes for one in given) * (self.ranks - 1)
        return self.inner.allgather_into_tensor_coalesced(outputs, given)

    def all_to_all_single(self, output, given, *options):
        self.calls["exchange"] += 1
        self.bytes += given.nbytes * (self.ranks - 1) // self.ranks
        return self.inner.alltoall_base(output, given, [], [])

    allgather_into_tensor_coalesced, alltoall_base = all_gather_single_coalesced, all_to_all_single


@contextmanager
def _names_by_thread():
    """In the block, the name of a group means another one in each thread."""
    _set_thread_isolation_mode(True)
    try:
        yield
    finally:
        _set_thread_isolation_mode(False)
