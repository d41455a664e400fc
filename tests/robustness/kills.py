"""Kills 100 saves of a quantized UNet at random moments, and one at each file event; prints what their folders hold.

    PYTHONPATH=tests/support python tests/robustness/kills.py [--kills 100]

Each save replaces an older checkpoint of the same folder, in a single file and in shards. It exits with an error unless
each folder holds the whole old or the whole new checkpoint.
"""

import argparse
import collections
import copy
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers.utils import logging
from killed_saves import killed_after, killed_at_event, loaded_from
from tiny_unets import unet2d_condition

import dq_runtime


def quantized(timesteps):
    unet = unet2d_condition()
    with dq_runtime.record(unet) as calls, torch.no_grad():
        for timestep in timesteps:
            unet(torch.randn(2, 4, 8, 8), timestep, encoder_hidden_states=torch.randn(2, 5, 32))
    return dq_runtime.calibrate(unet, calls, dq_runtime.DilateQuantConfig(dilation="none"), distillation=None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="at random moments, for each kind of checkpoint")
    kills = parser.parse_args().kills
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    old, new = quantized((0, 250, 500, 750)), quantized((0, 10, 20, 30))
    states = {"old": copy.deepcopy(old.state_dict()), "new": copy.deepcopy(new.state_dict())}
    results = collections.Counter()
    for kind, arguments in (("single file", {}), ("shards", {"max_shard_size": "200KB"})):
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "unet"

            def save(unet=new, folder=folder, arguments=arguments):
                unet.save_pretrained(folder, **arguments)

            def check(way, folder=folder, kind=kind):
                results[kind, way, loaded_from(folder, **states)] += 1

            start = time.perf_counter()
            save()
            seconds = time.perf_counter() - start
            draw = random.Random(0)
            for _ in range(kills):
                save(old)
                killed_after(save, draw.uniform(0, 1.5 * seconds))
                check("killed at random")
            event = 0
            save(old)
            while killed_at_event(save, event):
                check("killed at each file event")
                save(old)
                event += 1
            left = [path.name for path in Path(parent).iterdir()]
            if left != ["unet"]:
                sys.exit(f"left behind: {left}")
    for (kind, way, found), count in sorted(results.items()):
        print(f"{kind}, {way}: {found} {count}")
    if {found for _, _, found in results} - {"old", "new"}:
        sys.exit("not always the old or the new checkpoint")


if __name__ == "__main__":
    main()
