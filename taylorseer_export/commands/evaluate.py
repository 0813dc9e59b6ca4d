"""`evaluate`: every way to sample with a bundle, as one table and one page."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from taylorseer_export.bundle.atomic import replacing
from taylorseer_export.bundle.quantised import UNQUANTISED
from taylorseer_export.commands.options import bundle_options, plan_options, sample_options
from taylorseer_export.commands.terminal import (
    check_out,
    forecasts_of,
    open_denoiser,
    progress,
    read_tensors,
    require_extra,
)
from taylorseer_export.errors import ConfigError
from taylorseer_export.values import seed, whole

if TYPE_CHECKING:
    from taylorseer_export.report.unquantised import Unquantised
    from taylorseer_export.runtime.denoiser import Denoiser

SUMMARY = "Compare ways to sample with a bundle: one table and one HTML page."


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    bundle_options(parser)
    plan_options(parser)
    parser.add_argument(
        "--model",
        metavar="REF",
        help="of a bundle with quantised weights the checkpoint that it was made from, to compare with it unquantised, "
        "eagerly on the CPU (default: the embedded model if it is of that, else no such comparison)",
    )
    parser.add_argument("--samples", type=whole(1), default=16, help="samples (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the first sample (default: %(default)s)")
    sample_options(parser)
    parser.add_argument("--out", type=Path, help="page to write (default: evaluation-<bundle>.html)")
    parser.add_argument(
        "--metric-weights",
        type=Path,
        metavar="FOLDER",
        help="weights of LPIPS, FID, CLIP score and the like, under the names that the output gives",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def run(given: argparse.Namespace) -> int:
    """The command itself; returns the exit code."""
    require_extra("sample", "torch", "diffusers", "PIL", "skimage")
    from taylorseer_export.report import evaluate
    from taylorseer_export.report.metrics import metrics
    from taylorseer_export.report.page import page
    from taylorseer_export.report.samples import groups, prompts_of, random_inputs, read_prompts
    from taylorseer_export.runtime.tensors import latent_sizes

    prompts = read_prompts(given.prompts) if given.prompts else None
    tensors = read_tensors(given.inputs) if given.inputs else None
    denoiser = open_denoiser(given, "evaluate")
    manifest = denoiser.manifest
    name = f"{manifest.family}-{manifest.name}"
    out = given.out or Path(f"evaluation-{name}.html")
    check_out(out)
    forecasts = forecasts_of(denoiser, given)
    if len(forecasts) < 2:
        raise ConfigError("steps is 1, expected at least 2 to evaluate (steps); ask for more")
    plan, ways = evaluate.compared_plan(denoiser, forecasts), evaluate.cases(denoiser, forecasts)
    if given.metric_weights is not None and not given.metric_weights.is_dir():
        raise ConfigError(f"--metric-weights {given.metric_weights} is not a folder, expected one; check the path")
    unquantised, lacking = _unquantised(denoiser, given.model)
    sizes = latent_sizes(manifest, given.size)
    tensors = tensors or random_inputs(denoiser, given.samples, sizes[0])
    requests = groups(
        denoiser, given.samples, given.seed, prompts, tensors, guidance_scale=given.guidance_scale, sizes=sizes
    )
    count = len(requests[0].latents)
    captions = [
        caption
        for k in range(len(requests))
        for caption in prompts_of(denoiser, range(k * count, (k + 1) * count), given.seed, prompts)
    ]
    measures, missing = (
        metrics(given.metric_weights, bool(captions), manifest.sampling.pictures == "digits")
        if evaluate.draws(denoiser)
        else ([], {"metrics of pictures": "a bundle that makes pictures of these latents, and no video"})
    )
    if manifest.state.guards:
        before = groups(
            denoiser, min(given.samples, 8), given.seed + given.samples, prompts, tensors,
            guidance_scale=given.guidance_scale, sizes=sizes,
        )  # fmt: skip
        with progress("fitting thresholds", 1) as advance:
            ran = iter(range(1, 1 << 62))
            guarded = evaluate.guarded_cases(denoiser, plan, before, lambda: advance(k := next(ran), k + 1))
        ways += guarded
        if not guarded:
            missing["guards"] = f"a --plan with more full steps than {plan}: the warm-up and the last at least"
    missing |= lacking
    whole_loops = [case.forecasts for case in ways] + ([ways[0].forecasts] if unquantised else [])
    total = sum(map(len, whole_loops)) * len(requests) + len(ways[-1].forecasts)
    with progress("evaluating", total) as advance:
        done = iter(range(1, 1 << 62))
        rows = evaluate.evaluate(
            denoiser,
            requests,
            ways,
            measures,
            captions,
            on_step=lambda: advance(next(done), total),
            unquantised=unquantised,
        )
    facts = {
        "bundle": name,
        "engine": f"{manifest.engine.kind} {manifest.precision} on {denoiser.device}",
        "granularity": manifest.state.granularity,
        "steps": str(len(plan)),
        "samples": str(len(requests) * count),
        "in groups of": str(count),
    }
    if manifest.quantised:
        facts["weights"] = ", ".join(filter(None, (manifest.quantised.weights, manifest.quantised.reads)))
    against = (manifest.quantised and manifest.quantised.compared_with) or UNQUANTISED
    with replacing(out) as partial:
        partial.write_text(page(f"{name}: ways to sample", facts, rows, missing, against), encoding="utf-8")
    print(evaluate.table(rows))
    if unquantised:
        print(evaluate.table_of_errors(rows, against))
    for name, what in missing.items():
        print(f"not measured: {name} (needs {what})")
    print(f"wrote {out}")
    if given.json:
        records = [{k: v for k, v in asdict(row).items() if k != "shown"} for row in rows]
        print(json.dumps({**facts, "rows": records}))
    return 0


def _unquantised(denoiser: Denoiser, reference: str | None) -> tuple[Unquantised | None, dict[str, str]]:
    """The model that shows what quantising a bundle cost, or what it would need.

    Raises:
        ConfigError: A model is given for a bundle that is not quantised, or whose unquantised model is in no file.
        CheckpointError: It is not the one that the bundle was made from.
    """
    from taylorseer_export.report.unquantised import Unquantised
    from taylorseer_export.report.verify import checkpoint_of

    manifest = denoiser.manifest
    if manifest.quantised is None:
        if reference:
            raise ConfigError(
                f"--model is {reference} for a bundle without quantised weights, expected none; leave it out"
            )
        return None, {}
    if manifest.quantised.compared_with is None:
        if reference:
            raise ConfigError(
                f"--model is {reference} for a bundle that keeps the weights of a quantised checkpoint, expected none, "
                "since what they were quantised from is in no file; leave it out"
            )
        return None, {
            "quantisation error": "the weights that the checkpoint was quantised from, which are in no file here"
        }
    if reference is None and not manifest.model.embedded:
        return None, {"quantisation error": "--model, the checkpoint that the bundle was made from"}
    return Unquantised(checkpoint_of(denoiser, reference), denoiser), {}
