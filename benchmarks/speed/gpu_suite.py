"""All that a GPU is needed for, in one command and one results file: the tests, the kernels, whole UNets.

    python -m benchmarks.speed.gpu_suite [--minutes 9] [--stage tests|kernels|unet]... [--full] [--output FILE]
    python -m benchmarks.speed.gpu_suite --dry-run           # on a CPU, tiny shapes, less than a minute

Every stage is a process with a time limit: its share of what is left of the budget. What a stage did not use goes to
the next ones. The results are written before the first stage and after each, and a stage's rows are kept as far as it
came, so an interruption (Ctrl-C, SIGTERM) loses nothing that was finished. A failed stage does not stop the others;
the exit code is 1 if any stage did not pass.

  tests    the test suite on the GPU, without what needs none and takes minutes: tests/kernels/test_static.py (compiles
           for other GPUs), tests/test_package.py (builds wheels), tests/examples (trains, samples on the CPU) and
           tests/benchmarks (runs benchmarks on the CPU); side by side where pytest-xdist is installed
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
TEST_PROCESSES = max(1, (os.cpu_count() or 1) - 2)  # each compiles kernels, which is what takes the time
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # for processes side by side
GRACE = 10.0  # seconds between interrupting a stage and killing it
POLL = 0.1  # seconds between looks at a stage


@dataclass(frozen=True)
class Stage:
    """A command, run in the repository's root; ``read`` finds its numbers, also after it was cut short."""

    name: str
    command: Sequence[str]
    share: float  # of the time that this stage and those after it have
    read: Callable[[], Any] = lambda: None
    variables: Mapping[str, str] = field(default_factory=dict)  # of its environment, beside ours


class Interruption:
    """Notes SIGINT or SIGTERM; who waits looks here, so that no write is ever cut short."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)


def stages(names: Sequence[str], full: bool, dry_run: bool, folder: Path) -> list[Stage]:
    """The stages by name; what they write goes to ``folder``."""
    rows, unets = folder / "rows.jsonl", folder / "unets.json"
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests = [*pytest, "--maxfail=20", "tests", *(f"--ignore={path}" for path in NOT_FOR_GPUS)]
    if importlib.util.find_spec("xdist") is not None:
        tests += ["-n", str(TEST_PROCESSES)]
    kernels = [*pytest, "benchmarks/speed/bench_kernels.py", f"--rows={rows}", "--benchmark-columns=median,iqr,rounds"]
    unet = [sys.executable, "-m", "benchmarks.speed.bench_unet", "--output", str(unets)]
    if dry_run:
        tests = [*pytest, "-x", "tests/kernels/test_packing.py"]
        kernels += ["--tiny"]
        unet += ["--device", "cpu", "--unet", "ddpm_cifar", "--batch", "1", "--rounds", "1"]
    else:
        kernels += ["--full"] if full else []
        unet += ["--unet", "sd15", "--unet", "sdxl"]
    every = (
        Stage("tests", tests, 4, variables=ONE_THREAD),
        Stage("kernels", kernels, 2, lambda: read_rows(rows)),
        Stage("unet", unet, 3, lambda: read_unets(unets)),
    )
    return [stage for stage in every if not names or stage.name in names]


def read_rows(path: Path) -> dict[str, list[Any]] | None:
    """bench_kernels.py's rows, the names of the columns once."""
    if not path.exists():
        return None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    columns = list(rows[0]) if rows else []
    return {"columns": columns, "rows": [[row[name] for name in columns] for row in rows]}


def read_unets(path: Path) -> dict[str, Any] | None:
    """bench_unet.py's results, without the environment, which is here already."""
    if not path.exists():
        return None
    document = json.loads(path.read_text(encoding="utf-8"))
    return {name: document[name] for name in ("batch", "compile_mode", "unets") if name in document}


def run_stage(stage: Stage, seconds: float, interruption: Interruption) -> dict[str, Any]:
    """Runs a stage to its end or its limit, its output going through; says how it ended, and its seconds."""
    start = time.monotonic()
    process = subprocess.Popen(
        stage.command, cwd=ROOT, env={**os.environ, **stage.variables},
        start_new_session=True,  # so that its children can be stopped with it
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
    """What a shell starts in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a stage that still runs, and its children: as Ctrl-C does, at which pytest reports, and then by force."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_suite(
    chosen: Sequence[Stage], seconds: float, output: Path, about: dict[str, Any], interruption: Interruption
) -> int:
    """Runs the stages in turn within a budget, and keeps ``output`` up to date; returns the exit code."""
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
    """JSON with each row of numbers on a line of its own; the file is always whole."""
    results = dict(document["results"])
    rows = results.get("kernels", {}).get("rows")
    if rows is not None:
        results["kernels"] = {**results["kernels"], "rows": "ROWS"}
    text = json.dumps({**document, "results": results}, indent=1)
    if rows is not None:
        text = text.replace('"ROWS"', "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]")
    write_whole(path, text + "\n")


def main() -> int:
    """Command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages (default: %(default)s)")
    parser.add_argument("--stage", action="append", default=[], choices=("tests", "kernels", "unet"))
    parser.add_argument("--full", action="store_true", help="every shape of the kernels; needs more minutes")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; results go to out/")
    parser.add_argument("--output", type=Path, help="the results (default: benchmarks/results/gpu_<device>.json)")
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
