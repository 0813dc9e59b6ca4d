"""Operators without a form in ONNX: taken apart while a graph is traced, so that the exporter traces it no more."""

# Shapes: B batch

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate, rms_norm

from taylorseer_export.bundle.manifest import Tensor
from taylorseer_export.compile.operators import taken_apart, traced_once
from taylorseer_export.compile.program import exported_program
from taylorseer_export.graph.cut import Cut
from taylorseer_export.graph.trace import drop_noise

SIZES, RANGES = {"batch": None}, {"batch": (1, 9)}
OPERATORS = {
    "rms_norm": lambda x: rms_norm(x, (4,), torch.arange(4.0)),
    "rms_norm without a weight": lambda x: rms_norm(x, (6, 4), eps=0.5),
    "outer": lambda x: torch.outer(x[0, 0], x[0, 1]),
    "names": lambda x: (
        torch.min(x, -x) + torch.max(x, 2 * x) + ((x > 0) & (x < 1)).float() + ((x > 1) | (x < 0)).float()
    ),
    "views": lambda x: torch.cat([*x.transpose(1, 2).flatten(1).unflatten(1, (4, -1)).chunk(2, 1)], 2),
    "expand_as": lambda x: x[:, :1].expand_as(x).reshape(-1, 2),
    "casts": lambda x: (x * 9).to(torch.int32),
    "resized": lambda x: interpolate(x.unsqueeze(1), scale_factor=2.0, mode="nearest-exact"),
    "meshgrid": lambda x: torch.stack(torch.meshgrid(x[0, 0], x[0, 1], indexing="ij")),
}


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = lambda x: (function(x),)


def cut_of(function):
    """The graph of a function of x [B, 6, 4]."""
    dynamic = ({0: torch.export.Dim("batch", min=1, max=9)},)
    module = torch.export.export(
        Model(function), (torch.zeros(2, 6, 4),), dynamic_shapes=dynamic, strict=False
    ).module()
    drop_noise(module.graph)
    x = Tensor(name="x", dtype="float32", shape=("batch", 6, 4), role="latent")
    return Cut("full", module, (x,), ())


def onnx_of(program):
    return torch.onnx.export(traced_once(program), dynamo=True, optimize=False, opset_version=20, verbose=False)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_parts_are_the_operator_and_are_not_traced_again(name):
    program = exported_program(taken_apart(cut_of(OPERATORS[name])), SIZES, RANGES)
    x = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(program.module()(x)[0], OPERATORS[name](x))
    assert onnx_of(program).exported_program is program


@pytest.mark.parametrize("name", ["views", "rms_norm"])
def test_what_is_left_whole_is_traced_again(name):
    program = exported_program(cut_of(OPERATORS[name]), SIZES, RANGES)
    assert onnx_of(program).exported_program is not program
