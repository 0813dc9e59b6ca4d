"""A group of ranks: the processes that run one bundle together, over torch.distributed.

It is one of its own, made over a store that all ranks see, so whatever else of torch.distributed a process uses is left
alone. Graphs find it by the name that is in them (`GROUP`). On the CPU they send by gloo, on GPUs by NCCL.

What the host sends goes by gloo and a connection of its own. The threads of gloo drop the tensors that they have sent,
and for those of Python they need the interpreter, which a package of AOTInductor holds while it waits for them.

Nothing waits for ever: whatever one rank asks of the others ends within `timeout` seconds, in what it asked for or in
one sentence that says which rank is missing, or differs. What ranks must agree about is compared over the store, where
a rank that never comes is seen as what it is.
"""

from __future__ import annotations

import ctypes
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from taylorseer_export.bundle.device import CPU, Device
from taylorseer_export.bundle.parallel import GROUP
from taylorseer_export.errors import ConfigError, RankError, StepError, first_line

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

TIMEOUT = 60.0  # s
_GRACE = 2.0  # s in which ranks that a collective failed on say so
_LEFT = -1  # in the place of a step, of a request that rank 0 gives up


class Left(StepError):
    """Rank 0 has given up the request under way; the group is ready for the next one."""


class Group:
    """The ranks of one run.

    Args:
        store: That all ranks see. Groups over one store are told apart by their order, which is the same on all ranks.
        rank: Of this process, from 0.
        size: How many there are.
        device: Where the engines are.
        timeout: After which a rank that does not answer is given up, in seconds.

    Attributes:
        sent: Bytes that this rank gave to others outside of graphs.
        leaving: Set on rank 0, it ends the request under way on all ranks at its next full step.

    Raises:
        ConfigError: This process is in a group already.
    """

    def __init__(self, store: Store, rank: int, size: int, device: Device = CPU, timeout: float = TIMEOUT) -> None:
        from torch.distributed import PrefixStore, ProcessGroupGloo

        self.rank, self.size, self.timeout, self.sent = rank, size, timeout, 0
        self.leaving = False
        number = store.add(f"{GROUP}/{rank}", 1)
        self._store, self._device, self._asked = PrefixStore(f"{GROUP}/{number}", store), device, 0
        self._handle = _process_group(PrefixStore("graphs", self._store), rank, size, device, timeout)
        span = timedelta(seconds=timeout)
        self._host: Any = ProcessGroupGloo(PrefixStore("host", self._store), rank, size, span)

    @classmethod
    def from_environment(cls, device: Device = CPU, timeout: float = TIMEOUT) -> Group | None:
        """The group that torchrun's environment tells of; None in a process that is alone.

        Raises:
            ConfigError: The other ranks did not come, or torch is not installed.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return None
        try:
            from torch.distributed import rendezvous

            store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
            return cls(store, rank, size, device, timeout)
        except (ImportError, RuntimeError, ValueError, KeyError) as error:
            raise ConfigError(
                f"the group of {os.environ['WORLD_SIZE']} ranks is not there ({first_line(error)}), expected all of "
                f"them within {timeout:g} s; start them with torchrun"
            ) from error

    @classmethod
    def of(cls, ranks: ProcessGroup, device: Device = CPU, timeout: float = TIMEOUT) -> Group:
        """The ranks of a process group of torch.distributed, whose own connections are left alone.

        Raises:
            ConfigError: It is none, or this process is not in it.
        """
        from torch.distributed import PrefixStore, distributed_c10d

        if not isinstance(ranks, distributed_c10d.ProcessGroup) or not distributed_c10d.is_initialized():
            raise ConfigError(
                f"group is {type(ranks).__name__}, expected a Group, or a process group of torch.distributed that this "
                "process is in; call init_process_group() first, or leave it out under torchrun"
            )
        store = PrefixStore(ranks.group_name, distributed_c10d._get_default_store())
        return cls(store, ranks.rank(), ranks.size(), device, timeout)

    def half(self) -> Group | None:
        """Of the ranks the half that this one is in, which graphs find in the place of all; None where it is alone."""
        from torch.distributed import PrefixStore

        count = self.size // 2
        if count < 2:
            return None
        self.close()
        store = PrefixStore(f"half/{self.rank // count}", self._store)
        return Group(store, self.rank % count, count, self._device, self.timeout)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Compare what all ranks are to have alike, before anything that depends on it.

        Args:
            facts: What it is -> what it is here.

        Raises:
            StepError: On every rank alike: one has something else than rank 0, or did not come in time.
        """
        told = [json.loads(one) for one in self.exchanged(json.dumps({k: str(v) for k, v in facts.items()}))]
        for rank, other in enumerate(told):
            for name in {**told[0], **other}:
                seen, expected = other.get(name, "missing"), told[0].get(name, "missing")
                if seen != expected:
                    raise StepError(
                        f"`{name}` of rank {rank} is {seen}, expected {expected} as of rank 0; start all ranks alike"
                    )

    def exchanged(self, text: str) -> list[str]:
        """Of every rank its text, over the store.

        Raises:
            RankError: One did not come in time.
        """
        self._asked += 1
        self._store.set(f"told/{self._asked}/{self.rank}", text)
        found = [self._wait_for(f"told/{self._asked}/{rank}", rank).decode() for rank in range(self.size)]
        self._store.delete_key(f"told/{self._asked - 1}/{self.rank}")  # all that have come here have read it
        return found

    def broadcast(self, given: bytes) -> bytes:
        """What rank 0 gives, on every rank; others give nothing. Nothing is no more than a sign of life.

        Raises:
            RankError: One did not come in time.
        """
        import torch

        with self.together():
            length = int(self.gathered(np.array([len(given)], np.int64))[0][0])
            if not length:
                return b""
            values = torch.frombuffer(bytearray(given), dtype=torch.uint8) if given else torch.empty(length).byte()
            self._host.broadcast(values, 0).wait()
            self.sent += len(given) * (self.size - 1)
        return values.numpy().tobytes()

    def same(self, step: int) -> None:
        """Hold that all ranks are at one step; 8 bytes to each other one.

        Raises:
            RankError: Names the rank that is elsewhere.
            Left: Rank 0 gives the request up, on all ranks alike.
        """
        steps = self.gathered(np.array([_LEFT if self.leaving else step], np.int64))
        if steps[0][0] == _LEFT:
            raise Left(f"the request is given up at step {step}, expected rank 0 to go on with it; send it again")
        for rank, (other,) in enumerate(steps):
            if other != steps[0][0]:
                raise RankError(
                    f"rank {rank} is at step {other}, expected step {steps[0][0]} as rank 0; run one plan on all ranks"
                )

    def gathered(self, values: np.ndarray) -> list[np.ndarray]:
        """Of every rank its values, all of one shape."""
        import torch

        mine = torch.from_numpy(np.ascontiguousarray(values))
        every = [torch.empty_like(mine) for _ in range(self.size)]
        self._host.allgather([every], [mine]).wait()
        self.sent += mine.nbytes * (self.size - 1)
        return [one.numpy() for one in every]

    def summed(self, values: np.ndarray) -> np.ndarray:
        """The sum over all ranks, in their order and so alike on each."""
        return np.sum(self.gathered(values), axis=0)

    @contextmanager
    def together(self, step: int | None = None) -> Iterator[None]:
        """What all ranks do at the same time: where it fails, which of them is missing.

        Args:
            step: That is under way, for the sentence.

        Raises:
            RankError: In the place of what the library said.
        """
        begun = time.monotonic()
        try:
            yield
        except RankError:
            raise
        except (RuntimeError, StepError) as error:
            cause = error if isinstance(error, RuntimeError) else error.__cause__
            if not isinstance(cause, RuntimeError):
                raise
            where, waited = "" if step is None else f" at step {step}", time.monotonic() - begun
            raise RankError(
                f"{self._missing(waited)} after {waited:.1f} s{where} ({first_line(cause)}), expected all "
                f"{self.size} ranks within {self.timeout:g} s; see what it says, and start all again"
            ) from error

    def communicator(self) -> Any:
        """NCCL's communicator of the graphs on torch's current GPU, for engines that send by themselves: its address in
        a capsule, as Python hands such a thing on.

        Raises:
            ConfigError: This torch does not tell it.
        """
        import torch

        backend, gpu = self._handle._get_backend(torch.device("cuda")), torch.cuda.current_device()
        backend.eager_connect_single_device(torch.device("cuda", gpu))  # there is none before
        if not (address := getattr(backend, "_comm_ptr", int)()):
            raise ConfigError(
                f"torch {torch.__version__} does not tell the communicator of its group, expected one that does for "
                "engines that send by themselves; upgrade torch, or export again with --engine inductor"
            )
        capsule = ctypes.pythonapi.PyCapsule_New
        capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return capsule(address, None, None)

    def close(self) -> None:
        """Leave the group."""
        from torch._C._distributed_c10d import _unregister_process_group

        _unregister_process_group(_name())

    def _missing(self, waited: float) -> str:
        """Which ranks did not find out that something is wrong, and so have died, or found out by coming too late.

        Args:
            waited: Seconds that this rank has waited for the others.
        """
        import torch

        self._store.set(f"failed/{self.rank}", str(waited))
        end, left = time.monotonic() + _GRACE, set(range(self.size))
        try:
            while left and time.monotonic() < end:
                left = {rank for rank in left if not self._store.check([f"failed/{rank}"])}
                time.sleep(0.05)
            if not left:
                times = [float(self._store.get(f"failed/{rank}").decode()) for rank in range(self.size)]
                late = max(times) > 0.9 * self.timeout  # else nobody was waited for
                left = {rank for rank, time_ in enumerate(times) if late and time_ < 0.5 * self.timeout}
        except (RuntimeError, torch.distributed.DistError):
            return "rank 0, which holds the store, has died"
        if not left:
            return "a collective of all ranks failed"
        return f"rank {' and '.join(map(str, sorted(left)))} of {self.size} has died or is late"

    def _wait_for(self, key: str, rank: int) -> bytes:
        try:
            self._store.wait([key], timedelta(seconds=self.timeout))
            return bytes(self._store.get(key))
        except RuntimeError as error:
            raise RankError(
                f"rank {rank} of {self.size} has died or is late, expected it within {self.timeout:g} s; see what it "
                "says, and start all again"
            ) from error


