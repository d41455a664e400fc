"""Calls, loads and threads in large numbers on a tiny UNet: wrong results, and growth of memory.

    PYTHONPATH=tests/support python tests/robustness/soak.py [--forwards 10000] [--loads 100] [--threads 8]

Forward passes of a fused UNet change shape, prompt, timesteps and LoRA adapters at random. Each result is compared with
that of a copy which has made no other call, bit for bit, and so are those of threads that share a UNet and those of
loaded ones. It exits with an error if a result differs, or if memory grows by more than 1 % over the forwards after the
first tenth.
"""

import argparse
import copy
import gc
import logging
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import fused_unets
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig

import dq_runtime

SIZES = ((8, 8), (16, 16), (16, 8), (24, 16), (8, 24))
TIMESTEPS = (100, 333.5, 900, torch.tensor([900, 100, 500]), torch.tensor([1.0, 999.0, 450.0]))
ADAPTERS = (None, "first", "second", ("first", "second"))
GROWTH = 1.01  # the largest, over the forwards


def resident():
    """Memory of this process without garbage, in MB."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def adapted(unet):
    """The UNet with two LoRA adapters that change its results, fused."""
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False), name)
    dq_runtime.fuse(unet)
    return unet.requires_grad_(False)


def use(unet, adapter):
    if adapter is None:
        unet.disable_adapters()
    else:
        unet.enable_adapters()
        unet.set_adapter(list(adapter) if isinstance(adapter, tuple) else adapter)


def call(unet, case):
    size, timestep, seed, tokens, _ = case
    prompt = torch.randn(fused_unets.BATCH, tokens, 32, generator=torch.Generator().manual_seed(seed))
    return fused_unets.call(unet, timestep, size, seed, encoder_hidden_states=prompt)


def drawn_cases(number, seed=0):
    draw = random.Random(seed)
    return [
        (draw.choice(SIZES), draw.choice(TIMESTEPS), draw.randrange(4), draw.choice((5, 7)), draw.choice(ADAPTERS))
        for _ in range(number)
    ]


def expected_results(unet, cases):
    """Those of a new copy for each case."""
    results = []
    for case in cases:
        alone = copy.deepcopy(unet)
        use(alone, case[-1])
        results.append(call(alone, case))
    return results


def soak_forwards(number, report):
    unet, cases = adapted(fused_unets.quantized()), drawn_cases(60)
    expected = expected_results(unet, cases)
    draw, wrong, start = random.Random(1), 0, time.monotonic()
    for done in range(number):
        if done == number // 10:
            before = resident()
        chosen = draw.randrange(len(cases))
        use(unet, cases[chosen][-1])
        wrong += not torch.equal(call(unet, cases[chosen]), expected[chosen])
    report("forwards", number, wrong, before, resident(), time.monotonic() - start)
    return wrong, resident() / before


def soak_loads(number, report):
    unet, case = fused_unets.quantized(), drawn_cases(1)[0]
    expected, wrong, start = call(unet, case), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        unet.save_pretrained(folder)
        for done in range(number):
            if done == number // 10:
                before = resident()
            loaded = UNet2DConditionModel.from_pretrained(folder)
            wrong += not torch.equal(call(loaded, case), expected)
            del loaded
    report("loads", number, wrong, before, resident(), time.monotonic() - start)
    return wrong


def soak_threads(threads, calls, report):
    unet, cases = adapted(fused_unets.quantized()), drawn_cases(40, seed=2)
    cases = [(*case[:-1], "first") for case in cases]
    use(unet, "first")
    expected, wrong, start, before = expected_results(unet, cases), [], time.monotonic(), resident()

    def run(seed):
        draw = random.Random(seed)
        with torch.no_grad():
            for _ in range(calls):
                chosen = draw.randrange(len(cases))
                try:
                    if not torch.equal(call(unet, cases[chosen]), expected[chosen]):
                        wrong.append(chosen)
                except Exception as error:
                    wrong.append(error)

    running = [threading.Thread(target=run, args=(seed,)) for seed in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    report(f"calls of {threads} threads", threads * calls, len(wrong), before, resident(), time.monotonic() - start)
    return len(wrong)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forwards", type=int, default=10_000)
    parser.add_argument("--loads", type=int, default=100)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=200, help="of each thread")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    diffusers_logging.disable_progress_bar()

    def report(what, number, wrong, before, after, seconds):
        memory = f"{before:.1f} -> {after:.1f} MB ({100 * (after / before - 1):+.2f} %)"
        print(f"{number} {what}: {wrong} wrong; {memory}; {seconds:.0f} s", flush=True)

    wrong, growth = soak_forwards(arguments.forwards, report)
    wrong += soak_loads(arguments.loads, report)
    wrong += soak_threads(arguments.threads, arguments.calls, report)
    if wrong:
        sys.exit(f"{wrong} wrong results")
    if growth > GROWTH:
        sys.exit(f"memory grew by {100 * (growth - 1):.1f} % over the forwards")


if __name__ == "__main__":
    main()
