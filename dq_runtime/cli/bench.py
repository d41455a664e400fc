"""``dq-runtime bench``: a model in floating point and in INT4 on this machine, side by side."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import dq_runtime
from dq_runtime import DilateQuantConfig
from dq_runtime.cli import models
from dq_runtime.cli.drawing import record, repeated
from dq_runtime.cli.errors import as_user_errors
from dq_runtime.cli.prompts import COMPARISON_PROMPTS
from dq_runtime.layers import is_quantized

WARM_UPS = 3
STEPS = 2  # of the recorded calls


def bench(name: str, batch: int, rounds: int, device_name: str | None) -> dict[str, Any]:
    """Times one call of the model, alternating between both forms; the median of the rounds.

    A packed model is compared with its rounded weights in floating point, and a floating-point one with its weights
    rounded to nearest: the time does not depend on the values.

    Args:
        batch: images; with guidance the model's batch is twice as large.

    Returns:
        for each form: milliseconds (median, least), megabytes of all tensors; and their ratio.

    Raises:
        UserError: see ``dq_runtime.cli.errors``.
    """
    models.at_least("--batch", batch, 1)
    models.at_least("--rounds", rounds, 1)
    device = models.chosen_device(device_name)
    pipeline, _, model = models.load_any(models.find(name), device)
    call, forms = _forms(pipeline, model, device)
    call = repeated(call, batch)
    times: dict[str, list[float]] = {form: [] for form in forms}
    for number in range(WARM_UPS + rounds):
        for form, unet in forms.items():
            seconds = _seconds(lambda unet=unet: call.run(unet), device)  # type: ignore[misc]
            if number >= WARM_UPS:
                times[form].append(seconds)
    report = {
        form: {
            "milliseconds": 1000 * median(times[form]),
            "least_milliseconds": 1000 * min(times[form]),
            "megabytes": sum(t.nbytes for t in (*unet.parameters(), *unet.buffers())) / 1e6,
        }
        for form, unet in forms.items()
    }
    floating, packed = report.values()
    return {
        "model": name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "batch": call.sample.shape[0],
        "rounds": rounds,
        "forms": report,
        "speedup": floating["milliseconds"] / packed["milliseconds"],
    }


def _forms(pipeline: Any | None, model: Any, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """A recorded call, and the model in floating point and in INT4, by name."""
    packed, stock = (model, copy.deepcopy(model).dequantize()) if is_quantized(model) else (None, model)
    calls = record(_with(pipeline, model, stock), stock, COMPARISON_PROMPTS[:1], 1, STEPS, 0)
    if packed is None:
        with as_user_errors(ValueError, TypeError):
            packed = dq_runtime.calibrate(
                copy.deepcopy(stock), calls, DilateQuantConfig(dilation="none"), distillation=None
            )
    models.make_fast(packed, device)
    graphs = " with CUDA graphs" if device.type == "cuda" else ""
    return calls.calls[-1], {f"{str(stock.dtype).removeprefix('torch.')}, eager": stock, f"INT4, fused{graphs}": packed}


def _with(pipeline: Any | None, model: Any, other: Any) -> Any | None:
    """The pipeline with another model in the place of one."""
    if pipeline is not None:
        name = next(name for name, component in pipeline.components.items() if component is model)
        setattr(pipeline, name, other)
    return pipeline


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
