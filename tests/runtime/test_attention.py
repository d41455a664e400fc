"""Attention in int8: the attentions that a config selects, the processor's results, and its fallbacks."""

import copy
import json
import logging

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from fused_unets import arguments_of, calibrate, call, new_unet, noise

import dq_runtime
from dq_kernels import ops, reference
from dq_runtime import DilateQuantConfig, Int8AttnProcessor
from dq_runtime.convert import insert_empty_layers

DOWN = "down_blocks.0.attentions.0.transformer_blocks.0"
MID = "mid_block.attentions.0.transformer_blocks.0"
UP = [f"up_blocks.1.attentions.{i}.transformer_blocks.0" for i in range(2)]
BLOCKS = [DOWN, MID, *UP]
IMAGE_ATTENTIONS = [
    "down_blocks.1.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
]


def attentions_of(unet):
    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}


def in_int8(unet):
    """The names of the attentions that have the processor."""
    return sorted(name for name, a in attentions_of(unet).items() if type(a.processor) is Int8AttnProcessor)


@pytest.fixture(scope="module")
def float_unet():
    """Calibrated without int8 attention."""
    with torch.no_grad():
        return calibrate(new_unet("conv projections"))


@pytest.fixture(scope="module")
def int8_unet():
    """Calibrated like the one above, but for some attentions in int8."""
    with torch.no_grad():
        return calibrate(new_unet("conv projections"), int8_attention=["attn1", "mid_block"])


SELECTED = sorted([f"{MID}.attn2", *(f"{block}.attn1" for block in BLOCKS)])


# Selection of attentions.


@pytest.mark.parametrize(
    ("name", "entries", "selected"),
    [
        ("conv projections", ["attn1"], [f"{block}.attn1" for block in BLOCKS]),
        ("conv projections", ["mid_block"], [f"{MID}.attn1", f"{MID}.attn2"]),
        ("conv projections", [f"{DOWN}.attn2"], [f"{DOWN}.attn2"]),
        ("conv projections", [UP[0], f"{MID}.attn1"], [f"{UP[0]}.attn1", f"{UP[0]}.attn2", f"{MID}.attn1"]),
        ("conv projections", ["attentions"], [f"{block}.attn{i}" for block in BLOCKS for i in (1, 2)]),
        ("conv projections", ["attn", "mid"], []),
        ("conv projections", [], []),
        ("UNet2DModel", ["attentions"], IMAGE_ATTENTIONS),
        ("UNet2DModel", ["mid_block"], ["mid_block.attentions.0"]),
        ("UNet2DModel", ["up_blocks.0.attentions.1"], ["up_blocks.0.attentions.1"]),
        ("UNet2DModel", None, []),
    ],
)
def test_entries_select_the_attentions_that_they_name(name, entries, selected):
    unet = new_unet(name)

    insert_empty_layers(unet, DilateQuantConfig(int8_attention=entries, timesteps=[0.0]))

    assert in_int8(unet) == sorted(selected)
    others = {type(a.processor) for name, a in attentions_of(unet).items() if name not in selected}
    assert others <= {AttnProcessor2_0}


def test_no_attention_is_in_int8_by_default(float_unet):
    assert float_unet.config.quantization_config.int8_attention == []
    assert in_int8(float_unet) == []


