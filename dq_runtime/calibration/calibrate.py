"""Quantizes a floating-point model to packed INT4, in place, with a calibration set."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dq_kernels import ops
from dq_runtime.architectures.supported import architecture_of, without_compilation
from dq_runtime.calibration import ranks
from dq_runtime.calibration.collect import CalibrationSet
from dq_runtime.calibration.dilation import joint_dilation
from dq_runtime.calibration.distillation import distil
from dq_runtime.calibration.importance import timestep_importance
from dq_runtime.calibration.settings import ERROR_FEEDBACK, Distillation
from dq_runtime.calibration.temporal import Samples, by_group, layers_by_input, sample_inputs, temporal_quantizer
from dq_runtime.calibration.whole_unet import prediction_errors, prediction_snr
from dq_runtime.config import DilateQuantConfig
from dq_runtime.convert import convert, follow_timesteps, for_model, plan_conversion
from dq_runtime.diffusers_quantizer import attach_quantizer
from dq_runtime.digest import checksum
from dq_runtime.free_memory import return_free_memory
from dq_runtime.layers import quantized_layers
from dq_runtime.rollback import unchanged_on_error
from dq_runtime.timesteps import TimestepGrid, grouped
from dq_runtime.validation import instance
from dq_runtime.weights import in_parts, layer_tensors, quantize_dilated, shared_weight_dilation

logger = logging.getLogger("dq_runtime")

CLEARLY_LESS = 0.97  # ratio of squared errors; a smaller difference may be chance


def calibrate(
    model: Any,
    calibration_set: CalibrationSet,
    config: DilateQuantConfig | None = None,
    distillation: Distillation | None = ERROR_FEEDBACK,
) -> Any:
    """Quantizes a model in place: Weight Dilation, one activation quantizer per layer and timestep, packed weights.

    If torch.distributed has a process group (``torchrun``, ``accelerate launch``), all ranks must call this function
    with equal arguments, each with the model on its own device. They share the samples and get the same model, that of
    one process within rounding. An error on one rank ends all: the others raise ``RankFailed``, a RuntimeError.

    Args:
        model: a floating-point ``UNet2DModel``, ``UNet2DConditionModel``, ``ControlNetModel``,
            ``FluxTransformer2DModel``, or ``AutoencoderKL`` (its decoder is quantized), on any device. A model that was
            quantized on loading keeps its packed weights and its config, and gets activation tables.
        calibration_set: calls recorded over its real sampling trajectories (``record``, ``collect_from_pipeline``,
            ``collect_from_scheduler``). Its timesteps become the grid of the activation tables.
        config: W4A8 by default.
        distillation: settings for training the quantized model, block by block, towards the floating-point one. By
            default weights are rounded with error feedback and not trained. None rounds to nearest, which costs quality
            and takes a few passes over the calibration set and a search in each layer.

    Returns:
        the same model, quantized.

    Raises:
        TypeError: if the model's class is not supported, its forward lacks the sample or the timestep, or an argument
            is of another class.
        ValueError: if there is no calibration data, weights or activations are not finite, ranks have different
            arguments, or the distillation's folder belongs to another calibration. After any error, and after Ctrl-C,
            the model is unchanged.
    """
    given, model = model, without_compilation(model)
    with ranks.together():
        architecture = architecture_of(model)
        instance("calibration_set", calibration_set, CalibrationSet)
        instance("config", config, DilateQuantConfig, type(None))
        instance("distillation", distillation, Distillation, type(None))
        architecture.signature(model)  # raises if the forward lacks the sample or the timestep
        if ranks.count() > 1:
            _check_ranks(model, calibration_set, config, distillation)
    with unchanged_on_error(model), ranks.together():
        if any(layer.is_dynamic for layer in quantized_layers(model).values()):
            _make_scales_static(model, calibration_set, config, distillation)
        else:
            _quantize(model, calibration_set, config, distillation)
    return given


def _check_ranks(
    model: nn.Module,
    calibration_set: CalibrationSet,
    config: DilateQuantConfig | None,
    distillation: Distillation | None,
) -> None:
    """Raises ValueError if ranks have different arguments; paths of folders and functions may differ."""
    calls = [(call.sample, call.timestep, call.arguments, call.shared) for call in calibration_set.calls]
    scheduler = dict(getattr(calibration_set.scheduler, "config", {}))
    if distillation is not None:
        folder = None if distillation.folder is None else "given"
        distillation = replace(distillation, folder=folder, progress=None)
    ranks.check_equal(
        model=[checksum(name, tensor) for name, tensor in model.state_dict().items() if not tensor.is_meta],
        calibration_set=[checksum("", leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in tree_leaves(calls)],
        scheduler=str({name: value for name, value in scheduler.items() if not name.startswith("_")}),
        config=None if config is None else config.to_dict(),
        distillation=distillation,
    )


def _quantize(
    model: Any,
    calibration_set: CalibrationSet,
    config: DilateQuantConfig | None,
    distillation: Distillation | None,
) -> None:
    """Quantizes a floating-point model."""
    config = for_model(config or DilateQuantConfig(), model)
    config = replace(config, timesteps=grouped(calibration_set.timesteps, config.timestep_groups))
    assert config.timesteps is not None
    layers = plan_conversion(model, config).layers
    _check_weights(layers)
    samples = sample_inputs(model, layers, calibration_set)
    unreached = [name for name in layers if name not in samples]
    if unreached:
        logger.warning("Kept in floating point: %s (calibration never reached them)", ", ".join(unreached))
        config.modules_to_not_convert = [*(config.modules_to_not_convert or ()), *unreached]

    sharing = layers_by_input(samples)
    configs = [config]
    if config.dilation == "joint" and distillation is None:
        # Dilation is chosen layer by layer. If no training follows, the whole model must be clearly better with it.
        configs.append(replace(config, dilation="none"))
    candidates = _quantize_layers(layers, samples, sharing, calibration_set, configs)
    tensors = candidates[0]
    if len(candidates) > 1:
        errors = prediction_errors(model, layers, candidates, sharing, calibration_set, config)
        if not errors[0] < CLEARLY_LESS * errors[1]:
            logger.info("Not dilated: the whole model's squared error is %.3g with dilation, %.3g without", *errors)
            tensors = candidates[1]
    if distillation is not None:
        tensors = distil(model, layers, tensors, sharing, calibration_set, config, distillation)
    snr = prediction_snr(model, layers, tensors, sharing, calibration_set, config)
    config = replace(config, calibration=_facts(calibration_set, distillation) | {"prediction_snr_db": round(snr, 1)})
    convert(model, config, tensors)
    attach_quantizer(model, config)


def _facts(calibration_set: CalibrationSet, distillation: Distillation | None) -> dict[str, str | int | float | None]:
    """What a model card says about a calibration."""
    return {
        "samples": calibration_set.num_samples,
        "scheduler": None if calibration_set.scheduler is None else type(calibration_set.scheduler).__name__,
        "method": "rounded to nearest" if distillation is None else distillation.described(),
    }


def _check_weights(layers: Mapping[str, nn.Module]) -> None:
    """Raises ValueError for parameters that are not finite, or not there in a dtype to quantize from."""
    for name, layer in layers.items():
        for tensor, parameter in layer.named_parameters():
            if parameter.is_meta:
                raise ValueError(
                    f"{name}.{tensor} is offloaded: calibrate before enable_sequential_cpu_offload() or a device_map, "
                    "or load the model again"
                )
            if parameter.dtype not in ops.COMPUTE_DTYPES:
                raise ValueError(
                    f"{name}.{tensor} is stored in {parameter.dtype}: load the original weights in float16, bfloat16 "
                    "or float32, calibrate, and enable layerwise casting after that"
                )
            if not all(bool(rows.isfinite().all()) for rows in in_parts(parameter)):
                raise ValueError(f"{name}.{tensor} holds NaN or infinity; load the original weights again")


def _make_scales_static(
    model: Any,
    calibration_set: CalibrationSet,
    config: DilateQuantConfig | None,
    distillation: Distillation | None,
) -> None:
    """Gives a model with scales that are computed at run time one for each timestep instead."""
    own = model.hf_quantizer.quantization_config
    if distillation not in (None, ERROR_FEEDBACK) or (
        config is not None and replace(config, timestep_groups=None) != own
    ):
        raise ValueError(
            "The model was quantized on loading, so its weights and config are fixed: call calibrate without config "
            "and distillation, or load the model in floating point"
        )
    groups = None if config is None else config.timestep_groups
    config = replace(own, timestep_groups=groups, timesteps=grouped(calibration_set.timesteps, groups))
    config.calibration = _facts(calibration_set, None)
    assert config.timesteps is not None
    layers = quantized_layers(model)
    samples = sample_inputs(model, layers, calibration_set)
    unreached = [name for name in layers if name not in samples]
    if unreached:
        raise ValueError(f"Calibration never reached {', '.join(unreached)}: record calls that do")
    grid = TimestepGrid(config.timesteps)
    rows = grid.rows_of(calibration_set.timesteps)
    sharing, tables = layers_by_input(samples), []
    for names in ranks.part(sharing):
        first = layers[names[0]]
        seen = [x.to(first.weight_dilation.device) for x in samples[names[0]]]
        tables.append(temporal_quantizer(by_group(seen, rows), first.weight_dilation, first.activation_bits))
    for names, of_group in zip(sharing, ranks.joined(tables), strict=True):
        for name in names:
            layers[name].set_tables(grid, *(table.to(layers[name].weight_dilation.device) for table in of_group))
    follow_timesteps(model, grid.to(model.device))
    attach_quantizer(model, config)


def _quantize_layers(
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    samples: Samples,
    sharing: Sequence[Sequence[str]],
    calibration_set: CalibrationSet,
    configs: Sequence[DilateQuantConfig],
) -> list[dict[str, dict[str, torch.Tensor]]]:
    """The layers' state dicts for each config. Configs differ in ``dilation`` alone. Empties ``samples``."""
    assert configs[0].timesteps is not None
    timesteps = calibration_set.timesteps
    importance = timestep_importance(calibration_set.scheduler, timesteps)
    groups = TimestepGrid(configs[0].timesteps).rows_of(timesteps)
    own = ranks.part(sharing)
    of_groups = []  # for each group a list for the configs
    with ranks.progress_bar(total=sum(map(len, own)), desc="Quantizing layers") as progress:
        for names in own:
            group = {name: layers[name] for name in names}
            of_groups.append(
                [_quantize_group(group, samples[names[0]], importance, groups, config) for config in configs]
            )
            for name in names:
                del samples[name]
            return_free_memory()
            progress.update(len(names))
    samples.clear()
    quantized: list[dict[str, dict[str, torch.Tensor]]] = [{} for _ in configs]
    for of_configs in ranks.joined(of_groups):
        for tensors, of_config in zip(quantized, of_configs, strict=True):
            for name, state in of_config.items():
                device = layers[name].weight.device
                tensors[name] = {key: tensor.to(device) for key, tensor in state.items()}
    return quantized


