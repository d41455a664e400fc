"""Options of the benchmarks, kernels compiled ahead, what pytest-benchmark writes, and the summary of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment
from benchmarks.peers import linears
from benchmarks.speed.kernel_cases import compile_kernels
from benchmarks.speed.kernel_report import summary

ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernel benchmarks")
    group.addoption("--full", action="store_true", help="every shape of the UNets, at batch 2 and 8")
    group.addoption("--tiny", action="store_true", help="a few tiny shapes, to try the benchmarks out")
    group.addoption("--rows", type=Path, help="where each result goes at once, a line of JSON each")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture(scope="session", autouse=True)
def _compiled_kernels(request: pytest.FixtureRequest) -> None:
    """On a GPU, compiles the kernels of the selected rows in parallel, instead of each at its first call."""
    if torch.cuda.is_available():
        compile_kernels([item.callspec.params["case"] for item in request.session.items if hasattr(item, "callspec")])


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def record_row(pytestconfig: pytest.Config) -> Callable[[dict[str, Any]], None]:
    """Keeps a row for the summary, and appends it to ``--rows``."""

    def record(row: dict[str, Any]) -> None:
        pytestconfig.stash[ROWS].append(row)
        path = pytestconfig.getoption("--rows")
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    return record


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The speed-ups of what ran, and which libraries were not there to compare with."""
    rows = config.stash[ROWS]
    if rows:
        terminalreporter.section("kernels")
        for line in summary(rows):
            terminalreporter.line(line)
        for name in linears.PEERS:
            if (reason := linears.missing(name)) is not None:
                terminalreporter.line(f"not compared with {name}: {reason}")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Adds versions and the device; drops what names one machine and the list of CPU flags."""
    machine_info.update(environment.describe())
    machine_info["cpu"].pop("flags", None)
    for name in ("node", "release", "processor"):
        machine_info.pop(name, None)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keeps the statistics, not every single round, nor what a row's name says already."""
    output_json.pop("commit_info", None)
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
        for name in ("params", "param", "options"):
            benchmark.pop(name, None)
