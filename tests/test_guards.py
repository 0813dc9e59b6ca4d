"""Guards of a trace that are put off: what is true at every size is let go, what is not refuses the model."""

from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.exc import UserError, UserErrorType

from taylorseer_export.graph import guards
from taylorseer_export.graph.guards import guards_of, settled


class Asking(nn.Module):
    """Asks something of the number of its rows, which is a guard."""

    def __init__(self, ask):
        super().__init__()
        self.ask = ask

    def forward(self, x):
        return x * 2 if self.ask(x.shape[0]) else x


def always(rows):
    """True, which no torch proves."""
    return rows // 2 * 2 + rows % 2 == rows


def sometimes(rows):
    return rows % 4 == 0


def refused(ask, **how):
    """What a torch does that refuses whatever guards a size."""
    if not how:
        raise UserError(UserErrorType.CONSTRAINT_VIOLATION, "Constraints violated (rows)")
    rows = {"x": {0: torch.export.Dim("rows", min=2, max=9)}}
    return torch.export.export(Asking(ask), (), {"x": torch.ones(4, 3)}, dynamic_shapes=rows, strict=False, **how)


@pytest.fixture
def cannot_prove(monkeypatch):
    """A torch that refuses whatever guards a size, as 2.11 does where it does not see that the guard is true."""
    monkeypatch.setattr(guards, "_PROVES", (1 << 30, 0))


def test_a_guard_that_is_true_at_all_sizes_is_let_go(cannot_prove):
    assert guards_of(refused(always, prefer_deferred_runtime_asserts_over_guards=True))
    program = settled(partial(refused, always))
    assert torch.equal(program.module()(x=torch.ones(3, 3)), 2 * torch.ones(3, 3))


def test_a_guard_that_is_false_at_some_size_refuses_the_model(cannot_prove):
    assert guards_of(refused(sometimes, prefer_deferred_runtime_asserts_over_guards=True))
    with pytest.raises(
        UserError, match=r"it depends on sizes as torch [\d.]+\S* sees it, newer ones see more; upgrade"
    ):
        settled(partial(refused, sometimes))


def test_a_torch_that_sees_it_is_not_asked_twice(monkeypatch):
    monkeypatch.setattr(guards, "_PROVES", (0, 0))
    with pytest.raises(UserError, match=r"Constraints violated \(rows\)"):
        settled(partial(refused, always))
