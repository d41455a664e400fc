"""Fails calls at random lines of dq_runtime, and compares the model with what it was; prints what differs.

    PYTHONPATH=tests/support python tests/robustness/interruptions.py [--lines 100] [--seed 0] [--only fuse]

Every other failure is a Ctrl-C, the others are a MemoryError. It exits with an error if a model differs in anything, or
computes another result than before.
"""

import argparse
import logging
import random
import sys
import time

from failing_calls import CALLS, failures, number_of_lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=100, help="of each call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=CALLS)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    findings = 0
    for name in [arguments.only] if arguments.only else CALLS:
        start, lines = time.monotonic(), number_of_lines(name)
        chosen = random.Random(arguments.seed).sample(range(lines), min(lines, arguments.lines))
        found = failures(name, chosen)
        findings += len(found)
        print(
            f"{name}: {len(chosen)} of {lines} lines, {len(found)} findings, {time.monotonic() - start:.0f} s",
            flush=True,
        )
        for line in found:
            print(f"    {line}")
    if findings:
        sys.exit(f"{findings} findings")


if __name__ == "__main__":
    main()
