"""`taps`: propose a declaration for a model that no family covers."""

from __future__ import annotations

import argparse
import re

from taylorseer_export.commands.terminal import progress, require_extra
from taylorseer_export.errors import ExportError

SUMMARY = "Propose sites, inputs and a declaration for a transformer, from its config."


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("model", metavar="MODEL", help="diffusers folder of the transformer; its config.json is enough")
    parser.add_argument(
        "--no-trace", action="store_true", help="do not check the proposal by tracing the model with it"
    )


def run(given: argparse.Namespace) -> int:
    """The command itself; returns the exit code."""
    require_extra("export", "torch", "diffusers", "accelerate")
    import torch

    from taylorseer_export.checkpoint.checkpoint import open_config
    from taylorseer_export.graph import propose

    model = open_config(given.model).skeleton(torch.float32)
    proposal = propose.propose(model)
    modules = [name for name, _ in model.named_modules()]
    print(f"# {proposal.model_class}: {len(modules)} modules")
    for pattern in proposal.sites:
        count = sum(re.fullmatch(pattern, name) is not None for name in modules)
        print(f"#   {count:>4} sites  {pattern}")
    print(propose.declaration(proposal, re.sub(r"(transformer)?\d?d?model$", "", proposal.model_class.lower())))
    for reason, names in _by_reason(proposal.skipped).items():
        print(f"# left out: {names} ({reason})")
    if given.no_trace:
        print("# not checked: --no-trace")
        return 0
    with progress("tracing", 1) as advance:
        try:
            made = propose.check(model, proposal)
        except ExportError as error:
            print(f"# does not trace and split as it is: {error}")
            return 0
        advance(1, 1)
    operators = sum(made.forecast.operators().values())
    print(f"# traced and split: {len(made.sites)} sites, a forecast of {operators} operators, no attention, no MLP")
    return 0


def _by_reason(skipped: dict[str, str]) -> dict[str, str]:
    """Reason -> what was left out for it, block numbers as `*`."""
    grouped: dict[str, dict[str, None]] = {}
    for name, reason in skipped.items():
        grouped.setdefault(reason, {})[re.sub(r"\.\d+\.", ".*.", name)] = None
    return {reason: ", ".join(names) for reason, names in grouped.items()}
