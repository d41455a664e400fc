"""The GPU suite without a GPU: its results survive failures, limits, interruptions and kills."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.gpu import compile_fp16, equalities, hopper_gemm, profile_unets, report, row_file, steps, suite
from benchmarks.result_files import ROOT
from benchmarks.speed.launches import TINY, launches
from benchmarks.speed.unet_rows import rows as unet_rows
from benchmarks.tuning import tune

PYTHON = [sys.executable, "-c"]


def step(name, code, seconds=60.0, **options):
    return steps.Step(name, [*PYTHON, code], seconds, **options)


def run(folder, *chosen, seconds=60.0, again=False):
    record = suite.Record(folder, {"device": "none"}, again)
    suite.run_stage("stage", chosen, seconds, record, suite.Interruption())
    return json.loads((folder / "suite.json").read_text())["steps"]


def outcomes(noted):
    return {name: each["outcome"] for name, each in noted.items()}


def test_a_failed_step_is_recorded_and_the_others_run(tmp_path):
    noted = run(tmp_path, step("tests", "raise SystemExit(3)"), step("kernels", "pass"))

    assert outcomes(noted) == {"tests": "failed", "kernels": "passed"}
    assert noted["tests"]["exit_code"] == 3


def test_a_second_run_repeats_only_what_did_not_pass(tmp_path):
    passing = step("passing", "import os, pathlib; pathlib.Path('{}').open('a').write('x')".format(tmp_path / "runs"))
    for again, runs in ((False, 1), (False, 1), (True, 2)):
        assert run(tmp_path, passing, step("failing", "raise SystemExit(1)"), again=again)["failing"]["exit_code"] == 1
        assert len((tmp_path / "runs").read_text()) == runs


ROW = '{"group": "a", "us": 1.5}'
SLOW = """
import time
with open({!r}, "a") as file:
    file.write({!r})
