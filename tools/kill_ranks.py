"""Kill one of two ranks in mid-loop at random steps, and see that the other one ends in one sentence.

    python tools/kill_ranks.py [--times 20] [--seed 0]

The tiny FLUX of the tests, shared out by gathers, 40 full steps; ranks are processes. Prints a line for each time and
the longest wait; exits with 1 where a sentence does not name the rank, or took longer than the group's timeout.
"""

import argparse
import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from ranks import killed
from tiny_bundles import options_of, trace_of
from tiny_models import MODELS

from taylorseer_export.compile.export import draft

STEPS, TIMEOUT = 40, 20.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    _, build, inputs_of = MODELS["plain"]
    model, options = build(), options_of(engine="inductor", parallel="gather", degree=2)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        made = draft(trace_of("plain", Path(folder), options), options)
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
