"""diffusers' tests for quantization methods (``QuantizationTesterMixin``), applied to ours, with and without fusion.

``run.py`` runs this file inside a checkout; there is no stock run beside it.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from tests.models.testing_utils import QuantizationTesterMixin  # of the checkout

import dq_runtime
from dq_runtime.layers import QuantizedLayer, is_quantized

QuantizationTesterMixin.pytestmark = []  # "requires an accelerator": ours also runs on a CPU


class FusedUNet(UNet2DConditionModel):
    """Its ``from_pretrained`` also fuses quantized UNets."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = UNet2DConditionModel.from_pretrained(*args, **kwargs)
        if is_quantized(loaded):
            dq_runtime.fuse(loaded)
        return loaded


@pytest.mark.parametrize("model_class", [UNet2DConditionModel, FusedUNet], ids=["quantized", "fused"])
class TestDilateQuant(QuantizationTesterMixin):
    """Each test calls the one of the mixin that its name names.

    ``_test_quantization_dtype_assignment`` is left out: it expects that casts are refused, and ours are supported.
    """

    sharded_serialization_config: dict[str, Any] = {}  # noqa: RUF012

    @pytest.fixture(autouse=True)
    def _use(self, model_class: Any) -> None:
        self.model_class = model_class
        self.pretrained_model_name_or_path = str(_stock_checkpoint())

    def get_dummy_inputs(self) -> dict[str, Any]:
        return _inputs()

    def _create_quantized_model(self, config_kwargs: dict[str, Any], **extra_kwargs: Any) -> Any:
        folder = _quantized_checkpoint(tuple(config_kwargs.get("modules_to_not_convert", ("conv_in", "conv_out"))))
        return self.model_class.from_pretrained(folder, torch_dtype=torch.float32, **extra_kwargs)

    def _verify_if_layer_quantized(self, name: str, module: torch.nn.Module, config_kwargs: dict[str, Any]) -> None:
        assert isinstance(module, QuantizedLayer), name

    def test_num_parameters(self) -> None:
        self._test_quantization_num_parameters({})

    def test_memory_footprint(self) -> None:
        self._test_quantization_memory_footprint({})

    def test_inference(self) -> None:
        self._test_quantization_inference({})

    def test_lora_inference(self) -> None:
        self._test_quantization_lora_inference({})

    def test_serialization(self, tmp_path: Path) -> None:
        self._test_quantization_serialization({}, tmp_path)

    def test_config_serialization(self) -> None:
        self._test_quantization_config_serialization({})

    def test_original_dtype(self) -> None:
        self._test_original_dtype({})

    def test_quantized_layers(self) -> None:
        self._test_quantized_layers({})

    def test_keep_modules_in_fp32(self) -> None:
        self._test_keep_modules_in_fp32({})

    def test_modules_to_not_convert(self) -> None:
        self._test_quantization_modules_to_not_convert({}, ["conv_in", "conv_out", "mid_block", "time_embedding"])

    def test_device_map(self) -> None:
        self._test_quantization_device_map({})

    def test_cpu_device_map(self) -> None:
        self._test_quantization_cpu_device_map({})

    def test_dequantize(self) -> None:
        self._test_dequantize({})

    def test_training(self) -> None:
        self._test_quantization_training({})


def _inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": 500,
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=generator),
    }


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="dq-upstream-"))


@functools.cache
def _stock_checkpoint() -> Path:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    unet.save_pretrained(_folder() / "stock")
    return _folder() / "stock"


@functools.cache
def _quantized_checkpoint(modules_to_not_convert: tuple[str, ...]) -> Path:
    unet = UNet2DConditionModel.from_pretrained(_stock_checkpoint())
    with torch.no_grad(), dq_runtime.record(unet) as calibration_set:
        unet(**_inputs())
    config = dq_runtime.DilateQuantConfig(dilation="none", modules_to_not_convert=list(modules_to_not_convert))
    folder = _folder() / "-".join(("quantized", *modules_to_not_convert))
    dq_runtime.calibrate(unet, calibration_set, config, distillation=None).save_pretrained(folder)
    return folder
