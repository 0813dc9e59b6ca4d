"""The first hour: how goals are judged, how stages end, what is carried, and what is said of a failure."""

import json
import os
import subprocess
import sys
import time
import zipfile
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import first_hour
import pytest
from hour import carry, goals, mending, process, suites
from hour.carry import Wheel
from hour.report import Report, read
from hour.stages import NAMES, STAGES, Stage, listing, stage_of

ROOT = Path(__file__).resolve().parents[1]


def args(*words):
    given = first_hour.options().parse_args(["--device", "cpu", "--tiny", *words])
    given.trial = "a trial"
    return given


# Goals


OURS = {
    "granularity": "residual",
    "order": 1,
    "weights": None,
    "efficiency": 0.993,
    "forecast_over_floor": 1.8,
    "full_over_compiled": 1.0,
    "fallbacks": 0,
    "loop_ms": 100.0,
    "parity": {"FFF..F.": {"over_bound": 0.4}},
}


def judged(trial="", **changes):
    """Goal -> verdict, of a contest of ours and what `changes` adds."""
    results = {"compiled": {"step_ms": 1.0}, "ours residual order 1": OURS} | changes
    contest = {"model": "flux", "results": results}
    return {goal["goal"]: goal["verdict"] for goal in goals.of_contest(contest, trial)}


def test_every_goal_of_a_good_contest_is_met():
    seen = judged(**{"hook eager": {"order": 1, "loop_ms": 131.0}, "cache-dit eager": {"order": 1, "loop_ms": 130.0}})
    assert set(seen.values()) == {"met"} and len(seen) == 7


@pytest.mark.parametrize(
    ("change", "goal"),
    [
        ({"efficiency": 0.9899}, "flux residual order 1: efficiency"),
        ({"granularity": "module", "efficiency": 0.969}, "flux residual order 1: efficiency"),
        ({"forecast_over_floor": 2.01}, "flux residual order 1: forecast over its floor"),
        ({"full_over_compiled": 1.0001}, "flux residual order 1: full over compiled"),
        ({"fallbacks": 1}, "flux residual order 1: calls without a CUDA graph"),
        ({"parity": {"FF": {"over_bound": 1.1}}}, "flux residual order 1: error over its bound on FF"),
        ({"parity": {"FF": {"over_bound": float("nan")}}}, "flux residual order 1: error over its bound on FF"),
        ({"efficiency": float("nan")}, "flux residual order 1: efficiency"),
    ],
)
def test_what_misses_a_goal_is_missed_alone(change, goal):
    seen = judged(**{"ours residual order 1": OURS | change})
    assert [name for name, verdict in seen.items() if verdict == "missed"] == [goal]


def test_the_fastest_form_of_a_rival_counts():
    slow, fast = {"order": 1, "loop_ms": 200.0}, {"order": 1, "loop_ms": 129.0}
    assert judged(**{"hook eager": slow})["flux: diffusers' hook over ours (hook eager)"] == "met"
    both = judged(**{"hook eager": slow, "hook compiled": fast})
    assert both["flux: diffusers' hook over ours (hook compiled)"] == "missed"


def test_what_did_not_run_has_its_reason():
    results = {"compiled": {"failed": "it broke"}, "ours module order 1": {"left_out": "no time left"},
               "ours residual order 1": {k: v for k, v in OURS.items() if k != "full_over_compiled"},
               "hook eager": {"failed": "x"}, "hook compiled": {"left_out": "y"}}  # fmt: skip
    found = goals.of_contest({"model": "flux", "results": results})
    missing = {goal["goal"]: goal["why"] for goal in found if goal["verdict"] == "not run"}
    assert missing == {
        "flux module order 1: every goal": "no time left",
        "flux residual order 1: full over compiled": "it broke",
        "flux: diffusers' hook over ours": "hook eager: x; hook compiled: y",
    }


