"""ComfyUI for the tests: the real one where `COMFYUI_PATH` says where it lies, or else the double."""

import os
import sys
from pathlib import Path

import comfy_double

REAL = os.environ.get("COMFYUI_PATH")


def enter(models):
    """Make ComfyUI's modules importable, with `models` as its folder of models; twice is once."""
    if "folder_paths" not in sys.modules:
        if REAL:
            sys.path.insert(0, str(Path(REAL).resolve()))
            from comfy.cli_args import args

            args.cpu = True
        else:
            sys.modules.update(comfy_double.modules(models))
    import folder_paths

    folder_paths.models_dir = str(models)
