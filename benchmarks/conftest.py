"""What pytest-benchmark writes beside the times."""

from __future__ import annotations

import torch
import triton


def pytest_benchmark_update_machine_info(config, machine_info):
    """Adds versions and the device; drops what names one machine and the list of CPU flags."""
    machine_info.update(torch=torch.__version__, triton=triton.__version__, threads=torch.get_num_threads())
    machine_info["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    machine_info["cpu"].pop("flags", None)
    for name in ("node", "release", "processor"):
        machine_info.pop(name, None)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keeps the statistics, not every single round."""
    output_json.pop("commit_info", None)
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
