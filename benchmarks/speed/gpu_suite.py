"""Runs everything that needs a GPU with one command and one results file: tests, kernels and whole UNets.

    python -m benchmarks.speed.gpu_suite [--minutes 9] [--stage hopper|tests|kernels|unet]... [--full] [--output FILE]
    python -m benchmarks.speed.gpu_suite --dry-run           # on a CPU, tiny shapes, less than a minute

Every stage is a process with a time limit: its share of the remaining budget. Unused time goes to the next stages. The
results are written before the first stage and after each stage. The finished rows of a stage are kept, so an
interruption (Ctrl-C, SIGTERM) loses no finished result. A failed stage does not stop the others; the exit code is 1 if
any stage did not pass.

  hopper   benchmarks/speed/bench_hopper_gemm.py: whether the GEMM in Gluon may take the place of Triton's
  tests    the test suite on the GPU, without slow tests that need no GPU: tests/kernels/test_static.py (compiles for
           other GPUs), tests/test_package.py (builds wheels), tests/examples (trains, samples on the CPU) and
           tests/benchmarks (runs benchmarks on the CPU); in parallel if pytest-xdist is installed
  kernels  benchmarks/speed/bench_kernels.py; --full for every shape
  unet     benchmarks/speed/bench_unet.py for SD1.5 and SDXL
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import environment
from benchmarks.command_line import new_parser
from benchmarks.result_files import ROOT, write_whole

NOT_FOR_GPUS = ("tests/kernels/test_static.py", "tests/test_package.py", "tests/examples", "tests/benchmarks")
TEST_PROCESSES = max(1, (os.cpu_count() or 1) - 2)  # each compiles kernels, which takes most of the time
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # for parallel processes
GRACE = 10.0  # seconds between interrupting a stage and killing it
POLL = 0.1  # seconds between checks of a stage


@dataclass(frozen=True)
class Stage:
    """A command, run in the repository's root; ``read`` returns its results, also after an early end."""

    name: str
    command: Sequence[str]
    share: float  # of the time of this stage and all later ones
    read: Callable[[], Any] = lambda: None
    variables: Mapping[str, str] = field(default_factory=dict)  # additional environment variables


class Interruption:
    """Records SIGINT or SIGTERM. Waiting code reads ``requested``, so no write is interrupted."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)


def stages(names: Sequence[str], full: bool, dry_run: bool, folder: Path) -> list[Stage]:
    """The stages by name; their files are in ``folder``."""
    decisions, rows, unets = folder / "hopper.jsonl", folder / "rows.jsonl", folder / "unets.json"
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests = [*pytest, "--maxfail=20", "tests", *(f"--ignore={path}" for path in NOT_FOR_GPUS)]
    if importlib.util.find_spec("xdist") is not None:
        tests += ["-n", str(TEST_PROCESSES)]
    hopper = [sys.executable, "-m", "benchmarks.speed.bench_hopper_gemm", f"--rows={decisions}"]
    kernels = [*pytest, "benchmarks/speed/bench_kernels.py", f"--rows={rows}", "--benchmark-columns=median,iqr,rounds"]
    unet = [sys.executable, "-m", "benchmarks.speed.bench_unet", "--output", str(unets)]
    if dry_run:
        tests = [*pytest, "-x", "tests/kernels/test_packing.py"]
        kernels += ["--tiny"]
        unet += ["--device", "cpu", "--unet", "ddpm_cifar", "--batch", "1", "--rounds", "1", "--row", "int4"]
    else:
        kernels += ["--full"] if full else []
        unet += ["--unet", "sd15", "--unet", "sdxl"]
    every = (
        Stage("hopper", hopper, 2, lambda: read_decision(decisions)),
        Stage("tests", tests, 4, variables=ONE_THREAD),
        Stage("kernels", kernels, 2, lambda: read_rows(rows)),
        Stage("unet", unet, 3, lambda: read_unets(unets)),
    )
    return [stage for stage in every if not names or stage.name in names]


def read_decision(path: Path) -> dict[str, Any] | None:
    """bench_hopper_gemm.py's decision, which is its last row, and the other rows."""
    if not path.exists():
        return None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    decided = rows.pop() if rows and "decision" in rows[-1] else {"decision": "not finished"}
    return {**decided, "rows": rows}


def read_rows(path: Path) -> dict[str, list[Any]] | None:
    """bench_kernels.py's rows; the names of the columns are stored once."""
    if not path.exists():
        return None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    columns = list(rows[0]) if rows else []
    return {"columns": columns, "rows": [[row[name] for name in columns] for row in rows]}


