"""NaN and infinity in a latent or a prompt: the sample's prediction is not finite, as in floating point."""

import pytest
import torch
from fused_unets import MIXED, arguments_of, call, fused, noise, quantized

from dq_kernels.cpu import compiled
from dq_runtime import Int8AttnProcessor

pytestmark = pytest.mark.usefixtures("contiguous_group_norm")

SICK, OTHERS = 0, [1, 2]
MODELS = {"unfused": quantized, "fused": fused}


def call_with(unet, value, where, timestep=MIXED):
    """A call with one bad number, in the latent or in the prompt of one sample."""
    latent, arguments = noise(unet), arguments_of(unet)
    tensor = latent if where == "latent" else arguments["encoder_hidden_states"]
    tensor[SICK].view(-1)[17] = value
    return unet(latent, timestep, **arguments).sample


def assert_only_one_sample_is_lost(result, expected):
    assert not result[SICK].isfinite().any()
    assert torch.equal(result[OTHERS], expected[OTHERS])


@pytest.mark.supports("Errors", "NaN and infinity", "stay visible in their sample alone")
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("where", ["latent", "prompt"])
@pytest.mark.parametrize("model", MODELS)
def test_prediction_of_a_bad_sample_is_not_finite_and_others_are_as_without_it(model, where, value):
    unet = MODELS[model]()
    expected = call(unet)

    assert_only_one_sample_is_lost(call_with(unet, value, where), expected)
    assert torch.equal(call(unet), expected)  # nothing is left for the next call


@pytest.mark.parametrize("model", MODELS)
def test_batch_of_two_timesteps_keeps_the_other_sample_bit_for_bit(model):
    """Without the bad sample's timestep, the batch would have one, which the CPU computes otherwise."""
    unet = MODELS[model]()
    timestep = torch.tensor([900, 100, 100])

    assert_only_one_sample_is_lost(call_with(unet, torch.nan, "latent", timestep), call(unet, timestep))


@pytest.mark.parametrize("where", ["latent", "prompt"])
def test_prediction_is_not_finite_without_a_compiler_and_with_int8_attention(where, monkeypatch):
    monkeypatch.setattr(compiled, "library", lambda: None)
    unet = fused()
    unet.set_attn_processor(Int8AttnProcessor())

    assert_only_one_sample_is_lost(call_with(unet, torch.nan, where, 500), call(unet, 500))


def test_overflow_within_the_unet_is_not_finite():
    """An image beyond float16's range between two layers."""
    unet = fused().half()
    conv = unet.down_blocks[0].resnets[0].conv2
    conv.bias.data.fill_(65000.0)
    conv.weight_scale.mul_(1e6)

    prompt = arguments_of(unet)["encoder_hidden_states"].half()
    assert not unet(noise(unet).half(), 500, encoder_hidden_states=prompt).sample.isfinite().any()


def test_layer_of_another_batch_marks_its_copy_of_the_index():
    """Such as an attention processor that splits each sample in two."""
    unet = quantized()
    grid = unet.timestep_grid
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(6, 4, layer.in_features)
    grid.before_forward(unet, (noise(unet), 500), {})
    expected = layer(x)
    x[SICK, 0, 0] = torch.nan

    y = layer(x)

    assert not y[SICK].isfinite().any()
    assert torch.equal(y[1:], expected[1:])
    assert (grid.index >= 0).all()
    grid.before_forward(unet, (noise(unet), 500), {})
    assert layer(x.nan_to_num()).isfinite().all()


def test_other_batch_has_the_timestep_of_samples_that_are_not_lost():
    unet = quantized()
    grid = unet.timestep_grid
    grid.before_forward(unet, (noise(unet), 500), {})
    row = grid.index[0].item()
    grid.index[SICK] = -1

    assert grid.copied_index(5, torch.device("cpu")).tolist() == [row] * 5
