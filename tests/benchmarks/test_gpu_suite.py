"""The GPU suite without a GPU: its results survive failures, limits and interruptions."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.result_files import ROOT
from benchmarks.speed import bench_hopper_gemm, gpu_suite, kernel_cases
from benchmarks.speed.kernel_sides import CHAINS

ABOUT = {"device": "none"}


def stage(name, code, share=1.0, read=lambda: None):
    return gpu_suite.Stage(name, [sys.executable, "-c", code], share, read)


def run(tmp_path, *stages, seconds=60.0):
    output = tmp_path / "results.json"
    exit_code = gpu_suite.run_suite(stages, seconds, output, ABOUT, gpu_suite.Interruption())
    return exit_code, json.loads(output.read_text())


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The finished process of a dry run, its document, and the report of pytest-benchmark in its stage of kernels."""
    folder = tmp_path_factory.mktemp("dry_run")
    output, report = folder / "results.json", folder / "benchmark.json"
    command = [sys.executable, "-m", "benchmarks.speed.gpu_suite", "--dry-run", "--minutes", "8", "--output", output]
    # pytest-benchmark measures nothing in a process with variables of xdist.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": f"--benchmark-json={report}"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=480)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished, output, report


def test_dry_run_works_end_to_end(dry_run):
    _, output, _ = dry_run
    document = json.loads(output.read_text())
    assert {name: each["outcome"] for name, each in document["stages"].items()} == dict.fromkeys(
        ("hopper", "tests", "kernels", "unet"), "passed"
    )
    assert {"device", "date", "cpu_model", "threads", "versions"} <= set(document)
    assert document["results"]["hopper"]["decision"] == "not run"
    assert "needs a GPU of architecture cuda 90" in document["results"]["hopper"]["reason"]
    kernels = document["results"]["kernels"]
    assert kernels["columns"][:5] == ["group", "unet", "kind", "implementation", "us"]
    assert len(kernels["rows"]) == 3 * 3 + 2 * len(CHAINS)  # layers by implementations, chains by implementations
    assert document["results"]["unet"]["rows"][0]["median_ms"] > 0
    lines = output.read_text().splitlines()
    assert sum(line.startswith("[") for line in lines) == len(kernels["rows"])  # one line a row


def test_kernels_of_a_dry_run_are_timed_row_by_row_with_a_summary(dry_run):
    finished, output, report = dry_run
    kernels = json.loads(output.read_text())["results"]["kernels"]
    rows = [dict(zip(kernels["columns"], row, strict=True)) for row in kernels["rows"]]
    expected = [(case.group, case.implementation) for case in kernel_cases.cases(full=False, tiny=True)]
    if not torch.cuda.is_available():
        assert [(row["group"], row["implementation"]) for row in rows] == expected
    assert all(row["us"] > 0 and math.isfinite(row["tflops"]) for row in rows)
    assert "tiny, conv2d:" in finished.stdout
    assert "slower than fp32:" in finished.stdout
    document = json.loads(report.read_text())
    assert document["machine_info"]["versions"]["torch"] == torch.__version__
    assert [benchmark["extra_info"]["us"] for benchmark in document["benchmarks"]] == [row["us"] for row in rows]


def test_a_failed_stage_is_recorded_and_the_others_run(tmp_path):
    exit_code, document = run(tmp_path, stage("tests", "raise SystemExit(3)"), stage("kernels", "pass"))
    assert exit_code == 1
    assert document["stages"]["tests"]["outcome"] == "failed"
    assert document["stages"]["tests"]["exit_code"] == 3
    assert document["stages"]["kernels"]["outcome"] == "passed"
    assert document["device"] == "none"


def test_exit_code_is_0_if_all_passed(tmp_path):
    assert run(tmp_path, stage("tests", "pass"), stage("kernels", "pass"))[0] == 0


