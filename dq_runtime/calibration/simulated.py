"""Trainable simulations of quantized layers: floating-point arithmetic with the results of the packed integer layers.

Rounding is straight-through: its gradient is that of the identity between the ends of the range. Scales and zero points
have the gradients of LSQ (arXiv 1902.08153) and LSQ+ (arXiv 2004.09576). All parameters are dimensionless, so that one
learning rate fits every layer: weights and zero points are in steps of their quantizers, a bias is in products of a
weight's step and a typical input, and a scale is the logarithm of its ratio to the initial scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dq_kernels.ops import unpack_int4
from dq_runtime.config import DilateQuantConfig
from dq_runtime.convert import replace_layers
from dq_runtime.timesteps import TimestepGrid
from dq_runtime.weights import in_parts, layer_tensors, round_to_int4

TYPICAL_INPUT = 1 / 8  # relative to an activation quantizer's range


class _RoundZeroPoint(torch.autograd.Function):
    """An integer between ``low`` and ``high``.

    The gradient also passes at these ends, where a zero point may start. There clamp's depends on torch's version.
    """

    @staticmethod
    def forward(ctx: Any, zero_point: torch.Tensor, low: int, high: int) -> torch.Tensor:
        ctx.save_for_backward((zero_point < low) | (zero_point > high))
        return zero_point.clamp(low, high).add_(0.5).floor_()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (outside,) = ctx.saved_tensors
        return grad.masked_fill(outside, 0), None, None


class _RoundActivations(torch.autograd.Function):
    """x / dilation, quantized with scale and zero point, and dequantized.

    x is [B, ..., K] or [B, K, H, W]; scale and zero point broadcast along B, dilation along K.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dilation: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor,
        low: int, high: int,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(x, dilation, scale, zero_point)
        ctx.range = low, high
        steps = (x * (dilation * scale).reciprocal_()).add_(0.5).floor_()
        return steps.add_(zero_point).clamp_(low, high).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, dilation, scale, zero_point = ctx.saved_tensors
        low, high = ctx.range
        exact = x * (dilation * scale).reciprocal_()
        steps = (exact + 0.5).floor_()
        clamped = (steps + zero_point).clamp_(low, high).sub_(zero_point)
        through = steps.eq_(clamped).mul_(grad)  # in place eq_ yields floats: far faster than bools on CPUs
        # Inside the range d/dscale = rounded - exact. Outside it d/dscale is the range's end, d/dzero_point = -scale.
        grad_zero_point = _row_sum(through - grad) * scale
        grad_scale = _row_sum(clamped.mul_(grad).sub_(exact.mul_(through)))
        return through.div_(dilation), None, grad_scale, grad_zero_point, None, None


