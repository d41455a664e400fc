"""Runs a function in several forked processes, alone or as ranks of one group of Gloo."""

import os
import signal
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist


def on_ranks(function, folder, count=2, seconds=100):
    """The results of ``function(rank)`` on each rank, or what it raised, in the order of the ranks.

    All ranks must end within ``seconds``. ``folder`` must be empty.
    """

    def on_rank(rank):
        group = {"init_method": f"file://{folder}/group", "rank": rank, "world_size": count}
        dist.init_process_group("gloo", timeout=timedelta(seconds=seconds), **group)
        return function(rank)

    return in_processes(on_rank, folder, count, seconds)


def in_processes(function, folder, count=2, seconds=100):
    """The results of ``function(number)`` in each process, or what it raised."""
    processes = [_forked(function, folder, number) for number in range(count)]
    deadline = time.monotonic() + seconds
    while processes and time.monotonic() < deadline:
        processes = [process for process in processes if os.waitpid(process, os.WNOHANG)[0] == 0]
        time.sleep(0.02)
    for process in processes:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert not processes, f"{len(processes)} of {count} processes did not end"
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(count)]


def _forked(function, folder, number):
    process = os.fork()
    if process:
        return process
    try:
        torch.set_num_threads(1)  # more threads would wait for those of the process that was forked
        try:
            result = function(number)
        except BaseException as error:
            traceback.print_exc()
            result = error.with_traceback(None)
            result.__cause__ = result.__context__ = None
        torch.save(result, folder / f"{number}.pt")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)
