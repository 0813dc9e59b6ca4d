"""Original layouts: checkpoints as their authors publish them, under diffusers' tensor names, read one at a time.

diffusers knows how to convert them, by functions that take a whole state dict. Here such a function runs once on
tensors that have shapes and no numbers, while a tape notes what makes every result: which tensor of the files is cut,
joined or renamed into it. Those operations are done when a tensor is read, so a conversion costs the memory of one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from taylorseer_export.checkpoint.formats import ONE_WITH_ALL
from taylorseer_export.errors import CheckpointError


class _Made(NamedTuple):
    """The operation that made a tensor, and its position where the operation returned several."""

    tensor: torch.Tensor  # kept, or its id could be another's
    operation: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    position: int | None


class _Tape(TorchDispatchMode):
    """Notes every operation on tensors without numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, _Made] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            raise CheckpointError(
                f"the converter changes tensors in place ({func}), expected one that only cuts and joins them; "
                "convert the checkpoint with diffusers' from_single_file and save_pretrained"
            )
        result = func(*args, **(kwargs or {}))
        several = isinstance(result, tuple | list)
        for position, tensor in enumerate(result if several else (result,)):
            if isinstance(tensor, torch.Tensor):
                self.made[id(tensor)] = _Made(tensor, func, args, kwargs or {}, position if several else None)
        return result


_CUTS = (
    torch.ops.aten.split.Tensor,
    torch.ops.aten.split_with_sizes.default,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.cat.default,
)


class Unread(CheckpointError):
    """A checkpoint has all that the model needs, and more: of its tensors, or of the numbers of one."""


class Converted:
    """The tensors of an original-layout checkpoint under diffusers' names.

    Every tensor of the files makes some tensor of the model, all of it: what the converter leaves over is refused.

    Args:
        model_class: Name of the transformer's class in diffusers.
        config: The transformer's config.
        shapes: Tensor name in the files -> shape.

    Attributes:
        shapes: Tensor name in diffusers -> shape.
        sources: Tensor name in diffusers -> the tensors of the files that make it.

    Raises:
        CheckpointError: diffusers has no converter for this class, or it does not know these tensors.
        Unread: It leaves some unread.
    """

    def __init__(self, model_class: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        convert = converter_of(model_class, shapes)
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        leaves = {_bare(name, shapes): tensor for name, tensor in tensors.items()}  # not every converter does that
        self._leaves = tuple(leaves.values())
        options = {"config": dict(config)} if "config" in inspect.signature(convert).parameters else {}
        try:
            with _Tape() as tape:
                self._tensors: dict[str, torch.Tensor] = convert(dict(leaves), **options)
        except (KeyError, IndexError, ValueError, RuntimeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise CheckpointError(
                f"tensors {_some(shapes)} are not converted by diffusers' {convert.__name__} "
                f"({reason}), expected the original layout of {model_class}; "
                "check --model and the family"
            ) from error
        self._made = tape.made
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.sources = self._all_sources()
        self._refuse_unread(model_class, convert.__name__, shapes)

    def _all_sources(self) -> dict[str, frozenset[str]]:
        known: dict[int, frozenset[str]] = {key: frozenset({name}) for key, name in self._names.items()}

        def sources(tensor: torch.Tensor) -> frozenset[str]:
            if id(tensor) not in known:
                made = self._made[id(tensor)]
                inputs = [t for t in tree_leaves((made.args, made.options)) if isinstance(t, torch.Tensor)]
                known[id(tensor)] = frozenset[str]().union(*map(sources, inputs))
            return known[id(tensor)]

        return {name: sources(tensor) for name, tensor in self._tensors.items()}

    def _refuse_unread(self, model_class: str, converter: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        read = frozenset[str]().union(*self.sources.values())
        unread = [name for name in shapes if name not in read]
        if unread:
            raise Unread(
                f"{len(unread)} of {len(shapes)} tensors are left unread by diffusers' {converter} ({_some(unread)}), "
                f"expected the original layout of {model_class} and nothing else; check --model and the family, or "
                "pass a checkpoint without them"
            )
        found, made = (sum(map(math.prod, of.values())) for of in (shapes, self.shapes))
        if made < found:
            raise Unread(
                f"{found - made} of {found} numbers of the tensors are left unread by diffusers' {converter}, expected "
                f"the original layout of {model_class}; convert the checkpoint with diffusers' from_single_file and "
                "save_pretrained"
            )

    def along_rows(self, name: str) -> bool:
        """Whether a tensor is made by cuts and joins along the first axis alone, which fit scales of rows too."""

        def cut(tensor: torch.Tensor) -> bool:
            if id(tensor) in self._names:
                return True
            made = self._made[id(tensor)]
            schema = [argument.name for argument in made.operation._schema.arguments]
            given = {**dict(zip(schema, made.args, strict=False)), **made.options}
            inputs = [t for t in tree_leaves(given) if isinstance(t, torch.Tensor)]
            return made.operation in _CUTS and given.get("dim", 0) == 0 and all(map(cut, inputs))

        return cut(self._tensors[name])

    def tensor(self, name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """One tensor by its name in diffusers; `read` gives those of the files."""

        def value(tensor: torch.Tensor) -> Any:
            if id(tensor) in self._names:
                return read(self._names[id(tensor)])
            made = self._made[id(tensor)]
            several: Any = tree_map_only(torch.Tensor, value, (made.args, made.options))
            result = made.operation(*several[0], **several[1])
            return result if made.position is None else result[made.position]

        found: torch.Tensor = value(self._tensors[name])
        return found


def converter_of(model_class: str, names: Iterable[str]) -> Callable[..., dict[str, torch.Tensor]]:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    known: Any = SINGLE_FILE_LOADABLE_CLASSES.get(model_class)
    if known is None:
        raise CheckpointError(
            f"tensors {_some(names)} are in no layout of {model_class}, expected diffusers' (it has no converter for "
            "this class); pass a diffusers folder"
        )
    convert: Callable[..., dict[str, torch.Tensor]] = known["checkpoint_mapping_fn"]
    return convert


def _bare(name: str, names: Container[str]) -> str:
    """A name without the prefix of a file that may hold a whole pipeline, where no other tensor is called so."""
    bare = name.removeprefix(ONE_WITH_ALL)
    return name if bare in names else bare


def _some(names: Iterable[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(f"`{name}`" for name in first) + ", …"
