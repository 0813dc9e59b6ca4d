"""An exchange of rows between two processes in an AOTInductor package: the smallest program that shows whether it runs.

    python tools/exchange.py [--symbolic]

Each of two processes exports `x -> all_to_all_single(2 x) + 1`, one compiles it, both load and run it over gloo. With
`--symbolic` the number of rows is open, and so are the split sizes. What graphs of this package hold is the other form:
a first dimension of one entry for each rank, so that the split sizes are ones whatever the sizes are.
"""

import argparse
import faulthandler
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import distributed, multiprocessing

LIMIT = 240  # s, after which it counts as hanging, and says where


class Exchange(torch.nn.Module):
    """Half of the rows of each rank for each."""

    def forward(self, x):
        functional, half = torch.ops._c10d_functional, x.shape[0] // 2
        return functional.wait_tensor(functional.all_to_all_single(x * 2, [half, half], [half, half], "0")) + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--symbolic", action="store_true", help="leave the number of rows open")
    symbolic = parser.parse_args().symbolic
    with TemporaryDirectory() as folder:
        multiprocessing.start_processes(one, args=(folder, symbolic), nprocs=2, start_method="spawn")


def one(rank: int, folder: str, symbolic: bool) -> None:
    """What one process does."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    package, x = Path(folder, "exchange.pt2"), torch.arange(8.0).reshape(4, 2) + 100 * rank
    expected = Exchange()(x)
    if rank == 0:
        began = time.monotonic()
        rows = {0: 2 * torch.export.Dim("half", min=2, max=8)} if symbolic else {}
        program = torch.export.export(Exchange(), (x,), dynamic_shapes=(rows,), strict=False)
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    distributed.barrier()
    seen = torch._inductor.aoti_load_package(str(package))(x)
    print(f"rank {rank}: {'equal to eager' if torch.equal(seen, expected) else 'NOT equal to eager'}", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
