"""Untrained models that are no UNets, the same at every call, and stock pipelines of them."""

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionControlNetPipeline,
)

TOKENS, TEXT = 16, 6  # of a Flux image of 8x8 latents, and of its prompt


def controlnet():
    """For ``distilling.unet2d_condition``; the convolutions that training starts at zero are not zero here."""
    torch.manual_seed(0)
    model = ControlNetModel(
        layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(8, 16),
    )  # fmt: skip
    for module in (*model.controlnet_down_blocks, model.controlnet_mid_block, model.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return model.eval()


def autoencoder():
    """Halves height and width once, to four channels."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16, 32), norm_num_groups=4, layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def flux():
    """Two blocks of two streams, one of one; 2x2 latents of four channels are a token."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=20, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip


def _normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flux_arguments(batch, seed=0, text=TEXT):
    """All but sample and timestep."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    return {
        "encoder_hidden_states": _normal(batch, text, 24, seed=seed),
        "pooled_projections": _normal(batch, 20, seed=seed + 1),
        "img_ids": torch.stack([torch.zeros(TOKENS), rows.flatten(), columns.flatten()], dim=1),
        "txt_ids": torch.zeros(text, 3),
    }


def controlnet_arguments(batch, seed=0):
    """All but sample and timestep."""
    return {
        "encoder_hidden_states": _normal(batch, 5, 12, seed=seed),
        "controlnet_cond": _normal(batch, 3, 16, 16, seed=seed + 1).sigmoid(),
    }


def controlnet_pipeline(unet, controlnet, vae):
    """Stock, but for prompts, which come embedded."""
    pipeline = StableDiffusionControlNetPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet, controlnet=controlnet,
        scheduler=DDIMScheduler(clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def controlnet_run(seed=0, steps=3):
    """The arguments of a run of that pipeline."""
    return {
        "prompt_embeds": _normal(2, 5, 12, seed=seed),
        "negative_prompt_embeds": _normal(2, 5, 12, seed=seed + 1),
        "image": _normal(2, 3, 16, 16, seed=seed + 2).sigmoid(),
        "latents": _normal(2, 4, 8, 8, seed=seed + 3),
        "num_inference_steps": steps,
        "output_type": "pt",
    }


def flux_pipeline(transformer):
    """Stock, but for prompts, which come embedded."""
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=autoencoder(), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux_run(seed=0, steps=3):
    """The arguments of a run of that pipeline, to packed latents."""
    return {
        "prompt_embeds": _normal(2, TEXT, 24, seed=seed),
        "pooled_prompt_embeds": _normal(2, 20, seed=seed + 1),
        "latents": _normal(2, TOKENS, 16, seed=seed + 2),
        "height": 16,
        "width": 16,
        "num_inference_steps": steps,
        "output_type": "latent",
    }
