"""The supported classes of models."""

from __future__ import annotations

from torch import nn

from dq_runtime.architectures.architecture import Architecture, is_a
from dq_runtime.architectures.transformers import FLUX
from dq_runtime.architectures.unets import AUTOENCODER_KL, CONTROLNET, UNET2D, UNET2D_CONDITION

ARCHITECTURES = (UNET2D, UNET2D_CONDITION, CONTROLNET, AUTOENCODER_KL, FLUX)


def is_supported(model: object) -> bool:
    """True if the model's class has a description."""
    return isinstance(model, nn.Module) and any(is_a(model, known.model_class) for known in ARCHITECTURES)


def without_compilation(model: nn.Module) -> nn.Module:
    """The model inside of ``torch.compile(model)``; any other model itself."""
    return getattr(model, "_orig_mod", model)


def architecture_of(model: nn.Module) -> Architecture:
    """The description of a model's class.

    Raises:
        TypeError: if it has none.
    """
    for architecture in ARCHITECTURES:
        if is_a(model, architecture.model_class):
            return architecture
    supported = ", ".join(architecture.model_class for architecture in ARCHITECTURES)
    raise TypeError(
        f"{type(model).__name__} is no model that dq_runtime can quantize; it supports {supported}. Pass a pipeline's "
        "component of one of these classes, not the pipeline or a wrapper of the component"
    )
