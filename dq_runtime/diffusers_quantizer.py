"""The diffusers quantizer: stock ``from_pretrained`` loads packed checkpoints, stock ``save_pretrained`` writes them.

Importing this module gives diffusers' models the methods that differ for quantized ones.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import ControlNetModel, UNetMotionModel
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from dq_kernels import ops
from dq_runtime import digest
from dq_runtime.config import DilateQuantConfig
from dq_runtime.convert import for_model, insert_empty_layers
from dq_runtime.layers import QuantizedLayer, is_quantized, quantized_layers
from dq_runtime.on_loading import WeightsOnLoading
from dq_runtime.saving import install
from dq_runtime.validation import finite

logger = logging.getLogger("dq_runtime")

RENAMES = hasattr(DiffusersQuantizer, "maybe_update_loaded_keys")  # since diffusers 0.39


class DilateQuantizer(DiffusersQuantizer):
    """Loads and saves models quantized by ``dq_runtime.calibrate``."""

    quantization_config: DilateQuantConfig
    is_serializable = True
    is_trainable = False
    use_keep_in_fp32_modules = True  # in every dtype

    def __init__(self, quantization_config: DilateQuantConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True) and quantization_config.timesteps is not None:
            raise ValueError(
                "These weights are in floating point, and activation scales for timesteps need calibration: load with "
                "a quantization_config without timesteps, then call dq_runtime.calibrate"
            )
        super().__init__(quantization_config, **kwargs)
        self._checksums: dict[str, int] = {}  # of the tensors that were loaded, as they are stored
        self._on_loading: WeightsOnLoading | None = None  # for a checkpoint in floating point
        self._empty_layers: dict[str, QuantizedLayer] = {}
        self.model_config: Mapping[str, Any] = {}  # of the model that is being saved
        self._may_offload = False  # True if the device map may leave tensors on the disk, unread
        self.modules_to_not_convert = quantization_config.modules_to_not_convert

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError for a compute dtype that the kernels do not support."""
        device_map = kwargs.get("device_map")
        self._may_offload = isinstance(device_map, str) or (
            isinstance(device_map, dict) and "disk" in device_map.values()
        )
        dtype = kwargs.get("torch_dtype")
        if dtype is not None and dtype not in ops.COMPUTE_DTYPES:
            raise ValueError(f"torch_dtype must be float16, bfloat16 or float32 for a DilateQuant UNet, got {dtype}")

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Empty: ``device_map="auto"`` reads the sizes from the tensors themselves, including packed ones."""
        return {}

    @property
    def supports_parallel_loading(self) -> bool:
        """False for a floating-point checkpoint: q, k and v wait for one another, whichever shard holds them."""
        return self.pre_quantized

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        tensors = kwargs.get("state_dict")
        if tensors is not None:  # from_single_file does not tell what the file holds
            refuse_packed(tensors)
            self.pre_quantized = False
        if self.pre_quantized:
            insert_empty_layers(model, self.quantization_config)
            digest.expect(model)
            self._empty_layers = quantized_layers(model)
        else:
            self.quantization_config = for_model(self.quantization_config, model)
            self._on_loading = WeightsOnLoading(model, self.quantization_config)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """The tensors' present names: older versions saved packed weights as ``weight``."""
        return present_names(loaded_keys)

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The tensors of a file under their present names. All are checksummed, also those that go to disk unread."""
        if not self._empty_layers:
            return state_dict  # it is in floating point, without a digest
        tensors = dict(zip(present_names(state_dict), state_dict.values(), strict=True))
        for name, tensor in tensors.items():
            self._add_checksum(name, tensor)
            self._fill_table(name, tensor)
        return tensors

    def _fill_table(self, name: str, tensor: torch.Tensor) -> None:
        """Sets a table of a quantized layer. If the device map says disk, accelerate would leave it empty."""
        layer_name, _, table = name.rpartition(".")
        layer = self._empty_layers.get(layer_name)
        empty = None if layer is None else layer._buffers.get(table)
        if layer is None or empty is None:
            return
        if table == digest.NAME or (empty.shape, empty.dtype) == (tensor.shape, tensor.dtype):
            layer._buffers[table] = tensor.clone()

    def _add_checksum(self, name: str, tensor: torch.Tensor) -> None:
        if not name.endswith(f".{digest.NAME}") and name not in self._checksums:
            self._checksums[name] = digest.checksum(name, tensor)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Raises ValueError for missing tensors; diffusers would only warn, and leave the layer empty."""
        others = [key for key in missing_keys if not key.endswith(f".{digest.NAME}")]
        if others and not RENAMES and all(key.endswith(".packed_weight") for key in others):
            raise ValueError(
                "The checkpoint holds no packed_weight. If an older version of dq_runtime wrote it, diffusers 0.39 or "
                "newer loads it: update diffusers, load it and save it again"
            )
        self._refuse("missing", others)
        if len(others) < len(missing_keys):
            digest.expect_none(model)
        return others

    def _refuse(self, what: str, keys: list[str]) -> None:
        if keys:
            listed = ", ".join(sorted(keys)[:10]) + (f" and {len(keys) - 10} more" if len(keys) > 10 else "")
            raise ValueError(
                f"The checkpoint does not fit this UNet and its quantization_config; {what} tensors: {listed}. The "
                "file is incomplete or was made for another config: download or save it again"
            )

    def check_if_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """True if a tensor is a packed weight or a table, which must not be cast, and for all of a stock checkpoint.

        Tensors are checksummed here, too: older versions of diffusers do not call ``maybe_update_state_dict``.
        """
        module_name, _, tensor_name = param_name.rpartition(".")
        module = model.get_submodule(module_name)
        if self._on_loading is not None:
            return True
        if param_name in state_dict:
            self._add_checksum(param_name, state_dict[param_name])
        return isinstance(module, QuantizedLayer) and tensor_name != "bias"

    def check_quantized_param_shape(
        self, param_name: str, current_param: torch.Tensor, loaded_param: torch.Tensor
    ) -> bool:
        """Raises ValueError if a tensor's shape is not that of its layer."""
        expected, found = tuple(current_param.shape), tuple(loaded_param.shape)
        if expected != found and not param_name.endswith(f".{digest.NAME}"):  # of which other errors follow
            raise ValueError(
                f"{param_name}: expected shape {expected}, the checkpoint holds {found}. It was made for another model "
                "or config: save it again"
            )
        return True

    def create_quantized_param(  # type: ignore[override]
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Sets a layer's tensor with the checkpoint's dtype; ``param_value`` may already have been cast.

        Raises ValueError for unexpected tensors in the checkpoint, which diffusers would ignore.
        """
        module_name, _, tensor_name = param_name.rpartition(".")
        module = model.get_submodule(module_name)
        if self._on_loading is not None:
            if self._on_loading.takes(module, tensor_name):
                self._on_loading.add(module, state_dict[param_name].to(target_device))
                return
            dtype = param_value.dtype
            if dtype == torch.float8_e4m3fn:  # which diffusers does not cast
                dtype = kwargs.get("dtype") or getattr(module, tensor_name).dtype
            # A tensor of a mapped file would keep all of it in memory.
            value = param_value.to(target_device, dtype, copy=True)
            if tensor_name in module._buffers:
                module._buffers[tensor_name] = value
            else:
                module._parameters[tensor_name] = nn.Parameter(value, requires_grad=False)
            return
        self._refuse("unexpected", unexpected_keys or [])
        stored, empty = state_dict[param_name], getattr(module, tensor_name)
        if stored.dtype != empty.dtype:
            raise ValueError(
                f"{param_name}: expected {empty.dtype}, the checkpoint holds {stored.dtype}. Casting a packed "
                "checkpoint destroys it: save it again"
            )
        value = stored.to(target_device).contiguous()
        if isinstance(empty, nn.Parameter):
            module._parameters[tensor_name] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[tensor_name] = value

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The tensors to save, with their digest; those of adapters are left out, and a warning says so.

        Raises:
            ValueError: if the model has an IP-Adapter, which changes its config.
        """
        if any(".processor." in name for name in state_dict):
            raise ValueError(
                "The UNet has an IP-Adapter, which a checkpoint of the UNet cannot store: call unload_ip_adapter(), "
                "save, and load it again"
            )
        tensors = without_adapters(state_dict)
        if len(tensors) < len(state_dict):
            logger.warning(
                "The adapters of the model are not part of its checkpoint: save them with save_lora_adapter()"
            )
        return digest.with_digest(tensors, self.quantization_config, self.model_config), {}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        is_packed_now = self._on_loading is not None
        if self._on_loading is not None:
            self._on_loading.finish()
            self._on_loading = None
            model.register_to_config(quantization_config=self.quantization_config)  # from_single_file does not
        if not self._may_offload:
            empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
            self._refuse("missing", [name for name in empty if not name.endswith(f".{digest.NAME}")])
        try:
            is_verified = digest.verify(model, self._checksums, self.quantization_config)
        except ValueError:
            _check_values(model)  # tells more, if the values of a tensor are impossible
            raise
        _check_values(model, weights=not (is_verified or is_packed_now))
        self._checksums, self._empty_layers = {}, {}
        model.requires_grad_(False)
        # If this flag is True, diffusers refuses half(), to(dtype) and IP-Adapters, which all work here.
        model.is_quantized = False
        return model

    def dequantize(self, model: Any) -> Any:
        """Converts the model back to a stock one, in place."""
        from dq_runtime.dequantization import dequantize  # imported here: it loads much, and is rarely needed

        return dequantize(model)


def _check_values(model: nn.Module, weights: bool = True) -> None:
    """Raises ValueError for values that no model has; ``weights`` as for ``QuantizedLayer.check_tensors``."""
    for layer in quantized_layers(model).values():
        layer.check_tensors(weights)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_meta:
            finite(name, tensor)


def present_names(names: Iterable[str]) -> list[str]:
    """The names of a checkpoint's tensors, with those of an older version replaced: ``weight`` of quantized layers."""
    names = list(names)
    packed = {name.removesuffix("_scale") for name in names if name.endswith(".weight_scale")}
    return [f"{name.removesuffix('weight')}packed_weight" if name in packed else name for name in names]


def without_adapters(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a model without its adapters, which PEFT puts around layers as ``base_layer``."""
    base = ".base_layer."
    wrapped = {name.partition(base)[0] for name in tensors if base in name}
    inside = tuple(f"{name}." for name in wrapped)
    kept = (name for name in tensors if base in name or not name.startswith(inside))
    return {name.replace(base, "."): tensors[name] for name in kept}


def refuse_packed(names: Iterable[str]) -> None:
    """Raises ValueError if a single file holds the tensors of a packed model, whose config is in another file."""
    if any(name.endswith(".weight_dilation") for name in names):
        raise ValueError(
            "The file holds packed INT4 weights, and from_single_file does not read their quantization_config: load "
            "the folder that save_pretrained wrote, with from_pretrained"
        )


def attach_quantizer(unet: Any, config: DilateQuantConfig) -> None:
    """Enables ``save_pretrained`` and ``unet.dequantize()`` for a UNet that was quantized in memory."""
    unet.hf_quantizer = DilateQuantizer(config, pre_quantized=True)
    unet.register_to_config(quantization_config=config)


def _with_stock_unet(method: Any) -> Any:
    """A class method that makes a model from a UNet's layers, for a quantized UNet as well: it gets a stock copy."""
    function = method.__func__

    @functools.wraps(function)
    def from_any_unet(cls: Any, unet: Any, *args: Any, **kwargs: Any) -> Any:
        if is_quantized(unet):
            unet = copy.deepcopy(unet).dequantize()
        return function(cls, unet, *args, **kwargs)

    return classmethod(from_any_unet)


for _class, _method in ((ControlNetModel, "from_unet"), (UNetMotionModel, "from_unet2d")):
    setattr(_class, _method, _with_stock_unet(getattr(_class, _method)))
install()
