"""Export memory grows neither with the weights nor with the state: two checkpoints exported by one child process.

Both have one double and one single block, and every other matrix in fp8 with a scale; the large one is wider and its
bundle is for a larger latent image. The child reads the kernel's high mark of its own resident memory after each
export. Libraries, graphs and the tracer's objects are the same for both, so what the mark rises by is what weights and
Taylor buffers cost. One tensor at a time makes that the largest tensor, as read and as stored; holding the weights, or
making an example of the buffers, would make it all of them. The allocator gives freed tensors back at once: what it
would keep differs from run to run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import WEIGHTS
from published_formats import FORMATS, quantised, save
from tiny_models import tiny_flux

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]

CHILD = """
import json, sys
from pathlib import Path
from taylorseer_export.compile.export import Options, describe, draft, write_bundle
from taylorseer_export.families import FAMILIES
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.bundle.memory import state_bytes

out, *folders = map(Path, sys.argv[1:])
for folder, side in zip(folders, (8, 128), strict=True):
    options = Options(order=2, interval=4, warmup=2, latent_size=(side, side), batch=1)
    plan = draft(open_checkpoint(str(folder), FAMILIES["flux"]), options)
    bundle = write_bundle(plan, out, folder.name)
    state = state_bytes(describe(plan, folder.name), plan.typical)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024
    print(json.dumps({"peak": peak, "weights": (bundle / "weights.safetensors").stat().st_size, "state": state}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc")
def test_memory_grows_neither_with_weights_nor_with_state(tmp_path):
    folders, largest = [], 0
    for name, heads in (("small", 6), ("large", 16)):  # 34 and 238 MB of float32
        model = tiny_flux(double=1, single=1, heads=heads, head_dim=64)
        folders.append(tmp_path / name)
        model.save_pretrained(folders[-1])
        matrices = [n for n, value in model.state_dict().items() if value.ndim == 2]
        packed = {n: value for n, value in model.state_dict().items() if n in matrices[::2]}
        tensors, metadata, _, _ = quantised(FORMATS["comfy fp8"], packed)
        plain = {n: value for n, value in model.state_dict().items() if n not in packed}
        save(folders[-1] / WEIGHTS, tensors | plain, metadata)
        largest = max(parameter.nbytes for parameter in model.parameters())
        del model
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "engines"), *map(str, folders)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    small, large = map(json.loads, done.stdout.splitlines()[-2:])
    added = large["weights"] - small["weights"]
    allowed = 2 * largest  # as read and as stored
    assert added > 3 * allowed and large["state"] - small["state"] > 2 * allowed
    assert large["peak"] - small["peak"] < allowed, f"{small} {large}"
