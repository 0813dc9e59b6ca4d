"""What `torch.export` does not take in a model's code, in a form that it takes, equal to the original.

1. What the code keeps for its next call is forgotten after a run: tables of fake tensors are no numbers.
2. `flex_attention` with a mask of blocks is `scaled_dot_product_attention` with the same mask, an entry for each query
   and key. Blocks that are not listed are left out, as by its kernels; uncompiled, torch looks at the rule alone.
3. A mask of a text of which every token counts has known values: what the code makes of them, the number of tokens or
   their places, is known without looking.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import flex_attention as flex
from torch.overrides import TorchFunctionMode

from taylorseer_export.errors import ExportError
from taylorseer_export.families.family import replaced

# Caches --------------------------------------------------------------------------------------------------------------


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """For the length of the block, the model's modules and the objects that its code gave them may change."""
    code = _code(model)
    owners: list[Any] = list(model.modules())
    for module in model.modules():
        owners += [o for o in vars(module).values() if type(o).__module__ in code and not isinstance(o, nn.Module)]
    kept = [(owner, dict(vars(owner))) for owner in owners if hasattr(owner, "__dict__")]
    cached = [m for name in code for kind in vars(sys.modules[name]).values() for m in _cached(kind)]
    for function in cached:
        function.cache_clear()
    try:
        yield
    finally:
        for function in cached:
            function.cache_clear()
        for owner, attributes in kept:
            vars(owner).clear()
            vars(owner).update(attributes)


def _code(model: nn.Module) -> set[str]:
    """Names of the Python modules that the model's classes are of."""
    return {type(module).__module__ for module in model.modules()}


def _cached(found: Any) -> list[Any]:
    """The functions with a cache that a name of a module stands for: itself, or methods of a class."""
    methods = vars(found).values() if isinstance(found, type) else ()
    return [function for function in (found, *methods) if hasattr(function, "cache_clear")]


# Masks of blocks -----------------------------------------------------------------------------------------------------


class _Dense(flex.BlockMask):
    """A mask of blocks that knows its entry for every query and key, `[B, H, Q, K]` with sizes 1 where it is alike."""

    def __init__(self, entries: torch.Tensor, block: tuple[int, int]) -> None:
        self.entries, self.BLOCK_SIZE = entries, block


@contextmanager
def dense_attention(model: nn.Module) -> Iterator[None]:
    """For the length of the block, the model's code attends through masks with an entry for each query and key."""
    made = {"flex_attention": _attend, "create_block_mask": _of_entries}
    originals = {name: getattr(flex, name) for name in made}
    from_blocks = vars(flex.BlockMask)["from_kv_blocks"]
    with ExitStack() as stack:
        stack.enter_context(replaced(flex, **made))
        for name in _code(model):
            code = sys.modules[name]
            named = {key: made[key] for key, original in originals.items() if vars(code).get(key) is original}
            stack.enter_context(replaced(code, **named))
        flex.BlockMask.from_kv_blocks = staticmethod(_of_blocks)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            flex.BlockMask.from_kv_blocks = from_blocks  # type: ignore[method-assign]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
) -> torch.Tensor:
    if score_mod is not None or return_lse or not isinstance(block_mask, _Dense | None):
        raise ExportError(
            "flex_attention is called with a change of its scores, or a mask made elsewhere, expected a mask that the "
            "model's code makes of blocks; put the model's part into `patched` of its family"
        )
    mask = None if block_mask is None else block_mask.entries
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
    )


def _of_entries(
    mask_mod: Callable[..., torch.Tensor],
    B: int | None,  # as torch calls them
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: Any = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    _compile: bool = False,
    **_: Any,
) -> _Dense:
    """`create_block_mask`: the rule asked for every entry."""
    places = _places((B or 1, H or 1, Q_LEN, KV_LEN), device)
    return _Dense(mask_mod(*places).expand(-1, -1, Q_LEN, KV_LEN), _pair(BLOCK_SIZE))


def _of_blocks(
    kv_num_blocks: torch.Tensor,
    kv_indices: torch.Tensor,
    full_kv_num_blocks: torch.Tensor | None = None,
    full_kv_indices: torch.Tensor | None = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    mask_mod: Callable[..., torch.Tensor] | None = None,
    **_: Any,
) -> _Dense:
    """`BlockMask.from_kv_blocks`: the blocks that count, by their numbers, those in part as the rule says."""
    block = _pair(BLOCK_SIZE)
    entries = _spread(kv_num_blocks, kv_indices, block)
    if mask_mod is not None:
        entries = entries & mask_mod(*_places(tuple(entries.shape), entries.device))
    if full_kv_num_blocks is not None and full_kv_indices is not None:
        entries = entries | _spread(full_kv_num_blocks, full_kv_indices, block)
    return _Dense(entries, block)


