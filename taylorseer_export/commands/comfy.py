"""`comfy`: put the nodes into a ComfyUI."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "Put the nodes for bundles into a ComfyUI."


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--into", type=Path, required=True, metavar="FOLDER", help="ComfyUI's, the one with main.py")
    parser.add_argument("--copy", action="store_true", help="copy the nodes where no link can be made")


def run(given: argparse.Namespace) -> int:
    """The command itself; returns the exit code."""
    from taylorseer_export.comfy.install import install

    done = install(given.into, given.copy)
    print(f"nodes are in {done.place}, of ComfyUI {done.version}")
    print(f"put bundles into {done.models}; the Python that runs ComfyUI needs this package, then start it again")
    return 0
