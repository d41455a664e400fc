"""``dq-runtime doctor``: what this machine has, which kernels run on it, and whether they compute what they should."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from dq_kernels.self_check import check_operators, kernels_in_use
from dq_runtime.cli.models import chosen_device

PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate", "safetensors", "scikit-image")


def examine(device_name: str | None) -> dict[str, Any]:
    """The report: versions, device, kernels, and a check of each operator.

    Raises:
        UserError: if there is no such device.
    """
    device = chosen_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return {
        "device": _describe(device),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "kernels": kernels_in_use(device),
        "operators": {
            check.operator: {"passed": check.passed, "detail": check.detail} for check in check_operators(device)
        },
    }


def _describe(device: torch.device) -> dict[str, str]:
    if device.type == "cpu":
        gpu = "none found" if not torch.cuda.is_available() else "there is one; --device cuda checks it"
        return {"device": f"CPU, {platform.machine()}, {torch.get_num_threads()} threads", "GPU": gpu}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": f"{properties.total_memory / 1e9:.1f} GB",
        "CUDA or HIP": str(torch.version.cuda or torch.version.hip),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
