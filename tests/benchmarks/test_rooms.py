"""The benchmarks are a package of rooms: allowed imports, imports without side effects, existing commands."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "benchmarks").rglob("*.py"))
}
ROOMS = {path.parent.name for path in (ROOT / "benchmarks").glob("*/__init__.py")}
SCRIPTS = [name for name, path in MODULES.items() if '\nif __name__ == "__main__":\n' in path.read_text()]
# A search path that a file changes, as an attribute, by setattr, or through pytest.
SEARCH_PATH = re.compile(r"\bsys\.path\b|\bsys,\s*['\"]path['\"]|from\s+sys\s+import\s.*\bpath\b")


def imported(name, path):
    """The modules of benchmarks that a module imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: relative imports are not read here"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
            found.add(node.module)
    return found & MODULES.keys() - {name, "benchmarks"}


IMPORTS = {name: imported(name, path) for name, path in MODULES.items()}


def room(name):
    """The room of a module; None for a module beside the rooms, which all of them share."""
    return next((part for part in name.split(".")[1:2] if part in ROOMS), None)


def test_every_script_is_in_a_room():
    assert len(SCRIPTS) > 10
    assert [name for name in SCRIPTS if room(name) is None] == []


def test_no_file_changes_the_search_path():
    files = [path for folder in ("benchmarks", "examples", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 50
    assert [str(path.relative_to(ROOT)) for path in files if SEARCH_PATH.search(path.read_text())] == []


def test_no_module_imports_a_script():
    importers = {name: sorted(modules & {*SCRIPTS}) for name, modules in IMPORTS.items()}
    assert {name: scripts for name, scripts in importers.items() if scripts} == {}


@pytest.mark.parametrize("level", ["modules", "rooms"])
def test_imports_have_no_cycle(level):
    graph = IMPORTS
    if level == "rooms":
        graph = {}
        for name, modules in IMPORTS.items():
            graph.setdefault(room(name), set()).update({room(module) for module in modules} - {room(name)})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"cycle: {error.args[1]}")


def test_shared_modules_import_no_room():
    shared = {name: modules for name, modules in IMPORTS.items() if room(name) is None}
    assert {name for name, modules in shared.items() if any(map(room, modules))} == set()


# In its own process, where nothing is imported yet. Libraries are imported first: their side effects do not count.
PROBE = """
import importlib, os, random, signal, sys, threading, warnings
import diffusers, matplotlib.figure, numpy, pytest, sklearn.datasets, triton
import torch, torch.nn.functional as F, torch.utils.cpp_extension
import dq_runtime.calibration.calibrate, dq_runtime.fused

def state():
    return {
        "environment": dict(os.environ), "folder": os.getcwd(), "arguments": list(sys.argv),
        "search path": list(vars(sys)["path"]), "files": sorted(os.listdir()),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "threads": (threading.active_count(), torch.get_num_threads()),
        "random": (random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()),
        "torch": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.backends.cudnn.benchmark),
        "functions": dict(vars(F)), "warnings": len(warnings.filters),
    }

for name in sys.argv[1:]:
    before = state()
    importlib.import_module(name)
    after = state()
    for part in before:
        if before[part] != after[part]:
            print(f"{name} changes {part}")
"""


def test_importing_a_module_does_nothing_else():
    modules = [name for name in MODULES if name != "benchmarks.upstream.quantization_mixin"]  # it imports a checkout's
    assert len(modules) == len(MODULES) - 1
    run = subprocess.run(
        [sys.executable, "-c", PROBE, *modules], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""


def test_commands_name_files_that_exist():
    documents = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "docs/measurements.md")]
    documents += [*MODULES.values(), *sorted((ROOT / "tests").rglob("*.py"))]
    missing, found = {}, 0
    for document in documents:
        text = document.read_text()
        files = set(re.findall(r"\bbenchmarks/(?:\w+/)*\w+\.py\b", text))
        scripts = set(re.findall(r"-m[\s\",]+(benchmarks(?:\.\w+)+)(?!\w|\.\{)", text))
        found += len(files) + len(scripts)
        wrong = {file for file in files if not (ROOT / file).exists()} | (scripts - {*SCRIPTS})
        if wrong:
            missing[str(document.relative_to(ROOT))] = sorted(wrong)
    assert found > 30
    assert missing == {}
