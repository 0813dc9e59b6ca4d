"""`auto` exports a model that no family declares if what is proposed for it equals the model; graphs/coverage.md."""

import re

import coverage
import diffusers
import pytest
from randomised import randomised
from tiny_configs import tiny_config

from taylorseer_export import cli
from taylorseer_export.families import FAMILIES
from taylorseer_export.report import proposal

pytestmark = pytest.mark.slow

README = coverage.PAGE.parents[1] / "README.md"
STRANGER = "PixArtTransformer2DModel"


def saved(name, folder, **changes):
    """A folder with a tiny random model of a class."""
    model_class = getattr(diffusers, name)
    randomised(lambda: model_class(**tiny_config(model_class) | changes), seed=0).save_pretrained(folder)
    return folder


def auto(capsys, *options):
    code = cli.main(["auto", *map(str, options)])
    return code, capsys.readouterr()


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return saved(STRANGER, tmp_path_factory.mktemp("stranger"), num_layers=1)


@pytest.fixture
def undeclared(monkeypatch):
    """The registry without a family of the stranger's class, should one come to declare it."""
    for name in [name for name, family in FAMILIES.items() if family.model_class == STRANGER]:
        monkeypatch.delitem(FAMILIES, name)


def test_a_stranger_is_exported_and_verified(stranger, tmp_path, capsys, undeclared):
    """The bundle opens, and equals the eager model: the command `verify` knows what it was exported with."""
    code, printed = auto(capsys, "--model", stranger, "--out", tmp_path, "--name", "it")
    assert code == 0, printed.err
    assert re.search(r"every step equals the model, 0\.\d+ of the bound, at --state module", printed.out)
    assert "no scheduler beside the model" in printed.out
    assert cli.main(["verify", str(tmp_path / "auto-it"), "--steps", "3"]) == 0
    assert "auto-it equals the eager model within its bounds" in capsys.readouterr().out


def test_samples_taken_one_by_one_are_one_batch(tmp_path, capsys):
    """Such a model is refused with the option that takes it, and verifies with that."""
    model = saved("LuminaNextDiT2DModel", tmp_path / "model", num_layers=1)
    code, printed = auto(capsys, "--model", model, "--out", tmp_path)
    assert code == 2
    assert "takes the samples of a batch one by one, expected a batch of one size; add --batch 1" in printed.err
    code, printed = auto(capsys, "--model", model, "--out", tmp_path, "--name", "it", "--batch", "1")
    assert code == 0, printed.err
    assert "one size alone of batch; every step equals the model" in printed.out
    assert cli.main(["verify", str(tmp_path / "auto-it"), "--steps", "3"]) == 0


def test_what_does_not_verify_is_refused(stranger, tmp_path, capsys, undeclared, monkeypatch):
    """Nothing is written, and the sentence says by how much it is off."""
    compare = proposal.compare
    off = lambda *given: proposal.replace(compare(*given), bound=(1e-12,) * 7)  # noqa: E731
    monkeypatch.setattr(proposal, "compare", off)
    code, printed = auto(capsys, "--model", stranger, "--out", tmp_path)
    assert code == 2
    assert re.search(
        r"step \d of plan FFFFFFF differs from the model by .*, expected at most 1e-12; declare", printed.err
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("FluxTransformer2DModel", {}, "which family flux declares, expected one that none does; export it with"),
        ("MiniMaxH3Transformer3DModel", {}, "does not take the inputs that could be told (it needs audio_"),
        (
            "LuminaNextDiT2DModel",
            {"layers_of_foam": 3},
            "has `layers_of_foam`, which LuminaNextDiT2DModel of",
        ),
        ("NoSuchModel", {}, "is of class NoSuchModel, expected a transformer of diffusers"),
    ],
)
def test_bad_input(name, changes, sentence, tmp_path, capsys):
    if name == "NoSuchModel":
        (tmp_path / "config.json").write_text('{"_class_name": "NoSuchModel"}')
    else:
        saved(name, tmp_path)
    if changes:
        path = tmp_path / "config.json"
        path.write_text(path.read_text().replace("{", '{"layers_of_foam": 3,', 1))
    code, printed = auto(capsys, "--model", tmp_path, "--out", tmp_path / "out")
    assert code == 2
    assert sentence in printed.err
    assert not (tmp_path / "out").exists()


def test_a_model_is_needed(capsys):
    code, printed = auto(capsys)
    assert code == 2
    assert "--model is left out, expected the diffusers folder" in printed.err


# The page ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    return coverage.read(coverage.PAGE.read_text(encoding="utf-8"))


def test_the_page_is_of_these_classes(rows):
    """Its classes are those of diffusers, its text follows from its rows, and the README tells its counts."""
    assert sorted(rows) == coverage.classes()
    assert coverage.page(rows) == coverage.PAGE.read_text(encoding="utf-8")
    assert set(coverage.EXCLUDED) <= set(coverage.transformers())
    auto, declared, refused = coverage.counts(rows)
    assert f"{auto + declared} of {auto + declared + refused}" in README.read_text(encoding="utf-8")
    assert f"{auto} of them without a declaration" in README.read_text(encoding="utf-8")


def test_no_declared_class_is_refused(rows):
    assert not [f.model_class for f in FAMILIES.values() if rows[f.model_class].how == coverage.REFUSED]


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "MiniMaxH3Transformer3DModel"])
def test_a_row_is_as_the_tool_finds_it(rows, name):
    assert coverage.cover(name) == rows[name]
