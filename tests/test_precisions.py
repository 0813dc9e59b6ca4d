"""Half precision: every combination that the command line offers drafts and exports, for every family."""

from itertools import product

import pytest
from conftest import MODELS

from taylorseer_export.compile import export
from taylorseer_export.compile.program import exported_program
from taylorseer_export.families import FAMILIES

# One model of each family, and those that differ from it in what is read beside the latent.
NAMES = [*{family: name for name, (family, *_) in reversed(MODELS.items())}.values()]
GUARDS = ((), ("cg", "fbcache", "teacache"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_every_combination_exports(traced, name, precision):
    """Traced once; a graph that two combinations share is exported again once."""
    options = {"order": 1, "interval": 4, "warmup": 2, "engine": "inductor", "precision": precision}
    seen = set()
    for granularity, layout, guards in product(("module", "residual", "last"), ("snapshots", "derivatives"), GUARDS):
        chosen = export.Options(**options, granularity=granularity, layout=layout, guards=guards)
        made = export.draft(traced(name, chosen), chosen)
        assert [cut.name for cut in made.split.graphs][3:] == (["probe", "rest"] if guards else [])
        state = {t.dtype for cut in made.split.graphs for t in cut.inputs if t.role == "taylor_in"}
        assert state == {str(export.PRECISIONS[precision]).removeprefix("torch.")}
        for cut in made.split.graphs:
            graph = (cut.name, str(cut.module.graph), cut.inputs, cut.outputs)
            if graph not in seen:
                seen.add(graph)
                exported_program(cut, {**made.sizes, "steps": None}, made.ranges())


def test_every_family_is_tried():
    assert {MODELS[name][0] for name in NAMES} == FAMILIES.keys()
