"""Where results go, and the values that requests are made of: what cannot work is one sentence, before any work."""

import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import tqdm
from safetensors.numpy import save_file
from safetensors.torch import save_file as torch_file

import taylorseer_export as tse
from taylorseer_export import cli
from taylorseer_export.bundle import store
from taylorseer_export.commands.terminal import check_out, progress, read_tensors
from taylorseer_export.compile import export
from taylorseer_export.embedded.picture import grid, write_picture
from taylorseer_export.errors import ConfigError, ServeError, TaylorSeerError
from taylorseer_export.serve import probe


def refusal(capsys, *arguments):
    """The sentence of a refused command."""
    assert cli.main([str(a) for a in arguments]) == 2
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1 and "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("noextension", "expected a picture whose format can be written"),
        ("x.webp.gz", "expected a picture whose format can be written"),
        ("x.psd", "expected a picture whose format can be written"),  # read by Pillow, never written
        ("", "is a folder, expected a file to write; name a file in it"),
        ("no/such/x.png", "is missing, expected it for x.png; create it"),
        ("/dev/full", "is no regular file"),
        ("/dev/null", "is no regular file"),
    ],
)
@pytest.mark.parametrize("command", ["run", "client"])
def test_a_picture_that_could_not_be_written_is_refused_before_anything_is_opened(
    command, name, expected, tmp_path, capsys
):
    """The bundle and the server do not exist: had they been asked first, the sentence would be about them."""
    out = tmp_path / name
    said = refusal(capsys, command, tmp_path / "no-bundle", "--out", out)
    assert expected in said


def test_the_other_commands_check_their_files_first(tmp_path, capsys):
    said = refusal(capsys, "replay", tmp_path / "none", "--inputs", tmp_path / "in.safetensors", "--outputs", tmp_path)
    assert "--outputs" in said and "is a folder" in said


