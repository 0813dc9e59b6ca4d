"""What torch's ONNX exporter and its simplifier do over and over, done once.

1. The exporter reads the source of each of its functions for each graph. Here it keeps what it read.
2. It runs a graph again to know the types in it, which `torch.export` has noted. Here it reads the notes, and runs
   what it changes.
3. The simplifier tries each rule at each node, and a rule that begins at several nodes at each with all others. Here it
   tries those whose first operator is the node's.

The graphs are the same to the byte. None of this is a public interface: where a release has it under another name, that
one stays as it is, and takes longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from typing import Any


@contextmanager
def done_once() -> Iterator[None]:
    """For the length of the block, exports to ONNX and simplifications leave out what they did before."""
    with ExitStack() as stack:
        for find, make in ((_functions, _read), (_types, _noted), (_rules, _by_operator)):
            with suppress(ImportError, AttributeError):
                owner, name = find()
                original = getattr(owner, name)
                setattr(owner, name, make(original))
                stack.callback(setattr, owner, name, original)
        yield


def _functions() -> tuple[Any, str]:
    from torch.onnx._internal.exporter import _registration

    return _registration.onnxscript_apis, "get_torchlib_ops"


def _read(read: Callable[[], Any]) -> Callable[[], Any]:
    return partial(_once, read)


@cache
def _once(read: Callable[[], Any]) -> Any:
    return read()


def _types() -> tuple[Any, str]:
    from torch.onnx._internal.fx.passes import type_promotion

    return type_promotion._TypePromotionInterpreter, "run_node"


def _noted(run: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter, get_type_promotion_rule

    within, promote = _TypePromotionInterpreter._set_current_node, _TypePromotionInterpreter._maybe_promote_node

    def noted(interpreter: Any, node: Any) -> Any:
        if "val" not in node.meta:
            return run(interpreter, node)
        rule = get_type_promotion_rule(node, interpreter.type_promotion_table)
        if rule is not None:
            with within(interpreter, node):
                promote(interpreter, node, rule)  # notes anew what it changes, in the type noted before
        return node.meta["val"]

    return noted


def _rules() -> tuple[Any, str]:
    from onnxscript.rewriter import pattern

    return pattern.RewriteRule, "try_rewrite"


def _by_operator(rewrite: Callable[..., Any]) -> Callable[..., Any]:
    from onnxscript.rewriter.pattern import SimplePatternMatcher

    def rewritten(rule: Any, model: Any, graph: Any, node: Any, **how: Any) -> Any:
        with suppress(AttributeError):
            if type(rule._matcher) is SimplePatternMatcher:
                first = rule._target_pattern.output_nodes[0]
                if not first.op.matches(node.op_type) or not first.domain.matches(node.domain):
                    return None
        return rewrite(rule, model, graph, node, **how)

    return rewritten
