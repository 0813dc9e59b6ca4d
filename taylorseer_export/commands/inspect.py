"""`inspect`: the card of a bundle."""

from __future__ import annotations

import argparse

from taylorseer_export.commands.options import bundle_options

SUMMARY = "Check every byte of a bundle and print its card."


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    bundle_options(parser, runs=False)


def run(given: argparse.Namespace) -> int:
    """The command itself; returns the exit code."""
    from taylorseer_export.bundle.memory import size
    from taylorseer_export.bundle.store import open_bundle
    from taylorseer_export.report.card import card, orders

    bundle = open_bundle(given.bundle)
    print(card(bundle.manifest))
    print(orders(bundle.manifest))
    for name, file in bundle.manifest.files.items():
        print(f"  file       {file.sha256[:16]}  {size(file.size):>9}  {name}")
    print(f"  digest     {bundle.manifest.digest}")
    print("  versions   " + ", ".join(f"{k} {v}" for k, v in bundle.manifest.engine.versions.items()))
    return 0
