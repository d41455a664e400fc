"""Runs a function on several ranks: forked processes in one group of Gloo."""

import os
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist


def on_ranks(function, folder, count=2, seconds=100):
    """The results of ``function(rank)`` on each rank, or what it raised, in the order of the ranks.

    All ranks must end within ``seconds``. ``folder`` must be empty.
    """
    processes = [_forked(function, folder, rank, count) for rank in range(count)]
    deadline = time.monotonic() + seconds
    while processes and time.monotonic() < deadline:
        processes = [process for process in processes if os.waitpid(process, os.WNOHANG)[0] == 0]
        time.sleep(0.02)
    for process in processes:
        os.kill(process, 9)
        os.waitpid(process, 0)
    assert not processes, f"{len(processes)} of {count} ranks did not end"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _forked(function, folder, rank, count):
    process = os.fork()
    if process:
        return process
    try:
        torch.set_num_threads(1)
        group = {"init_method": f"file://{folder}/group", "rank": rank, "world_size": count}
        dist.init_process_group("gloo", timeout=timedelta(seconds=60), **group)
        try:
            result = function(rank)
        except BaseException as error:
            traceback.print_exc()
            result = error.with_traceback(None)
        torch.save(result, folder / f"{rank}.pt")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)
