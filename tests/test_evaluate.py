"""The evaluation: its numbers from their definitions, and its page opened in a browser."""

import html.parser
import json
import re
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from taylorseer_export import cli
from taylorseer_export.bundle.quantised import Quantised
from taylorseer_export.commands.evaluate import _unquantised
from taylorseer_export.embedded import requests
from taylorseer_export.errors import ConfigError
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.report.evaluate import Case, Difference, cases, evaluate, guarded_cases, table_of_errors
from taylorseer_export.report.metrics import Shown, metrics
from taylorseer_export.report.page import page
from taylorseer_export.report.samples import groups, random_inputs
from taylorseer_export.runtime import sampling
from taylorseer_export.runtime.denoiser import load

pytestmark = pytest.mark.slow

STEPS = 8


@pytest.fixture(scope="module")
def denoiser(residual_digits):
    return load(residual_digits, threads=1)


@pytest.fixture(scope="module")
def rows(denoiser):
    asked = denoiser.forecasts(plan="FF..F...")
    measures, _ = metrics(None, captions=False, digits=True)
    return evaluate(denoiser, groups(denoiser, 4, 0), cases(denoiser, asked), measures, shown=3)


@pytest.fixture(scope="module")
def shown(rows):
    """The rows, and one that a guard decided."""
    return [*rows, replace(rows[-1], name="guard cg at 0.0512", executed=("FF..F.F.", "FFF.F..."))]


@pytest.fixture(scope="module")
def text(shown):
    return page("dit: ways <to> sample", {"engine": "onnxruntime"}, shown, metrics(None, False, True)[1])


def test_rows_are_all_ways_that_the_bundle_has(rows):
    names = [row.name for row in rows if not row.name.startswith("profile")]
    regular = [f"regular, {how}" for how in ("reuse", "order 1", "order 2", "Newton")]
    assert names == [
        "all full",
        "4 steps",
        "3 steps",
        "2 steps",
        *regular,
        "interval 3, order 2",
        "interval 9, order 2",
    ]
    assert [row.full_steps for row in rows[:5]] == [8, 4, 3, 2, 3]


def test_the_numbers_are_what_they_say(denoiser, rows):
    """One row again, from the definitions."""
    plans = ("FF..F...", "F" * STEPS)
    (request,) = groups(denoiser, 4, 0)
    seen, exact = (sampling.sample(denoiser, request, denoiser.forecasts(plan=p, order=1)) for p in plans)
    row = next(row for row in rows if row.name == "regular, order 1")
    difference = np.linalg.norm(seen.latents - exact.latents) / np.linalg.norm(exact.latents)
    assert row.latent_error == pytest.approx(difference, rel=1e-4) and row.latent_error == row.step_errors[-1]
    pictures = [requests.pictures(denoiser, request, result).astype(float) for result in (seen, exact)]
    square = np.square(pictures[0] - pictures[1]).mean()
    assert row.psnr == pytest.approx(10 * np.log10(255**2 / square), rel=1e-6)
    assert row.psnr_worst <= row.psnr and 0 < row.ssim < 1 and row.loop_ms > 0
    assert row.step_errors[0] == row.step_errors[1] == 0 < row.step_errors[2]  # the plan begins with two full steps
    assert rows[0].psnr is None and rows[0].latent_error == 0 and rows[0].ssim == pytest.approx(1)


def test_a_row_that_differs_is_told_apart(denoiser, rows):
    worse = Case("one full step", denoiser.forecasts(plan="F.......", order=0))
    full = Case("all full", denoiser.forecasts(plan="F" * STEPS, order=0))
    _, row = evaluate(denoiser, groups(denoiser, 4, 0), [full, worse])
    assert row.psnr < min(r.psnr for r in rows if r.psnr is not None)


