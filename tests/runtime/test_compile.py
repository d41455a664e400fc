"""torch.compile and torch.export of fused UNets, and diffusers' features that find blocks by their classes."""

import copy
import functools
import threading

import pytest
import torch
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.models.attention import BasicTransformerBlock
from fused_unets import FLIPS, calibrate, call, fused, modules_of, new_unet, noise, quantized
from peft import LoraConfig
from torch._dynamo.backends.debugging import aot_eager

from dq_runtime import Int8AttnProcessor
from dq_runtime.fused import FUSED, fuse

pytestmark = pytest.mark.usefixtures("contiguous_group_norm")

ONE_LEVEL = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "mid_block_type": None,
}


@functools.cache
def _calibrated():
    return calibrate(new_unet("conv projections", **ONE_LEVEL))


def small():
    """A fused UNet of one level, which compiles in seconds."""
    unet = copy.deepcopy(_calibrated())
    fuse(unet)
    return unet


@pytest.fixture
def compiled_graphs():
    """The graphs that ``backend`` has compiled."""
    torch._dynamo.reset()
    return []


@pytest.fixture
def backend(compiled_graphs):
    def backend(graph, inputs):
        compiled_graphs.append(graph)
        return aot_eager(graph, inputs)

    return backend


PROMPT = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(3))
TIMESTEPS = [torch.tensor(timestep) for timestep in (900, 500, 100, 33)]


def sample(unet):
    """The results of a sampling run."""
    return torch.stack([call(unet, timestep, encoder_hidden_states=PROMPT) for timestep in TIMESTEPS])


@pytest.mark.supports(
    "Compiling, exporting, graphs",
    "`torch.compile(fullgraph=True)`",
    "one compilation for all timesteps",
    "timesteps as tensors; backend `aot_eager`",
)
def test_a_sampling_run_compiles_the_unet_once(relative_rms, backend, compiled_graphs):
    """A sample with NaN is one of the run's calls: it becomes NaN, and the others are as before."""
    unet = small()
    unet.compile(fullgraph=True, backend=backend)

    assert relative_rms(sample(unet), sample(small())) < FLIPS

    expected = call(unet, TIMESTEPS[0], encoder_hidden_states=PROMPT)
    latent = noise(unet)
    latent[1, 0, 0, 0] = torch.nan

    result = unet(latent, TIMESTEPS[0], encoder_hidden_states=PROMPT).sample

    assert result[1].isnan().all()
    assert torch.equal(result[[0, 2]], expected[[0, 2]])
    assert torch.equal(call(unet, TIMESTEPS[0], encoder_hidden_states=PROMPT), expected)
    assert len(compiled_graphs) <= 2  # the hook that maps the timestep, and the forward


def with_lora(unet):
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "ff.net.0.proj"]))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.5)
    return unet


def test_adapters_compile_and_their_weights_are_read_at_each_call(relative_rms, backend, compiled_graphs):
    unet, expected = with_lora(small()), with_lora(small())
    unet.compile(fullgraph=True, backend=backend)
    first = sample(unet)
    assert relative_rms(first, sample(expected)) < FLIPS

    for name, parameter in [*unet.named_parameters(), *expected.named_parameters()]:
        if "lora_B" in name:
            parameter.data.neg_()

    assert relative_rms(sample(unet), first) > 2 * FLIPS
    assert relative_rms(sample(unet), sample(expected)) < FLIPS
    assert len(compiled_graphs) <= 2


def test_hooks_run_in_compiled_blocks(relative_rms, backend):
    unets = small(), small()
    for unet in unets:
        layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_v
        layer.register_forward_hook(lambda module, args, output: -10 * output)
    unets[0].compile_repeated_blocks(fullgraph=True, backend=backend)

    assert relative_rms(sample(unets[1]), sample(small())) > 2 * FLIPS
    assert relative_rms(sample(unets[0]), sample(unets[1])) < FLIPS


@pytest.mark.supports("Compiling, exporting, graphs", "`compile_repeated_blocks`", "blocks are compiled once")
def test_repeated_blocks_are_compiled(relative_rms, backend, compiled_graphs):
    unet = small()
    unet.compile_repeated_blocks(fullgraph=True, backend=backend)

    assert relative_rms(sample(unet), sample(small())) < FLIPS
    assert 1 <= len(compiled_graphs) <= len(modules_of(unet, BasicTransformerBlock))


@pytest.mark.supports(
    "Compiling, exporting, graphs",
    "threads and compiled blocks",
    "a call from a second thread is refused",
    "not checked where the whole model is compiled",
)
@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_call_of_compiled_blocks_is_not_disturbed_by_another_thread(backend, is_compiled):
    unet = small()
    if is_compiled:
        unet.compile_repeated_blocks(backend=backend)
    first, second = (
        functools.partial(call, unet, timestep, encoder_hidden_states=PROMPT) for timestep in TIMESTEPS[:2]
    )
    expected, others = first(), second()
    errors, results = [], []

    def call_in_between():
        try:
            with torch.no_grad():
                results.append(second())
        except RuntimeError as error:
            errors.append(str(error))

    def start_other_thread(*_):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=call_in_between)
            thread.start()
            thread.join()

    unet.conv_in.register_forward_hook(start_other_thread)

    assert torch.equal(first(), expected)
    if is_compiled:
        assert not results
        assert "called while it runs in another thread. Call it in turns" in errors[0]
    else:
        assert torch.equal(results[0], others)


@pytest.mark.supports("Compiling, exporting, graphs", "`torch.export`", "fused UNets")
def test_fused_unet_is_exported(relative_rms):
    unet = small()
    exported = torch.export.export(unet, (noise(unet), TIMESTEPS[0], PROMPT)).module()

    results = torch.stack([exported(noise(unet), timestep, PROMPT).sample for timestep in TIMESTEPS])

    assert relative_rms(results, sample(small())) < FLIPS


@pytest.mark.supports(
    "Compiling, exporting, graphs", "`torch.jit.trace`, the older ONNX exporter", "refused: use `torch.compile`"
)
def test_a_trace_is_refused_with_the_remedy():
    unet = small()

    with pytest.raises(RuntimeError, match=r"UNet2DConditionModel is quantized.* use torch\.compile"):
        torch.jit.trace(unet, (noise(unet), torch.tensor(TIMESTEPS[0]), PROMPT))


# Features that find blocks by the names of their classes, or by the classes.


def test_fused_classes_have_the_names_of_the_stock_ones():
    for stock, fused_class in FUSED.items():
        assert fused_class.__name__ == stock.__name__
        assert fused_class.__qualname__ != stock.__qualname__  # pickle finds the class by it


LAYER_SKIPS = {
    "block": {},
    "attention": {"skip_ff": False},
    "scores": {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
}


@pytest.mark.supports("Adapters and attention", "layer skip", "finds fused blocks by their classes")
@pytest.mark.parametrize("int8_attention", [False, True])
@pytest.mark.parametrize("skip", LAYER_SKIPS)
def test_layers_of_a_fused_unet_are_skipped(relative_rms, skip, int8_attention):
    unets = fused(), quantized()
    for unet in unets:
        if int8_attention:
            unet.set_attn_processor(Int8AttnProcessor())
    without = call(unets[1])

    for unet in unets:
        for block in ("down_blocks.0", "mid_block", "up_blocks.1"):
            fqn = f"{block}.attentions.0.transformer_blocks"
            apply_layer_skip(unet, LayerSkipConfig([0], fqn=fqn, **LAYER_SKIPS[skip]))

    assert relative_rms(call(unets[1]), without) > 0.001
    assert relative_rms(call(unets[0]), call(unets[1])) < FLIPS
