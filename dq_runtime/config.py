"""The quantization config: the user's options, which a checkpoint stores in its ``config.json``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Any

import torch
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from dq_runtime.validation import choice, integer, names, number, shown

ACTIVATION_BITS = (8, 6, 4)
DILATIONS = ("joint", "weight", "none")
SHORTCUTS = {"conv_shortcut": 8}  # the default exceptions from ``activation_bits``
NOT_CONVERTED = ("conv_in", "conv_out")
LARGEST_DILATION = 1024.0
LARGEST_TIMESTEP = 1e6  # in magnitude
MOST_TIMESTEPS = 2**16  # each is a row of every layer's activation table
FORMAT_VERSION = 1  # of checkpoints; docs/format.md describes it
MOST_FACTS, LONGEST_FACT = 32, 1000  # about a calibration; characters


def is_part(entry: str, name: str) -> bool:
    """True if an entry of the config is a layer's dotted name or part of it; with a leading dot, its first part."""
    return f".{name}.".startswith(f"{entry}.") if entry.startswith(".") else f".{entry}." in f".{name}."


class DilateQuantMethod(str, Enum):
    """The name of this quantization method in diffusers."""

    DILATEQUANT = "dilatequant"


def _bits(name: str, value: Any) -> int:
    """A number of bits of activations."""
    return choice(name, integer(name, value), ACTIVATION_BITS)


def _timesteps(value: Any) -> list[float]:
    """A sorted list of timesteps that differ in float32, in which they are compared."""
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"timesteps must be a list of numbers, or None, got {shown(value)}")
    if len(value) > MOST_TIMESTEPS:
        raise ValueError(
            f"timesteps must hold at most {MOST_TIMESTEPS} numbers, got {len(value)}; timestep_groups reduces them"
        )
    timesteps = [number(f"timesteps[{i}]", entry, -LARGEST_TIMESTEP, LARGEST_TIMESTEP) for i, entry in enumerate(value)]
    compared = torch.tensor(timesteps, dtype=torch.float32, device="cpu").tolist()  # even under another default device
    for i, (entry, following) in enumerate(pairwise(compared)):
        if not entry < following:
            raise ValueError(
                f"timesteps must be sorted without repeats, got {timesteps[i]} before {timesteps[i + 1]} at {i}"
            )
    return timesteps


def _facts(value: Any) -> dict[str, str | int | float | None]:
    """What is known about a calibration, by name."""
    if not isinstance(value, dict) or len(value) > MOST_FACTS:
        raise ValueError(f"calibration must be a dict of at most {MOST_FACTS} facts, or None, got {shown(value)}")
    for name, fact in zip(names("calibration", list(value)), value.values(), strict=True):
        if isinstance(fact, bool) or not isinstance(fact, (str, int, float, type(None))):
            raise ValueError(f"calibration[{shown(name)}] must be a text, a number or None, got {shown(fact)}")
        if max(len(name), len(str(fact))) > LONGEST_FACT:
            raise ValueError(f"calibration must hold texts of at most {LONGEST_FACT} characters, got {shown(fact)}")
    return dict(value)


def _format_version(value: Any) -> int:
    """The version of a checkpoint's format, which this version of the package reads."""
    if integer("format_version", value, 1) > FORMAT_VERSION:
        raise ValueError(
            f"The checkpoint has format version {value}, and this version of dq_runtime reads versions up to "
            f"{FORMAT_VERSION}: upgrade dq_runtime"
        )
    return int(value)


