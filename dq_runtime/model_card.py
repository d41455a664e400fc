"""The model card that ``save_pretrained`` leaves beside a quantized model: a README.md for people and for the hub."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any

from dq_runtime.config import DilateQuantConfig
from dq_runtime.layers import quantized_layers

CARD = "README.md"
FACTS = {"samples": "calibration samples", "scheduler": "calibration scheduler", "method": "weights trained by",
         "prediction_snr_db": "signal-to-noise ratio of the prediction, dB"}  # fmt: skip
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FOLDER = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")  # of the hub's cache

TEMPLATE = """---
library_name: diffusers
{base_metadata}tags:
- dq_runtime
- int4
---

# {model_class}, W{weight_bits}A{activation_bits}{of_base}

A `{model_class}` with {count} layers in packed INT4, quantized by DilateQuant with dq_runtime.

| | |
|---|---|
{rows}

The signal-to-noise ratio is of a few calls that were recorded for calibration, against the floating-point model.

## Use

```python
import dq_runtime  # registers the method with diffusers
from diffusers import {model_class}

model = {model_class}.from_pretrained("this/folder")
```
"""


def model_card(model: Any, config: DilateQuantConfig) -> str:
    """The text of a model card, in Markdown with the hub's metadata.

    Args:
        model: a quantized model.
        config: its config.
    """
    base = base_model(str(getattr(model.config, "_name_or_path", "")))
    layers = quantized_layers(model).values()
    elements = sum(prod(layer.stock_shape) for layer in layers)
    rows = {
        "weights": f"{config.weight_bits} bits, one scale for each output channel",
        "activations": _activations(config),
        "activation scales": _scales(config.timesteps),
        "Weight Dilation": config.dilation,
        **{text: (config.calibration or {}).get(name) for name, text in FACTS.items()},
        "kept in floating point": _names(config.modules_to_not_convert),
        "attentions in int8": _names(config.int8_attention),
        "packed weights": f"{sum(layer.packed_weight.nbytes for layer in layers) / 1e6:.2f} MB "
        f"({2 * elements / 1e6:.2f} MB in fp16)",
    }
    return TEMPLATE.format(
        base_metadata=f"base_model: {base}\nbase_model_relation: quantized\n" if base else "",
        model_class=type(model).__name__,
        weight_bits=config.weight_bits,
        activation_bits=config.activation_bits,
        of_base=f": {base}" if base else "",
        count=len(layers),
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items() if value not in (None, "")),
    )


def base_model(name_or_path: str) -> str | None:
    """OWNER/NAME on the hub, of the name or the folder that a model was loaded from; None for any other folder."""
    for part in Path(name_or_path).parts:
        found = HUB_FOLDER.fullmatch(part)
        if found:
            return f"{found['owner']}/{found['name']}"
    is_name = HUB_NAME.fullmatch(name_or_path) and not Path(name_or_path).exists()
    return name_or_path if is_name else None


def _activations(config: DilateQuantConfig) -> str:
    exceptions = (f"{bits} for `{entry}`" for entry, bits in (config.layer_activation_bits or {}).items())
    return ", ".join([f"{config.activation_bits} bits", *exceptions])


def _scales(timesteps: list[float] | None) -> str:
    if timesteps is None:
        return "of each sample, computed at run time"
    return f"one for each of {len(timesteps)} timesteps from {timesteps[0]:g} to {timesteps[-1]:g}"


def _names(entries: list[str] | None) -> str:
    return ", ".join(f"`{entry}`" for entry in entries or ())
