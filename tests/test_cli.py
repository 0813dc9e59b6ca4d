"""The command line as a user meets it: exit codes, sentences, files, on the embedded models."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from taylorseer_export import cli
from taylorseer_export.bundle.manifest import MANIFEST, Manifest
from taylorseer_export.families import FAMILIES


@pytest.fixture(scope="module")
def digits(embedded):
    """The embedded DiT: the folder of its bundle."""
    return embedded("digits")


@pytest.fixture(scope="module")
def videos(embedded):
    """The embedded Wan: the folder of its bundle."""
    return embedded("videos")


@pytest.fixture
def copy(digits, tmp_path):
    """A copy of the bundle that a test may damage."""
    return shutil.copytree(digits, tmp_path / "dit-tiny")


def said(capsys, *arguments):
    """(exit code, standard error) of one command."""
    code = cli.main([str(a) for a in arguments])
    return code, capsys.readouterr().err


def test_help_groups_families_and_verbs(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    families, verbs = text.split("verbs:")
    assert "families:" in families and "  flux" in families and "  dit" in families
    assert all(f"  {verb} " in verbs for verb in ("run", "replay", "verify", "bench", "inspect"))


@pytest.mark.parametrize("command", ["flux", "dit", "run", "replay", "verify", "bench", "inspect"])
def test_every_command_explains_its_options(command, capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main([command, "--help"])
    assert leaving.value.code == 0
    assert "default" in capsys.readouterr().out or command == "inspect"


@pytest.mark.slow
def test_export_says_it_is_the_embedded_model_and_prints_the_card_first(tmp_path, capsys):
    assert cli.main(["flux", "--dry-run", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "embedded" in lines[0] and "--model black-forest-labs/FLUX.1-dev" in lines[0]
    text = "\n".join(lines)
    assert "FFF.....F.....F" in text and "50 steps, 10 full" in text and "5.00x" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_line_writes_what_the_tests_read(embedded, tmp_path):
    """The bundles of the other tests here are written without the command line; this one differs in nothing."""
    assert cli.main(["dit", "--order", "2", "--out", str(tmp_path)]) == 0
    (made,) = tmp_path.iterdir()
    assert made.name == embedded("digits").name
    again, kept = (json.loads((folder / MANIFEST).read_bytes()) for folder in (made, embedded("digits")))
    assert again == kept


@pytest.mark.slow
def test_aliases_that_users_know(tmp_path, capsys):
    arguments = ["--cache-interval", "4", "--max-order", "1", "--warmup-steps", "2", "--dry-run"]
    assert cli.main(["dit", *arguments, "--out", str(tmp_path)]) == 0
    assert "interval 4, warmup 2, order 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fluxx"], "did you mean `flux`"),
        (["wam"], "did you mean `wan`"),
        (["benhc", "x"], "did you mean `bench`"),
        (["flux", "--order", "9"], "expected a whole number, 0 to 4"),
        (["flux", "--order", "two"], "expected a whole number, 0 to 4"),
        (["flux", "--interval", "0"], "expected a whole number, at least 1"),
        (["flux", "--nope"], "unrecognized arguments"),
        (["flux", "--size", "big"], "expected HxW"),
        (["flux", "--size", "30x30", "--latent-size", "4x4"], "expected one of them"),
        (["flux", "--size", "5x32x32"], "--size is 5x32x32, expected HxW for family flux"),
        (["flux", "--size", "33x32"], "expected a multiple of 4 (pixels)"),
        (["flux", "--size", "36x32"], "expected a multiple of 2 (latent pixels)"),
        (["dit", "--size", "32x32"], "expected 16x16"),
        (["flux", "--batch", "99"], "expected 1 to 16"),
        (["flux", "--engine", "tensorflow"], "use --engine onnxruntime"),
        (["flux", "--precision", "bf16"], "expected fp32"),
        (["flux", "--model", "/no/such/folder"], "check the path"),
        (["wan", "--size", "480x832"], "--size is 480x832, expected FxHxW (frames first) for family wan"),
        (["wan", "--size", "80x480x832"], "expected a multiple of 4 and 1"),
        (["run", "/no/such/bundle"], "/no/such/bundle"),
        (["replay", "x", "--inputs", "y"], "required: --outputs"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_code_2(arguments, expected, tmp_path, capsys):
    out = ["--out", str(tmp_path)] if arguments[0] in ("flux", "dit") else []
    code, text = said(capsys, *arguments, *out)
    assert code == 2
    assert expected in text and "Traceback" not in text and len(text.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_fresh_process_prints_no_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "taylorseer_export.cli", "inspect", "/no/such/bundle"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_run_draws_a_picture_that_follows_seed_and_label(digits, tmp_path, capsys):
    from PIL import Image

    pictures = {}
    for name, label, seed in (("a", 7, 1), ("again", 7, 1), ("other", 3, 1)):
        out = tmp_path / f"{name}.png"
        arguments = ["run", digits, "--label", label, "--seed", seed, "--steps", 12, "--out", out]
        assert cli.main([str(a) for a in arguments]) == 0
        pictures[name] = np.asarray(Image.open(out))
    assert np.array_equal(pictures["a"], pictures["again"])
    assert not np.array_equal(pictures["a"], pictures["other"])
    assert "as planned" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--label", 10], "expected 0 to 9"),
        (["--label", 1, 2, "--seed", 1, 2, 3], "expected 1 or 3"),
        (["--plan", ".FF"], "F"),
        (["--plan", "FF.x"], "x"),
        (["--plan", "FF.", "--steps", 4], "4"),
        (["--order", 3], "export again with --order 3"),
        (["--device", "cuda"], "--device cpu"),
        (["--out", "no/such/folder/x.safetensors"], "create it"),
    ],
)
def test_bad_requests(digits, arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text = said(capsys, "run", digits, *arguments)
    assert code == 2
    assert expected in text and "Traceback" not in text


@pytest.mark.parametrize("family", ["hidream", "hunyuan-video"])
def test_an_embedded_model_says_that_it_is_random(family, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([family, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"exporting the tiny {family} embedded" in lines[0] and FAMILIES[family].reference in lines[0]
    assert lines[1].startswith("its weights are random") and lines[2] == f"{family}-tiny"
    assert not list(tmp_path.iterdir())


def test_a_family_without_pictures_is_sampled_verified_and_timed(videos, tmp_path, capsys):
    """Two branches of guidance: the embedded random Wan through every verb."""
    out = tmp_path / "latents.safetensors"
    run = ["run", str(videos), "--steps", "6", "--seed", "1", "2", "--size", "5x32x48", "--out", str(out)]
    assert cli.main(run) == 0
    assert "no --inputs: the conditioning is random" in capsys.readouterr().out
    first = load_file(out)["latents"]
    assert first.shape == (2, 16, 2, 4, 6) and np.isfinite(first).all()
    assert cli.main([*run[:-4], "--out", str(out), "--seed", "1", "--size", "5x32x48"]) == 0
    text = np.random.default_rng(0).standard_normal((1, 5, 32)).astype(np.float32)
    given = tmp_path / "in.safetensors"
    save_file({"encoder_hidden_states": text, "negative_encoder_hidden_states": -text}, given)
    made = {}
    for scale in ("5", "1", "1"):
        arguments = ["run", str(videos), "--steps", "4", "--inputs", str(given), "--guidance-scale", scale]
        assert cli.main([*arguments, "--size", "5x32x48", "--out", str(out)]) == 0
        made.setdefault(scale, []).append(load_file(out)["latents"])
    assert np.array_equal(*made["1"]) and not np.array_equal(made["5"][0], made["1"][0])
    assert cli.main(["verify", str(videos), "--steps", "6"]) == 0
    assert cli.main(["bench", str(videos), "--steps", "4", "--repeats", "1", "--json"]) == 0
    assert cli.main(["inspect", str(videos)]) == 0
    assert cli.main(["triton", str(videos), "--out", str(tmp_path / "models")]) == 0


@pytest.mark.parametrize(
    ("arguments", "tensors", "expected"),
    [
        (
            ["--prompt", "x"],
            {},
            "--prompt is given for family wan, expected --inputs, since this bundle draws from tensors",
        ),
        (["--label", 1], {}, "--label is given for family wan, expected --inputs"),
        (["--out", "x.png"], {}, "expected NAME.safetensors"),
        (["--size", "32x48"], {}, "expected FxHxW (frames first)"),
        (["--size", "5x40x48"], {}, "--size is 5x40x48, a latent of 2x5x6, expected [frames, 2*rows, 2*columns]"),
        (["--size", "5x32x8192"], {}, "--size is 5x32x8192, of `columns` 512, expected 2 to "),
        ([], {"other": (1,)}, "input `other` is not known, expected encoder_hidden_states"),
        ([], {"negative_encoder_hidden_states": (1, 5, 32)}, "input `encoder_hidden_states` is missing"),
        ([], {"encoder_hidden_states": (3, 5, 32)}, "has 3 rows, expected 1 or 2"),
        ([], {"encoder_hidden_states": (1, 5, 31)}, "dimension 2 (`32`) is 31 elements, expected 32"),
        ([], {"encoder_hidden_states": (1, 5, 32), "condition": (1, 4)}, "expected none for a model from text alone"),
    ],
)
def test_bad_requests_of_a_family_without_pictures(videos, tmp_path, capsys, arguments, tensors, expected):
    given = []
    if tensors:
        save_file({n: np.zeros(shape, np.float32) for n, shape in tensors.items()}, tmp_path / "in.safetensors")
        given = ["--inputs", tmp_path / "in.safetensors"]
    code, text = said(capsys, "run", videos, "--seed", 1, 2, *given, *arguments)
    assert code == 2 and expected in text and "Traceback" not in text and len(text.strip().splitlines()) == 1


def inputs_of_replay(steps=6, **changes):
    generator = np.random.default_rng(0)
    tensors = {
        "latents": generator.standard_normal((steps, 2, 1, 16, 16)).astype(np.float32),
        "timestep": np.linspace(980, 0, steps).astype(np.float32),
        "class_labels": np.array([3, 10], np.int64),
    } | changes
    return {name: value for name, value in tensors.items() if value is not None}


def test_replay_writes_predictions_and_the_plan(digits, tmp_path, capsys):
    from safetensors import safe_open

    save_file(inputs_of_replay(), tmp_path / "in.safetensors")
    arguments = ["--inputs", tmp_path / "in.safetensors", "--outputs", tmp_path / "out.safetensors"]
    code, _ = said(capsys, "replay", digits, *arguments, "--plan", "FF.F..", "--order", 1)
    assert code == 0
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        assert file.metadata() == {"plan": "FF.F.."}
        assert file.get_tensor("noise_pred").shape == (6, 2, 1, 16, 16)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"latents": None}, "tensor `latents` is missing"),
        ({"timestep": np.zeros(5, np.float32)}, "expected [6]"),
        ({"class_labels": None}, "input `class_labels` is missing"),
        ({"class_labels": np.zeros(2, np.float32)}, "expected int64"),
        ({"class_labels": np.zeros(3, np.int64)}, "class_labels"),
        ({"class_labels": np.array([3, 11])}, "expected 0 to 10 (table index)"),
        ({"class_labels": np.array([-1, 3])}, "expected 0 to 10 (table index)"),
        ({"extra": np.zeros(2, np.float32)}, "input `extra` is not known"),
        ({"latents": np.full((6, 2, 1, 16, 16), np.nan, np.float32)}, "NaN"),
        ({"latents": np.zeros((6, 2, 1, 16, 15), np.float32)}, "latents"),
    ],
)
def test_bad_replay_inputs(digits, tmp_path, capsys, changes, expected):
    save_file(inputs_of_replay(**changes), tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    code, text = said(capsys, "replay", digits, "--inputs", tmp_path / "in.safetensors", "--outputs", out)
    assert code == 2
    assert (expected in text or "hidden_states" in text) and "Traceback" not in text
    assert not out.exists()


def test_replay_refuses_what_is_not_safetensors(digits, tmp_path, capsys):
    (tmp_path / "in.safetensors").write_bytes(b"not a tensor")
    arguments = ["--inputs", tmp_path / "in.safetensors", "--outputs", tmp_path / "out.safetensors"]
    code, text = said(capsys, "replay", digits, *arguments)
    assert code == 2 and "write it again" in text


def test_verify_passes_on_the_bundle(digits, capsys):
    assert cli.main(["verify", str(digits), "--steps", "8"]) == 0
    text = capsys.readouterr().out
    assert "FFFFFFFF  order 2" in text and "equals the eager model" in text


def test_verify_fails_with_exit_code_1_when_the_weights_differ(copy, capsys):
    """One weight changed and the bundle sealed again: only a comparison of numbers can notice."""
    from taylorseer_export.bundle.store import hash_files

    path = copy / "weights.safetensors"
    tensors = load_file(path)
    data = bytearray(path.read_bytes())
    name = "proj_out_2.weight"
    header = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + header])[name]["data_offsets"]
    changed = (tensors[name] * np.float32(1.01)).tobytes()
    data[8 + header + begin : 8 + header + end] = changed
    path.write_bytes(data)
    manifest = Manifest.from_bytes((copy / MANIFEST).read_bytes(), copy)
    (copy / MANIFEST).unlink()
    sealed = manifest.model_copy(update={"files": hash_files(copy)})
    (copy / MANIFEST).write_bytes(sealed.to_json())
    code, text = said(capsys, "verify", copy, "--steps", 4)
    assert code == 1
    assert "noise_pred differs by" in text and "expected at most" in text


def test_verify_refuses_another_checkpoint(digits, tmp_path, capsys):
    from tiny_models import tiny_dit

    tiny_dit().save_pretrained(tmp_path / "other")
    code, text = said(capsys, "verify", digits, "--model", tmp_path / "other")
    assert code == 2 and "pass the right --model" in text


def test_bench_json_is_the_last_line_and_complete(digits, capsys):
    assert cli.main(["bench", str(digits), "--steps", "8", "--repeats", "1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    names = "plan steps full_steps prepare_ms full_ms forecast_ms loop_ms all_full_loop_ms speedup ideal_speedup"
    names += " efficiency state_bytes weights_bytes engine precision device"
    assert set(names.split()) <= record.keys()
    assert record["plan"] == record["executed"] and record["full_steps"] == record["plan"].count("F")
    assert set(record["full_ms"]) == set(record["forecast_ms"]) == {"p50", "p90"}
    assert record["efficiency"] == pytest.approx(record["speedup"] / record["ideal_speedup"])


def test_inspect_prints_card_and_hashes(digits, capsys):
    assert cli.main(["inspect", str(digits)]) == 0
    text = capsys.readouterr().out
    assert "full.onnx" in text and "digest" in text and "12 x 3 snapshots" in text


def test_any_changed_byte_is_refused(copy, capsys):
    path = copy / "full.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    code, text = said(capsys, "run", copy)
    assert code == 2 and "full.onnx" in text


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        ({"versions": {"onnxruntime": "0.1.2"}}, "pip install 'onnxruntime==0.1.2'"),
        ({"device": {"devices": "npu"}}, "built for (npu)"),
        ({"kind": "tensorrt"}, "pip install 'taylorseer-export[tensorrt]'"),
    ],
)
def test_another_version_device_or_engine_is_refused(copy, capsys, update, expected):
    manifest = Manifest.from_bytes((copy / MANIFEST).read_bytes(), copy)
    changed = manifest.model_copy(update={"engine": manifest.engine.model_copy(update=update)})
    (copy / MANIFEST).write_bytes(changed.to_json())
    code, text = said(capsys, "bench", copy)
    assert code == 2 and expected in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "expected"), [(KeyboardInterrupt(), "interrupted"), (OSError(28, "No space left on device"), "full")]
)
def test_an_export_that_stops_leaves_nothing(tmp_path, monkeypatch, capsys, error, expected):
    from taylorseer_export.compile import onnx

    def stop(*arguments):
        raise error

    monkeypatch.setattr(onnx, "write_onnx", stop)
    code, text = said(capsys, "dit", "--out", tmp_path)
    assert code == 2 and expected in text
    assert os.listdir(tmp_path) == []
