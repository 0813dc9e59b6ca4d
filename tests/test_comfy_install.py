"""`taylorseer-export comfy`: the nodes among a ComfyUI's, and the workflows beside them."""

import json
import shutil

import comfy_workflows
import pytest

from taylorseer_export import cli
from taylorseer_export.comfy import install


@pytest.fixture
def comfyui(tmp_path):
    """A folder with what tells a ComfyUI."""
    for name in ("custom_nodes", "models"):
        (tmp_path / name).mkdir()
    (tmp_path / "main.py").touch()
    (tmp_path / "comfyui_version.py").write_text('# generated\n__version__ = "0.3.64"\n')
    return tmp_path


def said(capsys, *arguments):
    code = cli.main(["comfy", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out or err


def test_it_links_the_nodes_once(comfyui, capsys):
    for _ in range(2):
        code, text = said(capsys, "--into", comfyui)
        assert code == 0 and "of ComfyUI 0.3.64" in text and str(comfyui / "models" / "taylorseer") in text
    place = comfyui / "custom_nodes" / "taylorseer-export"
    assert place.is_symlink() and (place / "__init__.py").samefile(
        install.__file__.replace("install.py", "__init__.py")
    )
    assert (comfyui / "models" / "taylorseer").is_dir()


def test_it_copies_them_where_asked(comfyui, capsys):
    assert said(capsys, "--into", comfyui, "--copy")[0] == 0
    place = comfyui / "custom_nodes" / "taylorseer-export"
    assert not place.is_symlink() and (place / "nodes.py").is_file() and not list(place.rglob("__pycache__"))
    assert (place / "example_workflows" / "flux.json").is_file()
    code, text = said(capsys, "--into", comfyui, "--copy")
    assert code == 2 and text.strip().endswith("is there, expected nothing of that name; remove it, and run this again")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "main.py").unlink(), "has no main.py, expected the folder of a ComfyUI"),
        (
            lambda folder: shutil.rmtree(folder / "custom_nodes"),
            "has no custom_nodes, expected the folder of a ComfyUI",
        ),
        (
            lambda folder: (folder / "comfyui_version.py").write_text("x = 1"),
            "says no version, expected one like 0.3.64",
        ),
        (
            lambda folder: (folder / "comfyui_version.py").write_text('__version__ = "0.3.9"'),
            "is 0.3.9, expected 0.3.64 or newer; update it",
        ),
    ],
)
def test_what_is_no_comfyui_is_refused(comfyui, capsys, change, told):
    change(comfyui)
    code, text = said(capsys, "--into", comfyui)
    assert code == 2 and told in text and not (comfyui / "models" / "taylorseer").exists()


def test_the_example_workflows_are_those_of_the_tool():
    """One for each family that declares ComfyUI's model; the canvas links just what the prompt names."""
    written = {path.stem: path.read_text() for path in comfy_workflows.FOLDER.glob("*.json")}
    made = comfy_workflows.workflows()
    assert written == {family: comfy_workflows.text_of(prompt) for family, prompt in made.items()}
    for family, prompt in made.items():
        canvas = json.loads(written[family])
        types = {node["id"]: node["type"] for node in canvas["nodes"]}
        linked = {(types[a], types[b], kind) for _, a, _, b, _, kind in canvas["links"]}
        assert ("TaylorSeerLoadBundle", "TaylorSeerPlan", "MODEL") in linked
        assert len(canvas["links"]) == sum(isinstance(v, list) for e in prompt.values() for v in e["inputs"].values())
        for node in canvas["nodes"]:
            connections, widgets, outputs = comfy_workflows.NODES[node["type"]]
            counts = len(node["inputs"]), len(node["widgets_values"]), len(node["outputs"])
            assert counts == (len(connections), len(widgets), len(outputs))
