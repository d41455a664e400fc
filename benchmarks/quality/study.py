"""Shared by the comparison of methods and the studies: sampling settings, command lines and reports."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import dq_runtime
from benchmarks import environment
from benchmarks.command_line import new_parser
from benchmarks.result_files import RESULTS
from examples.small_unets.task import Task
from examples.small_unets.tasks import TASKS

STEPS, BATCH = 20, 100
CALIBRATION_SAMPLES = 200
FIRST_IMAGE_SEED = 1000  # calibration uses smaller seeds


def collect(task: Task, unet: Any, seed: int) -> dq_runtime.CalibrationSet:
    """A seed's calibration set: the UNet's calls during sampling."""
    return dq_runtime.collect_from_scheduler(
        unet, task.noise_scheduler(), task.noise(CALIBRATION_SAMPLES, seed), STEPS,
        task.condition(task.labels(CALIBRATION_SAMPLES)), BATCH,
    )  # fmt: skip


def task_parser(description: str | None, tasks: Iterable[str] = TASKS) -> argparse.ArgumentParser:
    """A parser with the shared options: the task, one of these, and the report's file."""
    parser = new_parser(description)
    parser.add_argument("--task", choices=list(tasks), default="digits/cross_attention")
    parser.add_argument("--output", type=Path)
    return parser


def slug(task: str) -> str:
    """The name of a task in a form for file names."""
    return task.replace("/", "_")


def command(script: str, options: str) -> str:
    """The command line for the report."""
    return f"python -m benchmarks.quality.{script} {options}"


def write_report(
    script: str, options: str, name: str, results: Mapping[str, Any], output: Path | None, **about: Any
) -> None:
    """Writes JSON: the command, the environment, then the results; by default to ``results/<script>_<name>.json``.

    ``about`` replaces entries of the environment, for measurements in other processes with other settings.
    """
    report = {"command": command(script, options), "environment": environment.describe() | about} | dict(results)
    path = output or RESULTS / f"{script}_{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
