"""What quantization costs in image quality: DilateQuant part by part, what came before it, and other libraries.

    python benchmarks/quality.py [--task digits/cross_attention] [--quick] [--row NAME]... [--jobs 2] [--output FILE]

Trained small UNets (``examples/small_unets``) draw the same noise in fp32 and quantized. Each row of each seed runs in
a process of its own, on one thread, ``--jobs`` at a time; a seed decides about calibration data, training and the noise
of the images. Writes every single number to ``benchmarks/results/quality_<task>.json`` and, beside it, a page with the
means and standard deviations (``.md``, which it prints as well) and a plot (``.png``). Rows that are there already
(from an interrupted run) are not measured again; delete the file to begin anew.

Columns: label accuracy; PSNR in dB against fp32 at equal noise, of each image (mean) and of all together (pooled: the
few images that became others decide about it); SSIM; Fréchet distance to real images in the
classifier's features, and what it is more than fp32's; MB (10^6 bytes) of the whole UNet; seconds of calibration, and
the memory that it allocated at its peak on top of what the process held before.
"""

from __future__ import annotations

import argparse
import importlib.metadata
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

import environment
import peak_memory
import quality_peers
import torch
from quality_methods import ACTIVATION_BITS, METHODS, ONLY_AT, QUICK
from quality_report import contributions, page, plot, summary
from whole_file import write_whole

import dq_runtime
from dq_runtime.evaluation.metrics import frechet_distance, pooled_psnr, psnr, ssim

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "small_unets"))
from task import Task  # noqa: E402
from tasks import TASKS  # noqa: E402

STEPS, BATCH = 20, 100
CALIBRATION_SAMPLES = 200
IMAGES, QUICK_IMAGES, SEEDS = 300, 100, 3
FIRST_IMAGE_SEED = 1000  # calibration uses the seeds below
FP32 = "fp32"


def row_names(quick: bool) -> list[str]:
    """fp32; every method at each number of activation bits; the other libraries."""
    methods = [
        (name, bits)
        for bits in ACTIVATION_BITS
        for name in (QUICK if quick else METHODS)
        if ONLY_AT.get(name, bits) == bits
    ]
    ours = [f"{name}, W4A{bits}" for name, bits in methods]
    return [FP32, *ours, *([] if quick else quality_peers.PEERS)]


def rows_to_measure(quick: bool) -> list[str]:
    """Without the libraries that are not installed."""
    peers = quality_peers.PEERS
    return [name for name in row_names(quick) if name not in peers or not quality_peers.missing(peers[name])]


def collect(task: Task, unet: Any, seed: int) -> dq_runtime.CalibrationSet:
    """A seed's calibration data: the UNet's calls while it samples."""
    return dq_runtime.collect_from_scheduler(
        unet, task.noise_scheduler(), task.noise(CALIBRATION_SAMPLES, seed), STEPS,
        task.condition(task.labels(CALIBRATION_SAMPLES)), BATCH,
    )  # fmt: skip


def quantized(name: str, unet: Any, calibration_set: Any, seed: int) -> tuple[Any, int, int]:
    """The row's UNet, its weight bits and its activation bits."""
    if name == FP32:
        return unet, 32, 32
    if name in quality_peers.PEERS:
        peer = quality_peers.PEERS[name]
        return peer.quantize(unet, calibration_set), peer.weight_bits, peer.activation_bits
    method, bits = name.rsplit(", W4A", 1)
    return METHODS[method](unet, calibration_set, int(bits), seed), 4, int(bits)