def read_unets(path: Path) -> dict[str, Any] | None:
    """bench_unet.py's results, without the environment, which the suite records itself."""
    if not path.exists():
        return None
    document = json.loads(path.read_text(encoding="utf-8"))
    return {"rows": document["rows"]}


def run_stage(stage: Stage, seconds: float, interruption: Interruption) -> dict[str, Any]:
    """Runs a stage to its end or its time limit, and passes its output on; returns the outcome and the seconds."""
    start = time.monotonic()
    process = subprocess.Popen(
        stage.command, cwd=ROOT, env={**os.environ, **stage.variables},
        start_new_session=True,  # so that its children are stopped with it
        preexec_fn=heed_interruptions,
    )  # fmt: skip
    while process.poll() is None and time.monotonic() < start + seconds and not interruption.requested:
        time.sleep(POLL)
    if process.returncode is None:
        outcome = "interrupted" if interruption.requested else "timed out"
        stop(process)
    else:
        outcome = "passed" if process.returncode == 0 else "failed"
    return {
        "outcome": outcome,
        "seconds": round(time.monotonic() - start, 1),
        "limit_seconds": round(seconds, 1),
        "exit_code": process.returncode,
    }


def heed_interruptions() -> None:
    """Restores SIGINT: a shell's background processes ignore it, and their children inherit this."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stops a running stage and its children: first by SIGINT, so that pytest reports, then by SIGKILL."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_suite(
    chosen: Sequence[Stage], seconds: float, output: Path, about: dict[str, Any], interruption: Interruption
) -> int:
    """Runs the stages in turn within a budget, updates ``output`` after each, and returns the exit code."""
    end = time.monotonic() + seconds
    outcomes: dict[str, dict[str, Any]] = {stage.name: {"outcome": "not run"} for stage in chosen}
    document = {**about, "stages": outcomes, "results": {}}
    write(output, document)
    for index, stage in enumerate(chosen):
        if interruption.requested:
            break
        share = stage.share / sum(later.share for later in chosen[index:])
        limit = max(0.0, share * (end - time.monotonic()))
        print(f"\n=== {stage.name}: up to {limit:.0f} s", flush=True)
        outcomes[stage.name] = run_stage(stage, limit, interruption)
        print(f"=== {stage.name}: {outcomes[stage.name]['outcome']}", flush=True)
        numbers = stage.read()
        if numbers is not None:
            document["results"][stage.name] = numbers
        write(output, document)
    for name, stage_outcome in outcomes.items():
        print(f"{name}: {stage_outcome['outcome']}, {stage_outcome.get('seconds', 0)} s")
    print(f"results: {output}")
    return 0 if all(stage_outcome["outcome"] == "passed" for stage_outcome in outcomes.values()) else 1


def write(path: Path, document: dict[str, Any]) -> None:
    """Writes JSON atomically, with each row of numbers on its own line."""
    results = dict(document["results"])
    rows = results.get("kernels", {}).get("rows")
    if rows is not None:
        results["kernels"] = {**results["kernels"], "rows": "ROWS"}
    text = json.dumps({**document, "results": results}, indent=1)
    if rows is not None:
        text = text.replace('"ROWS"', "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]")
    write_whole(path, text + "\n")


def main() -> int:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="time budget of all stages (default: %(default)s)")
    parser.add_argument("--stage", action="append", default=[], choices=("hopper", "tests", "kernels", "unet"))
    parser.add_argument("--full", action="store_true", help="every shape of the kernels; needs more minutes")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; writes to out/")
    parser.add_argument("--output", type=Path, help="the results file (default: benchmarks/results/gpu_<device>.json)")
    arguments = parser.parse_args()
    interruption = Interruption()
    interruption.install()
    if arguments.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    about = environment.describe()
    if about["device"] == "cpu" and not arguments.dry_run:
        parser.error("PyTorch sees no GPU here; --dry-run does without one")
    default = (
        "out/gpu_dry_run.json"
        if arguments.dry_run
        else f"benchmarks/results/gpu_{environment.slug(about['device'])}.json"
    )
    with tempfile.TemporaryDirectory() as folder:
        chosen = stages(arguments.stage, arguments.full, arguments.dry_run, Path(folder))
        return run_suite(chosen, 60 * arguments.minutes, arguments.output or ROOT / default, about, interruption)


if __name__ == "__main__":
    sys.exit(main())
