"""Memory: what a slot and a request of a bundle take, in bytes, from the contract alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from taylorseer_export.bundle.low_rank import LORA
from taylorseer_export.bundle.manifest import Manifest, PipelinePart, Role, Tensor
from taylorseer_export.bundle.shapes import resolve

CONDITIONING_ROOM = 256 << 20  # bytes of a server's cache of conditioning, where nobody says otherwise

_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "bool": 1}


def state_bytes(manifest: Manifest, sizes: Mapping[str, int]) -> int:
    """Bytes of the Taylor buffers of one slot; derivatives need two sets, one read while the other is written."""
    once = role_bytes(manifest.graphs["forecast"].inputs, "taylor_in", sizes)
    return once * (2 if manifest.state.layout == "derivatives" else 1)


def table_bytes(manifest: Manifest, sizes: Mapping[str, int]) -> int:
    """Bytes of the step tables of one request."""
    return role_bytes(manifest.graphs["prepare"].outputs, "step", sizes)


def probe_bytes(manifest: Manifest, sizes: Mapping[str, int]) -> int:
    """Bytes of what the probe of one slot keeps between steps and hands to the rest of a full step."""
    probe = manifest.graphs.get("probe")
    return kept_by_probe(probe.inputs, probe.outputs, sizes) if probe else 0


def kept_by_probe(inputs: Iterable[Tensor], outputs: Iterable[Tensor], sizes: Mapping[str, int]) -> int:
    """The same from the tensors of a probe graph."""
    handed = sum(role_bytes(outputs, role, sizes) for role in ("probe_out", "carried", "error"))
    return role_bytes(inputs, "probe_in", sizes) + handed


def request_bytes(manifest: Manifest, sizes: Mapping[str, int]) -> int:
    """Bytes of a request: Taylor buffers, step tables for `sizes["steps"]` steps, what a probe keeps, and its LoRA."""
    return (
        state_bytes(manifest, sizes)
        + table_bytes(manifest, sizes)
        + probe_bytes(manifest, sizes)
        + lora_bytes(manifest)
    )


def lora_bytes(manifest: Manifest) -> int:
    """Bytes of the low-rank weights of one slot."""
    taken = {t.name: t for graph in manifest.graphs.values() for t in graph.inputs if t.role == LORA}
    return role_bytes(taken.values(), "lora", {})


def video_bytes(described: PipelinePart, sizes: Mapping[str, int]) -> int:
    """Bytes of the buffers that decode videos, or encode what one has beside its noise, whatever their length.

    They are what is read and written of the first latent frame and of a later one, which share what they read where it
    is of one size, and two sets of caches: one is read while the other is written.
    """
    first, later = described.graph, described.later
    assert later is not None, "bug in taylorseer-export: buffers of videos for a part of pictures"
    caches = role_bytes(later.outputs, "cache_out", sizes)
    more = [t for t in later.inputs if t.role != "cache_in" and t not in first.inputs]
    others = [t for t in (*first.inputs, *more, *first.outputs, *later.outputs) if t.role != "cache_out"]
    return 2 * caches + sum(role_bytes(others, role, sizes) for role in {t.role for t in others})


def role_bytes(tensors: Iterable[Tensor], role: Role, sizes: Mapping[str, int]) -> int:
    """Bytes of the tensors of one role."""
    return sum(math.prod(resolve(t.shape, sizes)) * _BYTES[t.dtype] for t in tensors if t.role == role)


def size(count: int) -> str:
    """A number of bytes for people, in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"
