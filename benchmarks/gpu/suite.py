"""Runs what needs a GPU: three stages with a time limit each, which lose nothing that is known.

    python -m benchmarks.gpu.suite [--stage check|profile|improve]... [--again] [--output FOLDER]
    python -m benchmarks.gpu.suite --dry-run           # the same steps on a CPU with tiny shapes

``steps.py`` has the steps, in the order of their worth. A step is a process with a time limit, which writes each row at
once to its own file in the folder of the results. ``suite.json`` there has the machine and the outcome of each step; it
is written before and after each. So a kill at any moment, of a step or of the suite, loses no finished row. A second
run skips the steps that passed, unless ``--again``. A failed step does not stop the others; the exit code is 1 if any
step did not pass. ``python -m benchmarks.gpu.report`` makes tables of the results.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import environment
from benchmarks.command_line import new_parser
from benchmarks.gpu.steps import SECONDS, Step, stages
from benchmarks.result_files import RESULTS, ROOT, write_whole

GRACE = 10.0  # seconds between interrupting a step and killing it
POLL = 0.1  # seconds between checks of a step
PR_SET_PDEATHSIG = 1  # of Linux


class Interruption:
    """Records SIGINT or SIGTERM. Waiting code reads ``requested``, so no write is interrupted."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)


class Running:
    """A step's process, with its children."""

    def __init__(self, step: Step, seconds: float) -> None:
        self.step, self.seconds, self.start = step, seconds, time.monotonic()
        self.process = subprocess.Popen(
            step.command, cwd=ROOT, env={**os.environ, **step.variables},
            start_new_session=True,  # so that its children are stopped with it
            preexec_fn=_dies_with_the_suite,
        )  # fmt: skip

    def is_over(self) -> bool:
        """True if the step ended, or has had its time."""
        return self.process.poll() is not None or time.monotonic() > self.start + self.seconds

    def end(self, outcome: str = "timed out") -> dict[str, Any]:
        """Stops the step if it still runs, which gives ``outcome``, and returns what became of it."""
        if self.process.poll() is None:
            self._stop()
        else:
            outcome = "passed" if self.process.returncode == 0 else "failed"
        return {
            "outcome": outcome,
            "seconds": round(time.monotonic() - self.start, 1),
            "limit_seconds": round(self.seconds, 1),
            "exit_code": self.process.returncode,
        }

    def _stop(self) -> None:
        """First by SIGINT, so that pytest reports, then by SIGKILL."""
        os.killpg(self.process.pid, signal.SIGINT)
        try:
            self.process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _dies_with_the_suite() -> None:
    """Of a step: a kill of the suite kills it. SIGINT is restored, which a shell's background processes ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Record:
    """``suite.json``: the machine, and the outcome of each step."""

    def __init__(self, folder: Path, about: dict[str, Any], again: bool) -> None:
        self.path = folder / "suite.json"
        self.document: dict[str, Any] = {**about, "steps": {}}
        if self.path.exists() and not again:
            self.document["steps"] = json.loads(self.path.read_text(encoding="utf-8"))["steps"]

    def passed(self, step: Step) -> bool:
        return self.document["steps"].get(step.name, {}).get("outcome") == "passed"

    def note(self, step: Step, outcome: dict[str, Any]) -> None:
        self.document["steps"][step.name] = outcome
        write_whole(self.path, json.dumps(self.document, indent=1) + "\n")


def run_stage(name: str, steps: Sequence[Step], seconds: float, record: Record, interruption: Interruption) -> None:
    """Runs the steps that did not pass before, within a time limit."""
    end = time.monotonic() + seconds
    beside: Running | None = None

    def stop_beside(outcome: str) -> None:
        nonlocal beside
        if beside is not None:
            record.note(beside.step, beside.end(outcome))
            beside = None

    for step in steps:
        if record.passed(step):
            continue
        if step.measures:
            stop_beside("stopped for a quiet machine")
        limit = min(step.seconds, end - time.monotonic())
        if interruption.requested or limit <= 0:
            record.note(step, {"outcome": "interrupted" if interruption.requested else "no time left"})
            continue
        print(f"\n=== {name}: {step.name}, up to {limit:.0f} s", flush=True)
        record.note(step, {"outcome": "killed"})  # if nothing replaces it
        running = Running(step, limit)
        if step.background:
            beside = running
            continue
        while not (running.is_over() or interruption.requested):
            time.sleep(POLL)
        outcome = running.end("interrupted" if interruption.requested else "timed out")
        print(f"=== {name}: {step.name}: {outcome['outcome']}, {outcome['seconds']} s", flush=True)
        record.note(step, outcome)
    while beside is not None and not (beside.is_over() or interruption.requested):
        time.sleep(POLL)
    stop_beside("interrupted" if interruption.requested else "timed out")


def main() -> int:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--stage", action="append", choices=SECONDS, help="may be repeated (default: all)")
    parser.add_argument("--minutes", type=float, help="time limit of each stage (default: 7, 5 and 7)")
    parser.add_argument("--again", action="store_true", help="repeat the steps that passed before, too")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; writes to out/gpu_dry_run")
    parser.add_argument("--output", type=Path, help="the folder (default: benchmarks/results/gpu_<device>)")
    arguments = parser.parse_args()
    interruption = Interruption()
    interruption.install()
    if arguments.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    about = environment.describe()
    if about["device"] == "cpu" and not arguments.dry_run:
        parser.error("PyTorch sees no GPU here; --dry-run does without one")
    folder = ROOT / "out" / "gpu_dry_run" if arguments.dry_run else RESULTS / f"gpu_{environment.slug(about['device'])}"
    folder = (arguments.output or folder).resolve()
    record = Record(folder, about, arguments.again)
    of_stage = stages(folder, arguments.dry_run)
    chosen = {name: of_stage[name] for name in of_stage if name in (arguments.stage or SECONDS)}
    for name, steps in chosen.items():
        seconds = 60 * arguments.minutes if arguments.minutes else SECONDS[name]
        run_stage(name, steps, seconds, record, interruption)
    outcomes = record.document["steps"]
    for step in (step for steps in chosen.values() for step in steps):
        print(f"{step.name}: {outcomes[step.name]['outcome']}, {outcomes[step.name].get('seconds', 0)} s")
    print(f"results: {folder}")
    return 0 if all(record.passed(step) for steps in chosen.values() for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