@dataclass
class DilateQuantConfig(QuantizationConfigMixin):
    """How to quantize a model with DilateQuant (arXiv 2409.14307).

    Args:
        weight_bits: 4; weights are packed two to a byte.
        activation_bits: 8, 6 or 4; activations are always stored as int8.
        layer_activation_bits: exceptions from ``activation_bits``, by dotted name or part of one; the longest matching
            entry applies. By default a resnet's ``conv_shortcut`` has 8: its rounding error reaches the output
            directly, and its input, stored as int8 anyway, costs no more. {} for no exception.
        dilation: "weight", the paper's rule, scales unsaturated input channels of the weights up as far as no weight
            range grows; "joint" chooses for each layer, by its error on the calibration data, among this rule and
            rules that consider the activations too, and without training drops all dilation unless the whole UNet's
            prediction is clearly better with it; "none" turns it off.
        max_dilation: the largest factor of a channel, 1 to 1024.
        timestep_groups: number of activation scales per layer, which neighbouring timesteps share; by default one for
            each calibrated timestep.
        modules_to_not_convert: layers that stay in floating point, by dotted name or part of one: "conv_in",
            "mid_block", "to_out.0". An entry with a leading dot matches the first part of a name only: ".proj_out" is
            the model's own. If the value is the default, ``calibrate`` uses the default of the model's architecture.
        int8_attention: attentions that multiply q, k, v and the softmax's probabilities in 8 bits, by dotted name or
            part of one: ["attn1"] for all self-attentions, ["attentions"] for all attentions, [] for none. Their scales
            are computed at run time and need no calibration or training.
        timesteps: the sorted timesteps of the activation tables; set by calibration.
        calibration: facts about the calibration, for the model card; set by calibration.
        format_version: of the checkpoint; a newer one than this version of the package writes is refused.

    Raises:
        ValueError: if a value is not supported or has another type.
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
    calibration: dict[str, str | int | float | None] | None = None
    format_version: int = FORMAT_VERSION
    quant_method: DilateQuantMethod = DilateQuantMethod.DILATEQUANT  # type: ignore[assignment]

    def __post_init__(self) -> None:
        methods = [method.value for method in DilateQuantMethod]
        self.quant_method = DilateQuantMethod(choice("quant_method", self.quant_method, methods))
        if integer("weight_bits", self.weight_bits) != 4:
            raise ValueError(f"weight_bits must be 4 (two weights to a byte), got {self.weight_bits}")
        self.activation_bits = _bits("activation_bits", self.activation_bits)
        if self.layer_activation_bits is not None:
            if not isinstance(self.layer_activation_bits, dict):
                raise ValueError(f"layer_activation_bits must be a dict, got {shown(self.layer_activation_bits)}")
            entries = names("layer_activation_bits", list(self.layer_activation_bits))
            self.layer_activation_bits = {
                entry: _bits(f"layer_activation_bits[{shown(entry)}]", self.layer_activation_bits[entry])
                for entry in entries
            }
        self.dilation = choice("dilation", self.dilation, DILATIONS)
        self.max_dilation = number("max_dilation", self.max_dilation, 1, LARGEST_DILATION)
        if self.timestep_groups is not None:
            self.timestep_groups = integer("timestep_groups", self.timestep_groups, 1)
        for name in ("modules_to_not_convert", "int8_attention"):
            value = getattr(self, name)
            setattr(self, name, [] if value is None else names(name, value))
        if self.timesteps is not None:
            self.timesteps = _timesteps(self.timesteps)
        if self.calibration is not None:
            self.calibration = _facts(self.calibration)
        self.format_version = _format_version(self.format_version)

    def activation_bits_of(self, layer: str) -> int:
        """The number of bits of the input of the layer with this dotted name."""
        fitting = [entry for entry in self.layer_activation_bits or {} if is_part(entry, layer)]
        return (self.layer_activation_bits or {})[max(fitting, key=len)] if fitting else self.activation_bits

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return {**super().to_dict(), "quant_method": self.quant_method.value}

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that differ from the defaults, without the format's version."""
        default = DilateQuantConfig().to_dict() | {"format_version": self.format_version}
        return {name: value for name, value in self.to_dict().items() if value != default[name]}


for _mappings in ("diffusers.quantizers.auto", "transformers.quantizers.auto"):
    if _mappings in sys.modules:
        sys.modules[_mappings].AUTO_QUANTIZATION_CONFIG_MAPPING[DilateQuantMethod.DILATEQUANT.value] = DilateQuantConfig
