"""dq_runtime: packed-INT4 diffusion models for diffusers, by DilateQuant, on Triton kernels.

Importing it registers the quantization method with diffusers, so that stock ``from_pretrained`` loads packed
checkpoints. Everything else is imported on first use, torch and diffusers too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dq_runtime.diffusers_registration import register

if TYPE_CHECKING:
    from dq_runtime.attention import Int8AttnProcessor
    from dq_runtime.calibration.calibrate import calibrate
    from dq_runtime.calibration.collect import CalibrationSet, collect_from_pipeline, collect_from_scheduler, record
    from dq_runtime.calibration.settings import Distillation
    from dq_runtime.config import DilateQuantConfig
    from dq_runtime.dequantization import dequantize
    from dq_runtime.fused import fuse
    from dq_runtime.graphs import disable_cuda_graphs, enable_cuda_graphs
    from dq_runtime.layers import QuantConv2d, QuantLinear

_MODULES = {
    "CalibrationSet": "calibration.collect",
    "DilateQuantConfig": "config",
    "Distillation": "calibration.settings",
    "Int8AttnProcessor": "attention",
    "QuantConv2d": "layers",
    "QuantLinear": "layers",
    "calibrate": "calibration.calibrate",
    "collect_from_pipeline": "calibration.collect",
    "collect_from_scheduler": "calibration.collect",
    "dequantize": "dequantization",
    "disable_cuda_graphs": "graphs",
    "enable_cuda_graphs": "graphs",
    "fuse": "fused",
    "record": "calibration.collect",
}

__all__ = [
    "CalibrationSet",
    "DilateQuantConfig",
    "Distillation",
    "Int8AttnProcessor",
    "QuantConv2d",
    "QuantLinear",
    "calibrate",
    "collect_from_pipeline",
    "collect_from_scheduler",
    "dequantize",
    "disable_cuda_graphs",
    "enable_cuda_graphs",
    "fuse",
    "record",
]
__version__ = "0.1.0"

register()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'dq_runtime' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"dq_runtime.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
