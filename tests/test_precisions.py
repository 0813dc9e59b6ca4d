"""Half precision: every combination that the command line offers drafts and exports, for every family.

What half precision adds to an export is one condition, that no operator mixes float types. A split checks it for every
graph (`graph/ensures.py`) and takes a fifth of a second; exporting all of them again would take half an hour. So all
are split, and of each family those graphs are exported again that differ by granularity. float16 is tried where the
model's source names it or bfloat16, to clip or to round: to all others one is a dtype of two bytes as the other is.
"""

import inspect
import sys
from itertools import product

import diffusers
import pytest
from tiny_models import of_families

from taylorseer_export.compile import export
from taylorseer_export.compile.program import exported_program, mixed_types
from taylorseer_export.families import FAMILIES

NAMES = [*of_families().values()]
GRANULARITIES = ("module", "residual", "last")
OPTIONS = {"order": 1, "interval": 4, "warmup": 2, "engine": "inductor"}
pytestmark = pytest.mark.slow


def names_float16(family):
    """Whether the file of a family's model does anything by that name, or bfloat16's."""
    made = getattr(diffusers, FAMILIES[family].model_class)
    return "float16" in inspect.getsource(sys.modules[made.__module__])


CASES = [(name, "bf16") for name in NAMES]
CASES += [(name, "fp16") for family, name in of_families().items() if names_float16(family)]


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_every_combination_drafts(traced, name, precision):
    every = product(GRANULARITIES, ("snapshots", "derivatives"), ((), ("cg", "fbcache", "teacache")))
    for granularity, layout, guards in every:
        chosen = export.Options(**OPTIONS, precision=precision, granularity=granularity, layout=layout, guards=guards)
        made = export.draft(traced(name, chosen), chosen)
        assert [cut.name for cut in made.split.graphs][3:] == (["probe", "rest"] if guards else [])
        state = {t.dtype for cut in made.split.graphs for t in cut.inputs if t.role == "taylor_in"}
        assert state == {str(export.PRECISIONS[precision]).removeprefix("torch.")}


@pytest.mark.parametrize("name", NAMES)
def test_forecasts_export_again(traced, name):
    """And with them the full graph of Wan, which hands its final norm a hidden state in float32."""
    for granularity in GRANULARITIES:
        chosen = export.Options(**OPTIONS, precision="bf16", granularity=granularity, layout="derivatives")
        made = export.draft(traced(name, chosen), chosen)
        for cut in made.split.graphs:
            if cut.name == "forecast" or (name == "wan" and cut.name == "full" and granularity != "module"):
                program = exported_program(cut, made.graph_sizes, made.ranges())
                assert mixed_types(program) == []


def test_every_family_is_tried():
    assert of_families().keys() == FAMILIES.keys()
