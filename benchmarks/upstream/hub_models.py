"""Local stand-ins for the tiny CLIP tokenizers and text encoders that diffusers' tests load from the hub.

Shapes are those of the originals. Values are not, so images differ from the slices that some tests expect.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

CLIP = ("hf-internal-testing/tiny-random-clip", "peft-internal-testing/tiny-clip-text-2")


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer without merges: a token for each byte. The end token has the largest id, as in CLIP."""
    characters = list(bytes_to_unicode().values())
    tokens = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=77)


def text_encoder(model_class: Any) -> PreTrainedModel:
    """A CLIP text encoder of 32 channels with random weights, the same at every call."""
    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=5, projection_dim=32,
        vocab_size=1000, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config).eval()


def install() -> None:
    """Makes ``from_pretrained`` of tokenizers and models return the stand-ins for these names."""
    _replace(PreTrainedTokenizerBase, lambda cls: tokenizer())
    _replace(PreTrainedModel, text_encoder)


def _replace(base: Any, create: Any) -> None:
    stock = base.from_pretrained.__func__

    def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        return create(cls) if name in CLIP else stock(cls, name, *args, **kwargs)

    base.from_pretrained = classmethod(from_pretrained)
