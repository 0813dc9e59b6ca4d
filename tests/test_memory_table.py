"""The memory planner: its numbers against hand-computed ones, what it picks, and how it refuses."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from taylorseer_export import cli
from taylorseer_export.bundle.memory import state_bytes, table_bytes
from taylorseer_export.commands.export import options as family_options
from taylorseer_export.commands.options import Parser
from taylorseer_export.compile import export
from taylorseer_export.compile.export import Options, describe, draft
from taylorseer_export.errors import ConfigError
from taylorseer_export.families import FAMILIES
from taylorseer_export.report import memory_table
from taylorseer_export.report.card import card, orders
from taylorseer_export.report.memory_table import (
    GRANULARITIES,
    LAYOUTS,
    Choice,
    choices,
    choices_of_formats,
    choose,
    reason,
    table,
)

pytestmark = pytest.mark.slow

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def parser_of(family):
    parser = Parser(family.name, "")
    family_options(parser, family)
    return parser


def options(order=2, **changes):
    return Options(order=order, interval=4, warmup=2, steps=20, **changes)


def row_of(rows, granularity, layout, order):
    (row,) = (r for r in rows if (r.granularity, r.layout, r.order) == (granularity, layout, order))
    return row


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", range(5))
def test_flux_buffers_are_sites_x_entries_x_batch_x_tokens_x_width_x_4(traced, order):
    """The tiny FLUX: two double blocks of two sites, two single blocks of one, width 32, 3 x 4 image tokens."""
    rows = choices(traced("flux"), options(order, latent_size=(6, 8), batch=3))
    assert row_of(rows, "module", "snapshots", order).state_bytes == 6 * (order + 1) * 3 * 12 * 32 * 4
    for granularity in ("residual", "last"):
        assert row_of(rows, granularity, "snapshots", order).state_bytes == (order + 1) * 3 * 12 * 32 * 4


def test_dit_buffers_are_sites_x_entries_x_batch_x_tokens_x_width_x_4(traced):
    """The tiny DiT: three blocks of two sites, width 32, an 8 x 8 latent in patches of 2."""
    rows = choices(traced("dit"), options(1, batch=5))
    assert row_of(rows, "module", "snapshots", 1).state_bytes == 6 * 2 * 5 * 16 * 32 * 4
    assert row_of(rows, "last", "snapshots", 0).state_bytes == 5 * 16 * 32 * 4


def test_derivatives_count_twice(traced):
    rows = choices(traced("flux"), options())
    for row in rows:
        if row.layout == "derivatives":
            assert row.state_bytes == 2 * row_of(rows, row.granularity, "snapshots", row.order).state_bytes


def test_rows_are_every_choice_at_the_asked_order_and_below(traced):
    rows = choices(traced("flux"), options(3))
    seen = [(r.granularity, r.layout, r.order) for r in rows]
    assert seen == [(g, y, k) for g in GRANULARITIES for y in LAYOUTS for k in (3, 2, 1, 0)]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_says_what_the_bundle_will_say(traced, granularity, layout):
    """The planner splits at one order and one layout; the real draft of each choice must weigh the same."""
    one = traced("flux")
    rows = choices(one, options(2, latent_size=(6, 8)))
    for order in (0, 1):
        made = draft(one, options(order, granularity=granularity, layout=layout, latent_size=(6, 8)))
        manifest, row = describe(made, "x"), row_of(rows, granularity, layout, order)
        assert row.state_bytes == state_bytes(manifest, made.typical)
        assert row.table_bytes == table_bytes(manifest, made.typical)
        assert dict(row.graph_bytes) == {name: graph.weights_bytes for name, graph in manifest.graphs.items()}
        assert row.weights_bytes == made.weights_bytes()
        assert f"gain up to {row.gain:.1f}" in card(manifest) and f"at most {row.ceiling:.2f}x" in card(manifest)


@pytest.mark.parametrize(
    ("steps", "interval", "warmup", "said"),
    [
        (4, 6, 3, "few steps: ceiling 4 / 3 = 1.33x; a loop of 3 steps, all full, gains as much: `calibrate` compares"),
        (8, 4, 3, "few steps: ceiling 8 / 4 = 2.00x; a loop of 4 steps, all full, gains as much: `calibrate` compares"),
        (4, 6, 4, "few steps: all 4 are full, so nothing is gained; lower --warmup or --interval"),
        (20, 6, 3, None),
    ],
)
def test_what_few_steps_can_gain_is_said_plainly(traced, steps, interval, warmup, said):
    """FLUX.1-schnell and klein take 4 steps, Qwen-Image-Lightning 8: every full step counts there."""
    made = draft(traced("flux"), replace(options(), steps=steps, interval=interval, warmup=warmup))
    lines = [line.strip() for line in card(describe(made, "x")).splitlines()]
    assert [line for line in lines if line.startswith("few steps")] == ([said] if said else [])


def test_drafts_from_one_trace_do_not_depend_on_what_was_split_before(traced):
    one = traced("flux")
    before = describe(draft(one, options()), "x").to_json()
    choices(one, options(4))
    assert describe(draft(one, options()), "x").to_json() == before


def test_gain_is_that_of_the_plan_by_hand():
    """FF...F: order 0 only repeats; order 1 at lead 3 after a gap of 1 has weights 4 and -3."""
    from taylorseer_export.method import Forecasts, Plan
    from taylorseer_export.report.card import highest_gain

    assert highest_gain(Forecasts(Plan("FF...F"), 0)) == 1
    assert highest_gain(Forecasts(Plan("FF...F"), 1)) == 7
    assert highest_gain(Forecasts(Plan("FFF"), 4)) == 1


def test_sizes_that_no_option_fixed_are_said_to_be_typical(traced):
    free = choices(traced("flux"), options())[0]
    fixed = choices(traced("flux"), options(latent_size=(6, 8), batch=3))[0]
    assert "batch 1*, image_tokens 4096*" in free.quoted and "* typical" in free.quoted
    assert "batch 3, image_tokens 12, text_tokens 512*" in fixed.quoted
    assert "steps 20 " in free.quoted
    assert "typical" not in choices(traced("dit"), options(batch=2))[0].quoted
    assert free.quoted in table([free])


# Choosing -------------------------------------------------------------------------------------------------------------


def rows_of(order=2, weights=1000, table_size=10, entries=(100, 20, 10)):
    """Rows of a made-up model: one entry of its buffers weighs `entries` bytes at module, residual, last."""
    rows = []
    for granularity, entry in zip(GRANULARITIES, entries, strict=True):
        for layout in LAYOUTS:
            for k in range(order, -1, -1):
                state = entry * (k + 1) * (2 if layout == "derivatives" else 1)
                graphs = (("full", weights),)
                rows.append(Choice(granularity, layout, k, state, table_size, graphs, weights, 3.0, 1.0, "q"))
    return tuple(rows)


def test_total_is_weights_and_slots_of_state_and_tables():
    row = row_of(rows_of(), "module", "derivatives", 2)
    assert row.total() == 1000 + 600 + 10
    assert row.total(slots=3) == 1000 + 3 * (600 + 10)


@pytest.mark.parametrize(
    ("budget", "slots", "expected"),
    [
        (10**9, 1, "module"),
        (1310, 1, "module"),  # exactly fits
        (1309, 1, "residual"),
        (1070, 1, "residual"),
        (1069, 1, "last"),
        (1040, 1, "last"),
        (1620, 2, "module"),
        (1619, 2, "residual"),
    ],
)
def test_the_closest_to_the_paper_that_fits(budget, slots, expected):
    best = choose(rows_of(), budget, 2, slots)
    assert (best.granularity, best.layout, best.order) == (expected, "snapshots", 2)


def test_the_preference_is_the_constant(monkeypatch):
    monkeypatch.setattr(memory_table, "GRANULARITIES", ("residual", "last", "module"))
    assert choose(rows_of(), 10**9, 2).granularity == "residual"


def test_what_the_user_decided_is_kept():
    assert choose(rows_of(), 10**9, 2, granularity="last").granularity == "last"
    best = choose(rows_of(), 1400, 2, layout="derivatives")
    assert (best.granularity, best.layout) == ("residual", "derivatives")


@pytest.mark.parametrize(
    ("budget", "arguments", "expected"),
    [
        (1039, {}, r"expected at least 1.02 KiB \(--state last --layout snapshots --order 2, 1 slot\); use --order 1"),
        (1019, {}, r"--memory-budget is 1019 bytes, expected .* raise it, or lower --size or --batch"),
        (999, {}, r"raise it, the weights alone are 1000 bytes"),
        (1100, {"slots": 3}, "3 slots\\); use --slots 2"),
        (
            1200,
            {"granularity": "module"},
            "--state module --layout snapshots --order 2, 1 slot\\); use --state residual",
        ),
    ],
)
def test_a_refusal_says_what_is_needed_and_what_to_change(budget, arguments, expected):
    with pytest.raises(ConfigError, match=expected) as refused:
        choose(rows_of(), budget, 2, **arguments)
    assert str(refused.value).startswith("--memory-budget is ")
    assert refused.value.__notes__ == [table(rows_of(), arguments.get("slots", 1))]


def test_the_order_is_never_lowered():
    rows = rows_of()
    assert row_of(rows, "last", "snapshots", 0).total() <= 1039
    with pytest.raises(ConfigError, match="use --order 1"):
        choose(rows, 1039, 2)


@pytest.mark.parametrize("weights", [1, 1023, 10**6 + 1, GIB - 1, 2 * GIB + 1, 7 * GIB + 12345])
def test_the_budget_that_a_refusal_names_is_enough(weights):
    rows = rows_of(weights=weights)
    with pytest.raises(ConfigError) as refused:
        choose(rows, 1, 2)
    named = re.search(r"at least (.*?) \(", str(refused.value))[1]
    given = parser_of(FAMILIES["dit"]).parse_args(["--memory-budget", named])
    assert choose(rows, given.memory_budget, 2).total() <= given.memory_budget


def test_the_reason_names_the_choice_and_what_was_too_big():
    rows = rows_of()
    best = choose(rows, 1309, 2)
    text = reason(best, rows, 1309)
    assert "\n" not in text
    assert "--state residual --layout snapshots needs 1.05 KiB for 1 slot at q" in text
    assert "--state module --layout snapshots would need 1.28 KiB" in text
    assert reason(choose(rows, 10**9, 2), rows, 10**9).endswith("the first choice fits")


def test_the_table_is_aligned_and_in_one_unit():
    rows = rows_of(weights=3 * GIB, table_size=8 * MIB, entries=(GIB, 64 * MIB, 32 * MIB))
    head, *body = table(rows, slots=2).splitlines()[-len(rows) - 1 :]
    assert table(rows, 2).startswith("memory in MiB:") and "bundle + 2 slots" in table(rows, 2)
    assert head.split() == ["state", "layout", "order", "buffers", "tables", "full", "bundle", "total", "gain"]
    assert {len(line) for line in (head, *body)} == {len(head)}
    first = body[0].split()
    assert first == ["module", "snapshots", "2", "3,072.0", "8.0", "3,072.0", "3,072.0", "9,232.0", "1.0"]


# The command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def flux(tiny, traces, monkeypatch, tmp_path, capsys):
    """Run an export of the tiny FLUX without tracing it again; returns (exit code, output, errors, made options)."""
    known = traces("flux")
    monkeypatch.setattr(export, "trace", lambda *_: known)
    written = []

    def write(plan, out, name, progress):
        written.append(plan.options)
        (out / "x").mkdir(exist_ok=True)
        return out / "x"

    monkeypatch.setattr(export, "write_bundle", write)

    def run(*arguments):
        code = cli.main(["flux", "--model", str(tiny("flux").folder), "--out", str(tmp_path), *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err, written

    return run


def test_dry_run_prints_the_table_after_the_card_and_writes_nothing(flux, tmp_path):
    code, out, _, written = flux("--dry-run", "--order", "1", "--slots", "3")
    assert code == 0 and not written and not list(tmp_path.iterdir())
    assert out.index("quoted at batch 1") < out.index("memory in ") < out.index("residual  snapshots")
    assert "bundle + 3 slots" in out and "* typical" in out
    assert len(re.findall(r"^  (?:module|residual|last) ", out, re.MULTILINE)) == 12


def test_a_budget_chooses_the_granularity_before_the_work_starts(flux, traced):
    rows = choices(traced("flux"), Options(order=1, interval=6, warmup=3))
    enough = row_of(rows, "module", "snapshots", 1).total()
    code, out, _, written = flux("--memory-budget", f"{enough}")
    assert code == 0 and written[-1].granularity == "module"
    code, out, _, written = flux("--memory-budget", f"{enough - 1} bytes")
    assert code == 0 and (written[-1].granularity, written[-1].layout) == ("residual", "snapshots")
    assert "--state residual --layout snapshots needs" in out
    assert out.index("--state residual") < out.index("at granularity residual")


def test_an_explicit_state_is_respected_or_refused(flux, traced):
    rows = choices(traced("flux"), Options(order=1, interval=6, warmup=3))
    module, last = (row_of(rows, g, "snapshots", 1).total() for g in ("module", "last"))
    _, out, _, written = flux("--memory-budget", f"{module}", "--state", "last", "--layout", "snapshots")
    assert written[-1].granularity == "last" and "as asked" in out
    code, _, err, _ = flux("--memory-budget", f"{last}", "--state", "module")
    assert code == 2 and len(written) == 1
    assert "--state module --layout snapshots --order 1, 1 slot); use --state residual" in err
    assert err.startswith("taylorseer-export: --memory-budget is ") and "Traceback" not in err


def test_auto_takes_the_widest_weights_that_fit(flux, traced):
    """The precision as long as it fits in any way, then fp8; what fits in none is refused with the least that does."""
    one, asked = traced("flux"), Options(order=1, interval=6, warmup=3)
    plain, fp8 = (choices(one, replace(asked, weights=form)) for form in (None, "fp8"))
    entry = describe(draft(one, replace(asked, weights="fp8")), "x").quantised
    assert plain[0].weights_bytes - fp8[0].weights_bytes == entry.unquantised_bytes - entry.bytes > 0
    enough, least = (min(row.total() for row in rows if row.order == 1) for rows in (plain, fp8))
    code, out, _, written = flux("--weights", "auto", "--memory-budget", f"{enough}", "--activations", "token")
    assert code == 0 and (written[-1].weights, written[-1].activations) == (None, None)
    assert written[-1].granularity == choose(plain, enough, 1).granularity
    code, out, _, written = flux("--weights", "auto", "--memory-budget", f"{enough - 1}", "--activations", "token")
    best = choose(fp8, enough - 1, 1)
    assert code == 0 and (written[-1].weights, written[-1].granularity) == ("fp8", best.granularity)
    assert written[-1].activations == "token"
    sizes = r"[\d.]+ KiB in the precision, [\d.]+ KiB in fp8, [\d.]+ KiB in int8"
    assert re.search(
        rf"^budget .*: {best.options} needs .*; --state \w+ .* would need .*; weights: {sizes}$", out, re.M
    )
    code, out, err, _ = flux("--weights", "auto", "--memory-budget", f"{least - 1}")
    assert code == 2 and len(written) == 2 and re.search(r"at least .* \(--weights fp8 --state \w+ --layout snap", err)
    code, out, err, _ = flux("--weights", "auto")
    assert code == 2 and "--weights is auto without --memory-budget, expected it too; add it, or name a format" in err
    code, out, err, _ = flux("--weights", "auto", "--memory-budget", "1 GB", "--activations", "static")
    assert code == 2 and "--activations is static with --weights auto, expected a format by name" in err


def test_without_auto_a_format_is_named_and_never_chosen(flux, traced):
    fp8 = choices(traced("flux"), Options(order=1, interval=6, warmup=3, weights="fp8"))
    enough = min(row.total() for row in fp8 if row.order == 1)
    code, _, err, written = flux("--memory-budget", f"{enough}")
    assert code == 2 and not written and "1 slot); add --weights fp8, which fits, or raise it" in err
    code, out, _, written = flux("--memory-budget", f"{enough}", "--weights", "fp8")
    assert code == 0 and written[-1].weights == "fp8" and "--weights fp8 --state" in out and "; weights:" not in out


@pytest.mark.parametrize(
    ("engine", "arch", "formats"),
    [
        ("onnxruntime", None, ["fp8", "int8"]),
        ("inductor", None, ["fp8", "int8", "nvfp4"]),
        ("tensorrt-rtx", "8.6", ["int8"]),
        ("tensorrt-rtx", "8.9", ["fp8", "int8"]),
    ],
)
def test_formats_are_those_that_engine_and_gpu_take(traced, engine, arch, formats):
    if arch:
        pytest.importorskip("tensorrt_rtx")
    given = Options(order=0, interval=6, warmup=3, engine=engine, engine_options={"gpu-arch": arch} if arch else {})
    rows = choices_of_formats(traced("flux"), replace(given, weights="auto"))
    assert list(dict.fromkeys(row.weights for row in rows)) == [None, *formats]
    head, first = table(rows).splitlines()[-len(rows) - 1 :][:2]
    assert (head.split()[:2], first.split()[:2]) == (["weights", "state"], ["precision", "module"])


def test_without_a_budget_the_defaults_are_the_papers(flux):
    *_, written = flux()
    assert (written[-1].granularity, written[-1].layout) == ("module", "snapshots")


@pytest.mark.parametrize("text", ["lots", "", "-1GiB", "0", "0.2", "24G", "1e9", "nan", "1,5GiB", "24GiBs", "1.GiB"])
def test_a_budget_that_is_no_size_is_refused(text, tmp_path, capsys):
    assert cli.main(["flux", f"--memory-budget={text}", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"--memory-budget is {text}, expected a size above 0 in GiB, GB, MiB, MB or bytes" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GiB", 24 * GIB), ("24 gib", 24 * GIB), ("1.5GB", 1_500_000_000), ("512MiB", 512 * MIB), ("3MB", 3_000_000),
     ("7KiB", 7 * KIB), ("1000", 1000), ("12 bytes", 12), ("0.1GiB", GIB // 10)],
)  # fmt: skip
def test_a_budget_is_read_exactly(text, count):
    assert parser_of(FAMILIES["flux"]).parse_args(["--memory-budget", text]).memory_budget == count


def test_slots_without_a_budget_are_refused(flux):
    code, _, err, written = flux("--slots", "2")
    assert code == 2 and "expected --memory-budget too" in err and not written


def test_inspect_lists_state_and_gain_per_order_from_the_manifest(drafts):
    manifest = describe(drafts("dit", layout="derivatives", order=1), "x")
    rows = orders(manifest)
    entry = 2 * 2 * 6 * 16 * 32 * 4  # two sets of buffers, a batch of two for guidance, six sites
    assert f"0: {entry / 1e3:.2f} KB, gain 1.0" in rows and f"4: {5 * entry / 1e3:.2f} KB" in rows
    assert len(rows.splitlines()) == 2


def answer_into(stdout, *command, unbuffered=False):
    """(exit code, standard error) of a fresh process that writes to `stdout`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    python = [sys.executable, *(["-u"] if unbuffered else []), "-m", "taylorseer_export.cli"]
    done = subprocess.run([*python, *command], stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("command", "unbuffered", "code"),
    [
        (["--help"], False, 0),  # all was done when the last flush failed
        (["flux", "--help"], False, 0),
        (["--help"], True, 141),  # as if SIGPIPE had ended it
    ],
)
def test_a_reader_that_left_is_met_with_silence(command, unbuffered, code):
    """What `| head -1` does, made certain: nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert answer_into(writer, *command, unbuffered=unbuffered) == (code, "")
    finally:
        os.close(writer)


def test_a_full_disk_behind_standard_output_is_one_sentence():
    with open("/dev/full", "w") as full:
        code, text = answer_into(full, "--help")
    assert code == 2
    assert "standard output is not writable" in text and text.count("\n") == 1
