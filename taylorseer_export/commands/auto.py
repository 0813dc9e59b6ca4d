"""`auto`: export a model that no family declares, once what is proposed for it agrees with the model itself."""

from __future__ import annotations

import argparse

from taylorseer_export.commands import export
from taylorseer_export.commands.options import PROGRAM
from taylorseer_export.commands.terminal import progress, require_extra
from taylorseer_export.errors import CheckpointError, ConfigError
from taylorseer_export.families import FAMILIES
from taylorseer_export.families.family import Family, unknown

SUMMARY = "Export a model that no family declares, if what is proposed for it agrees with the model."


def options(parser: argparse.ArgumentParser) -> None:
    """Those of any family."""
    export.options(parser, unknown("a transformer of diffusers"))


def run(given: argparse.Namespace) -> int:
    """The command itself; returns the exit code."""
    if given.model is None:
        raise ConfigError("--model is left out, expected the diffusers folder of the model; name it")
    require_extra("export", "torch", "diffusers", "accelerate")
    return export.run(_proposed(given), given)


def _proposed(given: argparse.Namespace) -> Family:
    """What is proposed for the model, verified; the granularity that verifies is chosen where none is asked for."""
    import torch

    from taylorseer_export.checkpoint.checkpoint import open_undeclared
    from taylorseer_export.checkpoint.recognise import class_of, family_of
    from taylorseer_export.compile.export import Options
    from taylorseer_export.graph.propose import propose
    from taylorseer_export.report.proposal import GRANULARITIES, verified

    name = class_of(given.model)
    if any(family.model_class == name for family in FAMILIES.values()):
        family = family_of(given.model)
        raise CheckpointError(
            f"--model is of class {name}, which family {family.name} declares, expected one that none does; export it "
            f"with `{PROGRAM} {family.name} --model {given.model}`"
        )
    checkpoint = open_undeclared(given.model, given.variant)
    options = Options(
        order=given.order,
        interval=given.interval,
        warmup=given.warmup,
        latent_size=given.latent_size,
        batch=given.batch,
    )
    with progress("verifying the proposal", 1) as advance:
        model = checkpoint.skeleton(torch.float32)
        found = verified(checkpoint, model, propose(model), options, given.state)
        advance(1, 1)
    if not checkpoint.scheduler:
        print(f"no scheduler beside the model: taking {found.checkpoint.family.scheduler} with its defaults")
    for state in GRANULARITIES:
        if state in found.refused:
            print(f"not at --state {state}: {found.refused[state]}")
    sizes = [name for name, (low, high) in found.proposal.dimensions.items() if low == high]
    fixed = f"; one size alone of {', '.join(sizes)}" if sizes else ""
    print(
        f"proposed for {name}: {len(found.proposal.sites)} patterns of sites, inputs "
        f"{', '.join(spec.name for spec in found.proposal.inputs)}{fixed}; every step equals the model, "
        f"{found.ratio:.2f} of the bound, at --state {found.granularity}"
    )
    given.state = found.granularity
    return found.checkpoint.family
