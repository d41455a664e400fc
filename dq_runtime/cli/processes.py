"""The processes of ``torchrun`` or ``accelerate launch`` that run one command together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from dq_runtime.calibration import ranks
from dq_runtime.cli.console import are_several_processes
from dq_runtime.cli.errors import UserError, as_user_errors
from dq_runtime.cli.models import chosen_device

LONGEST_WAIT = timedelta(hours=2)  # for the slowest process, which may have one image more to draw


@contextmanager
def together(device_name: str | None) -> Iterator[torch.device]:
    """Runs the ``with`` block on all processes, as ranks of one group; it fails on all of them or on none.

    Args:
        device_name: the option --device.

    Returns:
        the device of this process. On GPUs it has the number of the process on its machine.

    Raises:
        UserError: if another process failed, several processes are given the same GPU, the launcher's variables are
            incomplete, or there is no such device.
    """
    if not are_several_processes():
        yield chosen_device(device_name)
        return
    device = _own_device(device_name)
    with as_user_errors(ValueError, RuntimeError, subject="The processes find no group"):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    try:
        with ranks.together():
            yield device
    except ranks.RankFailed as error:
        raise UserError(str(error)) from error
    finally:
        dist.destroy_process_group()


def _own_device(name: str | None) -> torch.device:
    device = chosen_device(name)
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise UserError(f"--device {name}: several processes need a GPU each. Use --device cuda")
    number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= count:
        raise UserError(f"More processes than GPUs on this machine: start at most {count}, or use --device cpu")
    return torch.device("cuda", number)
