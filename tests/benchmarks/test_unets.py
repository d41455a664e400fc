"""The benchmarks' UNets are the published ones, by the counts of the models' authors and of PyTorch."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import unets

# Millions, as the papers of SD (860), SDXL (2.6 billion), LDM (274) and DDPM (35.7) state them, to more digits.
PARAMETERS = {"sd15": 859.5, "sdxl": 2567.5, "ldm4": 274.1, "ddpm_cifar": 35.7}
LAYERS = {"sd15": (282, 54), "sdxl": (794, 40), "ldm4": (155, 46), "ddpm_cifar": (113, 30)}  # layers, distinct shapes


@pytest.fixture(scope="module")
def build():
    """Builds a UNet without weights, once."""
    return functools.cache(functools.partial(unets.build, device="meta"))


@pytest.mark.parametrize("name", unets.CONFIGS)
def test_parameters_are_those_of_the_published_model(build, name):
    unet = build(name)
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.06)
    assert not unet.training
    assert all(p.is_meta and p.dtype == torch.float16 for p in unet.parameters())


@pytest.mark.parametrize("name", unets.CONFIGS)
def test_every_layer_is_called_once_and_belongs_to_one_shape(build, name):
    names = [layer for shape in unets.layers(name, 2) for layer in shape.names]
    called = {n for n, m in build(name).named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    assert len(names) == len(set(names)) == LAYERS[name][0]
    assert set(names) == called


@pytest.mark.parametrize("name", unets.CONFIGS)
def test_shapes_are_distinct_by_their_label_too(name):
    shapes = unets.layers(name, 2)
    assert len(shapes) == len({shape.label for shape in shapes}) == LAYERS[name][1]


@pytest.mark.parametrize("name", unets.CONFIGS)
def test_operations_agree_with_pytorchs_counter(build, name):
    unet, arguments = build(name), unets.inputs(name, 2, "meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(**arguments)
    counts = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    layers = counts["aten.convolution"] + counts["aten.addmm"] + counts.get("aten.mm", 0)
    assert sum(shape.operations * len(shape.names) for shape in unets.layers(name, 2)) == layers


def test_labels_read_as_the_field_writes_shapes():
    labels = {shape.label for shape in unets.layers("sd15", 2)}
    assert labels >= {
        "conv2d 3x3 320 -> 320, 64x64",
        "conv2d 3x3 320 -> 320, 64x64, stride 2",
        "linear 320 -> 2560, 4096 tokens",
    }


def test_random_weights_on_a_real_device_compute_something_finite():
    unet = unets.build("ddpm_cifar", "cpu", torch.float32)
    with torch.no_grad():
        sample = unet(**unets.inputs("ddpm_cifar", 1, "cpu", torch.float32)).sample
    assert sample.shape == (1, 3, 32, 32)
    assert sample.isfinite().all()
    assert sample.std() > 0
    assert torch.get_default_dtype() == torch.float32
