"""The evaluation: its numbers from their definitions, and its page opened in a browser."""

import html.parser
import re
import shutil
import subprocess

import numpy as np
import pytest

from taylorseer_export import cli
from taylorseer_export.report.evaluate import UNMEASURED, Case, cases, evaluate
from taylorseer_export.report.page import page
from taylorseer_export.report.samples import groups
from taylorseer_export.runtime import sampling

STEPS = 8


@pytest.fixture(scope="module")
def denoiser(residual_digits):
    from taylorseer_export.runtime.denoiser import load

    return load(residual_digits, threads=1)


@pytest.fixture(scope="module")
def rows(denoiser):
    plan = denoiser.plan("FF..F...")
    return evaluate(denoiser, groups(denoiser, 4, 0), cases(denoiser, STEPS, plan), shown=3)


@pytest.fixture(scope="module")
def text(rows):
    return page("dit: ways <to> sample", {"engine": "onnxruntime"}, rows, UNMEASURED)


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
    plan = denoiser.plan("FF..F...")
    (request,) = groups(denoiser, 4, 0)
    seen, exact = (sampling.sample(denoiser, request, p, 1) for p in (plan, denoiser.plan("F" * STEPS)))
    row = next(row for row in rows if row.name == "regular, order 1")
    difference = np.linalg.norm(seen.latents - exact.latents) / np.linalg.norm(exact.latents)
    assert row.latent_error == pytest.approx(difference, rel=1e-4) and row.latent_error == row.step_errors[-1]
    pictures = [sampling.pictures(denoiser, request, result).astype(float) for result in (seen, exact)]
    square = np.square(pictures[0] - pictures[1]).mean()
    assert row.psnr == pytest.approx(10 * np.log10(255**2 / square), rel=1e-6)
    assert row.psnr_worst <= row.psnr and 0 < row.ssim < 1 and row.loop_ms > 0
    assert row.step_errors[0] == row.step_errors[1] == 0 < row.step_errors[2]  # the plan begins with two full steps
    assert rows[0].psnr is None and rows[0].latent_error == 0 and rows[0].ssim == pytest.approx(1)


def test_a_row_that_differs_is_told_apart(denoiser, rows):
    worse = Case("one full step", denoiser.plan("F......."), 0)
    full = Case("all full", denoiser.plan("F" * STEPS), 0)
    _, row = evaluate(denoiser, groups(denoiser, 4, 0), [full, worse])
    assert row.psnr < min(r.psnr for r in rows if r.psnr is not None)


def test_the_page_needs_nothing_else_and_is_well_formed(text, rows):
    assert set(re.findall(r"(?:src|href)=(\S{6})", text)) == {'"data:'} and "http" not in text
    assert "ways &lt;to&gt; sample" in text and "<to>" not in text
    assert all(metric in text for metric in UNMEASURED) and all(row.plan in text for row in rows)
    assert text.count("<img") == len(rows) * 3 and text.count("data-other=") == len(rows) * 3
    parser = html.parser.HTMLParser()
    parser.feed(text)
    parser.close()


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
    assert "2 steps" in printed and "not measured: LPIPS" in printed and '"rows": [' in printed
    assert out.read_text().startswith("<!doctype html>")
    assert cli.main(["evaluate", str(residual_digits), "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert "create it" in capsys.readouterr().err