def test_entry_that_names_no_attention_is_one_warning(calibration_call, caplog):
    unet = new_unet("UNet2DModel")
    config = DilateQuantConfig(dilation="weight", int8_attention=["mid_block", "attn3", "to_q"])

    with caplog.at_level(logging.INFO, "dq_runtime"):
        dq_runtime.calibrate(unet, calibration_call(unet), config, distillation=None)

    warnings = [r for r in caplog.records if "int8_attention" in r.getMessage()]
    assert [r.levelno for r in warnings] == [logging.WARNING] * 2
    assert "int8_attention: 'attn3'" in warnings[0].getMessage()
    assert "int8_attention: 'to_q'" in warnings[1].getMessage()
    assert in_int8(unet) == ["mid_block.attentions.0"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"heads": 1, "dim_head": 136}, "heads of more than 128 channels"),
        ({"processor": AttnProcessor()}, "AttnProcessor"),
        ({"added_kv_proj_dim": 16}, "added keys and values"),
        ({"kv_heads": 2}, "keys of fewer heads"),
        ({"qk_norm": "layer_norm"}, "norms of queries and keys"),
    ],
    ids=["large heads", "another processor", "added keys", "fewer heads", "normed queries"],
)
def test_attention_that_cannot_run_in_int8_stays_and_one_warning_says_why(options, reason, caplog):
    unet = new_unet("UNet2DModel")
    attention = unet.mid_block.attentions[0] = Attention(64, **{"heads": 4, "dim_head": 16} | options)
    processor = attention.processor

    with caplog.at_level(logging.INFO, "dq_runtime"):
        insert_empty_layers(unet, DilateQuantConfig(int8_attention=["attentions"], timesteps=[0.0]))

    assert attention.processor is processor
    assert in_int8(unet) == [name for name in IMAGE_ATTENTIONS if name != "mid_block.attentions.0"]
    (line,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert line.startswith("Attention stays in floating point: mid_block.attentions.0 (")
    assert reason in line


def test_heads_of_128_channels_are_in_int8():
    unet = new_unet("UNet2DModel", block_out_channels=(32, 128), attention_head_dim=128)

    insert_empty_layers(unet, DilateQuantConfig(int8_attention=["attentions"], timesteps=[0.0]))

    assert in_int8(unet) == IMAGE_ATTENTIONS


# Results of the processor.


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(dtype=torch.float32, **options):
    """One attention with diffusers' processor, and the same in int8."""
    torch.manual_seed(0)
    stock = Attention(**{"query_dim": 32, "heads": 4, "dim_head": 8} | options).to(dtype).eval()
    int8 = copy.deepcopy(stock)
    int8.set_processor(Int8AttnProcessor())
    return stock, int8


@pytest.fixture
def with_reference(monkeypatch):
    """Calls diffusers' own processor with the reference between the projections."""

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False):
        assert attn_mask is None
        heads = query.shape[1]
        y = reference.int8_attention(*(x.transpose(1, 2).flatten(2) for x in (query, key, value)), heads)
        return y.unflatten(2, (heads, -1)).transpose(1, 2)

    def with_reference(attention, *args, **kwargs):
        assert type(attention.processor) is AttnProcessor2_0
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", attend)
            return attention(*args, **kwargs)

    return with_reference


TOKENS, IMAGE, CONTEXT = (2, 70, 32), (2, 32, 5, 14), (2, 5, 24)


@pytest.mark.supports(
    "Adapters and attention", "`Int8AttnProcessor`", "on any stock attention", "heads of at most 128 channels"
)
@pytest.mark.parametrize(
    ("options", "shape", "context_shape"),
    [
        ({}, TOKENS, None),
        ({"bias": True, "dim_head": 12}, TOKENS, None),
        ({"cross_attention_dim": 24}, TOKENS, CONTEXT),
        ({}, IMAGE, None),
        ({"cross_attention_dim": 24}, IMAGE, CONTEXT),
        ({"norm_num_groups": 4}, IMAGE, None),
        ({"norm_num_groups": 4}, TOKENS, None),
        ({"residual_connection": True}, TOKENS, None),
        ({"residual_connection": True, "norm_num_groups": 4, "rescale_output_factor": 3.0}, IMAGE, None),
        ({"cross_attention_dim": 24, "cross_attention_norm": "layer_norm"}, TOKENS, CONTEXT),
        (
            {"cross_attention_dim": 24, "cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 4},
            TOKENS,
            CONTEXT,
        ),
        ({"cross_attention_norm": "layer_norm"}, TOKENS, None),
    ],
    ids=str,
)
def test_processor_computes_what_the_stock_one_does(with_reference, relative_rms, options, shape, context_shape):
    """Close to floating point; equal to the reference's attention up to the order of sums."""
    stock, int8 = pair(**options)
    x = 1 + 2 * random(*shape)
    context = None if context_shape is None else 1 + 2 * random(*context_shape, seed=1)

    y = int8(x, context)

    assert relative_rms(y, with_reference(stock, x, context)) < 1e-4 < relative_rms(y, stock(x, context)) < 0.03


def test_spatial_norm_is_heeded(with_reference, relative_rms):
    stock, int8 = pair(spatial_norm_dim=6)
    x, temb = random(*IMAGE), random(2, 6, 5, 14, seed=1)

    y = int8(x, temb=temb)

    assert relative_rms(y, with_reference(stock, x, temb=temb)) < 1e-4 < relative_rms(y, stock(x, temb=temb)) < 0.03


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_half_precision(relative_rms, dtype):
    stock, int8 = pair(dtype)
    x = random(*TOKENS).to(dtype)

    y = int8(x)

    assert y.dtype == dtype
    assert relative_rms(y, stock(x)) < 0.03


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"heads": 1, "dim_head": 136}, {}),
        ({"qk_norm": "layer_norm"}, {}),
        ({}, {"attention_mask": torch.zeros(2, 1, 70).index_fill(2, torch.arange(9), -10000.0)}),
    ],
    ids=["large heads", "normed queries", "mask"],
)
def test_what_int8_cannot_do_is_done_in_floating_point(options, arguments):
    stock, int8 = pair(**options)
    x = random(*TOKENS)

    assert torch.equal(int8(x, **arguments), stock(x, **arguments))


def test_float64_is_computed_as_such():
    stock, int8 = pair(torch.float64)
    x = random(*TOKENS).double()

    assert torch.equal(int8(x), stock(x))