def test_a_trial_shows_speeds_and_judges_numbers():
    seen = judged("a trial", **{"ours residual order 1": OURS | {"efficiency": 0.1, "fallbacks": 2}})
    assert seen["flux residual order 1: efficiency"] == "not judged"
    assert seen["flux residual order 1: calls without a CUDA graph"] == "missed"
    assert seen["flux residual order 1: error over its bound on FFF..F."] == "met"


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, []),
        ({"weights_bytes": 52}, ["weights of the full graph over bfloat16"]),
        ({"full_ms": 11.1}, ["full step over bfloat16"]),
        ({"parity": {"FF": {"over_bound": 1.1}}}, ["error over its bound on FF"]),
    ],
)
def test_quantised_weights_are_judged_beside_bfloat16(change, missed):
    wide = OURS | {"weights_bytes": 100, "full_ms": 10.0}
    few = wide | {"weights": "fp8", "weights_bytes": 51, "full_ms": 11.0} | change
    results = {"eager": {}, "ours residual order 1": wide, "ours residual order 1 fp8": few}
    found = goals.of_contest({"model": "flux", "results": results})
    where = "flux residual order 1 fp8: "
    assert [goal["goal"] for goal in found if goal["verdict"] == "missed"] == [where + goal for goal in missed]
    assert len(found) == 4 + 4 + 2
    lost = goals.of_contest({"model": "flux", "results": results | {"ours residual order 1": {"failed": "it broke"}}})
    assert {goal["why"] for goal in lost if goal["verdict"] == "not run"} == {"it broke"}


def test_the_table_says_what_is_met_missed_and_not_run():
    stages = [
        {"stage": "flux", "status": "missed", "seconds": 61.2, "why": "", "mend": {"needs": "the times"},
         "goals": [goals.at_least("a", 0.99, 0.95), goals.at_most("b", 2, 1.5), goals.not_run("c", "no time left")]},
        {"stage": "fp8", "status": "not run", "seconds": 0, "why": "there is none", "goals": []},
        {"stage": "facts", "status": "passed", "seconds": 2, "why": "", "goals": [goals.holds("a compiler", True)]},
    ]  # fmt: skip
    assert goals.table(stages).splitlines() == [
        "flux: missed in 61 s",
        "    missed      a is 0.95, expected at least 0.99",
        "    met         b is 1.5, expected at most 2",
        "    not run     c: no time left",
        "    to mend this away from the GPU, you need: the times",
        "fp8: not run: there is none",
        "facts: passed in 2 s",
        "    met         a compiler is yes, expected yes",
    ]


# How a stage ends


def python(code, seconds, tmp_path):
    return process.run([sys.executable, "-c", code], seconds, tmp_path / "log.txt", os.environ)


def test_a_process_ends_in_one_of_four_ways(tmp_path):
    assert python("print('said')", 60, tmp_path).how == "done"
    assert process.tail(tmp_path / "log.txt") == ["said"]
    failed = python("raise SystemExit(3)", 60, tmp_path)
    assert failed.how == "failed" and failed.why.startswith("exit 3 after")
    crashed = python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 60, tmp_path)
    assert crashed.how == "crashed" and crashed.why.startswith("ended by SIGSEGV after")


def test_one_that_takes_too_long_says_where_it_stands_and_takes_its_children_with_it(tmp_path):
    code = (
        "import faulthandler, signal, subprocess, sys, time; faulthandler.register(signal.SIGUSR1)\n"
        "def here(): time.sleep(600)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True); here()"
    )
    ended = python(code, 3, tmp_path)
    assert ended.how == "timed out" and ended.seconds < 30
    assert ended.why.endswith("expected to end within 3 s")
    said = process.tail(tmp_path / "log.txt")
    assert any("in here" in line for line in said)
    child = Path("/proc") / said[0] / "stat"
    for _ in range(100):
        if not child.exists() or child.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {said[0]} lives on")


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A folder in the place of build/first-hour."""
    monkeypatch.setattr(first_hour, "BUILD", tmp_path)
    return tmp_path


def pretend(monkeypatch, ended, log="", **said):
    """Let a stage's process end so, after it said so."""

    def run(command, seconds, path, environment):
        path.write_text(log)
        if said:
            (path.parent / "report.json").write_text(json.dumps(said))
        return ended

    monkeypatch.setattr(process, "run", run)


