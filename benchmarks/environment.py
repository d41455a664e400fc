"""The environment of a benchmark: machine, clocks and versions, for every file under ``results/``."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "diffusers", "numpy")
NVIDIA_SMI_FIELDS = {  # our name -> nvidia-smi's; units are MHz and W
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
}


def describe() -> dict[str, Any]:
    """Device, driver, clocks in MHz, power limit in W, CPU, threads, versions and date.

    Fields of NVIDIA's driver are left out if there is none. Clocks are the current ones.
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "date": datetime.date.today().isoformat(),
        "device": device,
        **(_nvidia_smi() if device != "cpu" else {}),
        "cpu_model": _cpu_model(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def sm_clock_mhz() -> float | None:
    """The GPU's present clock in MHz; None if its driver does not tell."""
    clock = _nvidia_smi().get("sm_clock_mhz")
    return clock if isinstance(clock, float) else None


def slug(device: str) -> str:
    """The name of a device in a form for file names, such as "nvidia_h100_80gb_hbm3"."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def _nvidia_smi() -> dict[str, Any]:
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    command = ["nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI_FIELDS.values())}", "--format=csv,noheader,nounits"]
    if uuid is not None:
        command += [f"--id=GPU-{str(uuid).removeprefix('GPU-')}"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in output.splitlines()[0].split(",")] if output.strip() else []
    return {name: _number(value) for name, value in zip(NVIDIA_SMI_FIELDS, values, strict=False)}


def _number(value: str) -> float | str:
    return float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else value


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    return names[0] if names else platform.processor()


def _version(package: str) -> str:
    """A package's version; for torch ``torch.__version__``, which includes the CUDA version."""
    return torch.__version__ if package == "torch" else importlib.metadata.version(package)
