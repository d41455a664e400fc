"""Quantizes every UNet that a program creates or loads, at once, whatever the program does next with it.

The calibration data are random inputs of the shapes that the UNet's config names. A UNet whose inputs cannot be derived
stays as it is; ``Quantization`` keeps the reason.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

import dq_runtime
from dq_runtime.convert import convert
from dq_runtime.diffusers_quantizer import attach_quantizer
from dq_runtime.layers import is_quantized, quantized_layers

TIMESTEPS = (1, 999)
BATCH, TOKENS, LARGEST_SIDE = 2, 7, 16
HINT_CHANNELS = 4  # of the channels that conv_in reads, those that the UNet makes of an image
MOST_PARAMETERS = 20_000_000  # a few tests create UNets of the size of Stable Diffusion's
CONFIG = dq_runtime.DilateQuantConfig(dilation="none")


@dataclass
class Quantization:
    """What happened to the UNets of a test.

    Attributes:
        fused: quantized UNets are fused as well.
        quantized: number of UNets that were quantized, or loaded from a quantized checkpoint.
        left: reasons of those that stayed in floating point.
    """

    fused: bool
    quantized: int = 0
    left: list[str] = field(default_factory=list)
    _loading: bool = False
    _known: dict[int, tuple[Any, dict[str, dict[str, torch.Tensor]]]] = field(default_factory=dict)

    def install(self) -> None:
        """Wraps the constructors and ``from_pretrained`` of both classes of UNets."""
        for model_class in (UNet2DModel, UNet2DConditionModel):
            self._wrap_constructor(model_class)
            self._wrap_from_pretrained(model_class)

    def _wrap_constructor(self, model_class: Any) -> None:
        stock = model_class.__init__

        @functools.wraps(stock)  # diffusers reads the signature
        def construct(unet: Any, *args: Any, **kwargs: Any) -> None:
            stock(unet, *args, **kwargs)
            if type(unet) is model_class and not self._loading:
                self._apply(unet)

        model_class.__init__ = construct

    def _wrap_from_pretrained(self, model_class: Any) -> None:
        stock = model_class.from_pretrained.__func__

        @functools.wraps(stock)
        def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
            outer, self._loading = self._loading, True
            try:
                loaded = stock(cls, *args, **kwargs)
            finally:
                self._loading = outer
            self._apply(loaded[0] if isinstance(loaded, tuple) else loaded)
            return loaded

        model_class.from_pretrained = classmethod(from_pretrained)

    def _apply(self, unet: Any) -> None:
        if any(parameter.is_meta for parameter in unet.parameters()):
            return
        if sum(parameter.numel() for parameter in unet.parameters()) > MOST_PARAMETERS:
            self.left.append("too large to calibrate here")
            return
        try:
            if not is_quantized(unet):
                self._quantize(unet)
        except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            self.left.append(f"{type(error).__name__}: {error}".partition("\n")[0])
            return
        self.quantized += 1
        if self.fused:
            dq_runtime.fuse(unet)
            unet.eval()  # as from_pretrained does: in training mode no block would run fused

    def _quantize(self, unet: Any) -> None:
        """Calibrates; a UNet with known weights gets the tensors of the first one."""
        key = _checksum(unet)
        if key in self._known:
            config, tensors = self._known[key]
            convert(unet, config, {name: _clone(state) for name, state in tensors.items()})
            attach_quantizer(unet, config)
            return
        with _undisturbed(unet), dq_runtime.record(unet) as calibration_set:
            for timestep in TIMESTEPS:
                unet(timestep=timestep, **random_inputs(unet.config))
        dq_runtime.calibrate(unet, calibration_set, CONFIG, distillation=None)
        states = {name: _clone(layer.state_dict()) for name, layer in quantized_layers(unet).items()}
        self._known[key] = unet.hf_quantizer.quantization_config, states


def _clone(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def _checksum(unet: Any) -> int:
    checksum = zlib.crc32(json.dumps(unet.config, sort_keys=True, default=str).encode())
    for parameter in unet.parameters():
        checksum = zlib.crc32(parameter.detach().contiguous().view(torch.uint8).numpy(), checksum)
    return checksum


@contextmanager
def _undisturbed(unet: Any) -> Iterator[None]:
    """Without gradients, in evaluation mode, and with the random numbers of every run; then all is as before."""
    training = unet.training
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        unet.eval()
        try:
            yield
        finally:
            unet.train(training)


def random_inputs(config: Any) -> dict[str, Any]:
    """The arguments of a call, without the timestep, for a UNet's config.

    Raises:
        ValueError: if an option of the config is not known.
    """
    side = min(config.sample_size if isinstance(config.sample_size, int) else LARGEST_SIDE, LARGEST_SIDE)
    inputs: dict[str, Any] = {"sample": torch.randn(BATCH, config.in_channels, side, side)}
    if config.get("class_embed_type") in ("projection", "simple_projection"):
        inputs["class_labels"] = torch.randn(BATCH, config.projection_class_embeddings_input_dim)
    elif config.get("class_embed_type") == "identity":
        inputs["class_labels"] = torch.randn(BATCH, 4 * config.block_out_channels[0])
    elif config.get("class_embed_type") == "timestep" or config.get("num_class_embeds") is not None:
        inputs["class_labels"] = torch.zeros(BATCH, dtype=torch.long)
    if "cross_attention_dim" in config:
        _add_conditions(config, inputs, side)
    return inputs


def _add_conditions(config: Any, inputs: dict[str, Any], side: int) -> None:
    """The further arguments of a ``UNet2DConditionModel``."""
    widths = config.cross_attention_dim
    width = config.encoder_hid_dim or (widths if isinstance(widths, int) else widths[0])
    inputs["encoder_hidden_states"] = torch.randn(BATCH, TOKENS, width)
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = torch.randn(BATCH, config.time_cond_proj_dim)
    added: dict[str, torch.Tensor] = {}
    if config.encoder_hid_dim_type in ("image_proj", "text_image_proj"):
        added["image_embeds"] = torch.randn(BATCH, width)
    kind = config.addition_embed_type
    if kind == "text_time":
        ids = 6 * config.addition_time_embed_dim
        added["text_embeds"] = torch.randn(BATCH, config.projection_class_embeddings_input_dim - ids)
        added["time_ids"] = torch.full((BATCH, 6), 64.0)
    elif kind in ("image", "image_hint", "text_image"):
        added["image_embeds"] = torch.randn(BATCH, width)
        if kind == "image_hint":
            added["hint"] = torch.rand(BATCH, 3, 8 * side, 8 * side)
            inputs["sample"] = inputs["sample"][:, :-HINT_CHANNELS]
        if kind == "text_image":
            added["text_embeds"] = torch.randn(BATCH, width)
    elif kind not in (None, "text"):
        raise ValueError(f"addition_embed_type {kind!r} is not known here")
    if added:
        inputs["added_cond_kwargs"] = added
