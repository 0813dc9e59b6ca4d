"""Make what the package ships, and checkpoints to measure with; each maker is a module of `tools/assets/`.

python tools/make_asset.py random-tiny --help          the random embedded models
python tools/make_asset.py train-flux --help           the FLUX pipeline of coloured shapes, about two hours
python tools/make_asset.py train-dit --help            the DiT of digits, about 15 minutes
python tools/make_asset.py train-reader --help         the digit reader of `evaluate`
python tools/make_asset.py random-checkpoint --help    a FLUX-shaped checkpoint of any size
"""

from __future__ import annotations

import sys
from importlib import import_module

MAKERS = ("random-tiny", "train-flux", "train-dit", "train-reader", "random-checkpoint")


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in MAKERS:
        print(__doc__, file=sys.stderr)
        return 2
    sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]
    return int(import_module(f"assets.{name.replace('-', '_')}").main() or 0)


if __name__ == "__main__":
    sys.exit(main())
