"""Error of each quantized layer's output against the floating-point UNet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dq_runtime.fused import is_fused
from dq_runtime.layers import is_quantized, quantized_layers
from dq_runtime.validation import instance, shown

if TYPE_CHECKING:
    from dq_runtime.calibration.collect import CalibrationSet

LISTED = 10  # the most layers that an error message names


def layer_sqnr(unet: Any, reference: Any, calibration_set: CalibrationSet) -> dict[str, float]:
    """Signal-to-quantization-noise ratio of every quantized layer's output, in dB.

    SQNR = 10 log10(sum |y|^2 / sum |y' - y|^2) over all recorded calls, with output y of the reference and y' of the
    quantized UNet. Both UNets run as a whole, so a layer's error includes the error of its input. Memory holds the
    reference's outputs for one call at a time.

    Args:
        unet: the quantized UNet, not fused, so that its layers run one by one.
        reference: the floating-point UNet that it was made from.
        calibration_set: the calls to run, from the calibration or others.

    Returns:
        SQNR in dB by layer name, in the order of the forward pass. It is infinite for an output without error, and NaN
        for an output that is not finite. Layers that no call reaches are left out.

    Raises:
        ValueError: if a UNet is not as described, a layer has no counterpart of the same shape, or there are no calls.
        TypeError: if an argument is of another class.
    """
    instance("unet", unet, nn.Module)
    instance("reference", reference, nn.Module)
    if not hasattr(calibration_set, "calls"):
        raise TypeError(f"calibration_set must be a CalibrationSet, got {shown(calibration_set)}")
    layers = quantized_layers(unet)
    counterparts = _counterparts(unet, reference, layers)
    if not calibration_set.calls:
        raise ValueError("The calibration set is empty: record at least one call with dq_runtime.record")
    expected: dict[str, list[torch.Tensor]] = {}  # outputs of the current call; compare() removes them
    energies: dict[str, torch.Tensor] = {}

    def keep(name: str, layer: nn.Module, args: Any, y: torch.Tensor) -> None:
        # A copy: a UNet may change y in place, for example by adding a T2I-Adapter's features.
        expected.setdefault(name, []).append(y.detach().clone())

    def compare(name: str, layer: nn.Module, args: Any, y: torch.Tensor) -> None:
        signal = expected[name].pop(0)
        if signal.shape != y.shape:
            raise ValueError(
                f"{name}: its output is {list(y.shape)}, the reference's is {list(signal.shape)}. Pass the "
                "floating-point UNet that this one was made from"
            )
        signal = signal.to(y.device, torch.float64)
        energy = torch.stack([signal.square().sum(), (y.detach() - signal).square().sum()])
        energies[name] = energies.get(name, 0) + energy

    with ExitStack() as stack:
        for model in (unet, reference):
            stack.enter_context(_eval_mode(model))
        for name, layer in layers.items():
            stack.callback(counterparts[name].register_forward_hook(partial(keep, name)).remove)
            stack.callback(layer.register_forward_hook(partial(compare, name)).remove)
        for call in calibration_set.calls:
            call.run(reference)
            call.run(unet)
    return {name: _decibels(*energy.tolist()) for name, energy in energies.items()}


def _counterparts(unet: Any, reference: Any, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The reference's layer for each quantized layer, by name."""
    if not layers:
        raise ValueError("The UNet is not quantized: calibrate it, or load a quantized one")
    if is_quantized(reference):
        raise ValueError("The reference is quantized: pass the floating-point UNet that the other one was made from")
    if is_fused(unet):
        raise ValueError("The UNet is fused, its layers do not run one by one: measure it before fuse()")
    modules = dict(reference.named_modules())
    missing = [name for name in layers if name not in modules]
    if missing:
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        raise ValueError(
            f"The reference has no layers {', '.join(missing[:LISTED])}{more}. Pass the floating-point UNet that this "
            "one was made from"
        )
    return {name: modules[name] for name in layers}


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Switches to eval mode inside the ``with`` block and restores each module's mode after it."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _decibels(signal: float, noise: float) -> float:
    if not math.isfinite(signal + noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
