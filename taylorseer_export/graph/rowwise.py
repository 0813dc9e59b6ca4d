"""Which rows of a traced graph are the latent's, and whether anything but attention looks from one of them at others.

A rank holds some of the latent's rows and no others. Whatever treats each row alone may run on those as it is, and a
graph says so by its operators: the extent of a dimension mentions the size that counts the rows, and an operator either
leaves that dimension alone or it does not. So a model needs no mark of where its rows are.

    segment   rows that follow on each other in one dimension: the latent's own, or those that every rank has
              alike, such as a text's. `cat(text, latent)` has two.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import sympy
import torch
from torch import fx

from taylorseer_export.errors import ExportError
from taylorseer_export.graph.rewrite import TO_THE_END
from taylorseer_export.graph.sizes import is_size, simplified
from taylorseer_export.graph.trace import is_tap, module_paths

aten = torch.ops.aten

# What gives every row its own values back, or the same to all: moves, copies, lookups by what each row holds.
_MOVES = frozenset(
    {
        "view", "reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "unsqueeze", "squeeze", "expand",
        "expand_as", "to", "clone", "contiguous", "detach", "alias", "stack", "cat", "meshgrid", "embedding", "outer",
        "repeat", "dropout", "broadcast_to", "swapaxes", "sym_size", "view_as_complex", "view_as_real",
    }
)  # fmt: skip
_LIKE_POINTWISE = frozenset(
    {"floor_divide", "remainder", "fmod", "__and__", "__or__", "__xor__"}
)  # without torch's tag
_CONSTANT = frozenset(
    {"ones", "zeros", "full", "new_ones", "new_zeros", "new_full", "ones_like", "zeros_like", "full_like"}
)
_NORMS = ("layer_norm", "rms_norm")
_ALONG = frozenset({"unbind", "select", "chunk", "split", "index_select", "repeat_interleave", "softmax", "cumsum"})
_REDUCED = frozenset({"mean", "sum", "amax", "amin", "any", "all", "argmax", "argmin"})
_PATCHES = ("conv1d", "conv2d", "conv3d")
_EINSUM = "einsum"


@dataclass(frozen=True)
class Segment:
    """Rows that follow on each other: how many, whether they are the latent's, and what brought them.

    Attributes:
        source, dim: The tensor, and which of its dimensions they are.
        constant: Whether they are one value.
    """

    length: Any
    local: bool
    source: fx.Node
    dim: int
    constant: bool = False


class Rows:
    """The rows of a latent in a traced graph.

    Args:
        graph: It; left alone.
        symbol: Of the trace: the size that counts them.
        name: Of that size in the family.
        family: What refusals call the model.
        block: Rows that follow on each other on a rank, such as those of one frame, where what is outside of the size
            that is shared out, such as the frames, is whole on every rank; None where nothing is.
    """

    def __init__(
        self, graph: fx.Graph, symbol: sympy.Symbol, name: str, family: str, block: sympy.Expr | None = None
    ) -> None:
        self.graph, self.symbol, self.name, self.family, self._block = graph, symbol, name, family, block

    def holds(self, size: Any) -> bool:
        """Whether a size is computed from the number of rows."""
        return isinstance(size, torch.SymInt) and self.symbol in size.node.expr.free_symbols

    def dims(self, node: fx.Node) -> list[int]:
        """The dimensions of a tensor whose extent is computed from the number of rows."""
        value = node.meta.get("val")
        shape = value.shape if isinstance(value, torch.Tensor) else ()
        return [k for k, size in enumerate(shape) if self.holds(size)]

    def segments(self, node: fx.Node, length: Any, ends_at: Collection[sympy.Expr] = ()) -> list[Segment]:
        """The segments of a dimension of that length, found where they were joined.

        What an operator reads of that length is in one order, so whichever of it leads to such a place will do; others
        that are alike on every rank may be one segment there and several elsewhere.

        Args:
            node: The tensor.
            length: The extent of the dimension.
            ends_at: Where a segment has to begin or end.

        Raises:
            ExportError: It was not joined so by a concatenation.
        """
        left, seen, ends = [node], {node}, list[fx.Node]()
        ends_at = {end for end in ends_at if not self._of_blocks(end)}
        while self.holds(length) and sympy.expand(written(length)).coeff(self.symbol, 0) != 0:
            if not left:
                self.refuse(ends[0], "makes rows of the latent and others at once")
            node = left.pop()
            if (parts := _joined_of(node, length)) is not None:
                found = self._merged([one for part, extent in parts for one in self.segments(part, extent)])
            else:
                found = self._within(node, length) or []
            if found and ends_at <= set(_bounds(found)):
                return found
            sources = [source for source in node.all_input_nodes if _has(source, length)]
            if not found and (told := [source for source in sources if not is_constant(source)]):
                left += [source for source in reversed(told) if source not in seen]
                seen.update(told)
                continue
            if not found and (joined := self._joined(length)) and (sources or is_constant(node)):
                return [replace(segment, constant=True) for segment in self.segments(joined[0], length)]
            ends.append(node)
        dim = next(k for k, size in enumerate(node.meta["val"].shape) if _same(size, length))
        # Of the latent where every term counts its rows.
        return [Segment(length, self.holds(length), node, dim, is_constant(node))]

    def _of_blocks(self, count: sympy.Expr) -> bool:
        """Whether so many rows are whole frames, or the like: on each rank its own rows of them."""
        if self._block is None:
            return False
        share = sympy.cancel(count / self._block)
        return bool(share.is_polynomial()) and self.symbol not in share.free_symbols

    def _merged(self, found: list[Segment]) -> list[Segment]:
        """Rows of the latent that were cut into frames and joined again, as they were before."""
        made: list[Segment] = []
        for segment in found:
            last = made[-1] if made else None
            if last is not None and last.local and segment.local and self._of_blocks(written(last.length)):
                whole = self._with_extent(sympy.expand(written(last.length) + written(segment.length)))
                if whole is not None:
                    made[-1] = replace(whole, constant=last.constant and segment.constant)
                    continue
            made.append(segment)
        return made

    def _with_extent(self, extent: sympy.Expr) -> Segment | None:
        """So many rows of the latent, as the first tensor has them; None if there is no such tensor."""
        for node in self.graph.nodes:
            for dim in self.dims(node):
                if _size(length := node.meta["val"].shape[dim]) == extent:
                    return Segment(length, True, node, dim)
        return None

    def joined_as(self, length: Any) -> list[bool] | None:
        """How rows of the latent and others that are so many together follow on each other, where all do alike."""
        orders = [[segment.local for segment in self.segments(node, length)] for node in self._joined(length)]
        return orders[0] if orders and all(order == orders[0] for order in orders) else None

    def _joined(self, length: Any) -> list[fx.Node]:
        """The concatenations that have a dimension of that length."""
        return [node for node in self.graph.nodes if _joined_of(node, length) is not None]

    def _within(self, node: fx.Node, length: Any) -> list[Segment] | None:
        """The segments of a dimension of that length that was cut out of a longer one; None if it was not here."""
        if node.target is not aten.slice.Tensor:
            return None
        source, dim, begin, stop, step = self._cut_out(node)
        if step != 1 or not _same(node.meta["val"].shape[dim], length) or _same(source.meta["val"].shape[dim], length):
            return None
        found, at = [], sympy.Integer(0)
        for segment in self.segments(source, source.meta["val"].shape[dim], (begin, stop)):
            end = sympy.expand(at + written(segment.length))
            if _before(begin, at) and _before(end, stop):
                found.append(segment)
            elif at == 0 and segment.local and (self._of_blocks(begin) or self._of_blocks(stop)):
                kept = self._with_extent(sympy.expand((end if _before(end, stop) else stop) - begin))
                found += [] if kept is None else [replace(kept, constant=segment.constant)]
                begin = end  # what follows is kept from its beginning
            at = end
        total = sympy.expand(sum((written(segment.length) for segment in found), sympy.Integer(0)))
        return found if total == sympy.expand(written(length)) else None

    def _cut_out(self, node: fx.Node) -> tuple[Any, int, sympy.Expr, sympy.Expr, Any]:
        """Of a slice its source, dimension, begin, end and step; those from the end on as from the beginning."""
        given: Any = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
        source, dim, start, end, step = given
        dim %= source.meta["val"].ndim
        length = _size(source.meta["val"].shape[dim])

        def bound(size: sympy.Expr) -> sympy.Expr:
            negative = all(term.could_extract_minus_sign() for term in sympy.Add.make_args(size)) and size != 0
            return sympy.expand(size + length) if negative else size

        stop = length if end is None or end == TO_THE_END else bound(_size(end))
        return source, dim, bound(_size(start or 0)), stop, step

    def check(self, placed: Collection[fx.Node] = ()) -> None:
        """Refuse a graph in which anything but attention mixes the latent's rows, or tells one of them by its place.

        Args:
            placed: Nodes that are known to give this rank's rows their places among all.

        Raises:
            ExportError: Names the operator, and the module that it is part of.
        """
        for node in self.graph.nodes:
            if node.op != "call_function" or is_size(node) or is_tap(node) or node.target is operator.getitem:
                continue
            if node in placed:
                continue
            self._check_sizes(node)
            if any(map(self._falls_short, _extents(node))):
                self.refuse(node, "makes fewer rows than there are")
            read = [source for source in node.all_input_nodes if self.dims(source)]
            made = self._made(node)
            if read or made:
                self._check(node, read)

    def _made(self, node: fx.Node) -> bool:
        return any(map(self.holds, _extents(node)))

    def _falls_short(self, size: Any) -> bool:
        """Whether an extent is a number of rows less some, such as of all but the first: on each rank others."""
        terms = sympy.Add.make_args(sympy.expand(written(size))) if self.holds(size) else ()
        return not all(self._of_blocks(-term) for term in terms if term.could_extract_minus_sign())

    def _check_sizes(self, node: fx.Node) -> None:
        """A number of rows may be the extent of something, and nothing that is computed with."""
        if any(is_size(n) and self.holds(n.meta["val"]) for n in node.all_input_nodes) and computes(node):
            self.refuse(node, "computes with the number of rows")

    def _check(self, node: fx.Node, read: list[fx.Node]) -> None:
        name = operator_of(node)
        if name == "scaled_dot_product_attention" or (name in _MOVES and (read or name in ("expand", "repeat"))):
            return
        if name in _CONSTANT or (read and _pointwise(node)):
            return
        if not read:
            self.refuse(node, "makes a row by its place")
        source: Any = node.args[0]
        dims = self.dims(source) if isinstance(source, fx.Node) else []
        rank = source.meta["val"].ndim if isinstance(source, fx.Node) else 0
        if name == "slice":
            self._check_slice(node, source)
        elif name == "split_with_sizes":
            self._check_split(node, source)
        elif name == "linear":
            self._expect(node, rank - 1 not in dims and read == [source])
        elif name in _NORMS:
            whole: Any = node.args[1]
            self._expect(node, all(dim < rank - len(whole) for dim in dims) and read == [source])
        elif name in _REDUCED:
            self._expect(node, not set(dims) & set(_reduced(node, rank)))
        elif name in _ALONG:
            along: Any = _argument(node, "dim", 0)
            self._expect(node, along is not None and along % max(rank, 1) not in dims)
        elif name == "topk":
            self._expect(node, _argument(node, "dim", -1) % rank not in dims)
        elif name == "pad":
            self._expect(node, not set(dims) & set(_padded(node, rank)))
        elif name in _PATCHES:
            self._expect(node, _cuts_patches(node) and read == [source])
        elif name == "matmul":
            left, right = node.args[:2]
            inner = (self.dims(left), left.meta["val"].ndim - 1), (self.dims(right), max(right.meta["val"].ndim - 2, 0))  # type: ignore
            self._expect(node, all(dim not in held for held, dim in inner))
        elif name == _EINSUM:
            self._expect(node, self._einsum(node))
        elif name == "index":
            table, indices = node.args[:2]
            self._expect(node, not self.dims(table) and all(i is not None for i in indices))  # type: ignore
        else:
            self.refuse(node, "may mix rows")

    def _check_slice(self, node: fx.Node, source: Any) -> None:
        _, dim, begin, stop, step = self._cut_out(node)
        if dim not in self.dims(source):
            if self.holds(node.meta["val"].shape[dim]):
                self.refuse(node, "takes as many entries of a table as there are rows")
            return
        length = source.meta["val"].shape[dim]
        if step == 1 and begin == 0 and stop == _size(length):
            return
        segments = self.segments(source, length, (begin, stop))
        self._expect(node, step == 1 and all(self._bounds_in(segments, bound) for bound in (begin, stop)))

    def _bounds_in(self, segments: list[Segment], bound: sympy.Expr) -> bool:
        """Whether a segment begins or ends there, or of the first one whole frames do."""
        return bound in _bounds(segments) or (segments[0].local and self._of_blocks(bound))

    def _check_split(self, node: fx.Node, source: Any) -> None:
        given: Any = (*node.args[1:], 0)
        sizes, dim, *_ = given
        dim %= source.meta["val"].ndim
        if dim in self.dims(source):
            segments, end = self.segments(source, source.meta["val"].shape[dim]), sympy.Integer(0)
            for size in sizes:
                end = sympy.expand(end + _size(size))
                self._expect(node, self._bounds_in(segments, end))

    def _einsum(self, node: fx.Node) -> bool:
        """Whether every dimension that counts rows is one of the result's."""
        told, operands = node.args[:2]
        terms, _, result = str(told).replace(" ", "").partition("->")
        held = [bool(result)]
        for letters, operand in zip(terms.split(","), operands, strict=True):  # type: ignore[arg-type]
            first, _, last = letters.partition("...")
            spread = first + "." * (operand.meta["val"].ndim - len(first) - len(last)) + last
            held += [spread[dim] in result for dim in self.dims(operand)]
        return all(held)

    def _expect(self, node: fx.Node, held: bool) -> None:
        if not held:
            self.refuse(node, "mixes rows")

    def refuse(self, node: fx.Node, why: str) -> NoReturn:
        """Refuse to share the rows of this model out, because of that node."""
        where = next(reversed([path for path in module_paths(node) if path]), self.family)
        raise ExportError(
            f"operator `{operator_of(node) or node.target}` of `{where}` {why} along `{self.name}`, expected each row "
            f"of the latent to be treated alone but by attention; family {self.family} is not shared out over ranks "
            "yet, leave --parallel out"
        )


