"""The ONNX graphs of a bundle: valid, complete with one weights file, and free of traces of this machine."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from tiny_bundles import BUNDLES

from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.bundle.store import open_bundle
from taylorseer_export.compile.onnx import OPSET
from taylorseer_export.compile.weights import WEIGHTS, write_weights

CASES = [(name, graph) for name in BUNDLES for graph in ("prepare", "full", "forecast")]
pytestmark = pytest.mark.parametrize(("name", "graph"), CASES)


@pytest.fixture
def path(bundles, name, graph) -> Path:
    return bundles(name) / f"{graph}.onnx"


@pytest.fixture
def model(path):
    return onnx.load(path, load_external_data=False)


def place(tensor):
    """(file, offset, length) of an external tensor."""
    found = {entry.key: entry.value for entry in tensor.external_data}
    return found["location"], int(found["offset"]), int(found["length"])


def external(model):
    return [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]


def header(path):
    """Tensor name -> (offset from the start of the file, length, shape) of a safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
    found = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        found[name] = (8 + size + begin, end - begin, tuple(entry["shape"]))
    return found


def test_the_checker_accepts_it(path, model):
    onnx.checker.check_model(str(path), full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import if o.domain == ""] == [("", OPSET)]
    assert {node.domain for node in model.graph.node} == {""}
    assert len(model.functions) == 0


def test_names_and_shapes_are_the_contract(bundles, name, graph, model):
    manifest = open_bundle(bundles(name)).manifest
    fixed = {n: d.minimum for n, d in manifest.dimensions.items() if d.minimum == d.maximum}
    contract = manifest.graphs[graph]
    for values, tensors in ((model.graph.input, contract.inputs), (model.graph.output, contract.outputs)):
        assert [v.name for v in values] == [t.name for t in tensors]
        for value, tensor in zip(values, tensors, strict=True):
            kind = value.type.tensor_type
            assert kind.elem_type == onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
            shown = [d.dim_param or d.dim_value for d in kind.shape.dim]
            static = {str(e): fixed.get(str(e), e) for e in tensor.shape}
            assert shown == [static[str(e)] if str(e) in static else e for e in tensor.shape] or shown == list(
                resolve(tensor.shape, fixed)
            )


def test_weights_lie_in_the_one_file(bundles, name, model):
    known = header(bundles(name) / WEIGHTS)
    assert external(model) or model.graph.name == "forecast"
    for tensor in external(model):
        offset, length, shape = known[tensor.name]
        assert place(tensor) == (WEIGHTS, offset, length)
        assert tuple(tensor.dims) == shape
        assert offset % onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize == 0


def test_weights_are_those_of_the_checkpoint(bundles, drafts, tiny, name, model):
    state = tiny(name).model.state_dict() | drafts(name, **BUNDLES[name]).buffers
    with safe_open(bundles(name) / WEIGHTS, framework="pt") as file:
        assert {t.name for t in external(model)} <= set(file.keys())
        different = [t.name for t in external(model) if not torch.equal(file.get_tensor(t.name), state[t.name])]
    assert different == []


def test_it_reads_what_its_cut_reads(drafts, name, graph, model):
    cut = next(c for c in drafts(name, **BUNDLES[name]).split.graphs if c.name == graph)
    assert {t.name for t in external(model)} == set(cut.parameters())


def test_nothing_large_is_stored_inline(model):
    inline = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    constants = [
        a.t for node in model.graph.node if node.op_type == "Constant" for a in node.attribute if a.HasField("t")
    ]
    large = [t.name for t in (*inline, *constants) if t.ByteSize() > 1024]
    assert large == []


def test_no_path_of_this_machine(path, model):
    data = path.read_bytes()
    for part in (Path.cwd(), Path.home(), Path(torch.__file__).parent.parent, Path(__file__).parent, path.parent):
        assert str(part).encode() not in data or len(part.parts) < 3
    assert re.findall(rb"/tmp/|site-packages|[\w/]+\.py\b|pkg\.torch|Traceback", data) == []
    assert not model.doc_string
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


def test_every_weight_is_stored_once(bundles, drafts, name, graph):
    """The bundle is its weights, a small file for each graph and a manifest."""
    folder, draft = bundles(name), drafts(name, **BUNDLES[name])
    known = header(folder / WEIGHTS)
    assert known.keys() == draft.stored.keys()
    begin = min(offset for offset, _, _ in known.values())
    assert (folder / WEIGHTS).stat().st_size == begin + draft.weights_bytes()
    assert begin % 4096 == 0
    ends = sorted((offset, offset + length) for offset, length, _ in known.values())
    assert [a[1] for a in ends[:-1]] == [b[0] for b in ends[1:]]
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [*(f"{cut.name}.onnx" for cut in draft.split.graphs), "manifest.json", WEIGHTS]
    )
    assert (folder / f"{graph}.onnx").stat().st_size < 1 << 20


def test_weights_file_of_mixed_types(tmp_path, name, graph):
    """Wide elements first, so every tensor is aligned; empty and scalar tensors included."""
    tensors = {
        "half": torch.arange(3, dtype=torch.float16),
        "whole": torch.tensor([1, -2, 3]),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "brain": torch.ones(1, 5, dtype=torch.bfloat16),
        f"{name}.{graph}": torch.tensor([True, False]),
    }
    read = []
    places = write_weights(
        tmp_path / WEIGHTS, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, tensors.__getitem__, read.append
    )
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert set(file.keys()) == tensors.keys()
        assert all(torch.equal(file.get_tensor(n), t) for n, t in tensors.items())
    assert sum(read) == sum(t.nbytes for t in tensors.values())
    assert {n: (p.offset, p.length, p.shape) for n, p in places.items()} == header(tmp_path / WEIGHTS)
    assert all(p.offset % p.dtype.itemsize == 0 for p in places.values())