def test_the_page_needs_nothing_else_and_is_well_formed(text, shown):
    assert set(re.findall(r"(?:src|href)=(\S{6})", text)) == {'"data:'} and "http" not in text
    assert "ways &lt;to&gt; sample" in text and "<to>" not in text
    assert "LPIPS (needs AlexNet" in text and all(metric in text for metric in shown[0].metrics)
    plans = [re.findall("class=.(full|forecast)", line) for line in text.split("class=steps")[1:]]
    ran = [executed for row in shown for executed in dict.fromkeys(row.executed)]
    assert plans == [[{"F": "full", ".": "forecast"}[kind] for kind in executed] for executed in ran]
    assert text.count("<img") == len(shown) * 3 and text.count("data-other=") == len(shown) * 3
    parser = html.parser.HTMLParser()
    parser.feed(text)
    parser.close()


def test_no_two_ways_look_alike(text, shown):
    """There are more ways than colours; points, lines and keys still differ."""
    keys = re.findall(r'class="key (key\d)" style="background:(#\w+)"></i>', text.split("</table>")[0])
    assert len(keys) == len(set(keys)) == len(shown) > len({colour for _, colour in keys})
    points, _, curves = text.split("<svg")[1:4]
    dots = re.findall(r"<(circle|rect) [^>]*fill=\"(#\w+)", points)
    lines = re.findall(r'stroke="(#\w+)"( stroke-dasharray="7 3")?>', curves)
    assert len(dots) == len(set(dots)) == len(shown) - 1  # all full differs from nothing, and has no point
    assert len(lines) == len(set(lines)) == sum(bool(row.step_errors) for row in shown[1:])


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(text, tmp_path, width):
    """At the width of a phone and of a desktop the page is no wider than the window, and everything is drawn."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on the path")
    report = (
        "<script>addEventListener('load', () => { const e = document.documentElement;"
        "document.querySelector('.pictures img[data-other]').click();"
        "const seen = [e.scrollWidth, innerWidth, document.images.length,"
        "[...document.images].filter(i => i.naturalWidth > 0).length, document.querySelectorAll('svg').length,"
        "[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().right > innerWidth).length];"
        "document.title = seen.join(' '); });</script></body>"
    )
    file = tmp_path / "page.html"
    file.write_text(text.replace("</body>", report), encoding="utf-8")
    frame = tmp_path / "frame.html"
    # A window of headless Chromium is at least 500 wide, so the page stands in a frame.
    frame.write_text(
        f'<iframe src="{file.name}" style="width:{width}px;height:900px;border:0"></iframe><pre></pre><script>'
        "const f = document.querySelector('iframe'); f.addEventListener('load', () => setTimeout(() => {"
        "document.querySelector('pre').textContent = 'seen ' + f.contentDocument.title; }, 50));</script>"
    )
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]  # fmt: skip
    done = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"seen (\d+) (\d+) (\d+) (\d+) (\d+) (\d+)", done.stdout)
    assert found, done.stderr[-500:]
    wide, window, images, drawn, plots, cut_off = map(int, found.groups())
    assert window == width and wide <= window
    assert images == drawn > 0 and plots == 3 and cut_off == 0


def test_command_line(residual_digits, tmp_path, capsys):
    out = tmp_path / "page.html"
    arguments = ["evaluate", str(residual_digits), "--steps", "4", "--plan", "FF..", "--samples", "2", "--threads", "1"]
    assert cli.main([*arguments, "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr().out
    assert "2 steps" in printed and "not measured: LPIPS (needs AlexNet of torchvision: alexnet-" in printed
    assert "label accuracy" in printed and '"rows": [' in printed
    assert out.read_text().startswith("<!doctype html>")
    assert cli.main(["evaluate", str(residual_digits), "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert "create it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--plan", "FF..", "--steps", "8"], "plan FF.. is 4 steps long, expected 8"),
        (["--plan", "FXF"], "plan has `X` at step 1"),
        (["--samples", "0"], "--samples is 0, expected a whole number, at least 1"),
        (["--guidance-scale", "nan"], "is nan, expected a number above 0"),
        (["--prompts", "{empty}"], "is empty, expected one caption or class per line"),
        (["--inputs", "{folder}"], "is no file, expected a safetensors file"),
        (["--out", "{folder}"], "is a folder, expected a file to write; name a file in it"),
        (["--metric-weights", "{empty}"], "is not a folder"),
    ],
)
def test_bad_input_is_one_sentence(residual_digits, tmp_path, capsys, arguments, expected):
    (tmp_path / "empty").write_text("\n \n")
    given = [a.format(empty=tmp_path / "empty", folder=tmp_path) for a in arguments]
    assert cli.main(["evaluate", str(residual_digits), *given]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_guards_are_rows_with_as_many_full_steps(denoiser, residual_digits, tmp_path, capsys):
    asked = denoiser.forecasts(plan="FFF.F..F")
    plan = asked.plan
    (case,) = guarded_cases(denoiser, plan, groups(denoiser, 4, 9))
    assert case.forecasts.guard is not None and case.name.startswith("guard cg at")
    ways = [*cases(denoiser, asked)[:1], case]
    exact, row = evaluate(denoiser, groups(denoiser, 4, 0), ways)
    assert row.plan == str(case.forecasts.plan) and all(len(executed) == STEPS for executed in row.executed)
    assert len(case.forecasts.plan.full_steps) <= row.full_steps <= STEPS and exact.psnr is None
    assert guarded_cases(denoiser, Plan("F......."), groups(denoiser, 2, 9)) == []
    arguments = [
        "evaluate",
        str(residual_digits),
        "--samples",
        "2",
        "--threads",
        "1",
        "--out",
        str(tmp_path / "a.html"),
    ]
    assert cli.main([*arguments, "--plan", "FFF.F..F"]) == 0
    assert "guard cg at" in capsys.readouterr().out
    assert cli.main([*arguments, "--plan", "F......."]) == 0
    assert "not measured: guards (needs a --plan with more full steps" in capsys.readouterr().out


def test_rows_that_decided_at_run_time_show_what_ran(text, rows, shown):
    decided = shown[-1]
    assert text.count('added" title=') == sum(
        ran != kind for executed in decided.executed for kind, ran in zip(decided.plan, executed, strict=True)
    )
    assert "Orange: full, decided at run time" in text and "Orange" not in page("x", {}, rows, {})


# Quantised weights ----------------------------------------------------------------------------------------------------


def test_both_errors_of_a_quantised_bundle(embedded, tmp_path, capsys):
    """The embedded FLUX in fp8: apart and together, against what the float32 bundle makes of the same samples."""
    out, folder, samples, steps = tmp_path / "page.html", embedded("fp8-shapes"), 2, 5
    given = ["--samples", str(samples), "--steps", str(steps), "--threads", "1", "--out", str(out), "--json"]
    assert cli.main(["evaluate", str(folder), *given]) == 0
    said = capsys.readouterr().out
    found = {row["name"]: row for row in json.loads(said.splitlines()[-1])["rows"]}
    assert (
        "against the unquantised model, all steps full" in said and "Against the unquantised model" in out.read_text()
    )
    full = Forecasts(Plan.all_full(steps), 0)
    with load(embedded("shapes"), threads=1) as plain, load(folder, threads=1) as quantised:
        requests = groups(quantised, samples, 0, tensors=random_inputs(quantised, samples))
        exact, seen = (
            np.concatenate([sampling.sample(one, request, full).latents for request in requests])
            for one in (plain, quantised)
        )
    quantisation = found["all full"]["unquantised"]["latent_error"]
    assert quantisation == pytest.approx(np.linalg.norm(seen - exact) / np.linalg.norm(exact), rel=1e-2)
    assert found["all full"]["latent_error"] == 0 and found["all full"]["psnr"] is None
    shown = re.findall(r"^  (all full|regular, order 1) +([\d.]+) +[\d.]+ +[\d.]+ +-$", said, re.M)
    assert shown[0] == ("all full", f"{quantisation:.4f}") and len(shown) == 2
    regular = found["regular, order 1"]
    forecast, both = regular["latent_error"], regular["unquantised"]["latent_error"]
    longer = np.linalg.norm(seen) / np.linalg.norm(exact)  # one is a share of the one's norm, one of the other's
    assert abs(forecast * longer - quantisation) <= both * 1.001 and both <= (forecast * longer + quantisation) * 1.001
    assert both > quantisation and regular["unquantised"]["psnr"] < found["all full"]["unquantised"]["psnr"]


def test_what_the_unquantised_model_needs_is_said(denoiser):
    """A bundle of another model brings none, and one that keeps the checkpoint's values has none."""
    with pytest.raises(ConfigError, match=r"--model is x for a bundle without quantised weights, .*; leave it out"):
        _unquantised(denoiser, "x")
    entry = Quantised(weights="fp8", activations="none", layers=("a",), bytes=1, unquantised_bytes=4)
    elsewhere = denoiser.manifest.model.model_copy(update={"embedded": False})
    by_token = {"kept": True, "activations": "token"}
    needed = "--model, the checkpoint"
    for change, needs in (({}, needed), ({"kept": True}, "the checkpoint was quantised from"), (by_token, needed)):
        changed = {"quantised": entry.model_copy(update=change), "model": elsewhere}
        bundle = SimpleNamespace(manifest=denoiser.manifest.model_copy(update=changed))
        model, missing = _unquantised(bundle, None)
        assert model is None and needs in missing["quantisation error"]
        if needs is not needed:
            with pytest.raises(ConfigError, match=r"--model is x for a bundle that keeps .*; leave it out"):
                _unquantised(bundle, "x")
    row = SimpleNamespace(name="all full", unquantised=Difference(0.5, 30.0, 29.0, None))
    against = bundle.manifest.quantised.compared_with
    said = table_of_errors([row], against)
    assert "weights dequantised, all steps full: `all full` is the quantisation error of activations alone, e" in said
    assert "against the unquantised model" in table_of_errors([row])