def operator_of(node: fx.Node) -> str:
    """Name of a node's operator without its overload; empty where it is none of torch."""
    return node.target.__name__.split(".")[0] if isinstance(node.target, torch._ops.OpOverload) else ""


def is_constant(node: fx.Node) -> bool:
    """Whether a tensor has one value in all its places, whatever its size."""
    while operator_of(node) in ("to", "expand", "unsqueeze", "reshape", "view"):
        node = node.args[0]  # type: ignore[assignment]
    return operator_of(node) in _CONSTANT


def attentions(graph: fx.Graph) -> Iterator[fx.Node]:
    """The attentions of a graph."""
    return (n for n in list(graph.nodes) if n.target is aten.scaled_dot_product_attention.default)


def computes(node: fx.Node) -> bool:
    """Whether numbers that an operator is given are values, and no extents."""
    return _pointwise(node) or operator_of(node) in ("full_like", "scalar_tensor")


def _pointwise(node: fx.Node) -> bool:
    tagged = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return tagged or operator_of(node) in _LIKE_POINTWISE


def _reduced(node: fx.Node, rank: int) -> list[int]:
    dims: Any = _argument(node, "dim", None)
    given = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return [dim % max(rank, 1) for dim in given]


def _padded(node: fx.Node, rank: int) -> list[int]:
    """The dimensions that are made longer, or shorter."""
    told: Any = node.args[1]
    return [rank - 1 - k // 2 for k, size in enumerate(told) if not isinstance(size, int) or size]


def _bounds(segments: Iterable[Segment]) -> list[sympy.Expr]:
    """Where a segment begins or ends."""
    found = [sympy.Integer(0)]
    for segment in segments:
        found.append(sympy.expand(found[-1] + written(segment.length)))
    return found


def _before(one: sympy.Expr, other: sympy.Expr) -> bool:
    """Whether a bound is another or before it, whatever the sizes are."""
    return all(not term.could_extract_minus_sign() for term in sympy.Add.make_args(sympy.expand(other - one)))


def _cuts_patches(node: fx.Node) -> bool:
    """Whether a convolution takes every place once."""
    weight: Any = node.args[1]
    kernel = list(weight.meta["val"].shape[2:])
    stride: Any = _argument(node, "stride", 1)
    padding: Any = _argument(node, "padding", 0)
    dilation: Any = _argument(node, "dilation", 1)
    spread = [stride] * len(kernel) if isinstance(stride, int) else list(stride) * (len(kernel) // len(stride))
    none = all(p in (0, "valid") for p in (padding if isinstance(padding, list | tuple) else [padding]))
    close = all(d == 1 for d in (dilation if isinstance(dilation, list | tuple) else [dilation]))
    return kernel == spread and none and close


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    """An argument of a call by its name in the operator's schema."""
    if name in node.kwargs:
        return node.kwargs[name]
    assert isinstance(node.target, torch._ops.OpOverload)
    places = [argument.name for argument in node.target._schema.arguments]
    if name not in places or places.index(name) >= len(node.args):
        return default
    return node.args[places.index(name)]


def written(size: Any) -> sympy.Expr:
    """A size as an expression over the symbols of the trace."""
    return simplified(size.node.expr) if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _joined_of(node: fx.Node, length: Any) -> list[tuple[fx.Node, Any]] | None:
    """The tensors that a dimension of that length was joined of, each with its own length; None if it was not here."""
    if node.target is not aten.cat.default:
        return None
    parts: Any = node.args[0]
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    dim %= node.meta["val"].ndim
    return [(p, p.meta["val"].shape[dim]) for p in parts] if _same(node.meta["val"].shape[dim], length) else None


def _has(node: fx.Node, length: Any) -> bool:
    """Whether a dimension of a node's tensor, or of one of its tensors, has that length."""
    return any(_same(size, length) for size in _extents(node))


def _extents(node: fx.Node) -> list[Any]:
    """Of every dimension of a node's tensor, or tensors."""
    values = node.meta.get("val")
    several = values if isinstance(values, tuple | list) else (values,)
    return [size for value in several if isinstance(value, torch.Tensor) for size in value.shape]


def _size(value: Any) -> sympy.Expr:
    """A size, or the node of one, as it is written."""
    return sympy.expand(written(value.meta["val"] if isinstance(value, fx.Node) else value))


def _same(one: Any, other: Any) -> bool:
    return bool(written(one) == written(other))
