"""What pytest-benchmark writes beside the times."""

from __future__ import annotations

import torch
import triton


def pytest_benchmark_update_machine_info(config, machine_info):
    """Adds versions and the device; drops the list of CPU flags."""
    machine_info.update(torch=torch.__version__, triton=triton.__version__, threads=torch.get_num_threads())
    machine_info["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    machine_info["cpu"].pop("flags", None)
