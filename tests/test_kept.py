"""What is kept from run to run is never stale: its key follows every byte, damage is mended, old entries go."""

import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import too_old_for
from kept import MAKERS, ROOT, RUN_SIDE, Kept, key_of, sources, surroundings, sweep
from sources import imports

from taylorseer_export.families import FAMILIES


@pytest.fixture
def copy(tmp_path):
    """A copy of the sources, and the key of it as it stands."""
    for path in sources():
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return tmp_path


def key(root, facts=("torch==1",)):
    return key_of(root, sources(root), facts)


@pytest.mark.parametrize(
    "name", ["method/weights.py", "families/dit.py", "compile/onnx.py", "assets/dit/card.json", "errors.py"]
)
def test_a_changed_byte_gives_another_key(copy, name):
    before, path = key(copy), copy / "taylorseer_export" / name
    assert key(copy) == before
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert key(copy) != before
    path.write_bytes(data)
    assert key(copy) == before


@pytest.mark.parametrize("name", MAKERS)
def test_a_changed_model_or_option_of_the_tests_gives_another_key(copy, name):
    before = key(copy)
    (copy / name).write_bytes((copy / name).read_bytes() + b"\n")
    assert key(copy) != before


def test_a_new_a_lost_and_a_renamed_file_give_other_keys(copy):
    folder, keys = copy / "taylorseer_export/graph", [key(copy)]
    (folder / "new.py").touch()
    keys.append(key(copy))
    (folder / "new.py").rename(folder / "renamed.py")
    keys.append(key(copy))
    (folder / "renamed.py").unlink()
    assert key(copy) == keys[0]
    (folder / "trace.py").unlink()
    keys.append(key(copy))
    assert len(set(keys)) == 4


def test_another_version_and_another_place_give_other_keys(copy, tmp_path_factory):
    moved = shutil.copytree(copy, tmp_path_factory.mktemp("moved") / "clone")
    assert len({key(copy), key(copy, ("torch==2",)), key(moved)}) == 3


def test_the_run_side_has_no_part_in_the_key(copy):
    before = key(copy)
    (copy / "taylorseer_export/runtime").mkdir()
    (copy / "taylorseer_export/runtime/slot.py").write_text("changed")
    assert key(copy) == before


def test_what_is_installed_is_in_the_key():
    said = surroundings()
    assert any(line.startswith("torch==") for line in said) and any(line.startswith("onnx==") for line in said)


def test_every_file_that_an_export_imports_is_in_the_key():
    """Our own files alone; imports inside functions count."""
    known, seen = set(sources()), set()
    todo = [path for path in known if path.suffix == ".py"]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        if path == ROOT / "taylorseer_export/__init__.py":
            continue  # names for editors: it imports nothing when it is imported
        for name, _, _ in imports(path.read_text("utf-8")):
            parts = name.split(".")
            for top in (ROOT, ROOT / "tests", ROOT / "tools"):
                for end in range(1, len(parts) + 1):
                    base = top.joinpath(*parts[:end])
                    todo += [p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()]
    assert {path for path in seen - known if path != ROOT / "taylorseer_export/__init__.py"} == set()
    assert len(seen) > 30 and ROOT / "taylorseer_export/compile/export.py" in seen


def test_every_part_of_the_run_side_is_there():
    package = ROOT / "taylorseer_export"
    assert {name for name in RUN_SIDE if not (package / name).exists()} <= {"__main__.py"}


# Entries


def written(text, log):
    """A `write` that leaves one file in a folder `made`, and a line in the log."""

    def write(folder):
        log.append(text)
        (folder / "made").mkdir()
        (folder / "made/file").write_text(text)
        return folder / "made"

    return write


def test_an_entry_is_written_once_and_found_by_the_next_run(tmp_path):
    log = []
    for _ in range(2):
        store = Kept(tmp_path, "key")
        assert store("entry", written("a", log)) == tmp_path / "key/entry/made"
        store.close()
    other = Kept(tmp_path, "other key")
    assert (other("entry", written("b", log)) / "file").read_text() == "b"
    assert log == ["a", "b"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "entry/made/file").write_text("b"),
        lambda folder: (folder / "entry/made/file").unlink(),
        lambda folder: (folder / "entry/made/more").touch(),
        lambda folder: os.link(folder / "entry/made/file", folder / "link"),  # through which it could be written to
        lambda folder: (folder / "entry.json").unlink(),
        lambda folder: (folder / "entry.json").write_text("{"),
        lambda folder: shutil.rmtree(folder / "entry"),
    ],
)
def test_a_damaged_entry_is_written_again(tmp_path, damage):
    log, store = [], Kept(tmp_path, "key")
    store("entry", written("a", log))
    assert store.changed() == []
    damage(tmp_path / "key")
    assert store.changed() == ["entry"]
    made = Kept(tmp_path, "key")("entry", written("a", log))
    assert (made / "file").read_text() == "a" and len(log) == 2
    assert [path.name for path in made.iterdir()] == ["file"]


def test_an_entry_whose_writing_stopped_is_written_again(tmp_path):
    def stop(folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    store = Kept(tmp_path, "key")
    with pytest.raises(KeyboardInterrupt):
        store("entry", stop)
    assert (store("entry", written("a", [])) / "file").read_text() == "a"
    assert not (tmp_path / "key/entry/half").exists()


def test_old_keys_are_swept_and_none_that_is_in_use(tmp_path):
    stores = {}
    for age, name in enumerate(("newest", "newer", "old and in use", "old")):
        stores[name] = Kept(tmp_path, name)
        stores[name]("entry", written(name, []))
        os.utime(tmp_path / name / "in use", (1000 - age, 1000 - age))
    for name in ("newest", "newer", "old"):
        stores[name].close()
    sweep(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["newer", "newest", "old and in use"]
    stores["old and in use"].close()
    sweep(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["newer", "newest"]


def test_a_case_of_a_model_that_libraries_are_too_old_for_is_found(monkeypatch):
    case = SimpleNamespace(callspec=SimpleNamespace(params={"name": "flux onnxruntime", "batch": 2}))
    assert too_old_for(case) == too_old_for(SimpleNamespace()) == ""
    monkeypatch.setitem(FAMILIES, "flux", replace(FAMILIES["flux"], model_class="Flux9Transformer2DModel"))
    assert too_old_for(case).endswith(" has no Flux9Transformer2DModel")
    case = SimpleNamespace(callspec=SimpleNamespace(params={"name": "cogvideox-image"}))
    assert too_old_for(case, "2.11.0+cu130") == "torch 2.11.0+cu130 does not trace this model"
    assert too_old_for(case, "2.13.0+cpu") == ""


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="only pytest-xdist has groups of tests")
def test_a_test_is_in_the_group_of_its_file(request):
    """Otherwise the tests of a file run on all workers, and each makes what one would make for all of them."""
    assert request.node.nodeid.endswith("@test_kept")