def test_a_stage_that_crashes_keeps_what_it_found(build, monkeypatch):
    met = goals.at_least("copies", 1, 2)
    crash = process.Ended("crashed", "ended by SIGSEGV after 9 s", 9.0)
    pretend(monkeypatch, crash, "line\nFatal Python error: Segmentation fault", found={"gpu": "x"}, goals=[met])
    record = first_hour.one(stage_of("facts"), args(), 60, None)
    assert (record["status"], record["why"]) == ("crashed", "ended by SIGSEGV after 9 s")
    assert record["found"] == {"gpu": "x"} and record["goals"] == [met]
    assert record["log_tail"][-1].startswith("Fatal Python error")
    assert record["mend"]["needs"].startswith("the stack at the crash")


def test_a_stage_that_says_nothing_has_every_goal_not_run(build, monkeypatch):
    pretend(monkeypatch, process.Ended("timed out", "stopped after 60 s, expected to end within 60 s", 60.0))
    record = first_hour.one(stage_of("facts"), args(), 60, None)
    assert record["status"] == "timed out" and record["mend"]["needs"].startswith("the stacks at the end of the log")
    assert [goal["verdict"] for goal in record["goals"]] == ["not run"]


def test_a_missed_goal_makes_a_stage_missed(build, monkeypatch):
    pretend(monkeypatch, process.Ended("done", "", 1.0), found={}, goals=[goals.at_least("efficiency", 0.99, 0.5)])
    record = first_hour.one(stage_of("facts"), args(), 60, None)
    assert record["status"] == "missed" and "compile_for_gpu.py --gpu 9.0" in record["mend"]["needs"]


def test_a_stage_that_proved_nothing_has_not_passed(build, monkeypatch):
    pretend(monkeypatch, process.Ended("done", "", 1.0))
    record = first_hour.one(stage_of("facts"), args(), 60, None)
    assert (record["status"], record["why"]) == ("failed", "it ended without a word, expected what it found")
    pretend(monkeypatch, process.Ended("done", "", 1.0), found={}, goals=[goals.not_run("parity", "no library")])
    assert first_hour.one(stage_of("facts"), args(), 60, None)["status"] == "not run"
    pretend(monkeypatch, process.Ended("done", "", 1.0), not_run="torch finds no GPU")
    assert first_hour.one(stage_of("facts"), args(), 60, None)["why"] == "torch finds no GPU"


def test_what_a_stage_lacks_is_said_before_it_starts(build):
    assert first_hour.one(stage_of("facts"), args(), 3, None)["why"] == "no time left in --budget"
    lost = Stage("x", 1, "x", packages=("torch", "no_such_package"))
    assert lost.why_not().startswith("no_such_package not installed, expected for this stage; carry it")
    assert "no-such-program is not on the path" in Stage("x", 1, "x", packages=(), program="no-such-program").why_not()


def test_stale_words_of_an_earlier_run_are_not_read_again(build, monkeypatch):
    pretend(monkeypatch, process.Ended("done", "", 1.0), found={"old": 1}, goals=[])
    first_hour.one(stage_of("facts"), args(), 60, None)
    pretend(monkeypatch, process.Ended("failed", "exit 1 after 1 s", 1.0))
    assert first_hour.one(stage_of("facts"), args(), 60, None)["found"] == {}


def test_a_report_keeps_what_was_found_before_it_failed(tmp_path):
    report = Report(tmp_path / "report.json", 100)
    report.write({"a": 1}, [])
    report.failed("RuntimeError: no")
    assert read(tmp_path / "report.json") == {"found": {"a": 1}, "goals": [], "error": "RuntimeError: no"}
    assert 90 < report.left() <= 100 and read(tmp_path / "none.json") == {}


def test_every_stage_is_listed_and_its_code_is_there():
    text = listing()
    for stage in STAGES:
        assert f"\n{stage.name} " in "\n" + text and stage.proves in text
        module, function = stage.entry.split(":")
        assert callable(getattr(import_module(module), function))
    assert NAMES[:4] == ("facts", "engines", "captures", "flux")


# A contest


@pytest.fixture
def contest(monkeypatch):
    """`contest.run` over contestants that are given, without a model."""
    from hour import contest

    machine = SimpleNamespace(floor=lambda: {"bytes_per_s": 1e9, "flops_per_s": 1e12}, free=lambda: None)
    monkeypatch.setattr(contest, "Machine", lambda *_: machine)
    monkeypatch.setattr(contest, "Case", lambda *_: SimpleNamespace(model=SimpleNamespace(parameters=list)))

    def run(report, **contestants):
        made = {name.replace("_", " "): call for name, call in contestants.items()}
        monkeypatch.setattr(contest, "contestants", lambda *_: made)
        contest.run("flux", args(), report)

    return run