class _RoundWeights(torch.autograd.Function):
    """floor(steps / ratio + 0.5), clamped to 4 bits, times ratio and scale; both broadcast along output channels."""

    @staticmethod
    def forward(ctx: Any, steps: torch.Tensor, ratio: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(steps, ratio, scale)
        weight = torch.empty_like(steps)
        for some, part in _numbered_parts(steps):
            weight[some] = round_to_int4(part / ratio[some]).mul_(ratio[some] * scale[some])
        return weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        steps, ratio, scale = ctx.saved_tensors
        grad_steps, grad_ratio = torch.empty_like(steps), torch.empty_like(ratio)
        for some, part in _numbered_parts(steps):
            part_grad = grad[some] * scale[some]
            exact = part / ratio[some]
            clamped = round_to_int4(exact)
            through = (exact + 0.5).floor_().eq_(clamped).mul_(part_grad)
            grad_ratio[some] = _row_sum(clamped.mul_(part_grad).sub_(exact.mul_(through)))
            grad_steps[some] = through
        return grad_steps, grad_ratio, None


def _row_sum(x: torch.Tensor) -> torch.Tensor:
    return x.sum(tuple(range(1, x.ndim)), keepdim=True)


def _numbered_parts(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The parts of ``in_parts``, each with its place among the rows."""
    start = 0
    for part in in_parts(weight):
        yield slice(start, start + len(part)), part
        start += len(part)


class InputQuantizer(nn.Module):
    """Rounds a tensor to ``bits`` with the scale of each sample's timestep. Layers that share their input share one.

    Args:
        tensors: ``weight_dilation`` [K], ``act_scale`` and ``act_zero_point`` [T].
        grid: its ``index`` holds the timestep index of each sample.
    """

    weight_dilation: torch.Tensor
    initial_scale: torch.Tensor

    def __init__(self, tensors: Mapping[str, torch.Tensor], bits: int, grid: TimestepGrid) -> None:
        super().__init__()
        object.__setattr__(self, "grid", grid)  # belongs to the UNet; not a submodule of each quantizer
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.register_buffer("weight_dilation", tensors["weight_dilation"])
        self.register_buffer("initial_scale", tensors["act_scale"])
        self.log_ratio = nn.Parameter(torch.zeros_like(self.initial_scale), requires_grad=False)
        self.zero_point = nn.Parameter(tensors["act_zero_point"].float(), requires_grad=False)

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """act_scale and act_zero_point, both [T] fp32; zero points are integers with a straight-through gradient."""
        zero_point = _RoundZeroPoint.apply(self.zero_point, self.low, self.high)
        return self.initial_scale * self.log_ratio.exp(), zero_point

    def forward(self, x: torch.Tensor, channel_dim: int) -> torch.Tensor:
        """x / dilation, quantized and dequantized, in x's shape and in fp32; the operand of dilated weights."""
        per_sample, per_channel = [1] * x.ndim, [1] * x.ndim
        per_sample[0] = per_channel[channel_dim] = -1
        grid: Any = self.grid
        index = grid.index.to(x.device)
        scale, zero_point = (table[index].view(per_sample) for table in self.tables())
        dilation = self.weight_dilation.view(per_channel)
        return _RoundActivations.apply(x.float(), dilation, scale, zero_point, self.low, self.high)


class SimulatedLayer(nn.Module):
    """A linear layer or convolution that computes in floating point or, if ``quantized`` is set, like its INT4 form.

    Its weights are constant except between ``unfreeze`` and ``freeze``, when ``steps`` is trained. Constant weights are
    ``values``, int8, and ``unrounded``, fp16, where training resumes: weights close to the midpoint between two values
    are the first to move. Before ``unpack`` and after ``pack`` a layer holds four bits for a weight instead, since all
    layers of a large model are there together.
    """

    weight_scale: torch.Tensor

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, tensors: Mapping[str, torch.Tensor], quantizer: InputQuantizer
    ) -> None:
        super().__init__()
        self.layer = layer
        self.input_quantizer = quantizer
        self.quantized = False
        # Leaf tensors, not nn.Parameters: diffusers reads the UNet's dtype from its first parameter.
        self.steps: torch.Tensor | None = None
        self.log_ratio: torch.Tensor | None = None
        self.bias_steps: torch.Tensor | None = None
        self.register_buffer("weight_scale", _per_output(tensors["weight_scale"], layer.weight))
        self._packed: torch.Tensor | None = tensors["packed_weight"]
        self._values: torch.Tensor | None = None
        self._unrounded: torch.Tensor | None = None
        self.register_buffer("fixed_bias", None if layer.bias is None else layer.bias.detach().float())

    @property
    def weight(self) -> torch.Tensor:
        """The floating-point weights, since some of diffusers' blocks read their dtype."""
        return self.layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The floating-point bias."""
        return self.layer.bias

    @property
    def values(self) -> torch.Tensor:
        """The constant weights in steps of their scale, int8, in the layout of the layer's own weights."""
        if self._values is not None:
            return self._values
        assert self._packed is not None
        packed = self._packed.to(self.weight_scale.device)
        return unpack_int4(packed)[..., : self.layer.weight.shape[1]].movedim(-1, 1).contiguous()

    @property
    def unrounded(self) -> torch.Tensor:
        """The same before rounding, fp16."""
        self.unpack()
        assert self._unrounded is not None
        return self._unrounded

    def unpack(self) -> None:
        """Holds the constant weights ready for passes and for training."""
        if self._unrounded is None:
            self._fix(self.dilated_weight() / self.weight_scale, self.values)

    def pack(self, keep: Callable[[torch.Tensor], torch.Tensor] = lambda packed: packed) -> dict[str, torch.Tensor]:
        """Holds four bits for a weight alone: the layer is not trained again. Returns its state dict (``tensors``).

        Args:
            keep: returns the packed weights in the memory where they are kept.
        """
        tensors = self.tensors()
        self._packed = tensors["packed_weight"] = keep(tensors["packed_weight"])
        self._values = self._unrounded = None
        return tensors

    def dilated_weight(self) -> torch.Tensor:
        """s_k w_nk, fp32, in the layout of the layer's own weights."""
        weight = self.layer.weight.detach().float()
        return weight * self.input_quantizer.weight_dilation.view(1, -1, *[1] * (weight.ndim - 2))

    def unfreeze(
        self, start: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Makes weights and bias trainable.

        Args:
            start: initial weights in steps of the present scale, and the ratio of the initial scale to the present one;
                by default the constant weights and scale.

        Returns:
            the parameters in steps, and the logarithmic parameters; those of the input quantizer are not included.
        """
        steps, ratio = start or (self.unrounded, torch.ones_like(self.weight_scale))
        self.steps = steps.to(torch.float32, copy=True).requires_grad_()
        self.log_ratio = ratio.log().requires_grad_()
        self._values = self._unrounded = None  # ``freeze`` makes others
        in_steps = [self.steps]
        if self.fixed_bias is not None:
            self.bias_steps = torch.zeros_like(self.fixed_bias).requires_grad_()
            in_steps.append(self.bias_steps)
        return in_steps, [self.log_ratio]

    @torch.no_grad()
    def freeze(self) -> None:
        """Rounds the trained parameters and makes them constant."""
        assert self.steps is not None
        assert self.log_ratio is not None
        bias = self._bias()
        ratio = self.log_ratio.exp()
        self._fix(self.steps / ratio)
        self.weight_scale = self.weight_scale * ratio
        self.fixed_bias = bias
        self.steps = self.log_ratio = self.bias_steps = None

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors that training changes, including those of the input quantizer."""
        quantizer = self.input_quantizer
        state = {"unrounded": self.unrounded, "weight_scale": self.weight_scale}
        state |= {
            "act_log_ratio": quantizer.log_ratio.detach().clone(),
            "act_zero_point": quantizer.zero_point.detach().clone(),
        }
        return state if self.fixed_bias is None else state | {"bias": self.fixed_bias}

    @torch.no_grad()
    def set_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores tensors that ``state`` returned. They are copied: those of a mapped file would keep it in memory."""
        device = self.weight_scale.device
        self._fix(state["unrounded"].to(device))
        self.weight_scale = state["weight_scale"].to(device, copy=True)
        self.fixed_bias = state["bias"].to(device, copy=True) if "bias" in state else None
        self.input_quantizer.log_ratio.copy_(state["act_log_ratio"])
        self.input_quantizer.zero_point.copy_(state["act_zero_point"])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state dict of the packed layer."""
        scale, zero_point = (table.detach() for table in self.input_quantizer.tables())
        return layer_tensors(
            self.layer, self.values.movedim(1, -1), self.weight_scale.flatten(),
            self.input_quantizer.weight_dilation, scale, zero_point.to(torch.int32), self.fixed_bias,
        )  # fmt: skip

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        """The operand of the weights: x / dilation, quantized and dequantized, fp32."""
        return self.input_quantizer(x, channel_dim=1 if isinstance(self.layer, nn.Conv2d) else -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        if not self.quantized:
            return layer(x)
        if self.steps is None or self.log_ratio is None:
            weight = self.values * self.weight_scale
        else:
            weight = _RoundWeights.apply(self.steps, self.log_ratio.exp(), self.weight_scale)
        q = self.quantized_input(x)
        if isinstance(layer, nn.Conv2d):
            y = layer._conv_forward(q, weight, self._bias())
        else:
            y = F.linear(q, weight, self._bias())
        return y.to(x.dtype)

    def _bias(self) -> torch.Tensor | None:
        if self.bias_steps is None:
            return self.fixed_bias
        quantizer = self.input_quantizer
        typical_input = quantizer.initial_scale.mean() * (quantizer.high - quantizer.low) * TYPICAL_INPUT
        return self.fixed_bias + self.bias_steps * self.weight_scale.flatten() * typical_input

    def _fix(self, steps: torch.Tensor, values: torch.Tensor | None = None) -> None:
        """Sets both forms of the weights; rounding to fp16 must not move one across the midpoint of two values."""
        fixed = torch.empty_like(steps, dtype=torch.int8) if values is None else values
        unrounded = torch.empty_like(steps, dtype=torch.float16)
        for some, part in _numbered_parts(steps):
            if values is None:
                fixed[some] = round_to_int4(part.float()).to(torch.int8)
            halves = part.half()
            unrounded[some] = torch.where(round_to_int4(halves.float()) == fixed[some], halves, fixed[some].half())
        self._packed, self._values, self._unrounded = None, fixed, unrounded


def _per_output(table: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return table.view(-1, *[1] * (weight.ndim - 1))


def states_of(layers: Mapping[str, SimulatedLayer]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors that training changes, by layer."""
    return {name: layer.state() for name, layer in layers.items()}


def set_states(layers: Mapping[str, SimulatedLayer], state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Restores tensors that ``states_of`` returned."""
    for name, layer in layers.items():
        layer.set_state(state[name])


@contextmanager
def simulated(
    unet: nn.Module,
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    sharing: Sequence[Sequence[str]],
    config: DilateQuantConfig,
    grid: TimestepGrid,
) -> Iterator[dict[str, SimulatedLayer]]:
    """Replaces a UNet's layers by simulated ones inside the ``with`` block, and always restores them at its end.

    Convolutions inside the block have fp32 precision and are deterministic.

    Args:
        tensors: each layer's state dict (see ``QuantizedLayer``), where training starts.
        sharing: groups of layer names. The layers of a group share one input quantizer.
    """
    simulated_layers: dict[str, SimulatedLayer] = {}
    for names in sharing:
        quantizer = InputQuantizer(tensors[names[0]], config.activation_bits_of(names[0]), grid)
        for name in names:
            simulated_layers[name] = SimulatedLayer(layers[name], tensors[name], quantizer)
    required = {parameter: parameter.requires_grad for parameter in unet.parameters()}
    training = {module: module.training for module in unet.modules()}
    unet.requires_grad_(False).eval()  # no dropout
    replace_layers(unet, {layers[name]: layer.eval() for name, layer in simulated_layers.items()})
    hook = grid.follow(unet)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield simulated_layers
    finally:
        hook.remove()
        replace_layers(unet, {layer: layer.layer for layer in simulated_layers.values()})
        for parameter, wanted in required.items():
            parameter.requires_grad_(wanted)
        for module, mode in training.items():
            module.training = mode
