"""Layer errors, compared with sums over all outputs, which wrappers of the layers' forwards collect."""

import copy
import gc
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from fake_graphs import with_graphs
from torch import nn

from dq_runtime import CalibrationSet, calibrate, record
from dq_runtime.evaluation.layer_errors import layer_sqnr
from dq_runtime.fused import fuse
from dq_runtime.layers import quantized_layers

EXACT = "mid_block.resnets.0.conv1"
TIMESTEPS = (10, 500, 900)


@dataclass(frozen=True)
class Subject:
    stock: nn.Module
    quantized: nn.Module
    calibration_set: CalibrationSet

    def copies(self):
        return copy.deepcopy(self.quantized), copy.deepcopy(self.stock)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def new_unet(**arguments):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        **arguments,
    ).eval()
    unet.get_submodule(EXACT).weight.data.zero_()  # zero has no rounding error; only the bias remains
    return unet


def calls(unet, **arguments):
    """Records three calls with different batch sizes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad(), record(unet) as calibration_set:
        for batch, timestep in enumerate(TIMESTEPS, start=1):
            sample = torch.randn(batch, 4, 8, 8, generator=generator)
            inputs = {name: [x.expand(batch, -1, -1, -1) for x in value] for name, value in arguments.items()}
            unet(sample, timestep, torch.randn(batch, 3, 8, generator=generator), **inputs)
    return calibration_set


def quantize(stock, **arguments):
    calibration_set = calls(stock, **arguments)
    return Subject(stock, calibrate(copy.deepcopy(stock), calibration_set, distillation=None), calibration_set)


@pytest.fixture(scope="module")
def subject():
    return quantize(new_unet())


def outputs(unet, layers, calibration_set):
    """All outputs of these layers, as one flat float64 array per layer."""
    unet, collected = copy.deepcopy(unet), {name: [] for name in layers}
    for name in layers:
        layer = unet.get_submodule(name)

        def forward(x, run=layer.forward, parts=collected[name]):
            y = run(x)
            parts.append(y.numpy().astype(np.float64).ravel())
            return y

        layer.forward = forward
    for call in calibration_set.calls:
        call.run(unet)
    return {name: np.concatenate(parts) for name, parts in collected.items()}


def sqnr_by_hand(subject):
    layers = list(quantized_layers(subject.quantized))
    exact = outputs(subject.stock, layers, subject.calibration_set)
    found = outputs(subject.quantized, layers, subject.calibration_set)
    with np.errstate(divide="ignore"):
        return {n: 10 * np.log10((exact[n] ** 2).sum() / ((found[n] - exact[n]) ** 2).sum()) for n in layers}


def test_sqnr_follows_the_formula_over_all_outputs_of_all_calls(subject):
    expected = sqnr_by_hand(subject)

    sqnr = layer_sqnr(subject.quantized, subject.stock, subject.calibration_set)

    assert sqnr.keys() == expected.keys()
    assert sqnr == pytest.approx(expected, rel=1e-9)
    assert len({round(value, 3) for value in sqnr.values()}) > len(sqnr) // 2
    assert all(type(value) is float for value in sqnr.values())


def test_layers_come_in_the_order_of_the_forward_pass(subject):
    names = list(layer_sqnr(subject.quantized, subject.stock, subject.calibration_set))
    first = [names.index(f"{block}.resnets.0.conv1") for block in ("down_blocks.1", "mid_block", "up_blocks.0")]

    assert names[:2] == ["time_embedding.linear_1", "time_embedding.linear_2"]
    assert first == sorted(first)
    assert list(quantized_layers(subject.quantized)) != names  # module order has the mid block last


def test_the_sqnr_of_a_layer_without_error_is_infinite(subject):
    sqnr = layer_sqnr(subject.quantized, subject.stock, subject.calibration_set)

    assert [name for name, value in sqnr.items() if math.isinf(value)] == [EXACT]
    assert sqnr[EXACT] == math.inf


@pytest.mark.parametrize(("added", "expected"), [(0, math.inf), (1, -math.inf), (math.inf, math.nan)], ids=str)
def test_the_sqnr_of_an_output_whose_reference_is_zero(subject, added, expected):
    unet, reference = subject.copies()
    reference.get_submodule(EXACT).bias.zero_()
    unet.get_submodule(EXACT).bias.fill_(added)

    assert layer_sqnr(unet, reference, subject.calibration_set)[EXACT] == pytest.approx(expected, nan_ok=True)


def test_an_output_is_measured_before_it_is_changed_in_place():
    features = [torch.full((1, 8, 4, 4), 3.0), torch.full((1, 16, 4, 4), -2.0)]  # like a T2I-Adapter's
    subject = quantize(new_unet(), down_intrablock_additional_residuals=features)
    expected = sqnr_by_hand(subject)

    sqnr = layer_sqnr(subject.quantized, subject.stock, subject.calibration_set)

    name = "down_blocks.0.downsamplers.0.conv"
    without = layer_sqnr(subject.quantized, subject.stock, calls(subject.stock))
    assert sqnr == pytest.approx(expected, rel=1e-9)
    assert sqnr[name] == pytest.approx(without[name], abs=1)  # the features are added after it


def test_both_outputs_of_a_layer_that_runs_twice_in_a_call_are_summed():
    stock = new_unet()
    stock.mid_block.resnets[1].conv2 = stock.mid_block.resnets[0].conv2
    subject = quantize(stock)

    sqnr = layer_sqnr(subject.quantized, subject.stock, subject.calibration_set)

    assert sqnr == pytest.approx(sqnr_by_hand(subject), rel=1e-9)
    assert "mid_block.resnets.1.conv2" not in sqnr


def test_layers_that_no_call_reaches_are_left_out(subject):
    unet, reference = subject.copies()
    unet.unused = copy.deepcopy(unet.time_embedding.linear_1)
    reference.unused = copy.deepcopy(reference.time_embedding.linear_1)

    sqnr = layer_sqnr(unet, reference, subject.calibration_set)

    assert "unused" in quantized_layers(unet)
    assert sqnr == layer_sqnr(subject.quantized, subject.stock, subject.calibration_set)


def live_bytes():
    gc.collect()
    # Neither a compiler's fake tensors nor tensors in oneDNN's own layouts have memory to count.
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter)]
    storages = [x.untyped_storage() for x in tensors if x.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_only_one_calls_outputs_are_held_at_a_time(subject):
    unet, reference = subject.copies()
    one_call = CalibrationSet(subject.calibration_set.calls[2:])
    one_call.calls[0].run(unet)  # makes the int8 copies of the weights
    held = []
    reference.register_forward_pre_hook(lambda *_: held.append(live_bytes()))

    layer_sqnr(unet, reference, CalibrationSet(one_call.calls * 5))

    of_one_call = sum(array.size * 4 for array in outputs(subject.stock, quantized_layers(unet), one_call).values())
    assert len(held) == 5
    assert max(held) - min(held) < of_one_call / 10


def test_dropout_is_off_and_every_modules_mode_is_restored(subject):
    stock = new_unet(dropout=0.5)
    dropout = Subject(
        stock, calibrate(copy.deepcopy(stock), subject.calibration_set, distillation=None), subject.calibration_set
    )
    expected = layer_sqnr(dropout.quantized, dropout.stock, dropout.calibration_set)
    models = dropout.copies()
    for model in models:
        model.train()
        model.mid_block.eval()
    modes = [[module.training for module in model.modules()] for model in models]

    assert layer_sqnr(*models, dropout.calibration_set) == expected
    assert [[module.training for module in model.modules()] for model in models] == modes


def hooks(model):
    return [len(module._forward_hooks) for module in model.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_all_hooks_are_removed(subject, fails):
    unet, reference = subject.copies()
    before = hooks(unet), hooks(reference)
    if fails:
        unet.conv_out.forward = None

        with pytest.raises(TypeError):
            layer_sqnr(unet, reference, subject.calibration_set)
    else:
        layer_sqnr(unet, reference, subject.calibration_set)

    assert (hooks(unet), hooks(reference)) == before


def test_half_precision_is_summed_in_float64(subject):
    unet, reference = subject.copies()
    unet, reference = unet.to(torch.bfloat16), reference.to(torch.bfloat16)
    scale = 2.0**66  # squares overflow float32
    for model in (unet, reference):
        model.get_submodule(EXACT).bias.fill_(scale)
    unet.get_submodule(EXACT).bias.mul_(1.5)

    assert layer_sqnr(unet, reference, subject.calibration_set)[EXACT] == pytest.approx(20 * math.log10(2))


def test_an_unquantized_unet_is_refused(subject):
    with pytest.raises(ValueError, match="The UNet is not quantized"):
        layer_sqnr(subject.stock, subject.stock, subject.calibration_set)


def test_a_quantized_reference_is_refused(subject):
    with pytest.raises(ValueError, match="The reference is quantized"):
        layer_sqnr(subject.quantized, subject.quantized, subject.calibration_set)


def test_layers_without_counterpart_are_named(subject):
    unet, reference = subject.copies()
    del reference.mid_block.resnets[1]

    names = "mid_block.resnets.1.conv1, mid_block.resnets.1.time_emb_proj, mid_block.resnets.1.conv2"
    with pytest.raises(ValueError, match=f"no layers {names}. Pass") as error:
        layer_sqnr(unet, reference, subject.calibration_set)
    assert "resnets.0" not in str(error.value)


def test_no_more_than_ten_missing_layers_are_named(subject):
    unet, reference = subject.copies()
    missing = [name for name in quantized_layers(unet) if name.startswith(("mid_block", "up_blocks"))]
    del reference.mid_block, reference.up_blocks

    with pytest.raises(ValueError, match=f"{missing[9]} and {len(missing) - 10} more") as error:
        layer_sqnr(unet, reference, subject.calibration_set)
    assert [name for name in missing if f"{name}," in f"{error.value}".replace(" and", ",")] == missing[:10]


def test_a_counterpart_of_another_shape_is_named(subject):
    unet, reference = subject.copies()
    reference.time_embedding.linear_1 = nn.Linear(8, 16)
    reference.time_embedding.linear_2 = nn.Linear(16, 32)

    with pytest.raises(ValueError, match=r"time_embedding.linear_1: its output is \[1, 32\], .* \[1, 16\]"):
        layer_sqnr(unet, reference, subject.calibration_set)


def test_a_fused_unet_is_refused(subject):
    unet, reference = subject.copies()
    fuse(unet)

    with pytest.raises(ValueError, match="The UNet is fused"):
        layer_sqnr(unet, reference, subject.calibration_set)


def test_layers_of_models_with_cuda_graphs_are_measured(subject):
    """The hooks of the measurement make the calls run eagerly."""
    expected = layer_sqnr(*subject.copies(), subject.calibration_set)

    assert layer_sqnr(*map(with_graphs, subject.copies()), subject.calibration_set) == expected


def test_an_empty_calibration_set_is_refused(subject):
    with pytest.raises(ValueError, match="calibration set is empty"):
        layer_sqnr(subject.quantized, subject.stock, CalibrationSet())
