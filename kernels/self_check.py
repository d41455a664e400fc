"""Every public operator against its oracle on small inputs, on this machine, and what it runs on here."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dq_kernels import ops, reference
from dq_kernels.cpu import compiled
from dq_kernels.packing import pack_int4
from dq_kernels.records import Norm, PackedWeight, Quantizer

BATCH, ROWS, CHANNELS, OUT_CHANNELS, GROUPS, HEADS = 3, 8, 64, 32, 4, 2
# Of the relative root mean square error of floats: their rounding.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# int8 results are rounded from floats whose last bits may differ: so many values may be one step away.
ONE_STEP_IN = 1000


@dataclass(frozen=True)
class Check:
    """The comparison of one operator with its oracle."""

    operator: str
    passed: bool
    detail: str


def check_operators(device: torch.device) -> list[Check]:
    """Runs every operator on a device, in the dtype that models have there, and its oracle on the CPU."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return [_check(name, make(dtype), device) for name, make in CASES.items()]


def kernels_in_use(device: torch.device) -> dict[str, str]:
    """What runs the operators on a device: backend, launch configurations, instruction set."""
    if device.type == "cuda":
        from dq_kernels.triton import tuning  # without Triton, the CPU's kernels can be checked
        from dq_kernels.triton.launch import current_target

        target, file = current_target(), tuning.architecture()
        origin = tuning.read_tuning(tuning.FOLDER / f"{file}.json")[0]
        how = "measured on " + origin["source"]["device"] if origin.get("measured") else "chosen from compiler reports"
        return {
            "backend": "Triton",
            "target": "unknown" if target is None else f"{target.backend} {target.arch}",
            "launch configurations": f"{file}.json, {how}",
            "GEMM of linears": "Gluon" if tuning.uses_hopper_gemm(target) else "Triton",
        }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        library = compiled.library()
    plain = f"plain torch, slow: {caught[-1].message}" if caught else "plain torch, slow: no C++ compiler"
    return {
        "backend": "oneDNN" if torch.backends.mkldnn.is_available() else "PyTorch without oneDNN",
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "C++ compiler": compiled.found_compiler() or "none found ($CXX, c++, g++, clang++)",
        "quantization, norms and epilogues": "compiled C++, one pass" if library is not None else plain,
    }


def _check(name: str, arguments: tuple[Any, ...], device: torch.device) -> Check:
    expected = getattr(reference, name)(*arguments)
    try:
        actual = getattr(ops, name)(*(_moved(argument, device) for argument in arguments))
        pairs = zip(_tensors(actual), _tensors(expected), strict=True)
        errors = [_error(a.cpu(), b) for a, b in pairs]
    except Exception as error:  # a compiler's, a driver's, a launch's: all are findings here
        return Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    wrong = [error for error in errors if error is not None]
    return Check(name, not wrong, "; ".join(wrong) or "as the oracle")


def _error(actual: Tensor, expected: Tensor) -> str | None:
    """How a result differs from the oracle's by more than it may; None if it does not."""
    if actual.shape != expected.shape:
        return f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    if expected.dtype == torch.int8:
        steps = (actual.int() - expected.int()).abs()
        different = int(steps.count_nonzero())
        if different and (int(steps.max()) > 1 or different > max(1, steps.numel() // ONE_STEP_IN)):
            return f"{different} of {steps.numel()} int8 values differ, by {int(steps.max())} at most"
        return None
    error = ((actual.double() - expected.double()).square().mean() / expected.double().square().mean()).sqrt().item()
    limit = TOLERANCES[actual.dtype]
    return None if error <= limit else f"relative error {error:.2g}, allowed {limit:.2g}"  # NaN is an error


def _tensors(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [part for part in (result if isinstance(result, tuple) else (result,)) if part.numel()]


def _moved(argument: Any, device: torch.device) -> Any:
    if isinstance(argument, Tensor):
        return argument.to(device, copy=True)  # operators may write the timestep index
    if isinstance(argument, (Quantizer, PackedWeight, Norm)):
        return type(argument)(*(_moved(field, device) for field in argument))
    return argument


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _quantizer(channels: int, scale: float = 0.02) -> Quantizer:
    """Mixed timesteps; 8 bits."""
    scales = scale * torch.tensor([1.0, 1.5, 2.0])
    index = torch.tensor([2, 0, 1], dtype=torch.int32)
    return Quantizer(1 + _normal(channels).abs(), scales, torch.tensor([-9, 0, 7], dtype=torch.int32), index, 8)


def _weight(*shape: int) -> PackedWeight:
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-8, 8, shape, dtype=torch.int8, generator=generator)
    scale = 0.01 + 0.01 * torch.rand(shape[0], generator=generator)
    return PackedWeight(pack_int4(values), scale, values.flatten(1).sum(1, dtype=torch.int32))


def _integers(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(2))


def _norm(dtype: torch.dtype) -> Norm:
    return Norm(_normal(CHANNELS, seed=3).to(dtype), _normal(CHANNELS, seed=4).to(dtype), 1e-5)


def _attention(dtype: torch.dtype) -> tuple[Any, ...]:
    return (*(_normal(BATCH, 2 * ROWS, CHANNELS, seed=seed).to(dtype) for seed in range(3)), HEADS)


Case = Callable[[torch.dtype], tuple[Any, ...]]
CASES: dict[str, Case] = {
    "quantize": lambda dtype: (_normal(BATCH, ROWS, ROWS, CHANNELS).to(dtype), _quantizer(CHANNELS), (1, 1)),
    "layer_norm_quantize": lambda dtype: (
        _normal(BATCH, ROWS, CHANNELS).to(dtype), _norm(dtype), _quantizer(CHANNELS)
    ),
    "group_norm_quantize": lambda dtype: (
        _normal(BATCH, ROWS, ROWS, CHANNELS).to(dtype), GROUPS, _norm(dtype), _quantizer(CHANNELS), True, None, None,
        None, (1, 1), None,
    ),
    "int4_linear": lambda dtype: (
        _integers(BATCH, ROWS, CHANNELS), _weight(OUT_CHANNELS, CHANNELS), _quantizer(CHANNELS),
        _normal(OUT_CHANNELS).to(dtype), _normal(BATCH, ROWS, OUT_CHANNELS).to(dtype), dtype,
    ),
    "int4_geglu_quantize": lambda dtype: (
        _integers(BATCH, ROWS, CHANNELS), _weight(2 * OUT_CHANNELS, CHANNELS), _quantizer(CHANNELS),
        _quantizer(OUT_CHANNELS, 0.5), _normal(2 * OUT_CHANNELS).to(dtype),
    ),
    "int4_conv2d": lambda dtype: (
        _integers(BATCH, ROWS + 2, ROWS + 2, CHANNELS), _weight(OUT_CHANNELS, 3, 3, CHANNELS), _quantizer(CHANNELS),
        _normal(OUT_CHANNELS).to(dtype), None, _normal(BATCH, ROWS, ROWS, OUT_CHANNELS).to(dtype), (1, 1), (1, 1),
        False, dtype, True,
    ),
    "attention_quantize": lambda dtype: (*_attention(dtype), _quantizer(CHANNELS)),
    "int8_attention": _attention,
    "int8_attention_quantize": lambda dtype: (*_attention(dtype), _quantizer(CHANNELS)),
}  # fmt: skip
