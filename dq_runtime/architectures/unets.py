"""UNets, and models built of their blocks: ControlNets and the decoder of an autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dq_runtime.architectures.architecture import Activation, Architecture, all_result_tensors, is_a

BLOCKS = ("ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock", "Attention", "Downsample2D", "Upsample2D")


def _is_deep(block: Any) -> bool:
    """True for a transformer of several layers: training all at once, as SDXL's ten, takes much memory."""
    return is_a(block, "Transformer2DModel") and len(block.transformer_blocks) > 1


def _linears_by_input(model: nn.Module) -> dict[str, tuple[Sequence[nn.Module], Activation | None]]:
    """All time projections, and all key and value projections of cross-attentions."""
    modules: list[Any] = list(model.modules())
    projections = [block.time_emb_proj for block in modules if is_a(block, "ResnetBlock2D")]
    cross = [block.attn2 for block in modules if is_a(block, "BasicTransformerBlock") and block.attn2 is not None]
    return {
        "time_emb_proj": ([projection for projection in projections if projection is not None], F.silu),
        "encoder_hidden_states": ([layer for attn in cross for layer in (attn.to_k, attn.to_v)], None),
    }


UNET2D = Architecture("UNet2DModel", BLOCKS, _is_deep, timestep_dtype=torch.long, linears_by_input=_linears_by_input)
UNET2D_CONDITION = Architecture("UNet2DConditionModel", BLOCKS, _is_deep, linears_by_input=_linears_by_input)
CONTROLNET = Architecture(
    "ControlNetModel", BLOCKS, _is_deep, predicts=False, result=all_result_tensors, linears_by_input=_linears_by_input
)
# ``decode`` calls the decoder without running hooks of the model.
AUTOENCODER_KL = Architecture("AutoencoderKL", BLOCKS, entry_name="decoder", timestep=None, predicts=False)