PLACES = {
    "a file": "is a file, expected a folder; choose another --out",
    "under a file": "is no folder, expected one for dit-tiny",
    "a device": "/dev/null is no folder, expected one for dit-tiny",
    "another folder": "is a folder without manifest.json, expected a bundle or an empty folder",
    "a name too long": "is no place for a bundle",
    "a closed folder": "is not writable, expected it for dit-tiny; choose another --out",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_bundle_that_could_not_be_written_is_refused_before_anything_is_traced(tmp_path, capsys, monkeypatch, place):
    """On the command line and from Python."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "dit-tiny").mkdir()
    (tmp_path / "dit-tiny" / "photo.png").write_text("x")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "dit-tiny").write_text("x")
    outs = {"a file": tmp_path / "one", "under a file": tmp_path / "file" / "x", "another folder": tmp_path}
    outs |= {
        "a device": "/dev/null",
        "a name too long": tmp_path / ("x" * 300),
        "a closed folder": tmp_path / "new" / "x",
    }
    monkeypatch.setattr(export, "trace_model", lambda *_: pytest.fail("it was traced"))
    if place == "a closed folder":  # whoever runs as root may write anywhere
        monkeypatch.setattr(store.os, "access", lambda path, mode: path != tmp_path)
    assert PLACES[place] in refusal(capsys, "dit", "--out", outs[place])
    with pytest.raises(ConfigError, match=PLACES[place]):
        tse.export(family="dit", out=outs[place])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dit-tiny", "file", "one"]


def test_a_folder_that_is_closed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"is not writable, expected it for x\.png; choose another one"):
        check_out(tmp_path / "x.png")


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    made = grid([[np.zeros((4, 4, 3), np.uint8)]])
    (tmp_path / "x.png").write_bytes(b"before")
    made.save = lambda path, format: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        write_picture(tmp_path / "x.png", made)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x.png", b"before")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--seed", 2**64], f"expected a whole number, 0 to {2**63 - 1}"),
        (["--seed", 2**63], f"expected a whole number, 0 to {2**63 - 1}"),
        (["--seed", -1], f"expected a whole number, 0 to {2**63 - 1}"),
        (["--threads", 10**10], "expected a whole number, 0 to 1024"),
        (["--size", f"{10**12}x4"], "expected HxW, like 1024x1024, or FxHxW for a video, sides below 1000000"),
        (["--size", "²x4"], "expected HxW"),  # a digit to str.isdigit and none to int
        (["--size", "0x4"], "expected HxW"),
        (["--label", 10**30], "expected a whole number, 0 to 2147483647"),
        (["--label", "9" * 5000], "expected a whole number, at least 0"),
        (["--cap", 2**40], "expected a whole number;"),
        (["--guidance-scale", "nan"], "expected a finite number"),
        (["--guidance-scale", "1e999"], "expected a finite number"),
    ],
)
def test_numbers_that_nothing_can_hold_are_refused(arguments, expected, tmp_path, capsys):
    assert expected in refusal(capsys, "run", tmp_path / "none", *arguments)


def test_what_does_not_fit_into_memory_is_one_sentence(tmp_path, capsys, monkeypatch):
    def starve(*_):
        raise MemoryError("Unable to allocate 1.00 TiB")

    monkeypatch.setattr("taylorseer_export.commands.inspect.run", starve)
    assert "memory is not enough for what was asked (Unable to allocate 1.00 TiB)" in refusal(
        capsys, "inspect", tmp_path
    )


def test_a_bar_tells_what_was_written_beside_it(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(tqdm, "tqdm", lambda delay, **how: tqdm.std.tqdm(mininterval=0, **how))  # shown at once
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("sampling", 4) as advance:
        advance(2, 4, "1 of 2 previews")
    lines = sys.stderr.getvalue().split("\r")
    assert any("sampling:  50%" in line and "1 of 2 previews" in line for line in lines)


@pytest.mark.parametrize("kind", [ConfigError, lambda text: ServeError(text, "INTERNAL")])
def test_an_error_is_one_printable_line_whatever_it_quotes(kind):
    """A name can neither forge a second line nor send escape codes to the terminal."""
    hostile = "bundle a\nb\r\x1b[31m\u202ec\x00 is missing"
    shown = str(kind(hostile))
    assert shown.isprintable() and "a b" in shown and "\\x1b[31m" in shown and "\\u202e" in shown
    assert str(kind("plain – sentence `x`; fix")) == "plain – sentence `x`; fix"


def test_an_error_survives_a_pickle():
    error = pickle.loads(pickle.dumps(ConfigError("a is b; c")))
    assert type(error) is ConfigError and str(error) == "a is b; c"


def test_a_hostile_file_name_is_shown_escaped(tmp_path, capsys):
    assert "\\x1b[31m" in refusal(capsys, "inspect", tmp_path / "\x1b[31mred\nline")


@pytest.mark.parametrize(
    "call",
    [
        lambda: tse.forecast_weights((0, 1), 2, order=1.5),
        lambda: tse.Plan.regular(10, 1.5, 1),
        lambda: tse.Plan.regular(10, 2, "3"),
        lambda: tse.Guard("cg", 0.1, order=1.5),
        lambda: tse.Guard("cg", 0.1, cap=1.5),
        lambda: tse.Guard("cg", "0.1"),
        lambda: tse.Plan(5),
    ],
)
def test_numbers_of_another_kind_are_refused_in_python_too(call):
    with pytest.raises(ConfigError, match="expected"):
        call()


def test_numpy_numbers_are_numbers():
    assert tse.forecast_weights((0, 1), 2, order=np.int64(1)) == (-1.0, 2.0)
    assert str(tse.Plan.regular(np.int64(3), np.int32(2), np.int64(1))) == "F.F"


# The package from Python


def test_the_public_names_can_be_seen_and_are_there():
    assert {*tse.__all__, "__version__"} <= set(dir(tse))
    assert all(getattr(tse, name) is not None for name in tse.__all__)
    assert tse.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="has no attribute `nothing`"):
        tse.nothing  # noqa: B018


@pytest.mark.slow
def test_an_editor_and_mypy_see_the_types(tmp_path):
    (tmp_path / "user.py").write_text(
        "import taylorseer_export as tse\nreveal_type(tse.load)\nreveal_type(tse.Plan.regular(4, 2, 1))\n"
        "reveal_type(tse.export)\nreveal_type(tse.__version__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", str(tmp_path / "user.py")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert "Denoiser" in done.stdout and "plan.Plan" in done.stdout and "Path" in done.stdout, done.stdout
    assert "Any" not in done.stdout.replace("**options: Any", "") and "str" in done.stdout.splitlines()[3]


def test_the_module_is_the_command_line():
    done = subprocess.run([sys.executable, "-m", "taylorseer_export", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, tse.__version__)


@pytest.mark.slow
def test_export_from_python_is_the_export_of_the_command_line(embedded, tmp_path):
    """It differs in no byte from the bundle that `test_cli` compares with the command line's."""
    folder, other = tse.export(family="dit", order=2, out=tmp_path / "python"), embedded("digits")
    assert {p.name for p in folder.iterdir()} == {p.name for p in other.iterdir()}
    for path in folder.glob("*"):
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    with tse.load(folder, check=False) as denoiser:
        assert denoiser.manifest.state.order == 2


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: tse.export(), "neither model nor family is given"),
        (lambda: tse.export(family="dit", ordr=1), "option is `ordr`, expected one of order"),
        (lambda: tse.export("/no/such/folder"), "has no config that names a model class"),
        (lambda: tse.export(family="ditt"), "did you mean `dit`"),
    ],
)
def test_export_from_python_refuses_in_one_sentence(call, expected):
    with pytest.raises(TaylorSeerError, match=expected):
        call()