def _spread(counts: torch.Tensor, numbers: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Which keys are in one of the first `counts` `[B, H, rows]` blocks `numbers` `[B, H, rows, columns]`."""
    every = torch.arange(numbers.shape[-1], device=numbers.device)
    listed = every < counts[..., None]
    of_blocks = ((numbers[..., None] == every) & listed[..., None]).any(-2)
    return of_blocks.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)


def _places(shape: Sequence[int], device: Any) -> list[torch.Tensor]:
    """The index along each dimension, to be broadcast."""
    last = len(shape) - 1
    return [
        torch.arange(size, device=device).view([-1 if k == dim else 1 for k in range(last + 1)])
        for dim, size in enumerate(shape)
    ]


def _pair(block: int | tuple[int, int]) -> tuple[int, int]:
    return block if isinstance(block, tuple) else (block, block)


# Texts of which every token counts -----------------------------------------------------------------------------------

_T = torch.Tensor
_MOVES = {
    _T.__getitem__, _T.flatten, torch.flatten, _T.view, _T.reshape, torch.reshape, _T.unsqueeze, torch.unsqueeze,
    _T.squeeze, torch.squeeze, _T.expand, _T.repeat, _T.contiguous, _T.clone, torch.clone, _T.detach, _T.expand_as,
}  # fmt: skip
_CASTS = {_T.to, _T.bool, _T.int, _T.long, _T.float, _T.type_as, _T.type}
_TRUTHS = {_T.all, torch.all, _T.any, torch.any}
_LARGEST = {_T.max, torch.max, _T.min, torch.min}


class EveryTokenCounts(TorchFunctionMode):
    """Knows masks of ones, tensors of one number, and what is computed of them, wherever code asks for a number.

    It is for runs that have no numbers, on fake tensors. What is changed in place is known no longer; a view that
    changes what it is of is not seen, but by the comparison with the model, which runs without this.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[torch.Tensor, Any]] = {}

    def __enter__(self) -> EveryTokenCounts:
        original = FakeTensor.tolist  # which does not ask a mode
        FakeTensor.tolist = lambda tensor: self._list(tensor, original)  # type: ignore[method-assign, assignment]
        self.restore = lambda: setattr(FakeTensor, "tolist", original)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.restore()
        super().__exit__(*error)

    def _list(self, tensor: torch.Tensor, original: Any) -> Any:
        value = self._value(tensor)
        return original(tensor) if value is None else _nested(value, [int(size) for size in tensor.shape])

    def ones(self, *shape: Any, dtype: torch.dtype, device: Any) -> torch.Tensor:
        """A mask of which every token counts."""
        return self._keep(torch.ones(shape, dtype=dtype, device=device), 1)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.full:
            return self._keep(func(*args, **kwargs), args[1] if len(args) > 1 else kwargs["fill_value"])
        first: Any = args[0] if args else None
        value = self._value(first)
        if func is _T.__getitem__ and (chosen := self._value(args[1])) is not None and args[1].dtype == torch.bool:
            rank = args[1].ndim
            rows = first.flatten(0, rank - 1) if rank > 1 else first
            return rows[:] if chosen else rows[:0]
        if value is None:
            return func(*args, **kwargs)
        if func in _MOVES:
            return self._keep(func(*args, **kwargs), value)
        if func in (_T.unbind, torch.unbind):
            return tuple(self._keep(part, value) for part in func(*args, **kwargs))
        if func in _CASTS:
            made = func(*args, **kwargs)
            return self._keep(made, int(value != 0) if made.dtype == torch.bool else value)
        if func in (_T.__invert__, _T.logical_not, torch.logical_not) and first.dtype == torch.bool:
            return self._keep(func(*args, **kwargs), int(not value))
        if func in (_T.sum, torch.sum):
            made = func(*args, **kwargs)
            dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
            dims = range(first.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
            return self._keep(made, value * math.prod(first.shape[dim] for dim in dims))
        if func in _TRUTHS and len(args) == 1 and not kwargs:
            return self._keep(func(*args), int(value != 0))
        if func in _LARGEST and len(args) == 1 and not kwargs:
            return self._keep(func(*args), value)
        if func in (torch.nonzero, _T.nonzero) and first.ndim == 1:
            places = torch.arange(first.shape[0] if value else 0, device=first.device)
            return (places,) if kwargs.get("as_tuple") else places[:, None]
        if func is _T.__bool__:
            return bool(value)
        if func in (_T.item, _T.__int__, _T.__index__):
            return bool(value) if first.dtype == torch.bool else value
        if func is _T.tolist:
            return self._list(first, func)
        if re.fullmatch(r"\w*[^_]_|__setitem__|__i(add|sub|mul|and|or)__", getattr(func, "__name__", "")):
            self.known.clear()  # changed in place, with all that shares its memory
        return func(*args, **kwargs)

    def _keep(self, tensor: torch.Tensor, value: Any) -> torch.Tensor:
        self.known[id(tensor)] = (tensor, value)
        return tensor

    def _value(self, tensor: Any) -> Any:
        found, value = self.known.get(id(tensor), (None, None))
        return value if found is tensor and isinstance(tensor, torch.Tensor) else None


def _nested(value: Any, shape: list[int]) -> Any:
    return [_nested(value, shape[1:])] * shape[0] if shape else value
