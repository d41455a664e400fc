"""A pytest plugin: runs the tests of a diffusers checkout with quantized UNets, and writes each test's outcome.

    pytest -p benchmarks.upstream.plugin --unets stock|quantized|fused --outcomes FILE tests/...

The library is the installed diffusers: it is imported here, before the checkout's ``conftest.py`` puts its own source
first on the path. Models come from no hub: ``hub_models`` stands in for the tiny CLIP models. Each test begins with the
same random numbers, so all modes run on the same weights, and UNets of the same weights are calibrated once.
"""

from __future__ import annotations

import gc
import json
import random
from pathlib import Path
from typing import Any

import diffusers  # noqa: F401
import numpy as np
import pytest
import torch

MODES = ("stock", "quantized", "fused")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--unets", choices=MODES, default="stock")
    parser.addoption("--outcomes", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    from benchmarks.upstream import hub_models

    hub_models.install()
    mode = config.getoption("unets")
    quantization = None
    if mode != "stock":
        from benchmarks.upstream.quantize import Quantization

        quantization = Quantization(fused=mode == "fused")
        quantization.install()
    config.pluginmanager.register(Outcomes(config.getoption("outcomes"), quantization))


def pytest_collection_finish() -> None:
    gc.freeze()  # many tests collect garbage: not the imported libraries again each time


def pytest_unconfigure() -> None:
    gc.unfreeze()


class Outcomes:
    """Collects the outcomes: test -> outcome, the error, and what happened to its UNets."""

    def __init__(self, file: Path, quantization: Any) -> None:
        self.file, self.quantization = file, quantization
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.tests[nodeid] = {"outcome": "passed"}
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 (diffusers' tests draw from it)
        torch.manual_seed(0)
        if self.quantization is not None:
            self.quantization.quantized, self.quantization.left = 0, []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests[report.nodeid]
        if report.failed and test["outcome"] != "failed":
            test |= {"outcome": "failed", "error": _error(report)}
        elif report.skipped:
            test |= {"outcome": "skipped", "error": _error(report)}  # or failed, as upstream expects

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self.quantization is not None:
            self.tests[nodeid]["quantized"] = self.quantization.quantized
            if self.quantization.left:
                self.tests[nodeid]["left"] = self.quantization.left
        self.file.write_text(json.dumps(self.tests, indent=1))  # also if a later test kills the process


def _error(report: pytest.TestReport) -> str:
    """The error's class and the beginning of its message, on one line; the reason of a skipped test."""
    crash = getattr(report.longrepr, "reprcrash", None)
    message = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    message = crash.message if crash is not None else message
    return " ".join(str(message).split())[:300]