def fails():
    raise SystemExit("cache-dit is missing")


def test_a_rival_that_fails_costs_nobody_anything(contest, tmp_path):
    report = Report(tmp_path / "report.json", 100)
    contest(report, cache_dit_eager=fails, ours_residual_order_1=lambda: dict(OURS, full_ms=2.0, state_bytes=1))
    results = read(report.path)["found"]["results"]
    assert results["cache dit eager"]["failed"] == "SystemExit: cache-dit is missing"
    assert results["ours residual order 1"]["efficiency"] == OURS["efficiency"]


def test_one_of_ours_that_fails_fails_the_stage_and_keeps_the_rest(contest, tmp_path):
    report = Report(tmp_path / "report.json", 100)
    with pytest.raises(RuntimeError, match="ours module order 1: SystemExit: cache-dit is missing"):
        contest(report, ours_module_order_1=fails, eager=lambda: {"step_ms": 3.0})
    assert read(report.path)["found"]["results"]["eager"] == {"step_ms": 3.0}


def test_what_there_is_no_time_for_is_left_out(contest, tmp_path):
    report = Report(tmp_path / "report.json", 0)
    contest(report, eager=fails, ours_residual_order_1=fails)
    said = read(report.path)
    assert list(said["found"]["results"].values()) == 2 * [{"left_out": "no time left"}]
    assert [goal["why"] for goal in said["goals"]] == ["no time left"]


# Tests as stages