def test_attention_with_added_keys_is_refused_with_the_processor_that_it_needs():
    _, int8 = pair(added_kv_proj_dim=16)

    with pytest.raises(ValueError, match=r"set_processor\(AttnAddedKVProcessor2_0\(\)\)"):
        int8(random(*IMAGE))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("of", ["input", "context", "weights"])
def test_gradients_are_those_of_the_stock_processor(of, compiled):
    results = []
    for attention in pair(cross_attention_dim=24):
        attention.requires_grad_(of == "weights")
        if compiled:
            torch._dynamo.reset()
            attention.compile(fullgraph=True, backend="aot_eager")
        x, context = random(*TOKENS).requires_grad_(of == "input"), random(*CONTEXT).requires_grad_(of == "context")
        with torch.enable_grad():
            y = attention(x, context)
            y.square().sum().backward()
        results.append([y, *(leaf.grad for leaf in (x, context, *attention.parameters()) if leaf.requires_grad)])

    stock, int8 = results
    assert len(stock) > 1
    for actual, expected in zip(int8, stock, strict=True):
        assert torch.equal(actual, expected)


def test_wanted_gradients_that_are_off_are_no_reason_for_floating_point():
    stock, int8 = pair()
    x = random(*TOKENS).requires_grad_()

    assert not torch.equal(int8(x), stock(x))


@pytest.mark.parametrize(
    ("options", "shapes"),
    [({"cross_attention_dim": 24}, (TOKENS, CONTEXT)), ({"norm_num_groups": 4, "residual_connection": True}, (IMAGE,))],
    ids=["cross", "image"],
)
def test_compiled_attention_has_no_graph_break_and_computes_the_same(relative_rms, options, shapes):
    _, int8 = pair(**options)
    inputs = [random(*shape) for shape in shapes]
    torch._dynamo.reset()
    compiled = torch.compile(int8, fullgraph=True, backend="aot_eager")

    assert relative_rms(compiled(*inputs), int8(*inputs)) < 1e-6


# In UNets.


@pytest.mark.parametrize("name", ["conv projections", "UNet2DModel"])
def test_stock_unet_with_the_processor_draws_nearly_the_same(relative_rms, name):
    unet = new_unet(name)
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(3)

    def draw():
        sample = noise(unet)
        for timestep in scheduler.timesteps:
            prediction = unet(sample, timestep, **arguments_of(unet)).sample
            sample = scheduler.step(prediction, timestep, sample).prev_sample
        return sample

    expected = draw()
    for attention in attentions_of(unet).values():
        attention.set_processor(Int8AttnProcessor())

    assert 0 < relative_rms(draw(), expected) < 0.01


def test_calibration_with_int8_attention_makes_the_same_tensors(int8_unet, float_unet, assert_same_tensors):
    assert in_int8(int8_unet) == SELECTED
    assert_same_tensors(int8_unet.state_dict(), float_unet.state_dict())


def test_selected_attentions_run_in_int8(int8_unet, float_unet, relative_rms, monkeypatch):
    calls = []
    own = ops.int8_attention
    monkeypatch.setattr(ops, "int8_attention", lambda *args: calls.append(args) or own(*args))
    actual = call(int8_unet)

    assert len(calls) == len(SELECTED)
    assert 0 < relative_rms(actual, call(float_unet)) < 0.1  # other roundings cost as much as quantization
    assert len(calls) == len(SELECTED)


def test_checkpoint_keeps_the_selection_and_the_bits(int8_unet, tmp_path):
    int8_unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]

    unet = UNet2DConditionModel.from_pretrained(tmp_path)

    assert config["int8_attention"] == ["attn1", "mid_block"]
    assert in_int8(unet) == SELECTED
    assert torch.equal(call(unet), call(int8_unet))


def test_checkpoint_from_before_int8_attention_loads_without(float_unet, tmp_path):
    float_unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["int8_attention"]
    (tmp_path / "config.json").write_text(json.dumps(config))

    unet = UNet2DConditionModel.from_pretrained(tmp_path)

    assert in_int8(unet) == []
    assert unet.config.quantization_config == float_unet.config.quantization_config
    assert torch.equal(call(unet), call(float_unet))


def test_copy_keeps_the_selection_and_the_bits(int8_unet):
    unet = copy.deepcopy(int8_unet)

    assert in_int8(unet) == SELECTED
    assert torch.equal(call(unet), call(int8_unet))


def test_dequantized_unet_has_stock_processors(int8_unet, float_unet):
    unet = copy.deepcopy(int8_unet).dequantize()

    assert {type(a.processor) for a in attentions_of(unet).values()} == {AttnProcessor2_0}
    assert torch.equal(call(unet), call(copy.deepcopy(float_unet).dequantize()))
