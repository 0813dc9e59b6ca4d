"""The bundle: its manifest, the hashes of its files, atomic writing and checked opening."""

from taylorseer_export.bundle.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    Dimension,
    Engine,
    File,
    Graph,
    Manifest,
    Model,
    Pipeline,
    PlanDefaults,
    Sampling,
    Site,
    State,
    Tensor,
)
from taylorseer_export.bundle.store import Bundle, hash_files, open_bundle, writing

__all__ = [
    "MANIFEST",
    "SCHEMA_VERSION",
    "Bundle",
    "Dimension",
    "Engine",
    "File",
    "Graph",
    "Manifest",
    "Model",
    "Pipeline",
    "PlanDefaults",
    "Sampling",
    "Site",
    "State",
    "Tensor",
    "hash_files",
    "open_bundle",
    "writing",
]