def together(group: Group | None, step: int | None = None) -> AbstractContextManager[None]:
    """`Group.together` where there are several ranks."""
    return nullcontext() if group is None else group.together(step)


def _process_group(store: Any, rank: int, size: int, device: Device, timeout: float) -> Any:
    """A process group that graphs find by its name."""
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import _register_process_group

    span, kind = timedelta(seconds=timeout), dist.ProcessGroup.BackendType
    backend: Any
    group = dist.ProcessGroup(store, rank, size)
    if device.is_gpu:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = span
        backend, chosen = dist.ProcessGroupNCCL(store, rank, size, options), kind.NCCL
    else:
        backend, chosen = dist.ProcessGroupGloo(store, rank, size, span), kind.GLOO
    backend._set_sequence_number_for_group()
    group._set_default_backend(chosen)
    group._register_backend(torch.device("cuda" if device.is_gpu else "cpu"), chosen, backend)
    group._set_group_name(_name())
    try:
        _register_process_group(_name(), group)
    except RuntimeError as error:
        raise ConfigError(
            f"a group of ranks is there in this process ({first_line(error)}), expected one at a time, by whose name "
            "graphs find it; give load() that group again, or close it first"
        ) from error
    return group


def _name() -> Any:
    """`GROUP`, of which torch has a type of its own."""
    return GROUP
