"""dq_runtime: packed-INT4 diffusion models for diffusers, by DilateQuant, on Triton kernels.

Importing it registers the quantization method with diffusers, so that stock ``from_pretrained`` loads packed
checkpoints. Calibration, fused blocks, CUDA graphs and dequantization are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dq_runtime.attention import Int8AttnProcessor
from dq_runtime.config import DilateQuantConfig
from dq_runtime.diffusers_quantizer import register
from dq_runtime.layers import QuantConv2d, QuantLinear

if TYPE_CHECKING:
    from dq_runtime.calibration.calibrate import calibrate
    from dq_runtime.calibration.collect import CalibrationSet, collect_from_pipeline, collect_from_scheduler, record
    from dq_runtime.calibration.distillation import Distillation
    from dq_runtime.dequantization import dequantize
    from dq_runtime.fused import fuse
    from dq_runtime.graphs import disable_cuda_graphs, enable_cuda_graphs

_ON_FIRST_USE = {
    "calibrate": "calibration.calibrate",
    "CalibrationSet": "calibration.collect",
    "collect_from_pipeline": "calibration.collect",
    "collect_from_scheduler": "calibration.collect",
    "record": "calibration.collect",
    "Distillation": "calibration.distillation",
    "dequantize": "dequantization",
    "fuse": "fused",
    "enable_cuda_graphs": "graphs",
    "disable_cuda_graphs": "graphs",
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
    if name in _ON_FIRST_USE:
        from importlib import import_module

        return getattr(import_module(f"dq_runtime.{_ON_FIRST_USE[name]}"), name)
    raise AttributeError(f"module 'dq_runtime' has no attribute {name!r}")
