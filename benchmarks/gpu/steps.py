"""The steps of each stage, in the order of their worth, with their commands and time limits.

    check    are the kernels right, and how fast is INT4 beside the best that fp16 can do: the numbers that matter most
    profile  where the time goes: by kernel, without each optimisation, other batch sizes, whole pipelines
    improve  the slowest launches tuned again, the main rows with them, other libraries' kernels, all other tests

fp16 is compiled in the background while the tests run. It is stopped before the first step that measures times.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.result_files import ROOT

SECONDS = {"check": 420, "profile": 300, "improve": 400}  # of each stage
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # for processes side by side
TEST_PROCESSES = max(1, (os.cpu_count() or 1) - 4)  # each compiles kernels; two compile fp16
# Slow tests that need no GPU: compilation for other GPUs, wheels, documents, training and sampling on the CPU.
NOT_FOR_GPUS = (
    "tests/kernels/test_static.py", "tests/test_package.py", "tests/test_docs.py", "tests/examples", "tests/benchmarks",
    "tests/cli", "tests/robustness",
)  # fmt: skip
MAIN_ROWS = ("int4 graph", "fp16 graph", "fp16 channels_last", "fp16 eager")
COMPILED_ROWS = ("fp16 compiled, graph", "fp16 compiled blocks, graph")


@dataclass(frozen=True)
class Step:
    """A command, run in the repository's root, which writes its own results as it goes.

    Attributes:
        seconds: its time limit; less if less of the stage is left.
        measures: it times something, so nothing else may run beside it.
        background: later steps start while it runs, until one that measures.
        variables: additional environment variables.
    """

    name: str
    command: Sequence[str]
    seconds: float
    measures: bool = False
    background: bool = False
    variables: dict[str, str] = field(default_factory=dict)


def stages(folder: Path, dry_run: bool = False) -> dict[str, list[Step]]:
    """The steps of each stage, whose results go to ``folder``.

    Args:
        dry_run: the same steps on the CPU, with tiny shapes and few rows.
    """
    from benchmarks.speed.unet_rows import OPTIMISATIONS  # imports much, and a suite that resumes starts at once

    cache = {"TORCHINDUCTOR_CACHE_DIR": str(ROOT / "out" / "inductor"), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    unets = ["--unet", "ddpm_cifar"] if dry_run else ["--unet", "sd15", "--unet", "sdxl"]
    tiny = ["--dry-run"] if dry_run else []

    def python(module: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", f"benchmarks.{module}", *arguments]

    def rows(name: str) -> str:
        return str(folder / f"{name}.jsonl")

    def unet_rows(name: str, chosen: Sequence[str], batches: Sequence[int] = (2,)) -> list[str]:
        if dry_run:
            chosen, batches = ["int4"], [1]
        options = [*unets, "--output", str(folder / f"{name}.json"), *(["--device", "cpu"] if dry_run else [])]
        options += [word for row in chosen for word in ("--row", row)] + (["--rounds", "1"] if dry_run else [])
        return python("speed.bench_unet", *options, *(word for batch in batches for word in ("--batch", str(batch))))

    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    parallel = ["-n", str(TEST_PROCESSES)] if importlib.util.find_spec("xdist") is not None else []
    folders = ["tests/kernels", "tests/runtime", "tests/calibration"]
    cuda_tests = [*pytest, f"--junit-xml={folder / 'cuda_tests.xml'}", "-m", "cuda", *folders]
    other_tests = [*pytest, f"--junit-xml={folder / 'tests.xml'}", "--maxfail=20", "tests"]
    other_tests += [f"--ignore={path}" for path in NOT_FOR_GPUS]
    kernels = [*pytest, "benchmarks/speed/bench_kernels.py", f"--rows={rows('kernels')}"]
    if dry_run:
        cuda_tests, other_tests = ([*pytest, "-x", "tests/kernels/test_packing.py"] for _ in range(2))
        kernels += ["--tiny"]
    check = [
        Step("compile", python("gpu.compile_fp16", *unets, "--rows", rows("compile"), *tiny), 240, background=True),
        Step("operators", python("gpu.equalities", "--operators", "--rows", rows("operators"), *tiny), 90),
        Step("equalities", python("gpu.equalities", "--rows", rows("equalities"), *tiny), 120),
        Step("cuda tests", [*cuda_tests, *parallel], 120, variables=ONE_THREAD),
        Step("hopper gemm", python("gpu.hopper_gemm", "--shapes", "3", "--rows", rows("hopper_gemm")), 60, True),
        Step("race", unet_rows("race", MAIN_ROWS), 120, True),
        Step("race compiled", unet_rows("race_compiled", [*MAIN_ROWS[:2], *COMPILED_ROWS]), 150, True),
    ]
    without = ["int4 graph", *(f"int4 graph, without {what}" for what in (*OPTIMISATIONS, "fused blocks"))]
    adapters = ["int4 graph", "int4 graph, LoRA", "fp16 graph, LoRA", "int4 graph, int8 attention"]
    pipelines = python("speed.bench_pipeline", "--output", str(folder / "pipelines.json"))
    profile = [
        Step("kernels of a pass", python("gpu.profile_unets", *unets, "--rows", rows("profile"), *tiny), 60, True),
        Step("optimisations", unet_rows("optimisations", without), 100, True),
        Step("batches", unet_rows("batches", MAIN_ROWS[:2], (1, 8)), 100, True),
        Step("adapters and attention", unet_rows("adapters", adapters), 100, True),
        *([] if dry_run else [Step("pipelines", pipelines, 60, True)]),
    ]
    improve = [
        Step("tuning", python("tuning.tune", *(tiny or ["--worst", "10", "--minutes", "2"])), 150, True),
        Step("race, tuned", unet_rows("race_tuned", MAIN_ROWS[:2]), 90, True),
        Step("kernels and peers", kernels, 120, True),
        Step("all other tests", [*other_tests, *parallel], 300, variables=ONE_THREAD),
    ]
    shared = cache | ({"TRITON_INTERPRET": "1"} if dry_run else {})
    return {
        name: [replace(step, variables=shared | step.variables) for step in steps]
        for name, steps in (("check", check), ("profile", profile), ("improve", improve))
    }
