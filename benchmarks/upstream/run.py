"""Runs diffusers' own tests with stock, quantized and fused UNets, and lists what differs, with a verdict for each.

    python -m benchmarks.upstream.run --diffusers CHECKOUT [--module tests/lora/test_lora_layers_sd.py]...

The checkout gives the tests; the library is the installed diffusers. Nothing is downloaded, and nothing is written into
the checkout. Each file of tests runs once in each mode, in a process of one thread. Outcomes are kept in ``--folder``;
after an interruption, or a change of ``verdicts.json``, the same command runs only what is missing there. The report is
written after each file, to ``--output``; files of tests that did not run this time keep their part of a report of the
same versions. The exit code is 1 if a difference is a bug or has no verdict.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.command_line import new_parser
from benchmarks.result_files import RESULTS, ROOT, write_whole
from benchmarks.upstream.differences import Tests, counts, differences, is_clean, page, read_verdicts
from benchmarks.upstream.plugin import MODES

QUANTIZATION = "quantization_mixin.py"  # beside this file: upstream's mixin, applied to ours, in one run
PIPELINES = "tests/pipelines"
MODULES = (
    "tests/lora/test_lora_layers_sd.py",
    f"{PIPELINES}/stable_diffusion/test_stable_diffusion.py",
    "tests/models/unets/test_models_unet_2d.py",
    "tests/models/unets/test_models_unet_2d_condition.py",
    f"{PIPELINES}/stable_diffusion_xl/test_stable_diffusion_xl.py",
    f"{PIPELINES}/controlnet/test_controlnet.py",
    f"{PIPELINES}/stable_diffusion/test_stable_diffusion_img2img.py",
    f"{PIPELINES}/stable_diffusion/test_stable_diffusion_inpaint.py",
    f"{PIPELINES}/pag/test_pag_sd.py",
    f"{PIPELINES}/pag/test_pag_sdxl.py",
    f"{PIPELINES}/latent_consistency_models/test_latent_consistency_models.py",
    f"{PIPELINES}/latent_consistency_models/test_latent_consistency_models_img2img.py",
    f"{PIPELINES}/stable_diffusion_adapter/test_stable_diffusion_adapter.py",
    f"{PIPELINES}/stable_diffusion_xl/test_stable_diffusion_xl_adapter.py",
    f"{PIPELINES}/animatediff/test_animatediff.py",
    f"{PIPELINES}/kandinsky2_2/test_kandinsky.py",
    f"{PIPELINES}/kandinsky2_2/test_kandinsky_controlnet.py",
    f"{PIPELINES}/latent_diffusion/test_latent_diffusion.py",
    f"{PIPELINES}/latent_diffusion/test_latent_diffusion_superresolution.py",
    f"{PIPELINES}/stable_diffusion/test_stable_diffusion_instruction_pix2pix.py",
    f"{PIPELINES}/stable_diffusion_xl/test_stable_diffusion_xl_img2img.py",
    f"{PIPELINES}/stable_diffusion_xl/test_stable_diffusion_xl_inpaint.py",
    f"{PIPELINES}/stable_diffusion_xl/test_stable_diffusion_xl_instruction_pix2pix.py",
    f"{PIPELINES}/controlnet/test_controlnet_sdxl.py",
    "tests/lora/test_lora_layers_sdxl.py",
    QUANTIZATION,
)
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def outcomes_of(folder: Path, module: str, mode: str) -> Path:
    """The file that keeps the outcomes of one run."""
    return folder / mode / f"{module.replace('/', '.')}.json"


def run_tests(checkout: Path, module: str, mode: str, outcomes: Path) -> None:
    """Runs one file of tests with stock, quantized or fused UNets, and writes the outcomes if it comes to its end.

    Raises:
        FileNotFoundError: if the checkout has no such file.
        RuntimeError: if pytest ran no test, or was killed.
    """
    file = Path(__file__).with_name(module) if module == QUANTIZATION else checkout / module
    if not file.exists():
        raise FileNotFoundError(f"{file}: give a checkout that has it, or other modules with --module")
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder, "outcomes.json")
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.upstream.plugin",
            "-c", str(checkout / "pyproject.toml"), f"--rootdir={checkout}", "-W", "ignore",
            "--unets", mode, "--outcomes", str(new), str(file),
        ]  # fmt: skip
        paths = [str(ROOT), os.environ.get("PYTHONPATH", ""), str(checkout)]
        variables = {**os.environ, **OFFLINE, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        # Not in the checkout: its own folder "benchmarks" would come first.
        run = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
        if run.returncode not in (0, 1) or not new.exists():
            raise RuntimeError(
                f"{module}: pytest ended with {run.returncode}\n{run.stdout[-3000:]}{run.stderr[-3000:]}"
            )
        write_whole(outcomes, new.read_text())


def compare(folder: Path, module: str) -> dict[str, Any]:
    """The counts of the runs of a file of tests, and the differences from the stock run."""
    files = {mode: outcomes_of(folder, module, mode) for mode in MODES}
    runs: dict[str, Tests] = {mode: json.loads(file.read_text()) for mode, file in files.items() if file.exists()}
    stock = runs.get("stock", {})
    if module == QUANTIZATION:  # no other run to compare with: all tests should pass
        runs = {mode: {name: t for name, t in stock.items() if name.endswith(f"[{mode}]")} for mode in MODES[1:]}
        stock = {name: {"outcome": "passed"} if t["outcome"] == "failed" else t for name, t in stock.items()}
    rows: list[dict[str, str]] = []
    for mode, tests in runs.items():
        expected = {name: t for name, t in stock.items() if module != QUANTIZATION or name in tests}
        rows += differences(expected, tests, mode, read_verdicts()) if expected else []
    left = {reason for tests in runs.values() for test in tests.values() for reason in test.get("left", ())}
    return {
        "counts": {mode: counts(tests) for mode, tests in runs.items()},
        "differences": rows,
        "left_in_floating_point": sorted(left),
    }


def version_of(checkout: Path) -> str:
    """The version that a checkout of diffusers names.

    Raises:
        FileNotFoundError: if it is none.
    """
    text = (checkout / "src/diffusers/__init__.py").read_text()
    found = re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)
    return found.group(1) if found else "unknown"


def new_report(checkout: Path, output: Path) -> dict[str, Any]:
    """A report with the modules of the one in ``output`` if that is of the same tests, machine and versions."""
    report: dict[str, Any] = {
        "environment": environment.describe() | {"threads": 1},
        "tests_version": version_of(checkout),
        "modules": {},
    }
    if output.exists():
        earlier = json.loads(output.read_text())
        if _origin(earlier) == _origin(report):
            report["modules"] = earlier["modules"]
    return report


def _origin(report: Mapping[str, Any]) -> dict[str, Any]:
    """All that two runs must share for their outcomes to stand in one report: everything but the date."""
    return {**report["environment"], "date": None, "tests_version": report["tests_version"]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--diffusers", type=Path, required=True, help="a checkout of diffusers")
    parser.add_argument("--module", action="append", help="a file of tests in the checkout; default: all of ours")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "upstream", help="keeps the outcomes")
    parser.add_argument("--output", type=Path, default=RESULTS / "upstream.json")
    options = parser.parse_args(arguments)
    checkout = options.diffusers.resolve()
    report = new_report(checkout, options.output)
    for module in options.module or MODULES:
        for mode in ("stock",) if module == QUANTIZATION else MODES:
            outcomes = outcomes_of(options.folder, module, mode)
            if not outcomes.exists():
                run_tests(checkout, module, mode, outcomes)
        report["modules"][module] = compare(options.folder, module)
        print(module, json.dumps(report["modules"][module]["counts"]), flush=True)
        write_whole(options.output, json.dumps(report, indent=1) + "\n")
        write_whole(options.output.with_suffix(".md"), page(report))
    return 0 if is_clean(report) else 1


if __name__ == "__main__":
    sys.exit(main())
