"""Damages checkpoints and calibration sets at random, and gives arguments random values; prints what comes of it.

    PYTHONPATH=tests/support python tests/robustness/fuzz.py [--minutes 5 | --cases 1000] [--seed 0] [--only arguments]

Nothing may change silently: a load or call is refused in a sentence, or gives the same as without damage. It exits with
an error if anything is silent, crashes, hangs for over 5 s, takes over 200 MB, or is refused unclearly. A finding is
printed with its seed; ``--cases 1 --seed SEED --only KIND`` repeats it.
"""

import argparse
import collections
import logging
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import torch
from damaged_checkpoints import damaged_load, saved_checkpoints
from damaged_files import calibration_file, damaged_calibration_file, random_argument
from diffusers.utils import logging as diffusers_logging

FINDINGS = {"SILENT", "unclear", "crash", "slow", "large"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--cases", type=int, help="of each kind, instead of minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--only", choices=("checkpoints", "calibration sets", "arguments"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    diffusers_logging.set_verbosity(50)
    diffusers_logging.disable_progress_bar()
    results, findings, largest, start = collections.Counter(), 0, 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        image, checkpoints = saved_checkpoints(folder)
        calibration_set = calibration_file(folder / "calls")

        def checkpoint(seed):
            *result, megabytes = damaged_load(checkpoints[seed % len(checkpoints)], folder / "damaged", seed, image)
            nonlocal largest
            largest = max(largest, megabytes)
            return result

        kinds = {
            "checkpoints": checkpoint,
            "calibration sets": lambda seed: damaged_calibration_file(
                folder / "calls", folder / "damaged calls", seed, calibration_set
            ),
            "arguments": random_argument,
        }
        for seed in count(arguments.seed):
            for kind in [arguments.only] if arguments.only else kinds:
                done, found, said = kinds[kind](seed)
                results[kind, found] += 1
                if found in FINDINGS:
                    findings += 1
                    print(f"{found}: {done}\n    {said}\n    --cases 1 --seed {seed} --only '{kind}'", flush=True)
            if seed + 1 - arguments.seed == arguments.cases:
                break
            if arguments.cases is None and time.monotonic() - start > 60 * arguments.minutes:
                break
    for (kind, found), number in sorted(results.items()):
        print(f"{kind}: {found} {number}")
    print(f"seeds from {arguments.seed}; at most {largest:.0f} MB more for a load; {time.monotonic() - start:.0f} s")
    if findings:
        sys.exit(f"{findings} findings")


if __name__ == "__main__":
    main()
