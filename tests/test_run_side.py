"""The run side: what serves needs no make side, draws the same bits, and is measured as the tool says."""

import json
import sys

import numpy as np
import pytest
import run_side


@pytest.fixture
def environment(tmp_path):
    """A folder as an environment's, with one package of a thousand bytes and one that is a link to two thousand."""
    site = tmp_path / "environment/lib/python3.11/site-packages"
    site.mkdir(parents=True)
    (site / "one").mkdir()
    (site / "one/a.py").write_bytes(b"#" * 1000)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.py").write_bytes(b"#" * 2000)
    (site / "two").symlink_to(tmp_path / "elsewhere")
    (site / "three.py").write_bytes(b"#" * 500)
    return tmp_path / "environment"


def test_sizes_are_those_of_the_files_the_largest_first(environment):
    assert list(run_side.sizes_of(environment).items()) == [("two", 0.002), ("one", 0.001), ("three.py", 0.0005)]


def test_the_make_side_is_no_part_of_what_serving_asks_for(tmp_path):
    names = run_side.closure(run_side.copied_sources(tmp_path))
    assert {"numpy", "onnxruntime", "starlette", "tokenizers", "uvicorn"} <= names
    assert not names & set(run_side.ABSENT)


def test_an_environment_with_the_make_side_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(run_side, "_output", lambda *_: "torch onnx")
    with pytest.raises(SystemExit, match="the run side has torch onnx, expected none of torch, diffusers"):
        run_side.check_absent(tmp_path)


def test_another_picture_is_refused():
    from base64 import b64encode

    from taylorseer_export.embedded.picture import png

    picture = np.zeros((4, 4, 3), np.uint8)
    file = b64encode(png(picture)).decode()
    run_side.check_same([file, file], picture)
    picture[0, 0, 0] = 1
    with pytest.raises(SystemExit, match="draws another picture, expected the full environment's"):
        run_side.check_same([file], picture)


def test_what_is_linked_is_not_filed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_side.py", "--linked", "--file"])
    with pytest.raises(SystemExit):
        run_side.main()
    assert "what is filed is what pip installs" in capsys.readouterr().err


@pytest.mark.slow
def test_the_run_side_alone_draws_the_same_bits(embedded, tmp_path, monkeypatch):
    """The tool whole, but for pip: an environment of links, which needs no network."""
    monkeypatch.delenv("TAYLORSEER_API_KEYS", raising=False)
    record = run_side.measured(tmp_path, embedded("shapes"), 1, links=True)
    assert record["equal_bits"] and record["pictures"] == 4 and record["linked"]
    assert not set(record["packages"]) & set(run_side.ABSENT) and record["packages"]["numpy"] == np.__version__
    assert record["size_mb"] == pytest.approx(sum(record["sizes_mb"].values()))
    assert record["sizes_mb"]["onnxruntime"] > 1 and record["bundle_mb"] > 1
    for name in ("cold_start_s", "first_answer_s", "later_answer_s"):
        assert record["first"][name] > 0 and record["summary"][name]["p50"] == record["again"][0][name] > 0
    json.dumps(record)


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why(tmp_path):
    environment = tmp_path / "environment"
    run_side.linked(environment, run_side.copied_sources(tmp_path))
    with pytest.raises(SystemExit, match="the server does not start: taylorseer-export: "):
        run_side.served(environment, tmp_path / "no-bundle")