# Metrics --------------------------------------------------------------------------------------------------------------


def test_digits_are_read(real_digits):
    """Real digits are read right but for a few, their distance to themselves is nothing, and noise is far away."""
    pictures, labels = real_digits
    distance, accuracy = metrics(None, captions=False, digits=True)[0]
    real = Shown(pictures, pictures, labels=labels)
    noise = np.random.default_rng(0).integers(0, 256, pictures.shape).astype(np.uint8)
    assert accuracy.measure(real) > 0.95 and accuracy.measure(replace(real, labels=(labels + 1) % 10)) < 0.05
    near, far = distance.measure(real), distance.measure(replace(real, pictures=noise))
    assert abs(near) < 1e-6 * far


def test_the_distance_is_frechets(real_digits):
    """Against scipy's matrix square root."""
    from scipy.linalg import sqrtm

    from taylorseer_export.embedded.digits import trained_reader

    pictures, labels = real_digits
    some = pictures[labels % 2 == 0]
    distance, _ = metrics(None, captions=False, digits=True)[0]
    network, _ = trained_reader()
    with torch.no_grad():
        a, b = (network(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).double().numpy() for x in (pictures, some))
    covariances = np.cov(a.T), np.cov(b.T)
    floor = 1e-9 * np.eye(len(covariances[0]))  # features that are never on make the matrix singular
    root = np.trace(sqrtm((covariances[0] + floor) @ (covariances[1] + floor)).real)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(sum(covariances)) - 2 * root
    assert distance.measure(Shown(some, some)) == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def real_digits():
    """scikit-learn's digits as the DiT saw them: pictures `[1797, 16, 16, 3]` and labels."""
    from sklearn.datasets import load_digits
    from torch.nn.functional import interpolate

    digits = load_digits()
    ink = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]
    large = interpolate(ink, size=(16, 16), mode="bicubic").clamp(0, 1) * 2 - 1
    grey = ((large + 1) / 2).clamp(0, 1).mul(255).round().byte()[:, 0, :, :, None].numpy()
    return np.repeat(grey, 3, axis=3), digits.target


