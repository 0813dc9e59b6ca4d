"""Which size of a model is shared out over ranks, and what is refused before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from taylorseer_export.bundle.parallel import GROUP, Parallel
from taylorseer_export.bundle.shapes import is_multiple, names
from taylorseer_export.checkpoint.checkpoint import Checkpoint
from taylorseer_export.compile.draft import Options
from taylorseer_export.errors import ConfigError

_ENGINES = ("inductor", "tensorrt", "tensorrt-rtx", "torch-tensorrt")
# Why others have no collectives here.
_WITHOUT = {"onnxruntime": "ONNX Runtime's packages hold none"}
_Size = TypeVar("_Size", int, int | None)


def check_parallel(options: Options) -> None:
    """Refuse what is not shared out over ranks.

    Raises:
        ConfigError: The kind of engine has no collectives here, or there are too many ranks.
    """
    if options.parallel is None:
        return
    if not 2 <= options.degree <= 64:
        raise ConfigError(f"--degree is {options.degree}, expected 2 to 64 (ranks); change it")
    if options.engine not in _ENGINES:
        why = f" ({_WITHOUT[options.engine]})" if options.engine in _WITHOUT else ""
        raise ConfigError(
            f"--parallel is {options.parallel} with --engine {options.engine}, expected one with collectives, "
            f"{', '.join(_ENGINES)}{why}; choose among them"
        )


def parallel_of(checkpoint: Checkpoint, options: Options) -> Parallel | None:
    """How a model is shared out: by the first size of its latent that the ranks divide, as it is fixed or usual.

    Of several latents it is the first, and all ranks have the rows of the others. Rows need not follow on each other,
    so a video of 21 latent frames may be cut along its height. A size that is in some input with others, such as
    `frames+1`, is not cut.

    Raises:
        ConfigError: They divide none.
    """
    if options.parallel is None:
        return None
    family, config = checkpoint.family, checkpoint.config
    inputs = family.inputs(config)
    latent = next(spec for spec in inputs if spec.role == "latent")
    together = {name for spec in inputs for entry in spec.shape if not is_multiple(entry) for name in names(entry)}
    together |= {"batch", *family.undivided}
    counted = [name for entry in latent.shape for name in sorted(names(entry) - together)]
    ranges = family.dimensions(config)
    sizes = family.latent_sizes(config, *(options.latent_size or checkpoint.latent_size))
    open_ = [name for name in counted if name in ranges and ranges[name][0] < ranges[name][1]]
    divided = [name for name in open_ if sizes.get(name, 0) % options.degree == 0]
    if not divided:
        seen = " x ".join(f"{sizes[name]} {name}" for name in open_ if name in sizes) or "of one size alone"
        raise ConfigError(
            f"the latent of family {family.name} is {seen}, expected a size that --degree {options.degree} divides; "
            "change --size or --degree"
        )
    return Parallel(mode=options.parallel, degree=options.degree, dimension=divided[0])


def declared_for(checkpoint: Checkpoint, options: Options) -> Checkpoint:
    """The checkpoint as it is declared for what is asked of it: on ranks, or alone.

    Raises:
        ConfigError: On ranks it has one size alone, and none is given.
    """
    family = checkpoint.family
    if options.parallel is None or not family.shared:
        return checkpoint
    if options.latent_size is None and family.latent_sizes(checkpoint.config, *checkpoint.latent_size):
        raise ConfigError(
            f"--parallel is {options.parallel} without a size, expected one for family {family.name}, whose pictures "
            "are square and so are shared out at one size alone; add --size"
        )
    return replace(checkpoint, family=replace(family, **family.shared))


def sizes_of_one(parallel: Parallel | None, sizes: Mapping[str, _Size]) -> dict[str, _Size]:
    """Sizes on one rank, from those of the whole; None stays open."""
    if parallel is None:
        return dict(sizes)
    name = parallel.dimension
    return {n: size // parallel.degree if n == name and size is not None else size for n, size in sizes.items()}


@contextmanager
def named_group(parallel: Parallel | None) -> Iterator[None]:
    """For the length of the block there is a group by the name that graphs hold, of so many ranks; nothing is sent.

    Compilers ask a collective how large its group is.
    """
    if parallel is None:
        yield
        return
    from torch._C._distributed_c10d import _register_process_group, _unregister_process_group
    from torch.distributed import HashStore, ProcessGroup

    name: Any = GROUP  # to torch a type of its own, which is no class
    group = ProcessGroup(HashStore(), 0, parallel.degree)  # it is not kept by being known
    _register_process_group(name, group)
    try:
        yield
    finally:
        _unregister_process_group(name)
