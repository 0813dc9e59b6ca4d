"""The command line that makes a bundle again, from what its manifest says."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taylorseer_export.bundle.manifest import Manifest


def _samples(manifest: Manifest) -> str | None:
    """Where the sample requests are to be named that constants of activations were found by; classes need no file."""
    found = manifest.quantised
    asked = found is not None and found.activations == "static" and not found.kept
    return "FILE.safetensors" if asked and manifest.sampling.source != "labels" else None


def command_of(manifest: Manifest, device: str | None = None, **changes: str) -> str:
    """As `Manifest.command`."""
    devices = manifest.engine.device.get("devices", "").split()
    device = device or (devices[0] if len(devices) == 1 else None)
    given = {
        "model": None if manifest.model.embedded else manifest.model.reference,
        "variant": manifest.model.variant,
        "config": manifest.model.config_file,
        "lora": " --lora ".join(manifest.model.loras) or None,
        "lora-skip": " --lora-skip ".join(manifest.model.lora_skip) or None,
        "state": manifest.state.granularity,
        "layout": manifest.state.layout,
        "order": manifest.state.order,
        "interval": manifest.plan.interval,
        "warmup": manifest.plan.warmup,
        "guard": " --guard ".join(manifest.state.guards) or None,
        "steps": manifest.plan.steps,
        "engine": manifest.engine.kind,
        "precision": manifest.precision,
        "device": device,
        **(manifest.quantised.given() if manifest.quantised else {}),
        "inputs": _samples(manifest),
        **({"lora-rank": manifest.lora.rank, "lora-targets": manifest.lora.pattern} if manifest.lora else {}),
        **({"parallel": manifest.parallel.mode, "degree": manifest.parallel.degree} if manifest.parallel else {}),
        **manifest.engine.options,
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    words = [f"--{name} {value}".rstrip() for name, value in given.items() if value is not None]
    return " ".join(["taylorseer-export", manifest.family, *words, *["--whole"] * bool(manifest.parts)])