def measure(task_name: str, name: str, seed: int, images: int, folder: Path) -> dict[str, Any]:
    """Quantizes and samples; the fp32 row of a seed, which the others' data comes from, has to have been measured."""
    task = TASKS[task_name]
    unet = task.unet()
    calibration_file = folder / f"calibration_{seed}.pt"
    if name == FP32:
        collect(task, unet, seed).save(calibration_file)
    calibration_set = dq_runtime.CalibrationSet.load(calibration_file)
    start = time.perf_counter()
    with peak_memory.above_now() as peak:
        model, weight_bits, activation_bits = quantized(name, unet, calibration_set, seed)
    seconds = time.perf_counter() - start
    labels, classifier = task.labels(images), task.classifier()
    drawn = task.sample(model, labels, FIRST_IMAGE_SEED + seed, STEPS)
    reference_file = folder / f"fp32_{seed}.pt"
    if name == FP32:
        partial = reference_file.with_suffix(".partial")
        torch.save(drawn, partial)
        partial.replace(reference_file)
    reference = torch.load(reference_file)
    with torch.no_grad():
        real = classifier.features(task.real_images()[0])
        distances = [frechet_distance(classifier.features(batch), real) for batch in (drawn, reference)]
        accuracy = (classifier(drawn).argmax(1) == labels).float().mean().item()
    peer = quality_peers.PEERS.get(name)
    return {
        "library": None if peer is None else f"{peer.package} {importlib.metadata.version(peer.package)}",
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "label_accuracy": accuracy,
        "psnr_db": None if name == FP32 else float(psnr(drawn, reference).mean()),
        "pooled_psnr_db": None if name == FP32 else pooled_psnr(drawn, reference),
        "ssim": None if name == FP32 else ssim(drawn, reference),
        "frechet": distances[0],
        "frechet_increase": distances[0] - distances[1],
        "unet_mb": quality_peers.size_mb(model),
        "quantized_weight_share": None if name == FP32 else quality_peers.coverage(model, task.unet()).weight_share,
        "calibration_seconds": None if name == FP32 else seconds,
        "calibration_peak_mb": None if name == FP32 else peak["allocated_mb"],
    }


def one_row_each(jobs: int) -> Executor:
    """Processes that end with their row; they come from one that has imported everything."""
    # The fork server looks for modules where a new interpreter does, and says nothing if it cannot find one.
    path = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["quality"])
    return ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,), max_tasks_per_child=1)


def run_rows(arguments: argparse.Namespace, folder: Path, results: dict[str, Any], save: Any) -> bool:
    """Measures what is missing, each row of each seed in its own process, fp32 first; whether all of it succeeded."""
    succeeded = True

    def has_images(name: str, seed: int) -> bool:
        return name != FP32 or (folder / f"fp32_{seed}.pt").exists()

    for names in ([FP32], [name for name in arguments.row or rows_to_measure(arguments.quick) if name != FP32]):
        with one_row_each(arguments.jobs) as pool:
            # Seed by seed: an interrupted run has whole tables of fewer seeds.
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="digits/cross_attention")
    parser.add_argument("--quick", action="store_true", help="one seed, 100 images, five methods, no other libraries")
    parser.add_argument("--images", type=int, default=IMAGES, help="that each row of each seed draws")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--row", action="append", help="only this row; may be given several times")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images, arguments.seeds = QUICK_IMAGES, 1
    slug = arguments.task.replace("/", "_") + ("_quick" if arguments.quick else "")
    output = arguments.output or ROOT / "benchmarks" / "results" / f"quality_{slug}.json"
    folder = ROOT / "out" / f"quality_{slug}_{arguments.images}"
    folder.mkdir(parents=True, exist_ok=True)
    before = json.loads(output.read_text()) if output.exists() else {"images": arguments.images, "results": {}}
    results = before["results"]
    if before["images"] != arguments.images:
        parser.error(f"{output} has rows of {before['images']} images: delete it, or give --images or --output")

    def save() -> dict[str, Any]:
        ordered = {name: results[name] for name in row_names(quick=False) if name in results}
        report = {
            "command": f"python benchmarks/quality.py --task {arguments.task} --images {arguments.images}"
            f" --seeds {arguments.seeds} --jobs {arguments.jobs}",
            "environment": environment.describe() | {"threads": 1, "jobs": arguments.jobs},
            "task": arguments.task,
            "steps": STEPS,
            "images": arguments.images,
            "calibration_samples": CALIBRATION_SAMPLES,
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