time.sleep(60)
"""


def test_a_step_over_its_limit_is_stopped_and_keeps_its_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    start = time.monotonic()
    noted = run(
        tmp_path, step("kernels", SLOW.format(str(file), f"{ROW}\n{ROW[:9]}"), seconds=2.0), step("unet", "pass")
    )

    assert time.monotonic() - start < 12
    assert outcomes(noted) == {"kernels": "timed out", "unet": "passed"}
    assert row_file.read(file) == [{"group": "a", "us": 1.5}]


def test_a_stage_over_its_limit_starts_nothing_more(tmp_path):
    noted = run(tmp_path, step("first", "import time; time.sleep(60)"), step("second", "pass"), seconds=1.0)

    assert outcomes(noted) == {"first": "timed out", "second": "no time left"}
    assert noted["first"]["limit_seconds"] == pytest.approx(1.0, abs=0.2)


def test_a_step_that_is_stopped_may_still_report(tmp_path):
    """pytest prints its failures at an interruption, not when it is terminated."""
    code = (
        "import pathlib, time\ntry:\n    time.sleep(60)\n"
        f"except KeyboardInterrupt:\n    pathlib.Path({str(tmp_path / 'report')!r}).write_text('x')"
    )
    assert outcomes(run(tmp_path, step("tests", code, seconds=2.0))) == {"tests": "timed out"}
    assert (tmp_path / "report").read_text() == "x"


ALIVE = "import os, sys; sys.exit(os.path.exists({!r}))"
BESIDE = "import pathlib, time\np = pathlib.Path({!r})\np.touch()\ntry:\n    time.sleep(60)\nfinally:\n    p.unlink()"


def test_nothing_runs_beside_a_step_that_measures(tmp_path):
    file = str(tmp_path / "running")
    noted = run(
        tmp_path,
        step("compile", BESIDE.format(file), background=True),
        step("tests", f"import os, time\nwhile not os.path.exists({file!r}): time.sleep(.05)"),
        step("race", ALIVE.format(file), measures=True),
    )

    assert outcomes(noted) == {"compile": "stopped for a quiet machine", "tests": "passed", "race": "passed"}


def test_a_stage_waits_for_what_runs_in_the_background(tmp_path):
    noted = run(tmp_path, step("compile", "import time; time.sleep(1)", background=True), step("tests", "pass"))

    assert outcomes(noted) == {"compile": "passed", "tests": "passed"}


DRIVER = """
import sys
from pathlib import Path
from benchmarks.gpu.steps import Step
from benchmarks.gpu.suite import Interruption, Record, run_stage
folder = Path(sys.argv[1])
interruption = Interruption()
interruption.install()
code = "from benchmarks.gpu.row_file import append; import pathlib, sys, time; file = pathlib.Path(sys.argv[1]);"
code += "append(file.with_suffix('.jsonl'), {'us': 1});"
code += "file.exists() or (print('waiting', flush=True), time.sleep(60))"
steps = [Step(name, [sys.executable, "-c", code, str(folder / name)], 60, measures=True) for name in "ab"]
run_stage("stage", steps, 600, Record(folder, {}, False), interruption)
"""


@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
def test_a_kill_in_any_step_loses_no_row_and_a_second_run_goes_on(tmp_path, number):
    """A file with a step's name lets the step end."""
    command = [sys.executable, "-c", DRIVER, tmp_path]
    for at, name in enumerate("ab"):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert any(line == "waiting\n" for line in process.stdout)
        process.send_signal(getattr(signal, number))
        process.communicate(timeout=30)

        noted = json.loads((tmp_path / "suite.json").read_text())["steps"]
        expected = dict.fromkeys("ab"[:at], "passed") | {name: {"SIGKILL": "killed", "SIGTERM": "interrupted"}[number]}
        assert {each: outcomes(noted)[each] for each in expected} == expected
        assert row_file.read(tmp_path / f"{name}.jsonl") == [{"us": 1}]
        (tmp_path / name).touch()

    subprocess.run(command, cwd=ROOT, timeout=60, check=True)
    assert outcomes(json.loads((tmp_path / "suite.json").read_text())["steps"]) == dict.fromkeys("ab", "passed")
    assert [len(row_file.read(tmp_path / f"{name}.jsonl")) for name in "ab"] == [2, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux kills the children of a killed process on request")
def test_a_kill_of_the_suite_ends_its_step(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", DRIVER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert any(line == "waiting\n" for line in process.stdout)
    process.kill()

    assert process.stdout.read() == ""  # ends when the last process that holds it has ended


def test_ctrl_c_interrupts_as_termination_does(monkeypatch):
    installed = {}
    monkeypatch.setattr(suite.signal, "signal", installed.__setitem__)
    interruption = suite.Interruption()

    interruption.install()

    assert installed == dict.fromkeys((signal.SIGINT, signal.SIGTERM), interruption)


def test_steps_are_real_commands_and_measure_what_exists(tmp_path):
    of_stage = steps.stages(tmp_path)
    every = [each for stage in of_stage.values() for each in stage]

    assert of_stage.keys() == steps.SECONDS.keys()
    assert len({each.name for each in every}) == len(every)
    for each in every:
        words = list(each.command)
        chosen = {words[i + 1] for i, word in enumerate(words) if word == "--row"}
        assert chosen <= {row.name for row in unet_rows("sd15", "cuda")}, each.name
        assert all((ROOT / word.removeprefix("--ignore=")).exists() for word in words if word.startswith("--ignore="))
    assert [each.name for each in every if each.background] == ["compile"]
    assert sum(each.seconds for each in of_stage["check"] if not each.background) <= 700
    tests = next(each for each in every if each.name == "cuda tests")
    assert tests.variables["OMP_NUM_THREADS"] == "1"


DRY = ("equalities", "hopper gemm")


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The results of some steps of a dry run: each command runs."""
    folder = tmp_path_factory.mktemp("dry_run")
    chosen = [each for stage in steps.stages(folder, dry_run=True).values() for each in stage if each.name in DRY]
    assert len(chosen) == len(DRY)
    noted = run(folder, *chosen, seconds=600)
    assert outcomes(noted) == dict.fromkeys((each.name for each in chosen), "passed")
    return folder


def test_launches_are_equal_in_every_form(dry_run):
    found = row_file.read(dry_run / "equalities.jsonl")

    assert {row["op"] for row in found} == {"conv2d", "linear", "linear_geglu"}
    assert {"as shipped", "one product a step", "programmatic launches", "split-K"} == {row["form"] for row in found}
    assert not any(row["differing"] for row in found)


def test_a_launch_that_differs_is_counted(monkeypatch):
    monkeypatch.setattr(equalities, "results", lambda problem, config, repeats: iter(_counted(repeats)))
    first, *_ = equalities.compared(TINY[0], "cpu", 3)

    assert first["differing"] == 2


def _counted(repeats):
    import torch

    return [torch.tensor(0)] if repeats == 1 else [torch.tensor(0), torch.tensor(1), torch.tensor(2)]


def test_each_kind_of_launch_is_compared_once_at_its_largest():
    counted = launches("sd15", 2)
    chosen = equalities.kinds(counted)

    assert {launch.op for launch in chosen} == {"conv2d", "linear", "linear_geglu"}
    assert {launch.statistics for launch in chosen} == {launch.upsample for launch in chosen} == {True, False}
    assert len(chosen) < len(counted)
    assert chosen[0].operations == max(launch.operations for launch in counted)


def test_the_hopper_gemm_does_not_run_without_a_gpu(dry_run):
    (decision,) = row_file.read(dry_run / "hopper_gemm.jsonl")

    assert decision["decision"] == "not run"
    assert "needs a GPU of architecture cuda 90" in decision["reason"]


def test_the_compilers_cache_is_kept_in_small_files(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_fp16, "PART", 10)
    for content in (bytes(range(35)), bytes(range(12))):
        compile_fp16.save(tmp_path, content)
        assert compile_fp16.load(tmp_path) == content
        assert max(path.stat().st_size for path in tmp_path.iterdir()) <= 10
    assert compile_fp16.load(tmp_path / "nothing") == b""


EVENTS = [
    *({"cat": "kernel", "name": "gemm", "dur": 10.0, "args": {"grid": [2, 1, 1], "registers per thread": 168}},) * 4,
    {"cat": "kernel", "name": "gemm", "dur": 50.0, "args": {"grid": [4, 1, 1]}},
    {"cat": "gpu_memset", "name": "fill", "dur": 1.0},
    {"cat": "cpu_op", "name": "aten::add", "dur": 99.0},
]


def test_kernels_are_added_up_by_name_and_grid():
    found = profile_unets.by_kernel(EVENTS, passes=2)

    assert [(row["kernel"], row["grid"], row["launches"], row["us"]) for row in found] == [
        ("gemm", [4, 1, 1], 0.5, 25.0), ("gemm", [2, 1, 1], 2.0, 20.0), ("fill", None, 0.5, 0.5),
    ]  # fmt: skip
    assert found[1]["registers"] == 168


def test_the_worst_launches_are_those_that_lose_the_most_time(tmp_path):
    linear, geglu, conv = TINY
    rows = [
        [launch.op, launch.rows, launch.out_channels, launch.reduction, [1, 1], False, False, [], us, tops]
        for launch, us, tops in ((linear, 1.0, 0.05), (conv, 1.0, 0.6))
    ]
    (tmp_path / "timings.json").write_text(json.dumps({"rows": rows}))
    counted = {linear: 3, geglu: 1, conv: 3}

    assert tune.worst(counted, tmp_path / "timings.json", 3) == [geglu, linear, conv]  # the first has no time
    assert tune.worst(counted, tmp_path / "timings.json", 2) == [geglu, linear]
    assert set(tune.worst(counted, tmp_path / "nothing.json", 3)) == set(TINY)


def unet_row(row, ms, batch=2, **others):
    return {"unet": "sd15", "batch": batch, "row": row, "median_ms": ms, "back_to_back_ms": ms, "in_turn_ms": None,
            "weights_mb": 434.0, "peak_mb": None, "launches": 380} | others  # fmt: skip


@pytest.fixture
def results(tmp_path):
    def write(name, rows):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))

    (tmp_path / "suite.json").write_text(json.dumps({"device": "GPU", "steps": {"race": {"outcome": "passed"}}}))
    write("race", [unet_row("int4 graph", 5.0), unet_row("fp16 graph", 9.0, in_turn_ms=10.0)])
    write("optimisations", [unet_row("int4 graph", 5.0), unet_row("int4 graph, without split-K", 6.0)])
    write("batches", [unet_row("int4 graph", 20.0, 8), unet_row("fp16 graph", 30.0, 8)])
    for row in profile_unets.by_kernel(EVENTS, passes=2):
        row_file.append(tmp_path / "profile.jsonl", {"unet": "sd15", "row": "int4 graph", **row})
    row_file.append(tmp_path / "operators.jsonl", {"operator": "quantize", "passed": True, "detail": ""})
    row_file.append(tmp_path / "equalities.jsonl", {"differing": 1})
    return tmp_path


def test_the_report_has_a_table_of_each_kind(results, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report", str(results)])
    report.main()
    text = (results / "report.md").read_text()

    assert "| sd15 | fp16 graph | 9 | 9 | 10 | 434 | - | 380 | 2 |" in text
    assert "| sd15 | int4 graph, without split-K | 6 | 1.2 | 380 |" in text
    assert "| sd15 | 8 | fp16 graph | 30 | 1.5 |" in text
    assert "| gemm | [4, 1, 1] | 0.5 | 25 | 54.9% | - |" in text
    assert "operators equal to their oracles: 1 of 1" in text
    assert "in every repeat: 0 of 1" in text


def test_tables_go_to_their_places_in_documents():
    document = (
        "before\n<!-- gpu: race -->\nold\n\nold\n<!-- end -->\nbetween\n<!-- gpu: batches -->\nkept\n<!-- end -->"
    )

    assert report.replaced(document, "race", "new") == document.replace("old\n\nold", "new")
    assert report.replaced(document, "profile", "new") == document


def hopper_row(us, unet="sd15", equal=True, is_chosen=True):
    row = {"unet": unet, "number": 5, "us": us, "triton_us": 10.0, "is_chosen": is_chosen}
    return row | {"integers_equal": equal, "results_equal": True}


@pytest.mark.parametrize(
    ("rows", "decision", "faster", "saved"),
    [
        ([hopper_row(9.0), hopper_row(8.0, "sdxl")], "on", "2 of 2 layers", {"sd15": 5.0, "sdxl": 10.0}),
        ([hopper_row(9.0), hopper_row(8.0, equal=False, is_chosen=False)], "off", "1 of 1 layers", {"sd15": 5.0}),
        ([hopper_row(11.0), hopper_row(8.0, is_chosen=False)], "off", "0 of 1 layers", {"sd15": -5.0}),
        ([hopper_row(11.0), hopper_row(6.0)], "on", "1 of 2 layers", {"sd15": 15.0}),
        ([hopper_row(6.0), hopper_row(11.0, "sdxl")], "off", "1 of 2 layers", {"sd15": 20.0, "sdxl": -5.0}),
    ],
    ids=["faster", "unequal integers", "another tile is faster", "faster in all", "one UNet is slower"],
)
def test_the_hopper_gemm_is_on_if_its_integers_are_equal_and_each_unet_gains(rows, decision, faster, saved):
    last = hopper_gemm.decision(rows)
    assert (last["decision"], last["faster"], last["us_saved"]) == (decision, faster, saved)


def test_the_decision_covers_the_linear_layers_of_a_unet():
    served = hopper_gemm.served("sd15")
    assert len(served) >= 8
    assert all(launch.op == "linear" and not launch.statistics for launch, _ in served)
    operations = [launch.operations * number for launch, number in served]
    assert operations == sorted(operations, reverse=True)