def test_metrics_without_their_weights_are_named_with_what_they_need(tmp_path):
    found, missing = metrics(tmp_path, captions=True, digits=False)
    assert not found and set(missing) == {"LPIPS", "FID, sFID, IS", "CLIP score", "ImageReward"}
    assert all("in the folder of --metric-weights" in what for what in missing.values())
    assert "prompts" in metrics(tmp_path, captions=False, digits=False)[1]["CLIP score, ImageReward"]


def test_lpips_is_computed_from_local_weights(tmp_path):
    """AlexNet at random: what is the same has distance 0, what differs more is farther. Nothing is fetched."""
    torchvision = pytest.importorskip("torchvision", reason="torchvision has no wheel for this build of torch")
    weights = torchvision.models.alexnet(weights=None).features.state_dict()
    small = {f"features.{name}": value for name, value in weights.items()}
    for name, shape in (("1", (4096, 9216)), ("4", (4096, 4096)), ("6", (1000, 4096))):
        # One number, shown as a whole matrix: LPIPS reads none of these, so the file stays small.
        small |= {f"classifier.{name}.weight": torch.zeros(1).expand(shape)}
        small |= {f"classifier.{name}.bias": torch.zeros(shape[0])}
    torch.save(small, tmp_path / "alexnet-owt-7be5be79.pth")
    (lpips,), missing = metrics(tmp_path, captions=False, digits=False)
    assert lpips.name == "LPIPS" and "LPIPS" not in missing
    generator = np.random.default_rng(0)
    exact = generator.integers(60, 200, (2, 16, 16, 3)).astype(np.uint8)
    near, far = (np.clip(exact + generator.normal(0, by, exact.shape), 0, 255).astype(np.uint8) for by in (5, 50))
    distances = [lpips.measure(Shown(made, exact)) for made in (exact, near, far)]
    assert distances[0] == 0 < distances[1] < distances[2]


