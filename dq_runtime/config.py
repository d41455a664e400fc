"""The quantization config: what a user chooses, and what a checkpoint records in its ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

DILATIONS = ("joint", "weight", "none")
SHORTCUTS = {"conv_shortcut": 8}  # the default exceptions from ``activation_bits``
NOT_CONVERTED = ("conv_in", "conv_out")


def is_part(entry: str, name: str) -> bool:
    """True if an entry of the config is a layer's dotted name or a part of it; with a dot in front, its beginning."""
    return f".{name}.".startswith(f"{entry}.") if entry.startswith(".") else f".{entry}." in f".{name}."


class DilateQuantMethod(str, Enum):
    """The name under which diffusers knows this quantization method."""

    DILATEQUANT = "dilatequant"


@dataclass
class DilateQuantConfig(QuantizationConfigMixin):
    """How to quantize a model with DilateQuant (arXiv 2409.14307).

    Args:
        weight_bits: 4; weights are packed two to a byte.
        activation_bits: 8, 6 or 4; activations are stored as int8 whatever the number.
        layer_activation_bits: other numbers for some layers, by dotted name or part of one. Where several entries fit,
            the longest counts. By default a resnet's ``conv_shortcut`` has 8: what it rounds goes past all other layers
            straight into the result, and its input, stored as int8 anyway, costs no more. {} for no exception.
        dilation: "weight", the paper's rule, stretches unsaturated input channels of the weights as far as no weight
            range grows; "joint" chooses, layer by layer, among that and rules that look at the activations too, by the
            layer's error on the calibration data, and gives up all of it where, without training, the whole UNet
            does not predict clearly better with it; "none" turns it off.
        max_dilation: the largest factor by which a channel is stretched.
        timestep_groups: how many activation scales each layer has, neighbouring timesteps sharing one; by default one
            for each calibrated timestep.
        modules_to_not_convert: layers that stay in floating point, by dotted name or part of one: "conv_in",
            "mid_block", "to_out.0"; with a dot in front, by the name's beginning: ".proj_out" is the model's own. Where
            this has its default value, ``calibrate`` takes the default of the model's architecture.
        int8_attention: attentions that multiply q, k, v and the softmax's probabilities in 8 bits, by dotted name or
            part of one: ["attn1"] for all self-attentions, ["attentions"] for all there are, [] for none. Their scales
            are found at run time, so calibration and training are the same with and without.
        timesteps: the sorted timesteps that the activation tables hold; filled in by calibration.

    Raises:
        ValueError: for a value that is not supported.
    """

    weight_bits: int = 4
    activation_bits: int = 8
    layer_activation_bits: dict[str, int] | None = field(default_factory=lambda: dict(SHORTCUTS))
    dilation: str = "joint"
    max_dilation: float = 8.0
    timestep_groups: int | None = None
    modules_to_not_convert: list[str] | None = field(default_factory=lambda: list(NOT_CONVERTED))
    int8_attention: list[str] | None = field(default_factory=list)
    timesteps: list[float] | None = None
    quant_method: DilateQuantMethod = DilateQuantMethod.DILATEQUANT  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.quant_method = DilateQuantMethod(self.quant_method)
        if self.weight_bits != 4:
            raise ValueError(f"weight_bits must be 4 (two weights to a byte), got {self.weight_bits}")
        for place, bits in {"activation_bits": self.activation_bits, **(self.layer_activation_bits or {})}.items():
            if bits not in (8, 6, 4):
                raise ValueError(f"{place} must be 8, 6 or 4, got {bits}")
        if self.dilation not in DILATIONS:
            raise ValueError(f"dilation must be one of {DILATIONS}, got {self.dilation!r}")
        if not self.max_dilation >= 1:
            raise ValueError(f"max_dilation must be at least 1, got {self.max_dilation}")
        if self.timestep_groups is not None and not self.timestep_groups >= 1:
            raise ValueError(f"timestep_groups must be at least 1, or None, got {self.timestep_groups}")
        for name in ("modules_to_not_convert", "int8_attention"):
            entries = getattr(self, name)
            if entries is None:
                setattr(self, name, [])
            elif not isinstance(entries, (list, tuple)) or not all(isinstance(entry, str) for entry in entries):
                raise ValueError(f"{name} must be a list of names, got {entries!r}")
            else:
                setattr(self, name, list(entries))

    def activation_bits_of(self, layer: str) -> int:
        """The number of bits of a layer's input, by the layer's dotted name."""
        fitting = [entry for entry in self.layer_activation_bits or {} if is_part(entry, layer)]
        return (self.layer_activation_bits or {})[max(fitting, key=len)] if fitting else self.activation_bits

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return {**super().to_dict(), "quant_method": self.quant_method.value}

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that differ from the defaults."""
        default = DilateQuantConfig().to_dict()
        return {name: value for name, value in self.to_dict().items() if value != default[name]}
