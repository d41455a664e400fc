"""The UNets of the benchmarks: published configurations with random weights, without a download.

``sd15`` at 512x512, ``sdxl`` at 1024x1024, ``ldm4`` (the unconditional LDM-4 of CelebA-HQ) at 256x256 and
``ddpm_cifar`` at 32x32. On the device "meta" they need no memory; ``layers`` finds their shapes there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

TEXT_TOKENS = 77  # CLIP's context length, to which Stable Diffusion pads every prompt

# Fields of config.json in the named repositories on the Hugging Face hub that differ from diffusers' defaults.
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd15": (  # stable-diffusion-v1-5/stable-diffusion-v1-5
        UNet2DConditionModel,
        {
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
    ),
    "sdxl": (  # stabilityai/stable-diffusion-xl-base-1.0
        UNet2DConditionModel,
        {
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "ldm4": (  # CompVis/ldm-celebahq-256
        UNet2DModel,
        {
            "sample_size": 64,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (224, 448, 672, 896),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 32,
        },
    ),
    "ddpm_cifar": (  # google/ddpm-cifar10-32
        UNet2DModel,
        {
            "sample_size": 32,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": None,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-6,
        },
    ),
}


@dataclass(frozen=True)
class LayerShape:
    """The shape of a linear or a convolution, which determines its cost; ``names`` are the layers with this shape.

    ``height`` and ``width`` are those of the input. A linear is a 1x1 convolution over its tokens: height is their
    number, and width is 1.
    """

    kind: str  # "linear" or "conv2d"
    batch: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    names: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Positions of the input in one sample."""
        return self.height * self.width

    @property
    def rows(self) -> int:
        """M of the matrix product: positions of the output in the whole batch."""
        sides = zip((self.height, self.width), self.kernel_size, self.stride, self.padding, strict=True)
        height, width = ((size + 2 * pad - kernel) // stride + 1 for size, kernel, stride, pad in sides)
        return self.batch * height * width

    @property
    def taps(self) -> int:
        """Weights per pair of channels."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def reduction(self) -> int:
        """K of the matrix product: input channels times taps."""
        return self.in_channels * self.taps

    @property
    def operations(self) -> int:
        """Multiplications and additions, 2MNK."""
        return 2 * self.rows * self.out_channels * self.reduction

    @property
    def label(self) -> str:
        """The label in tables, such as "conv2d 3x3 320 -> 320, 64x64" or "linear 320 -> 2560, 4096 tokens"."""
        channels = f"{self.in_channels} -> {self.out_channels}"
        if self.kind == "linear":
            return f"linear {channels}, {self.tokens} tokens"
        stride = "" if self.stride == (1, 1) else f", stride {self.stride[0]}"
        return f"conv2d {self.kernel_size[0]}x{self.kernel_size[1]} {channels}, {self.height}x{self.width}{stride}"


def build(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float16) -> Any:
    """A UNet in evaluation mode; PyTorch's default initialisation draws it on the device in the dtype."""
    unet_class, config = CONFIGS[name]
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return unet_class(**config).eval()
    finally:
        torch.set_default_dtype(default_dtype)


def inputs(
    name: str, batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float16
) -> dict[str, Any]:
    """Random keyword arguments for one forward pass: latents [batch, C, H, W], timestep and conditioning."""
    config = CONFIGS[name][1]
    size = config["sample_size"]
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    arguments: dict[str, Any] = {
        "sample": torch.randn(batch, config["in_channels"], size, size, **options),
        "timestep": torch.full((), 500, device=device),
    }
    if "cross_attention_dim" in config:
        arguments["encoder_hidden_states"] = torch.randn(batch, TEXT_TOKENS, config["cross_attention_dim"], **options)
    if "addition_embed_type" in config:
        sizes = torch.tensor([1024, 1024, 0, 0, 1024, 1024], **options)  # original size, crop, target size
        text_embeds = torch.randn(batch, 1280, **options)  # pooled output of OpenCLIP ViT-bigG
        arguments["added_cond_kwargs"] = {"text_embeds": text_embeds, "time_ids": sizes.repeat(batch, 1)}
    return arguments


def layer_shape(module: nn.Module, x: torch.Tensor) -> LayerShape:
    """The shape of a layer called on x: [batch, ..., channels] for a linear, else [batch, channels, H, W]."""
    if isinstance(module, nn.Linear):
        batch, tokens = x.shape[0], x.shape[1:-1].numel()
        return LayerShape("linear", batch, module.in_features, module.out_features, tokens, 1)
    assert isinstance(module, nn.Conv2d)
    geometry = {field: getattr(module, field) for field in ("kernel_size", "stride", "padding")}
    return LayerShape("conv2d", x.shape[0], module.in_channels, module.out_channels, *x.shape[2:], **geometry)


def layers(name: str, batch: int) -> list[LayerShape]:
    """The distinct shapes of a UNet's linears and convolutions, in the order of their first calls.

    Two shapes are equal if all fields except ``names`` are equal; a bias makes no difference.
    """
    unet = build(name, "meta")
    names: dict[LayerShape, list[str]] = {}

    def record(layer: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            names.setdefault(layer_shape(module, arguments[0]), []).append(layer)

        return hook

    for layer, module in unet.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(record(layer))
    with torch.no_grad():
        unet(**inputs(name, batch, "meta"))
    return [replace(shape, names=tuple(called)) for shape, called in names.items()]