@torch.no_grad()
def _quantize_group(
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    samples: Sequence[torch.Tensor],
    importance: Sequence[float],
    groups: Sequence[int],
    config: DilateQuantConfig,
) -> dict[str, dict[str, torch.Tensor]]:
    """The state dicts of layers that share their input: they share one dilation and one activation quantizer."""
    bits_of = {name: config.activation_bits_of(name) for name in layers}
    if len(set(bits_of.values())) > 1:
        raise ValueError(
            "These layers share their input, which is quantized once, but layer_activation_bits gives them different "
            f"numbers of bits: {bits_of}. Give them the same"
        )
    bits = next(iter(bits_of.values()))
    weights = [layer.weight for layer in layers.values()]
    seen = [rows.to(weights[0].device) for rows in samples]
    if config.dilation == "joint":
        dilation = joint_dilation(weights, seen, bits, config.max_dilation, importance, groups)
    elif config.dilation == "weight":
        dilation = shared_weight_dilation(weights, config.max_dilation)
    else:
        dilation = torch.ones(weights[0].shape[1], dtype=torch.float32, device=weights[0].device)
    act_scale, act_zero_point = temporal_quantizer(by_group(seen, groups), dilation, bits)

    tensors = {}
    for name, layer in layers.items():
        values, weight_scale = quantize_dilated(layer.weight, dilation)
        tensors[name] = layer_tensors(layer, values, weight_scale, dilation, act_scale, act_zero_point, layer.bias)
    return tensors
