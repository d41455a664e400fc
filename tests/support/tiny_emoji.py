"""An untrained pipeline in the form of the emoji pipeline, with a smaller UNet."""

import tiny_unets
import torch

from examples.emoji import models


def save_pipeline(folder):
    """Writes the pipeline into ``folder / "pipeline"`` and returns that path."""
    torch.manual_seed(0)
    tokenizer = models.trained_tokenizer(["panda", "picture"])
    unet = tiny_unets.unet2d_condition(sample_size=16, cross_attention_dim=models.TEXT_CHANNELS)
    denoiser = torch.nn.ModuleDict({"text_encoder": models.untrained_text_encoder(tokenizer), "unet": unet}).eval()
    models.save(models.pipeline(models.untrained_autoencoder().eval(), tokenizer, denoiser), folder / "pipeline")
    return folder / "pipeline"