# Files that requests come from


WIDE = {"float16": np.float16, "float32": np.float32, "float64": np.float64, "bool": np.bool_}
WIDE |= {f"{kind}{bits}": np.dtype(f"{kind}{bits}").type for kind in ("int", "uint") for bits in (8, 16, 32, 64)}


@pytest.mark.parametrize("kind", WIDE)
def test_tensors_are_read_as_they_are(tmp_path, kind):
    made = {
        "a": np.arange(6).reshape(2, 3).astype(WIDE[kind]),
        "b": np.ones((), WIDE[kind]),
        "c": np.ones((0, 2), WIDE[kind]),
    }
    save_file(made, tmp_path / "in.safetensors")
    read = read_tensors(tmp_path / "in.safetensors")
    assert read.keys() == made.keys()
    for name, value in made.items():
        assert read[name].dtype == value.dtype and read[name].flags.writeable
        np.testing.assert_array_equal(read[name], value)


def test_bfloat16_is_read_without_loss(tmp_path):
    value = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    torch_file({"a": value, "b": torch.tensor(float("inf"), dtype=torch.bfloat16)}, tmp_path / "in.safetensors")
    read = read_tensors(tmp_path / "in.safetensors")
    np.testing.assert_array_equal(read["a"], value.float().numpy())
    assert read["a"].dtype == np.float32 and read["b"].shape == () and np.isinf(read["b"])


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (
            lambda path: torch_file({"x": torch.ones(4).to(torch.float8_e4m3fn)}, path),
            r"tensor `x` of .* is F8_E4M3, expec",
        ),
        (
            lambda path: torch_file({"x": torch.ones(4).to(torch.complex64)}, path),
            r"tensor `x` of .* is C64, expected flo",
        ),
        (lambda path: path.write_bytes(b"GGUF"), "is not readable"),
        (lambda path: path.write_bytes((9).to_bytes(8, "little") + b"[" * 9), "is not readable"),
        (lambda path: path.mkdir(), "is no file, expected a safetensors file; check --inputs"),
        (os.mkfifo, "is no file, expected a safetensors file"),
        (lambda path: path.symlink_to("/dev/zero"), "is no file, expected a safetensors file"),
        (lambda path: path.symlink_to(path), "is missing, expected a safetensors file"),
        (lambda path: None, "is missing, expected a safetensors file; check --inputs"),
    ],
)
def test_what_holds_no_tensors_is_refused(tmp_path, write, expected):
    """Also what would never end."""
    write(tmp_path / "in.safetensors")
    with pytest.raises(ConfigError, match=expected):
        read_tensors(tmp_path / "in.safetensors")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000", "", "localhost", "127.0.0.1:99999", "a b:80", "\x1b[31m:1", "h:1/x"]
)
@pytest.mark.parametrize("protocol", ["grpc", "http", "stream"])
def test_an_address_that_is_none_is_refused(tmp_path, capsys, url, protocol):
    """A port that is none would be another one: 99999 is 34463."""
    pytest.importorskip("tritonclient")
    said = refusal(capsys, "client", "m", "--url", url, "--protocol", protocol, "--out", tmp_path / "a.safetensors")
    assert "expected host:port without a scheme, like 127.0.0.1:8001; correct it" in said


@pytest.mark.parametrize("url", ["8002", ":8002", "http://x", "127.0.0.1:99999", "h:x"])
def test_a_probe_of_no_address_is_one_sentence(capsys, url):
    assert probe.main(["--url", url]) == 1
    assert "expected host:port, like 127.0.0.1:8002" in capsys.readouterr().err
