"""Valid arguments of every operator."""

import pytest
import torch


@pytest.fixture
def make(
    linear_arguments, geglu_quantize_arguments, conv2d_arguments, layer_norm_arguments, group_norm_arguments,
    attention_arguments, attention_quantize_arguments, quantizer_arguments,
):  # fmt: skip
    """Makes small valid arguments of an operator, with every optional one except statistics."""

    def make(op, dtype=torch.float32, batch=3, size=(5, 7)):
        if op == "int4_linear":
            following = {f"next_{name}": value for name, value in quantizer_arguments(batch, 4).items()}
            return linear_arguments((batch, size[0], 6), 4, dtype)[0] | following
        if op == "int4_geglu_quantize":
            return geglu_quantize_arguments((batch, size[0], 6), 4, dtype)[0]
        if op == "int4_conv2d":
            return conv2d_arguments((batch, *size, 6), 4, stride=(2, 1), dtype=dtype)[0]
        if op == "layer_norm_quantize":
            return layer_norm_arguments((batch, size[0], 6), dtype)
        if op == "group_norm_quantize":
            return group_norm_arguments((batch, *size, 6), 4, 10, dtype, padding=(1, 2), with_plain=True)
        if op == "int8_attention":
            return attention_arguments(batch, *size, 2, 3, dtype)
        if op in ("int8_attention_quantize", "attention_quantize"):
            statistics = {"statistics": None} if op == "int8_attention_quantize" else {}
            return attention_quantize_arguments(batch, *size, 2, 3, dtype=dtype) | statistics
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, *size, 6, generator=generator).to(dtype)
        return {"x": x, **quantizer_arguments(batch, 6), "padding": (1, 2)}

    return make