def test_a_stage_over_its_share_is_stopped_and_keeps_its_rows(tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = '{"group": "a", "us": 1.5}'
    code = f"import time; f = open({str(rows)!r}, 'w'); f.write('{row}\\n' + '{row[:9]}'); f.close(); time.sleep(60)"
    slow = stage("kernels", code, 1.0, lambda: gpu_suite.read_rows(rows))
    start = time.monotonic()
    exit_code, document = run(tmp_path, slow, stage("unet", "pass"), seconds=4.0)
    assert time.monotonic() - start < 10
    assert exit_code == 1
    assert document["stages"]["kernels"]["outcome"] == "timed out"
    assert document["stages"]["kernels"]["limit_seconds"] == pytest.approx(2.0, abs=0.2)
    assert document["stages"]["unet"]["outcome"] == "passed"
    assert document["results"]["kernels"] == {"columns": ["group", "us"], "rows": [["a", 1.5]]}


def test_a_stage_that_is_stopped_may_still_report(tmp_path):
    """pytest prints its failures at an interruption, not when it is terminated."""
    report = tmp_path / "report"
    code = (
        "import pathlib, time\ntry:\n    time.sleep(60)\n"
        f"except KeyboardInterrupt:\n    pathlib.Path({str(report)!r}).write_text('x')"
    )
    _, document = run(tmp_path, stage("tests", code), seconds=3.0)
    assert document["stages"]["tests"]["outcome"] == "timed out"
    assert report.read_text() == "x"


def test_tests_side_by_side_have_a_thread_each(tmp_path):
    (tests,) = gpu_suite.stages(["tests"], full=False, dry_run=False, folder=tmp_path)
    asked = "import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'] != '1')"
    code, _ = run(tmp_path, gpu_suite.Stage("tests", [sys.executable, "-c", asked], 1, variables=tests.variables))
    assert code == 0


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
    last = bench_hopper_gemm.decision(rows)
    assert (last["decision"], last["faster"], last["us_saved"]) == (decision, faster, saved)


def test_a_decision_that_is_not_reached_is_recorded_with_the_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert gpu_suite.read_decision(path) is None
    path.write_text('{"us": 1.5}\n{"us": 2')
    assert gpu_suite.read_decision(path) == {"decision": "not finished", "rows": [{"us": 1.5}]}
    path.write_text('{"us": 1.5}\n{"decision": "on"}\n')
    assert gpu_suite.read_decision(path) == {"decision": "on", "rows": [{"us": 1.5}]}


def test_the_decision_covers_the_linear_layers_of_a_unet():
    served = bench_hopper_gemm.served("sd15")
    assert len(served) >= 8
    assert all(launch.op == "linear" and not launch.statistics for launch, _ in served)
    operations = [launch.operations * number for launch, number in served]
    assert operations == sorted(operations, reverse=True)


DRIVER = """
import sys
from pathlib import Path
from benchmarks.speed.gpu_suite import Interruption, Stage, run_suite
interruption = Interruption()
interruption.install()
command = [sys.executable, "-c"]
stages = [
    Stage("tests", [*command, "pass"], 1, lambda: {"finished": True}),
    Stage("kernels", [*command, "import time; print('waiting', flush=True); time.sleep(60)"], 1),
    Stage("unet", [*command, "pass"], 1),
]
sys.exit(run_suite(stages, 60, Path(sys.argv[1]), {}, interruption))
"""


def test_an_interrupted_run_keeps_finished_stages(tmp_path):
    output = tmp_path / "results.json"
    process = subprocess.Popen([sys.executable, "-c", DRIVER, output], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert any(line == "waiting\n" for line in process.stdout)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 1
    document = json.loads(output.read_text())
    outcomes = {name: each["outcome"] for name, each in document["stages"].items()}
    assert outcomes == {"tests": "passed", "kernels": "interrupted", "unet": "not run"}
    assert document["results"] == {"tests": {"finished": True}}


def test_ctrl_c_interrupts_as_termination_does(monkeypatch):
    installed = {}
    monkeypatch.setattr(gpu_suite.signal, "signal", installed.__setitem__)
    interruption = gpu_suite.Interruption()

    interruption.install()

    assert installed == dict.fromkeys((signal.SIGINT, signal.SIGTERM), interruption)


def test_stages_can_be_chosen_and_the_tests_leave_out_what_needs_no_gpu(tmp_path):
    chosen = gpu_suite.stages(["unet", "tests"], full=False, dry_run=False, folder=tmp_path)
    assert [each.name for each in chosen] == ["tests", "unet"]
    ignored = [word.removeprefix("--ignore=") for word in chosen[0].command if word.startswith("--ignore=")]
    assert ignored == list(gpu_suite.NOT_FOR_GPUS)
    assert all((ROOT / path).exists() for path in ignored)
    assert "--full" in gpu_suite.stages(["kernels"], full=True, dry_run=False, folder=tmp_path)[0].command


def test_file_names_of_devices():
    assert gpu_suite.environment.slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"
