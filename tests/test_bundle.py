"""Bundles: what is written is what is read, and every attack on one is refused by name."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError

from taylorseer_export.bundle import manifest as manifest_module
from taylorseer_export.bundle.low_rank import Layer
from taylorseer_export.bundle.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    Comfy,
    Controlled,
    Dimension,
    Driven,
    Engine,
    File,
    Fitted,
    Graph,
    LowRank,
    Manifest,
    Model,
    Parallel,
    Patches,
    Pipeline,
    PipelinePart,
    PlanDefaults,
    Sampling,
    Sections,
    Shown,
    Site,
    State,
    Tensor,
    Tiles,
    Tokens,
    schema,
)
from taylorseer_export.bundle.profile import Profile
from taylorseer_export.bundle.quantised import Quantised
from taylorseer_export.bundle.store import hash_files, open_bundle, writing
from taylorseer_export.errors import BundleError, ConfigError
from taylorseer_export.method import Plan

CONTENT = {"full.onnx": b"full graph " * 999, "data/forecast.bin": b"\x00\x01", "empty.txt": b""}
ENGINE = "onnxruntime"
SEALED = "0" * 64
SITE = "transformer_blocks.0.attn"


def manifest_of(files: dict[str, File]) -> Manifest:
    def tensor(name, role, *shape):
        site = SITE if role.startswith("taylor") else None
        return Tensor(name=name, dtype="float32", shape=shape, role=role, site=site)

    latents = tensor("latents", "latent", "batch", "2*tokens", 64)
    noise = tensor("noise_pred", "noise_pred", "batch", "2*tokens", 64)
    clock, text = tensor("timestep", "step", "steps"), tensor("text", "constant", "batch", 8)
    table, row = tensor("step.shared", "step", "steps", "batch", 32), tensor("step.shared", "step", "batch", 32)
    site = ("batch", "tokens", 16)
    weights = tensor("weights", "weights", 3)
    kept, written = (
        tensor(f"taylor_in.{SITE}", "taylor_in", 3, *site),
        tensor(f"taylor_out.{SITE}", "taylor_out", *site),
    )
    return Manifest(
        tool_version="0.1.0",
        family="flux",
        name="tiny",
        precision="fp32",
        model=Model(
            reference="embedded",
            class_name="FluxTransformer2DModel",
            config={"axes_dims_rope": (4, 6, 6), "scale": 0.1, "note": "é"},
            weights_sha256="a" * 64,
            embedded=True,
        ),
        dimensions={
            "batch": Dimension(minimum=1, maximum=2, typical=1),
            "tokens": Dimension(minimum=1, maximum=4096, typical=1024),
            "steps": Dimension(minimum=1, maximum=1000, typical=50),
        },
        sites=(Site(name=SITE, shape=site),),
        state=State(granularity="module", layout="snapshots", order=2, dtype="float32"),
        graphs={
            "prepare": Graph(file="full.onnx", inputs=(text, clock), outputs=(table,), weights_bytes=8),
            "full": Graph(file="full.onnx", inputs=(latents, row), outputs=(noise, written), weights_bytes=8),
            "forecast": Graph(
                file="data/forecast.bin", inputs=(latents, row, weights, kept), outputs=(noise,), weights_bytes=8
            ),
        },
        plan=PlanDefaults(
            steps=10,
            interval=5,
            warmup=3,
            order=2,
            dialect="original",
            text=str(Plan.regular(10, 5, 3)),
        ),
        sampling=Sampling(
            scheduler="FlowMatchEulerDiscreteScheduler",
            config={"shift": 3.0},
            guidance="embedded",
            guidance_scale=3.5,
        ),
        engine=Engine(kind=ENGINE, versions={"onnxruntime": "1.31.0"}, device={"type": "cpu"}),
        files=files,
        cache_key="key",
    ).seal()


def write_bundle(folder: Path) -> Manifest:
    with writing(folder) as partial:
        for name, content in CONTENT.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)
        manifest = manifest_of(hash_files(partial))
        (partial / MANIFEST).write_bytes(manifest.to_json())
    return manifest


def resealed(manifest: Manifest, change) -> bytes:
    """What an attacker who knows the format writes: changed, with a digest that fits."""
    raw = json.loads(manifest.to_json())
    del raw["digest"]
    change(raw)
    raw["digest"] = hashlib.sha256(canonical(raw)).hexdigest()
    return canonical(raw)


def canonical(raw) -> bytes:
    return (json.dumps(raw, indent=2, sort_keys=True) + "\n").encode()


def snapshot(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "flux-tiny")
    return tmp_path / "flux-tiny"


# Round trip


def test_what_is_written_is_what_is_read(tmp_path):
    written = write_bundle(tmp_path / "engines" / "flux-tiny")
    bundle = open_bundle(tmp_path / "engines" / "flux-tiny")
    assert bundle.manifest == written
    assert bundle.manifest.model.config["axes_dims_rope"] == [4, 6, 6]
    assert bundle.path("full.onnx").read_bytes() == CONTENT["full.onnx"]
    assert os.listdir(tmp_path / "engines") == ["flux-tiny"]


def test_manifest_bytes_are_canonical():
    manifest = manifest_of({name: File(sha256=SEALED, size=1) for name in CONTENT})
    assert Manifest.from_bytes(manifest.to_json(), MANIFEST) == manifest
    assert manifest.to_json() == canonical(json.loads(manifest.to_json()))
    assert manifest.model_copy(update={"digest": ""}).to_json() == manifest.to_json()


def test_hashes_are_those_of_the_files(folder):
    read: list[int] = []
    files = hash_files(folder, read.append)
    assert sum(read) == sum(map(len, CONTENT.values()))
    assert list(files) == sorted(CONTENT)
    for name, content in CONTENT.items():
        assert files[name] == File(sha256=hashlib.sha256(content).hexdigest(), size=len(content))


def test_files_larger_than_one_read(tmp_path):
    content = os.urandom(3 << 20) + b"tail"
    (tmp_path / "weights.bin").write_bytes(content)
    assert hash_files(tmp_path)["weights.bin"].sha256 == hashlib.sha256(content).hexdigest()


def test_published_schema_is_up_to_date():
    published = Path(manifest_module.__file__).with_name("manifest.schema.json").read_text()
    fix = "write json.dumps(schema(), indent=2) and a newline to it"
    assert published == json.dumps(schema(), indent=2) + "\n", fix


def test_every_field_is_described():
    parts = (Comfy, Controlled, Dimension, Driven, Engine, File, Fitted, Graph, Layer, LowRank, Manifest, Model)
    parts += (
        Parallel,
        Patches,
        Pipeline,
        PipelinePart,
        PlanDefaults,
        Quantised,
        Sampling,
        Sections,
        Shown,
        Site,
        State,
        Tensor,
    )
    parts += (State, Tensor, Tiles, Tokens)
    assert {part.__name__ for part in parts} == {"Manifest", *schema()["$defs"]}
    fields = [(part.__name__, *item) for part in parts for item in part.model_fields.items()]
    assert [f"{part}.{name}" for part, name, field in fields if not field.description] == []


# Attacks on files


@pytest.mark.parametrize("name", ["full.onnx", "data/forecast.bin"])
@pytest.mark.parametrize("position", [0, -1])
def test_flipped_byte_in_a_file(folder, name, position):
    flip(folder / name, position)
    with pytest.raises(BundleError, match=rf"{name} has SHA-256 .* copy the bundle again"):
        open_bundle(folder)


def test_missing_file(folder):
    (folder / "full.onnx").unlink()
    fix = rf"full.onnx is missing.*`taylorseer-export flux ... --out {folder.parent}`"
    with pytest.raises(BundleError, match=fix):
        open_bundle(folder)


@pytest.mark.parametrize("size", [0, 5])
def test_truncated_file(folder, size):
    os.truncate(folder / "full.onnx", size)
    with pytest.raises(BundleError, match=f"is {size} bytes, expected 10989 bytes; copy"):
        open_bundle(folder)


def test_lengthened_file(folder):
    (folder / "empty.txt").write_bytes(b" ")
    with pytest.raises(BundleError, match=r"empty.txt is 1 bytes, expected 0 bytes"):
        open_bundle(folder)


def test_folder_in_place_of_a_file(folder):
    (folder / "full.onnx").unlink()
    (folder / "full.onnx").mkdir()
    with pytest.raises(BundleError, match=r"full.onnx is not a file, expected a regular file"):
        open_bundle(folder)


def test_unlisted_file_has_no_path(folder):
    (folder / "extra.bin").write_bytes(b"never checked")
    with pytest.raises(BundleError, match=r"`extra.bin` is not listed .* rebuild it"):
        open_bundle(folder).path("extra.bin")


@pytest.mark.parametrize("link", ["full.onnx", "data"])
def test_link_that_leaves_the_folder_is_what_its_bytes_are(folder, tmp_path, link):
    outside = tmp_path / "outside"
    (folder / link).rename(outside)
    (folder / link).symlink_to(outside)
    opened = open_bundle(folder)
    assert {name: opened.path(name).read_bytes() for name in CONTENT} == CONTENT
    with pytest.raises(BundleError, match="path escapes the folder"):
        hash_files(folder)
    flip(outside if outside.is_file() else outside / "forecast.bin", 0)
    with pytest.raises(
        BundleError, match=r"leads to .*outside.*, whose bytes are others, expected SHA-256 .*; copy the"
    ):
        open_bundle(folder)


def test_nothing_is_told_of_a_file_outside(folder, tmp_path):
    secret = b"S" * len(CONTENT["full.onnx"])
    (tmp_path / "secret").write_bytes(secret)
    (folder / "full.onnx").unlink()
    (folder / "full.onnx").symlink_to(tmp_path / "secret")
    with pytest.raises(BundleError) as refused:
        open_bundle(folder)
    assert hashlib.sha256(secret).hexdigest() not in str(refused.value)


@pytest.mark.parametrize("name", ["full.onnx", MANIFEST])
@pytest.mark.parametrize("place", ["pipe", "/dev/zero"])
def test_what_would_never_end_is_not_read(folder, tmp_path, name, place):
    (folder / name).unlink()
    os.mkfifo(tmp_path / "pipe")
    (folder / name).symlink_to(tmp_path / place)
    with pytest.raises(
        BundleError, match=rf"{name} is (not a file|no regular file), expected .*; copy the bundle again"
    ):
        open_bundle(folder)


def test_a_manifest_too_large_to_be_one_is_not_read(folder):
    os.truncate(folder / MANIFEST, 1 << 40)  # takes no room on the disk
    with pytest.raises(
        BundleError, match=r"manifest.json is more than 16777216 bytes, expected the manifest of a bundle"
    ):
        open_bundle(folder)


def test_link_to_itself(folder):
    (folder / "full.onnx").unlink()
    (folder / "full.onnx").symlink_to("full.onnx")
    with pytest.raises(BundleError, match=r"full.onnx is missing"):
        open_bundle(folder)


def test_link_inside_the_folder_is_followed(folder):
    (folder / "full.onnx").rename(folder / "blob")
    (folder / "full.onnx").symlink_to("blob")
    assert open_bundle(folder).path("full.onnx").read_bytes() == CONTENT["full.onnx"]


def test_missing_folder(tmp_path):
    with pytest.raises(BundleError, match=r"bundle .*nowhere is missing.*rebuild it"):
        open_bundle(tmp_path / "nowhere")


def test_missing_manifest(folder):
    (folder / MANIFEST).unlink()
    with pytest.raises(BundleError, match=r"manifest.json is not readable.*rebuild it"):
        open_bundle(folder)


# Attacks on the manifest


def test_every_flipped_byte_in_the_manifest_is_noticed(folder):
    data = (folder / MANIFEST).read_bytes()
    for position in [*range(0, len(data), 29), len(data) - 1]:
        changed = bytearray(data)
        changed[position] ^= 1
        with pytest.raises(BundleError, match=r"manifest.json .*; (copy|upgrade)"):
            Manifest.from_bytes(bytes(changed), folder / MANIFEST)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b"\n",
        lambda data: b" " + data,
        lambda data: data.rstrip(),
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data.replace(b"\\u00e9", b"\\u00E9"),
        lambda data: data.replace(b'"embedded": true', b'"embedded": 1'),
        lambda data: data.replace(b'"order": 2', b'"order": "2"'),
        lambda data: data.replace(b'"shift": 3.0', b'"shift": 3.00'),
        lambda data: data.replace(b'  "name"', b'  "name": "tiny",\n  "name"', 1),
        lambda data: json.dumps(json.loads(data)).encode(),
    ],
)
def test_the_same_content_in_other_bytes_is_refused(folder, change):
    data = (folder / MANIFEST).read_bytes()
    assert change(data) != data
    with pytest.raises(BundleError, match="copy the bundle again"):
        Manifest.from_bytes(change(data), MANIFEST)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", "é".encode(), b"[" * 100_000, b'{"a": NaN}', b"[]", b"null"])
def test_what_is_no_manifest_is_refused(data):
    with pytest.raises(BundleError, match="copy the bundle again"):
        Manifest.from_bytes(data, MANIFEST)


def test_changed_value_breaks_the_digest(folder):
    data = (folder / MANIFEST).read_bytes()
    changed = data.replace(b'"maximum": 4096', b'"maximum": 8192')
    with pytest.raises(BundleError, match="changed after it was written; copy"):
        Manifest.from_bytes(changed, MANIFEST)


def test_newer_schema(folder):
    manifest = open_bundle(folder).manifest

    def newer(raw):
        raw.update(schema_version=SCHEMA_VERSION + 1, field_of_the_future={})

    with pytest.raises(BundleError, match=r"newer taylorseer-export; upgrade taylorseer-export"):
        Manifest.from_bytes(resealed(manifest, newer), MANIFEST)


OLD = Path(__file__).with_name("manifest-1.json")  # as the revision before schema version 2 wrote it


def test_a_bundle_of_the_first_schema_names_the_command_that_rebuilds_it():
    command = (
        "taylorseer-export flux --model black-forest-labs/FLUX.1-dev --lora style.safetensors:0.8 --state residual "
        "--layout snapshots --order 1 --interval 4 --warmup 3 --guard cg --steps 20 --engine onnxruntime "
        "--precision fp32 --device cpu"
    )
    with pytest.raises(BundleError) as error:
        Manifest.from_bytes(OLD.read_bytes(), OLD)
    assert str(error.value) == (
        f"{OLD} is of schema version 1, expected {SCHEMA_VERSION}: it was written by an older taylorseer-export; "
        f"rebuild it with `{command}`"
    )


def test_a_whole_bundle_of_an_older_schema_is_rebuilt_whole():
    raw = json.loads(OLD.read_bytes()) | {"schema_version": 3, "parts": {"text": {}}}
    del raw["digest"]
    raw["digest"] = hashlib.sha256(canonical(raw)).hexdigest()
    with pytest.raises(BundleError, match=r"is of schema version 3, expected 4: .* --device cpu --whole`$"):
        Manifest.from_bytes(canonical(raw), OLD)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw.pop("engine"),
        lambda raw: raw["plan"].update(text="F"),
        lambda raw: raw["model"].update(reference="a\nb"),
        lambda raw: raw.update(family=["flux"]),
        lambda raw: raw.update(model=None),
    ],
)
def test_a_command_is_not_made_of_a_manifest_that_makes_no_sense(damage):
    raw = json.loads(OLD.read_bytes())
    del raw["digest"]
    damage(raw)
    raw["digest"] = hashlib.sha256(canonical(raw)).hexdigest()
    with pytest.raises(BundleError, match=r"of schema version 1, expected \d+: .*; copy the bundle again, or rebuild"):
        Manifest.from_bytes(canonical(raw), OLD)


def test_a_profile_of_the_first_schema_is_read_as_ever():
    """Files of different kinds have versions of their own: the manifest's rose, the profile's did not."""
    path = OLD.with_name("profile-1.json")
    profile = Profile.from_bytes(path.read_bytes(), path)
    assert (profile.schema_version, profile.plan, profile.weights[2]) == (1, "FF..", (-1.0, 2.0))
    assert profile.to_json() == path.read_bytes()


def test_a_changed_manifest_of_the_first_schema_is_damaged():
    changed = OLD.read_bytes().replace(b'"interval": 4', b'"interval": 5')
    with pytest.raises(BundleError, match="copy the bundle again"):
        Manifest.from_bytes(changed, OLD)


@pytest.mark.parametrize("place", [(), ("model",), ("graphs", "full"), ("files", "full.onnx")])
def test_unknown_key(folder, place):
    manifest = open_bundle(folder).manifest

    def extend(raw):
        for key in place:
            raw = raw[key]
        raw["surprise"] = 1

    with pytest.raises(BundleError, match=r"surprise.*not permitted; copy"):
        Manifest.from_bytes(resealed(manifest, extend), MANIFEST)


PATHS = [
    "/etc/passwd",
    "../full.onnx",
    "data/../../x",
    "./full.onnx",
    "data//x",
    "data/",
    "..",
    "",
    "C:x",
    "C:/x",
    "data\\x",
    "x\n",
    "x\x00",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("where", ["graph", "files"])
def test_path_escape(folder, path, where):
    manifest = open_bundle(folder).manifest

    def escape(raw):
        raw["files"][path] = raw["files"]["full.onnx"]
        if where == "graph":
            raw["graphs"]["full"]["file"] = path

    with pytest.raises(BundleError, match="path escapes the folder; copy"):
        Manifest.from_bytes(resealed(manifest, escape), MANIFEST)


def without(*place):
    """A change that takes one entry away."""

    def change(raw):
        for key in place[:-1]:
            raw = raw[key]
        del raw[place[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (without("graphs", "prepare"), "graphs are forecast, full, those with no guards are forecast, full, prepare"),
        (without("graphs", "forecast"), "graphs are full, prepare"),
        (without("graphs", "forecast", "inputs", 3), f"graph forecast has no `taylor_in.{SITE}`, which is a site"),
        (without("graphs", "full", "outputs", 1), f"graph full has no `taylor_out.{SITE}`, which is a site"),
        (without("graphs", "forecast", "outputs", 0), "graph forecast has 0 outputs of role noise_pred, it takes 1"),
        (without("graphs", "prepare", "outputs", 0), "is read by graph forecast, and no table of prepare is"),
        (without("dimensions", "batch"), "uses .'batch'., not in dimensions"),
        (without("sites", 0), "sites is empty, so nothing is forecast"),
    ],
)
def test_what_is_missing_is_named(folder, change, text):
    manifest = open_bundle(folder).manifest
    with pytest.raises(BundleError, match=f"{text}.*; copy the bundle again"):
        Manifest.from_bytes(resealed(manifest, change), MANIFEST)


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        (("plan", "text"), "FFFFFFFFFF", "its own numbers give FFF....F.."),
        (("plan", "interval"), 0, "plan.interval"),
        (("plan", "order"), 3, "plan order 3 exceeds state order 2"),
        (("state", "order"), 5, "state.order"),
        (("dimensions", "batch", "maximum"), 0, "dimensions.batch.maximum"),
        (("dimensions", "tokens", "minimum"), 5000, "typical 1024 is not within 5000 to 4096"),
        (("graphs", "full", "file"), "gone.onnx", "gone.onnx of graph full is not listed"),
        (("sites", 0, "shape", 0), "depth", f"shape of {SITE} uses .'depth'."),
        (("sites",), [{"name": "a", "shape": ["f(batch)"]}], "write it with these alone"),
        (("sites",), [{"name": "a", "shape": [-1]}], "expected at least 0 elements"),
        (("engine", "kind"), "pickle", "engine.kind"),
        (("family",), "../../x", "family"),
        (("name",), "../../x", "name"),
        (("name",), "..", "name"),
        (("cache_key",), "../../x", "cache_key"),
        (("model", "reference"), "\x1b[31m", "has characters that cannot be shown"),
        (("sampling", "scheduler"), "DiffusionPipeline", "no scheduler of diffusers"),
        (("sampling", "config", "num_train_timesteps"), "many", "num_train_timesteps is 'many', no whole number"),
        (("dimensions", "batch", "maximum"), 10**40, "dimensions.batch.maximum"),
        (("dimensions", "depth"), {"minimum": 1, "typical": 1, "maximum": 1}, "has .'depth'., which no shape uses"),
        (("dimensions", "ｂatch"), {"minimum": 1, "typical": 1, "maximum": 1}, "dimensions"),
        (("plan", "steps"), 10**9, "text is 10 steps long, its own numbers give 1000000000"),
        (("dimensions", "steps", "minimum"), 20, "plan has 10 steps, dimension `steps` is 20 to 1000"),
        (("state", "order"), 4, "order 4 give float32 .5, batch, tokens, 16."),
        (("state", "layout"), "derivatives", "layout derivatives and order 2 give float32 .3, batch"),
        (("state", "dtype"), "float16", "order 2 give float16"),
        (("state", "dtype"), "int64", "which is no float"),
        (("state", "guards"), ["cg"], "those with guards cg are forecast, full, prepare, probe, rest"),
        (("graphs", "probe"), None, "graphs.probe"),
        (("graphs", "full", "inputs", 0, "shape", 1), "2*ｔokens", "write it with these alone"),
        (("graphs", "full", "inputs", 0, "shape", 1), 10**40, "shape of `latents` is .*0, 64. in graph full"),
        (("graphs", "full", "inputs", 0, "shape", 1), "tokens-9", "in graph"),
        (("graphs", "full", "inputs", 0, "dtype"), "float16", "dtype of `latents` is float.* in graph"),
        (("graphs", "full", "inputs", 0, "role"), "constant", "graph full has 0 inputs of role latent, it takes 1"),
        (("graphs", "full", "inputs", 0, "role"), "error", "has role error, which it cannot have there"),
        (("graphs", "full", "inputs", 0, "name"), "step.shared", "inputs of graph full has `step.shared` twice"),
        (("graphs", "full", "inputs", 0, "name"), "noise_pred", "`noise_pred` is an input and an output of graph full"),
        (("graphs", "full", "outputs", 1, "name"), "taylor_out.other", "of graph full belongs to no site"),
        (("graphs", "full", "outputs", 1, "site"), "other", "of graph full belongs to no site"),
        (("graphs", "full", "outputs", 0, "name"), "noise", "has role noise_pred, which is called so"),
        (("graphs", "full", "inputs", 1, "shape", 1), 33, "shape of `step.shared` is .batch, 33. in graph full"),
        (("graphs", "full", "inputs", 1, "name"), "step.x", "`step.x` is read by graph full, and no table of prepare"),
        (("graphs", "prepare", "inputs", 1, "shape", 0), "batch", "one number for each step is .steps."),
        (("graphs", "prepare", "inputs", 0, "values"), [0, 1], "values of `text` are .0, 1., which is no range of"),
        (
            ("graphs", "forecast", "inputs", 2, "shape", 0),
            4,
            "`weights` of graph forecast is float32 .4., order 2",
        ),
        (("files", "FULL.onnx"), {"sha256": SEALED, "size": 1}, "are one file where case does not count"),
        (("files", "full.onnx/x"), {"sha256": SEALED, "size": 1}, "files lists full.onnx as a file and as a folder"),
        (("files", "full.onnx", "sha256"), "A" * 64, "sha256"),
    ],
)
def test_contradictions_are_refused(folder, place, value, text):
    def change(raw):
        for key in place[:-1]:
            raw = raw[key]
        raw[place[-1]] = value

    manifest = open_bundle(folder).manifest
    with pytest.raises(BundleError, match=f"{text}.*; copy the bundle again"):
        Manifest.from_bytes(resealed(manifest, change), MANIFEST)


def test_resealing_alone_changes_nothing(folder):
    manifest = open_bundle(folder).manifest
    assert Manifest.from_bytes(resealed(manifest, lambda raw: None), MANIFEST) == manifest


def test_the_manifest_is_immutable_and_plain():
    files = {name: File(sha256=SEALED, size=1) for name in CONTENT}
    with pytest.raises(ValidationError, match="frozen"):
        manifest_of(files).name = "other"
    with pytest.raises(ValidationError, match="is not plain JSON"):
        Sampling(scheduler="none", config={"a": object()}, guidance="none", guidance_scale=1)
    with pytest.raises(ValidationError, match="not JSON compliant"):
        Sampling(scheduler="none", config={"a": float("nan")}, guidance="none", guidance_scale=1)


# Writing


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_interrupted_write_leaves_nothing(tmp_path, error):
    with pytest.raises(error), writing(tmp_path / "flux-tiny") as partial:
        (partial / "full.onnx").write_bytes(b"half")
        raise error
    assert os.listdir(tmp_path) == []


def test_interrupted_write_leaves_the_old_bundle(folder):
    before = snapshot(folder)
    with pytest.raises(KeyboardInterrupt), writing(folder) as partial:
        (partial / "full.onnx").write_bytes(b"half")
        raise KeyboardInterrupt
    assert snapshot(folder) == before
    assert os.listdir(folder.parent) == ["flux-tiny"]


def test_failed_renaming_puts_the_old_bundle_back(folder, monkeypatch):
    before, rename = snapshot(folder), Path.rename

    def fail(path, target):
        if ".partial-" in path.name:
            raise OSError(errno.EIO, "disk failed")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk failed"), writing(folder):
        pass
    assert snapshot(folder) == before
    assert os.listdir(folder.parent) == ["flux-tiny"]


def test_nothing_is_visible_before_the_end(tmp_path):
    with writing(tmp_path / "flux-tiny") as partial:
        assert not (tmp_path / "flux-tiny").exists()
        assert partial.parent == tmp_path
        assert partial.name.startswith(".flux-tiny.partial-")


def test_overwriting_a_bundle(folder):
    with writing(folder) as partial:
        (partial / MANIFEST).write_bytes(b"{}")
    assert snapshot(folder) == {MANIFEST: b"{}"}
    assert os.listdir(folder.parent) == ["flux-tiny"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "flux-tiny").mkdir()
    write_bundle(tmp_path / "flux-tiny")
    assert open_bundle(tmp_path / "flux-tiny").manifest.name == "tiny"


def test_a_foreign_folder_is_not_overwritten(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"precious")
    fix = "choose another --out, nothing was deleted"
    with pytest.raises(ConfigError, match=fix), writing(tmp_path):
        raise AssertionError("began to write")
    assert snapshot(tmp_path) == {"photo.png": b"precious"}


def test_a_folder_that_turns_foreign_meanwhile_is_not_overwritten(tmp_path):
    with (
        pytest.raises(ConfigError, match="nothing was deleted"),
        writing(tmp_path / "flux-tiny"),
    ):
        (tmp_path / "flux-tiny").mkdir()
        (tmp_path / "flux-tiny" / "photo.png").write_bytes(b"precious")
    assert snapshot(tmp_path) == {"flux-tiny/photo.png": b"precious"}


def test_a_file_is_not_overwritten(folder):
    with pytest.raises(ConfigError, match="is a file, expected a folder; choose another --out"):
        with writing(folder / "full.onnx"):
            raise AssertionError("began to write")


def test_full_disk_while_writing(tmp_path):
    fix = "is full, expected room for the bundle; free space or choose another --out"
    with pytest.raises(BundleError, match=fix), writing(tmp_path / "flux-tiny"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_full_disk_while_flushing(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    fix = "is full, expected 12 bytes free; free space or choose another --out"
    with pytest.raises(BundleError, match=fix), writing(tmp_path / "flux-tiny", needed=12):
        pass
    assert os.listdir(tmp_path) == []


def test_too_little_space_is_known_before_the_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BundleError, match="expected 11 bytes free; free space"):
        with writing(tmp_path / "flux-tiny", needed=11):
            raise AssertionError("began to write")
    assert os.listdir(tmp_path) == []


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError), writing(tmp_path / "flux-tiny"):
        raise PermissionError(errno.EACCES, "denied")
    assert os.listdir(tmp_path) == []
