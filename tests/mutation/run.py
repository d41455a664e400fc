"""Mutation check: puts one defect at a time into a copy of the repository and runs the tests that should notice it.

    python -m tests.mutation.run [--output FILE] [NAME ...]

The selected tests first run on unchanged code, where they must pass: a failure later on then means that the mutant was
killed. Where no test has a selected name any more, the whole test files run instead, so that renaming a test costs time
and not a verdict. The exit status is 1 if a mutant survived.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.mutation.mutants import MUTANTS, Mutant

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = {"dq_kernels": "kernels", "dq_runtime": "dq_runtime"}
TIMEOUT = 600  # seconds of one pytest run with a mutant; a mutant that hangs is killed
PRELOADED = (
    "torch._inductor.compile_fx",
    "triton.language",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.pipelines.ddim.pipeline_ddim",
)
PASSED, FAILED, NO_TESTS = 0, 1, 5  # pytest's exit codes


class Copy:
    """A copy of the repository's tracked files, with an import path of its own."""

    def __init__(self, folder: Path) -> None:
        self.root, self.import_path = folder / "repository", folder / "packages"
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True, text=True)
        for name in filter(None, listed.stdout.split("\0")):
            if (REPOSITORY / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPOSITORY / name, self.root / name)
        self.import_path.mkdir()
        for package, source in PACKAGES.items():
            (self.import_path / package).symlink_to(self.root / source)

    def pytest(self, tests: Sequence[str], select: str | None, timeout: float | None = None) -> tuple[int | None, str]:
        """The exit code, None after the timeout, and the output."""
        search_path = f"pythonpath={self.import_path} . tests/support"  # the copy's, before the repository's own
        options = ["-x", "-q", "-p", "no:cacheprovider", "-o", search_path]
        arguments = [*options, *tests, *(() if select is None else ("-k", select))]
        log = self.root.parent / "output.txt"
        process = multiprocessing.get_context("fork").Process(target=self._run_pytest, args=(arguments, log))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            return None, f"timeout after {timeout} s"
        return process.exitcode, log.read_text(encoding="utf-8", errors="replace")

    def _run_pytest(self, arguments: list[str], log: Path) -> NoReturn:
        """In a process of its own, which has the preloaded modules from the start."""
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(self.root)
        os.environ["PYTHONPATH"] = str(self.import_path)  # for what tests start
        os.environ["COLUMNS"] = "200"  # of pytest's line about a failure
        # Without the repository that this file came from.
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        code = pytest.main(arguments)
        sys.stdout.flush()
        os._exit(int(code))

    def passes(self, tests: Sequence[str], select: str | None = None) -> bool:
        code, output = self.pytest(tests, select)
        if code != PASSED:
            print(output)
        return code == PASSED

    def try_mutant(self, mutant: Mutant) -> dict[str, Any]:
        """Runs a mutant's tests on it: the result, the first failure (or the note) and the duration."""
        start = time.monotonic()
        original = (self.root / mutant.file).read_text(encoding="utf-8")
        code, output = self._run_mutated(mutant, original, mutant.select)
        if code == NO_TESTS and self.passes(mutant.tests):
            code, output = self._run_mutated(mutant, original, None)
        result = {PASSED: "survived", FAILED: "killed", None: "killed"}.get(code, f"pytest exited with {code}")
        return {
            "file": mutant.file,
            "result": result,
            "why": mutant.note if result == "survived" else _first_failure(output),
            "seconds": round(time.monotonic() - start, 1),
        }

    def _run_mutated(self, mutant: Mutant, original: str, select: str | None) -> tuple[int | None, str]:
        file = self.root / mutant.file
        file.write_text(mutant.applied_to(original), encoding="utf-8")
        try:
            return self.pytest(mutant.tests, select, TIMEOUT)
        finally:
            file.write_text(original, encoding="utf-8")


def _first_failure(output: str) -> str:
    """pytest's one line about the first test that failed, or the end of the output."""
    lines = output.strip().splitlines() or [""]
    return next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1])[:300]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to try; all by default")
    parser.add_argument("--output", type=Path, help="JSON file, written after each mutant")
    options = parser.parse_args()
    by_name = {mutant.name: mutant for mutant in MUTANTS}
    if unknown := set(options.names) - set(by_name):
        parser.error(f"no such mutants: {', '.join(sorted(unknown))}")
    mutants = [by_name[name] for name in options.names or by_name]

    os.environ["OMP_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = True  # Python takes a file of the same size and second for unchanged
    if not importlib.import_module("torch").cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # as the tests do, before Triton is imported
    for module in PRELOADED:  # once: imports take longer than most mutants' tests
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(prefix="mutation_") as folder:
        copy = Copy(Path(folder))
        report: dict[str, Any] = {"seconds_unchanged": {}, "mutants": {}}
        for tests in dict.fromkeys(mutant.tests for mutant in mutants):
            group = [mutant for mutant in mutants if mutant.tests == tests]
            start = time.monotonic()
            if not copy.passes(tests, " or ".join(dict.fromkeys(f"({mutant.select})" for mutant in group))):
                print(f"The selected tests of {', '.join(tests)} fail on unchanged code")
                return 2
            report["seconds_unchanged"][" ".join(tests)] = seconds = round(time.monotonic() - start, 1)
            print(f"unchanged code passes {' '.join(tests)} ({seconds} s)", flush=True)
            for mutant in group:
                report["mutants"][mutant.name] = tried = copy.try_mutant(mutant)
                print(f"{mutant.name:40} {tried['result']:10} {tried['seconds']:6.1f} s  {tried['why']}", flush=True)
                if options.output is not None:
                    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    survivors = [name for name, tried in report["mutants"].items() if tried["result"] != "killed"]
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} killed", *survivors, sep="\n  ")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