def test_inception_metrics_are_computed_from_local_weights(tmp_path):
    pytest.importorskip("torchvision", reason="torchvision has no wheel for this build of torch")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr("torch.load", lambda *a, **k: {})
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], "none")
    torch.save(network.state_dict(), tmp_path / "weights-inception-2015-12-05-6726825d.pth")
    found, _ = metrics(tmp_path, captions=False, digits=False)
    assert [metric.name for metric in found] == ["FID", "sFID", "IS"]
    generator = np.random.default_rng(0)
    exact, other = generator.integers(0, 256, (2, 3, 16, 16, 3)).astype(np.uint8)
    for metric in found[:2]:
        assert abs(metric.measure(Shown(exact, exact))) < metric.measure(Shown(other // 4, exact))
    assert found[2].measure(Shown(exact, exact)) >= 1


def test_clip_score_is_computed_from_a_local_model(tmp_path):
    folder = tmp_path / "clip-vit-base-patch16"
    tiny_clip(folder)
    (score,), _ = metrics(tmp_path, captions=True, digits=False)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    found = score.measure(Shown(pictures, pictures, captions=["a red circle", "a blue square"]))
    assert score.name == "CLIP score" and 0 <= found <= 100


def tiny_clip(folder):
    """A CLIP at random, of the smallest size, as transformers saves it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{x}</w>" for x in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = {word: k for k, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(vocabulary), "eos_token_id": len(vocabulary) - 1},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(image_processor=pictures, tokenizer=tokenizer).save_pretrained(folder)


def test_times_of_a_row_are_those_of_its_steps(rows):
    for row in rows:
        full = [ms for ms, kind in zip(row.step_ms, row.plan, strict=True) if kind == "F"]
        assert row.median_ms("F") == np.median(full) and row.prepare_ms > 0
        assert (row.median_ms(".") is None) == ("." not in row.plan)


def test_a_step_that_differs_between_groups_has_no_kind(rows):
    row = replace(rows[0], step_ms=(1.0, 2.0, 5.0), executed=("FF.", "F.."))
    assert (row.median_ms("F"), row.median_ms(".")) == (1.0, 5.0)
