"""Image quality of quantized UNets: DilateQuant part by part, earlier methods, and other libraries.

    python -m benchmarks.quality.compare [--task photos|emoji] [--quick] [--row NAME]... [--jobs 2] [--output FILE]

Trained small UNets (``examples/small_unets``), or the emoji pipeline (``examples/emoji``), draw from the same noise in
fp32 and quantized. Each row of each seed runs in a separate process, on one thread, with ``--jobs`` processes at a
time. A seed sets the calibration data, the training and the noise of the images.

``benchmarks/results/quality_<task>.json`` has every number. A page beside it has the means and standard deviations
(``.md``, also printed), and a plot is beside it, too (``.png``). Rows in the file, such as those of an interrupted run,
are not measured again; delete the file to measure all rows.

Columns:

- accuracy: of labels; for emoji, the share of images that are closest to their own prompt among 32 captions;
- PSNR in dB against fp32 at equal noise: the mean over images, and pooled over all pixels (a few images with another
  content determine the pooled value); emoji are drawn without guidance and at guidance 5, the other columns are of both
  sets of images together;
- SSIM;
- Fréchet distance to real images in the classifier's features, for emoji to those asked for, and its increase over
  fp32's;
- MB (10^6 bytes) of the whole UNet;
- seconds of calibration, and its peak allocated memory above the level before it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
import traceback
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.quality.report import contributions, page, plot, summary
from benchmarks.quality.rows import FP32, measure, row_names, rows_to_measure
from benchmarks.quality.study import STEPS, command, slug, task_parser
from benchmarks.quality.subjects import SUBJECTS
from benchmarks.result_files import RESULTS, ROOT, write_whole

IMAGES, QUICK_IMAGES, SEEDS = 300, 100, 3


def one_row_each(jobs: int) -> Executor:
    """A pool with one process per row; the processes are forked from one that has imported everything."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    context = multiprocessing.get_context("forkserver")
    # The fork server uses a new interpreter's search path, and reports no error if a module is missing.
    context.set_forkserver_preload(["benchmarks.quality.compare"])
    return ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,), max_tasks_per_child=1)


def run_rows(arguments: argparse.Namespace, folder: Path, results: dict[str, Any], save: Any) -> bool:
    """Measures the missing rows, fp32 first, each row of each seed in its own process; True if all succeeded."""
    succeeded = True

    def has_images(name: str, seed: int) -> bool:
        return name != FP32 or (folder / f"fp32_{seed}.pt").exists()

    for names in ([FP32], [name for name in arguments.row or rows_to_measure(arguments.quick) if name != FP32]):
        with one_row_each(arguments.jobs) as pool:
            # Seed by seed, so that an interrupted run has complete tables of fewer seeds.
            rows = {
                pool.submit(measure, arguments.task, name, seed, arguments.images, folder): (name, seed)
                for seed, name in itertools.product(range(arguments.seeds), names)
                if str(seed) not in results.get(name, {}) or not has_images(name, seed)
            }
            for row in as_completed(rows):
                name, seed = rows[row]
                try:
                    results.setdefault(name, {})[str(seed)] = row.result()
                except Exception:
                    succeeded = False
                    print(f"{name}, seed {seed} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                else:
                    save()
                    print(f"{time.strftime('%H:%M:%S')}  {name}, seed {seed}", flush=True)
    return succeeded


def main() -> None:
    parser = task_parser(__doc__, SUBJECTS)
    parser.add_argument("--quick", action="store_true", help="one seed, 100 images, five methods, no other libraries")
    parser.add_argument("--images", type=int, default=IMAGES, help="images per row and seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--row", action="append", help="only this row; may be repeated")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images, arguments.seeds = QUICK_IMAGES, 1
    name = slug(arguments.task) + ("_quick" if arguments.quick else "")
    output = arguments.output or RESULTS / f"quality_{name}.json"
    folder = ROOT / "out" / f"quality_{name}_{arguments.images}"
    folder.mkdir(parents=True, exist_ok=True)
    before = json.loads(output.read_text()) if output.exists() else {"images": arguments.images, "results": {}}
    results = before["results"]
    if before["images"] != arguments.images:
        parser.error(f"{output} has rows of {before['images']} images: delete it, or give --images or --output")

    options = f"--task {arguments.task} --images {arguments.images} --seeds {arguments.seeds} --jobs {arguments.jobs}"

    def save() -> dict[str, Any]:
        ordered = {name: results[name] for name in row_names(quick=False) if name in results}
        report = {
            "command": command("compare", options),
            "environment": environment.describe() | {"threads": 1, "jobs": arguments.jobs},
            "task": arguments.task,
            "steps": STEPS,
            "images": arguments.images,
            "calibration_samples": SUBJECTS[arguments.task].calibration_samples,
            "summary": summary(ordered),
            "contributions": contributions(ordered),
            "results": ordered,
        }
        write_whole(output, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        return report

    complete = run_rows(arguments, folder, results, save)
    report = save()
    picture = output.with_suffix(".png")
    plot(report["summary"], picture)
    text = page(report, picture.name)
    output.with_suffix(".md").write_text(text)
    print(text)
    if not complete:
        sys.exit("Some rows failed; run it again for those")


if __name__ == "__main__":
    main()
