"""A saved Stable Diffusion pipeline of tiny random models, whose tokenizer knows single letters."""

import json
import string

import tiny_unets
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 16
# Options of ``dq-runtime quantize`` with which it takes a second or two.
SHORT = [
    *("--preset", "fast", "--steps", "2", "--samples", "8"),
    *(option for name in ("mid_block", "up_blocks", "down_blocks.1.resnets") for option in ("--keep", name)),
]


def save_pipeline(folder, **arguments):
    """Writes the pipeline into ``folder / "pipeline"`` and returns that path; the arguments are those of its UNet."""
    letters = string.ascii_lowercase
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    unet = tiny_unets.unet2d_condition(**arguments)
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=unet.config.cross_attention_dim, intermediate_size=37,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=TOKENS, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=autoencoder, text_encoder=CLIPTextModel(text), unet=unet, safety_checker=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        tokenizer=CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS), feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"