JUNIT = """<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="x"/></testcase>
<testcase name="c"><skipped message="no GPU"/></testcase><testcase name="d"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def test_tests_are_counted_by_their_report(tmp_path):
    path = tmp_path / "x.xml"
    path.write_text(JUNIT)
    assert suites.counts(path) == {"passed": 1, "failed": ["b"], "skipped": {"no GPU": 2}}
    assert suites.judged("goal", {**suites.counts(path), "died": ""})["verdict"] == "missed"
    empty = {"passed": 0, "failed": [], "skipped": {"no GPU": 2}, "died": ""}
    assert suites.judged("goal", empty) == goals.not_run("goal", "no GPU")
    assert suites.judged("goal", {**suites.counts(tmp_path / "none"), "died": "pytest ended by SIGSEGV"})["why"] == (
        "pytest ended by SIGSEGV"
    )


def test_an_engine_that_dies_costs_the_others_nothing(tmp_path, monkeypatch):
    def ran(report, name, words):
        dead = name == "engines-inductor"
        return {"passed": 0 if dead else 3, "failed": [], "skipped": {}, "died": "pytest ended by SIGABRT" * dead}

    monkeypatch.setattr(suites, "tests", ran)
    report = Report(tmp_path / "report.json", 100)
    with pytest.raises(RuntimeError, match=r"^inductor: pytest ended by SIGABRT$"):
        suites.engines(args(), report)
    verdicts = {goal["goal"].split(":")[0]: goal["verdict"] for goal in read(report.path)["goals"]}
    assert verdicts["inductor"] == "not run" and verdicts["onnxruntime"] == "met"
    assert {verdicts[kind] for kind in ("tensorrt", "tensorrt-rtx", "torch-tensorrt")} == {"not run"}


# What is carried


def test_too_heavy_a_load_is_refused():
    wheels = [Wheel("a", "1", 30_000_000), Wheel("b", "2", 34_000_000)]
    carry.refuse_heavy(wheels)
    with pytest.raises(SystemExit, match=r"the wheels are 64\.1 MB together, expected at most 64 MB; take c, 34\.1 MB"):
        carry.refuse_heavy([wheels[0], Wheel("c", "2", 34_100_000)])


def test_the_table_of_wheels_names_what_stays_behind():
    left = [(Wheel("big", "3", 255_000_000), "engines: big"), (Wheel("unknown", "", 0), "nothing")]
    lines = carry.table([Wheel("a", "1.0", 1_500_000), Wheel("b", "2.0", 500_000)], left).splitlines()
    assert [line.split() for line in lines] == [
        ["a", "1.0", "1.50", "MB"],
        ["b", "2.0", "0.50", "MB"],
        ["together", "2.00", "MB", "of", "at", "most", "64"],
        ["big", "3", "255.00", "MB,", "left", "behind;", "not", "run:", "engines:", "big"],
        ["unknown", "?", "MB,", "left", "behind;", "not", "run:", "nothing"],
    ]


def test_everything_that_is_carried_is_pinned():
    known = carry.pins()
    assert all(name in known for name in carry.CARRIED)
    assert known["torch"].startswith("2.11")  # the oldest versions come first


def test_a_copy_without_git_is_known_by_what_was_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(carry, "commit_of", lambda: ("", False))
    with pytest.raises(SystemExit, match=r"this checkout has no git and carried\.json is not beside the wheels"):
        carry.origin(tmp_path)
    noted = {"commit": "c" * 40, "uncommitted_changes": False, "sources": carry.digest(ROOT)}
    (tmp_path / "carried.json").write_text(json.dumps(noted))
    assert carry.origin(tmp_path) == {"commit": "c" * 40, "uncommitted_changes": False}
    (tmp_path / "carried.json").write_text(json.dumps(noted | {"sources": "other"}))
    assert carry.origin(tmp_path)["uncommitted_changes"] is True


def test_without_wheels_nothing_is_installed(tmp_path):
    with pytest.raises(SystemExit, match="has no wheel, expected those of --carry; run --carry"):
        carry.install(tmp_path, tmp_path / "site")


# What is needed to mend


@pytest.mark.parametrize(
    ("said", "needed"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory", "the bytes that the stage asked for"),
        ("BuildError: graph `full` does not compile, expected torch", "the generated kernels and wrappers"),
        ("StepError: graph `full` cannot be captured (x)", "the name of the call that may not be captured"),
        ("RuntimeError: CUDA error: an illegal memory access", "the stack at the crash"),
        ("timed out: stopped after 9 s", "the stacks at the end of the log"),
        ("ModuleNotFoundError: No module named 'x'", "the name of the package in the log; add it to `CARRIED`"),
        ("Captured stderr setup\nBundleError: torch is 2.11.0+cu130, expected 2.11.0", "the log and the versions"),
        ("something else", "the log and the versions"),
    ],
)
def test_a_failure_says_what_it_needs(said, needed):
    assert mending.needs(["", said], [], "9.0").startswith(needed)


def test_the_error_goes_before_what_stands_somewhere_in_the_log():
    log = "warning: CUDA out of memory was retried"
    assert mending.needs(["stopped after 9 s", log], [], "9.0").startswith("the stacks at the end of the log")


def test_a_broken_bound_needs_the_prediction_and_a_slow_step_its_counts():
    assert mending.needs([], ["flux: error over its bound on FF"], "9.0").startswith("the prediction of the first step")
    assert "compile_for_gpu.py --gpu 12.0`" in mending.needs([], ["flux: efficiency"], "12.0")


def test_the_archive_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(mending, "MOST_BYTES", 1000)
    monkeypatch.setattr(mending, "ONE_FILE", 600)
    log, made = tmp_path / "log.txt", tmp_path / "compiled"
    log.write_text("x" * 900)
    made.mkdir()
    for k, size in enumerate((300, 300, 700)):
        (made / f"{k}.py").write_text("y" * size)
        os.utime(made / f"{k}.py", (k, k))
    names = mending.pack(tmp_path / "a.zip", "flux", [log, tmp_path / "none"], made)
    assert names == ["flux/log.txt", "flux/generated/1.py"]  # the newest that is not too large, then no room
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.namelist() == names and len(archive.read("flux/log.txt")) == 600  # its end


# The record


def record(tmp_path, name, date, stages, **changes):
    content = {"date": date, "commit": "a" * 40, "uncommitted_changes": False, "trial": "", "device": "cuda",
               "command": name, "seconds": 2.0,
               "stages": [{"stage": s, "status": status} for s, status in stages.items()], **changes}  # fmt: skip
    path = tmp_path / name
    path.write_text(json.dumps(content))
    return path


def test_runs_of_one_commit_are_filed_as_one(tmp_path):
    first = record(tmp_path, "1", "2026-01-01T01", {"facts": "passed", "flux": "timed out", "wan": "passed"})
    second = record(tmp_path, "2", "2026-01-01T02", {"facts": "not run", "flux": "passed"})
    path = first_hour.filed([second, first], tmp_path / "out", False)
    assert path.name == "2026-01-01-first-hour.json"
    whole = json.loads(path.read_text())
    assert (whole["command"], whole["seconds"]) == ("1; 2", 4.0)
    stages = {stage["stage"]: stage["status"] for stage in whole["stages"]}
    assert stages == {"facts": "passed", "flux": "passed", "wan": "passed"}
    other = record(tmp_path, "3", "2026-01-01T03", {}, commit="b" * 40)
    with pytest.raises(SystemExit, match="of 2 commits or devices, expected one"):
        first_hour.filed([first, other], tmp_path / "out", False)


def test_a_filed_record_names_no_folder_of_the_machine():
    said = ["File /opt/x/site-packages/torch/a.py", "see https://a.org/b/c and tests/test_a.py, 5 GB/s", 3]
    assert first_hour.impersonal({"why": said, "platform": "a kernel", "n": None}) == {
        "why": ["File a.py", "see https://a.org/b/c and tests/test_a.py, 5 GB/s", 3],
        "n": None,
    }


def test_a_trial_without_a_gpu_needs_tiny_models(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["first_hour.py", "--device", "cpu"])
    with pytest.raises(SystemExit):
        first_hour.main()
    assert "--device is cpu without --tiny" in capsys.readouterr().err


def test_the_parts_that_start_stages_need_nothing_but_python():
    """A machine that lacks a package, or whose torch is broken, still says so in a record."""
    code = "import sys, first_hour; print(*sorted({'torch', 'numpy', 'pydantic'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tools", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stderr


def trial(tmp_path, *words):
    tool = [sys.executable, str(ROOT / "tools/first_hour.py"), "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    # Of models so small, threads cost more than they do: they wait for each other.
    done = subprocess.run([*tool, *words], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    path = tmp_path / "first-hour.json"
    assert path.is_file(), done.stderr
    stages = {stage["stage"]: stage for stage in json.loads(path.read_text())["stages"]}
    return done, stages


@pytest.mark.slow
def test_a_trial_of_the_contests_runs_through(tmp_path):
    """Every contestant on tiny models, without compiling: the code that a GPU will run."""
    pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    quick = ["--no-compile", "--steps", "8", "--order", "1", "--loops", "1", "--repeats", "1", "--patience", "4"]
    done, stages = trial(tmp_path, "--stage", "flux", "dit", "wan", "fp8", *quick)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    for name, stage in stages.items():
        results = stage["found"]["results"]
        assert stage["status"] == "passed", stage["why"]
        assert not [label for label, result in results.items() if "failed" in result or "left_out" in result]
        assert ("cache-dit eager" in results) == ("hook eager" in results) == (name == "flux")
        for granularity in ("residual", "residual" if name == "fp8" else "module"):
            ours = results[f"ours {granularity} order 1"]
            assert ours["plan"] == "FFF....." and ours["fallbacks"] == 0
            assert ours["efficiency"] == pytest.approx(ours["speedup"] / ours["ideal_speedup"])
            assert 0 < max(ours["parity"]["FFF..F."]["over_bound_of_each_step"]) <= 1
        assert results["eager"]["flops"] > 0
        assert {goal["verdict"] for goal in stage["goals"]} <= {"met", "not judged"}
    few, wide = (stages["fp8"]["found"]["results"][f"ours residual order 1{form}"] for form in (" fp8", ""))
    assert few["weights"] == "fp8" and few["weights_bytes"] < wide["weights_bytes"]
    assert few["parity"] != wide["parity"] and max(few["parity"]["FFF..F."]["over_bound_of_each_step"]) <= 1
    with zipfile.ZipFile(tmp_path / "first-hour.zip") as archive:
        assert archive.namelist() == [f"{name}/log.txt" for name in stages]


@pytest.mark.slow
def test_a_trial_of_the_facts_is_filed_with_its_commit(tmp_path):
    done, stages = trial(tmp_path, "--stage", "facts", "--no-compile", "--patience", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert stages["facts"]["found"]["bytes_per_s"] > 0
    whole = json.loads((tmp_path / "first-hour.json").read_text())
    assert len(whole["commit"]) == 40 and whole["trial"] and whole["versions"]["torch"]
