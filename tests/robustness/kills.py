"""Kills saves, and calibrations that can be resumed, at random moments; prints what they leave.

    PYTHONPATH=tests/support python tests/robustness/kills.py [--kills 50] [--only quantize]

Saves of a checkpoint, in a single file and in shards, and of a calibration set replace an older one: the old or the new
one must be there, whole. A killed block-wise distillation is repeated: the result must be that of an undisturbed one,
bit for bit. Half of the kills of a distillation come at a file operation, and so do more of a save, one at each. The
command ``dq-runtime quantize`` is killed at random moments of a whole run and repeated: its folder must hold the bytes
of an undisturbed run's, and nothing may lie beside it.
"""

import argparse
import collections
import copy
import logging
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import distilling
import torch
from diffusers.utils import logging as diffusers_logging
from killed_saves import killed_after, killed_at_event, loaded_from, number_of_events
from tiny_pipeline import SHORT, save_pipeline
from tiny_unets import unet2d_condition

import dq_runtime
from dq_runtime import CalibrationSet, DilateQuantConfig


def quantized(timesteps):
    unet = unet2d_condition()
    with dq_runtime.record(unet) as calls, torch.no_grad():
        for timestep in timesteps:
            unet(torch.randn(2, 4, 8, 8), timestep, encoder_hidden_states=torch.randn(2, 5, 32))
    return dq_runtime.calibrate(unet, calls, DilateQuantConfig(dilation="none"), distillation=None)


def seconds_of(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def kill_saves(kind, save, restore, found, kills, results):
    """Kills ``save``, which replaces what ``restore`` has written, at random moments and at each file operation."""
    draw, seconds = random.Random(0), seconds_of(save)
    for _ in range(kills):
        restore()
        killed_after(save, draw.uniform(0, 1.5 * seconds))
        results[kind, "killed at random", found()] += 1
    event = 0
    restore()
    while killed_at_event(save, event):
        results[kind, "killed at each file operation", found()] += 1
        restore()
        event += 1


def kill_checkpoints(kills, results):
    old, new = quantized((0, 250, 500, 750)), quantized((0, 10, 20, 30))
    states = {"old": copy.deepcopy(old.state_dict()), "new": copy.deepcopy(new.state_dict())}
    for kind, arguments in (("single file", {}), ("shards", {"max_shard_size": "200KB"})):
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "unet"
            kill_saves(
                kind,
                lambda folder=folder, arguments=arguments: new.save_pretrained(folder, **arguments),
                lambda folder=folder, arguments=arguments: old.save_pretrained(folder, **arguments),
                lambda folder=folder: loaded_from(folder, **states),
                kills,
                results,
            )
            check_left(Path(parent), ["unet"])


def kill_calibration_sets(kills, results):
    unet = distilling.unet2d()
    sets = {name: distilling.recorded(unet, rows=64, timesteps=t) for name, t in (("old", (1, 2)), ("new", (3, 4, 5)))}
    with tempfile.TemporaryDirectory() as parent:
        file = Path(parent) / "calls"

        def found():
            try:
                loaded = CalibrationSet.load(file)
            except ValueError:
                return "refused"
            for name, expected in sets.items():
                pairs = list(zip(loaded.calls, expected.calls, strict=False))
                if len(loaded.calls) == len(expected.calls) and all(torch.equal(a.sample, b.sample) for a, b in pairs):
                    return name
            return "mixture"

        kill_saves(
            "calibration set", lambda: sets["new"].save(file), lambda: sets["old"].save(file), found, kills, results
        )
        check_left(Path(parent), ["calls"])


def kill_distillations(kills, results):
    subject = distilling.Subject(distilling.unet2d(), DilateQuantConfig(**distilling.FEW_BLOCKS))
    with tempfile.TemporaryDirectory() as parent:
        seconds = seconds_of(lambda: subject.distil(folder=Path(parent) / "whole"))
        events = number_of_events(lambda: subject.distil(folder=Path(parent) / "counted"))
        draw = random.Random(0)
        for number in range(kills):
            folder = Path(parent) / str(number)
            if number % 2:
                killed_at_event(lambda folder=folder: subject.distil(folder=folder), draw.randrange(events))
            else:
                killed_after(lambda folder=folder: subject.distil(folder=folder), draw.uniform(0, seconds))
            finished = len(list(folder.glob("*.safetensors")))
            resumed, expected = subject.distil(folder=folder).state_dict(), subject.distilled.state_dict()
            same = all(torch.equal(resumed[name], expected[name]) for name in expected)
            some = "with finished blocks" if finished else "before the first block's end"
            results["distillation", f"killed {some}", "new" if same else "another result"] += 1
            check_left(folder / "activations", [])


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def kill_commands(kills, results):
    with tempfile.TemporaryDirectory() as parent:
        outputs, errors = Path(parent) / "outputs", Path(parent) / "errors"
        outputs.mkdir()
        source = save_pipeline(Path(parent), block_out_channels=(16, 32), norm_num_groups=4)
        prompts = Path(parent) / "prompts.txt"
        prompts.write_text("a cat\na dog\na hat\n")

        def start(output):
            command = [sys.executable, "-m", "dq_runtime", "quantize", source, "-o", output, "--prompts", prompts]
            return subprocess.Popen([*command, *SHORT, "--preset", "balanced"], stderr=errors.open("w"))

        def run(output):
            if start(output).wait():
                sys.exit(f"quantize failed: {errors.read_text()}")

        seconds = seconds_of(lambda: run(outputs / "undisturbed"))
        expected, draw = contents(outputs / "undisturbed"), random.Random(0)
        for number in range(kills):
            output = outputs / str(number)
            process = start(output)
            try:
                process.wait(draw.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            work = output.with_name(f"{output.name}.work")
            if output.exists():
                moment = "at its end"
            elif list((work / "blocks").glob("*.safetensors")):
                moment = "with finished blocks"
            else:
                moment = "with recorded calls" if (work / "calls.safetensors").exists() else "before its calls"
            if not output.exists():
                run(output)
            found = "new" if contents(output) == expected else "another result"
            results["quantize", f"killed {moment}", found] += 1
        check_left(outputs, sorted(["undisturbed", *map(str, range(kills))]))


def check_left(folder, names):
    left = sorted(path.name for path in folder.iterdir())
    if left != names:
        sys.exit(f"left behind: {left}")


KINDS = {
    "checkpoints": kill_checkpoints,
    "calibration sets": kill_calibration_sets,
    "distillations": kill_distillations,
    "quantize": kill_commands,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="at random, of each of the five kinds")
    parser.add_argument("--only", choices=KINDS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    diffusers_logging.disable_progress_bar()
    results = collections.Counter()
    for kind, kill in KINDS.items():
        if arguments.only in (None, kind):
            kill(arguments.kills, results)
    for (kind, way, found), count in sorted(results.items()):
        print(f"{kind}, {way}: {found} {count}")
    if {found for _, _, found in results} - {"old", "new"}:
        sys.exit("not always the old or the new one")


if __name__ == "__main__":
    main()
