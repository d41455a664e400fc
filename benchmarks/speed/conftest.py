"""Options of the benchmarks, compilation ahead of time, the output of pytest-benchmark, and the summary of a run."""

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
    group.addoption("--tiny", action="store_true", help="a few tiny shapes, for a trial run")
    group.addoption("--rows", type=Path, help="file that gets each result at once, one line of JSON each")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture(scope="session", autouse=True)
def _compiled_kernels(request: pytest.FixtureRequest) -> None:
    """On a GPU, compiles the kernels of the selected rows in parallel, before their first calls."""
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
    """Prints the speed-ups of the rows that ran, and the libraries that are missing."""
    rows = config.stash[ROWS]
    if rows:
        terminalreporter.section("kernels")
        for line in summary(rows):
            terminalreporter.line(line)
        for name in linears.PEERS:
            if (reason := linears.missing(name)) is not None:
                terminalreporter.line(f"not compared with {name}: {reason}")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Adds versions and the device; drops the machine's name and the list of CPU flags."""
    machine_info.update(environment.describe())
    machine_info["cpu"].pop("flags", None)
    for name in ("node", "release", "processor"):
        machine_info.pop(name, None)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keeps the statistics; drops the single rounds and the fields that a row's name contains."""
    output_json.pop("commit_info", None)
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
        for name in ("params", "param", "options"):
            benchmark.pop(name, None)
