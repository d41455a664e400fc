"""Bad input where values enter: always a ValueError or TypeError that names the parameter, and never a long one."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import nn

import dq_runtime
from dq_kernels import ops
from dq_runtime import CalibrationSet, DilateQuantConfig, Distillation
from dq_runtime.calibration.collect import RecordedCall
from dq_runtime.evaluation import footprint, layer_errors, metrics, plots
from dq_runtime.fused import unfuse
from dq_runtime.validation import shown

NAN, INF = math.nan, math.inf
LONGEST = 600  # characters of a message
NO_NUMBERS = ("8", "", None, True, False, [8], (8,), {}, {8}, b"8", 8j, object(), int, torch.tensor(8), np.ones(3))
NO_INTEGERS = (*NO_NUMBERS, 8.0, 7.5, NAN, INF, -INF, np.float32(8), 10**5000, -(10**5000))
NO_BOOLS = ("no", "", 0, 1, None, NAN, [], torch.tensor(True), np.bool_(True))
NO_PATHS = (3, 0.5, True, b"folder", ["folder"], object(), "", "a\0b")
NO_NAMES = (
    "conv_in",
    {"conv_in": 1},
    [1],
    [None],
    [b"a"],
    [""],
    3,
    NAN,
    True,
    False,
    0,
    "",
    {"a"},
    [["conv_in"]],
    object(),
)
NO_MODELS = (None, 3, "unet", [], {}, torch.ones(3), UNet2DModel, SimpleNamespace(), DDIMScheduler())
NO_TENSORS = (None, 3, "x", [[1.0]], np.ones((2, 3, 8, 8)), object())

X = torch.randn(2, 3, 8, 8)
WITH_NAN = X.clone().index_fill_(0, torch.tensor([1]), NAN)


def bad(parameter, call, *values):
    """A case for each value of a parameter: (parameter, call of the subject and the value, value)."""
    return [(parameter, call, value) for value in values]


def field(cls, name, *values):
    return bad(name, lambda _, value: cls(**{name: value}), *values)


def without(values, *left_out):
    return [value for value in values if not any(value is other for other in left_out)]


def collect(**arguments):
    defaults = {"scheduler": DDIMScheduler(), "noise": X, "num_inference_steps": 2}
    return lambda s, value: dq_runtime.collect_from_scheduler(s.stock, **defaults | dict.fromkeys(arguments, value))


CONFIG = [
    *field(DilateQuantConfig, "weight_bits", *NO_INTEGERS, 3, 8, -4),
    *field(DilateQuantConfig, "activation_bits", *NO_INTEGERS, 0, 5, 7, 16, -8),
    *field(DilateQuantConfig, "timestep_groups", *without(NO_INTEGERS, None), 0, -1),
    *field(DilateQuantConfig, "max_dilation", *NO_NUMBERS, NAN, INF, -INF, 0, 0.99, -8, 1e9, 10**5000),
    *field(DilateQuantConfig, "dilation", None, "", "paper", "JOINT", 3, NAN, True, ["joint"], b"joint", np.ones(2)),
    *field(DilateQuantConfig, "quant_method", None, "", "bitsandbytes", 3, [], object(), np.ones(2)),
    *field(DilateQuantConfig, "modules_to_not_convert", *NO_NAMES),
    *field(DilateQuantConfig, "int8_attention", *NO_NAMES),
    *field(
        DilateQuantConfig, "layer_activation_bits",
        *({"conv1": bits} for bits in (8.0, "8", 5, True, None, NAN, [8])), {3: 8}, {None: 8}, {"": 8}, [], "conv1", 3,
        [("conv1", 8)], True, {"x" * 10**6: 5},
    ),
    *field(
        DilateQuantConfig, "timesteps",
        [], (), "", "0", 3, NAN, True, {0, 1}, {0: 1}, torch.arange(3.0), np.arange(3), range(3), [NAN], [0, NAN],
        [INF], [-INF, 0], ["0"], [None], [True], [[0]], [3, 2], [1, 1], [0, 0.0], [1.0, 1.0 + 1e-9], [0, 1, 0.5],
        [1e30], [10**5000], [0j], list(range(10**7)), [0.0] * 10**7, [*range(10**4, 0, -1)], ["x" * 10**6], [object()],
    ),
]  # fmt: skip

DISTILLATION = [
    *(case for name in ("samples", "batch_size") for case in field(Distillation, name, *NO_INTEGERS, 0, -1)),
    *(case for name in ("iterations", "polish_iterations") for case in field(Distillation, name, *NO_INTEGERS, -1)),
    *(
        case
        for name in ("learning_rate", "scale_learning_rate", "polish_learning_rate")
        for case in field(Distillation, name, *NO_NUMBERS, NAN, INF, -INF, 0, 0.0, -1e-3, 10**5000)
    ),
    *(
        case
        for name in ("error_feedback", "gradient_checkpointing", "autocast")
        for case in field(Distillation, name, *NO_BOOLS)
    ),
    *field(Distillation, "seed", *NO_INTEGERS, 2**64),
    *field(Distillation, "folder", *NO_PATHS),
]

CALL = RecordedCall(X, torch.tensor([1.0]), {})
CALIBRATION_SET = [
    *bad("sample", lambda _, value: replace(CALL, sample=value), *NO_TENSORS, torch.ones(()), X[:0]),
    *bad(
        "timestep", lambda _, value: replace(CALL, timestep=value),
        *NO_TENSORS, *(torch.tensor(t) for t in ([NAN], [INF], [0.0, NAN], [1e30], 1.0, [[1.0]], [1, 2, 3], [1j])),
        torch.ones(0),
    ),
    *bad("arguments", lambda _, value: replace(CALL, arguments=value), None, 3, "x", [1]),
    *bad("shared", lambda _, value: replace(CALL, shared=value), None, 3, "x", ["x"]),
    *bad("calls", lambda _, value: CalibrationSet(value), None, 3, "x", CALL, (CALL,), [3], [CALL, None], {}),
    *bad(
        "scheduler", lambda _, value: CalibrationSet([CALL], value),
        3, "ddim", DDIMScheduler, nn.Linear(1, 1), {"_class_name": "DDIMScheduler"}, [], True,
    ),
    *bad("file", lambda _, value: CalibrationSet([CALL]).save(value), None, *NO_PATHS),
    *bad("file", lambda _, value: CalibrationSet.load(value), None, *NO_PATHS),
    *bad("model", lambda _, value: dq_runtime.record(value), *NO_MODELS),
    *bad("scheduler", lambda s, value: dq_runtime.record(s.stock, value), 3, "ddim", DDIMScheduler, []),
]  # fmt: skip

COLLECTION = [
    *bad("pipeline", lambda _, value: dq_runtime.collect_from_pipeline(value, [{}]), *NO_MODELS),
    *bad(
        "calls", lambda s, value: dq_runtime.collect_from_pipeline(s.pipeline, value),
        None, 3, "prompt", {"prompt": "x"}, [], ["prompt"], [None], [{}, 3],
    ),
    *bad(
        "component",
        lambda s, value: dq_runtime.collect_from_pipeline(s.pipeline, [{}], value), 3, [], b"unet", object()
    ),
    *bad("model", lambda _, value: dq_runtime.collect_from_scheduler(value, DDIMScheduler(), X, 2), *NO_MODELS),
    *bad("scheduler", collect(scheduler=0), None, 3, "ddim", DDIMScheduler, nn.Linear(1, 1)),
    *bad("noise", collect(noise=0), *NO_TENSORS, X[:0], X.long(), WITH_NAN, X / 0, torch.ones(3)),
    *bad("num_inference_steps", collect(num_inference_steps=0), *NO_INTEGERS, 0, -1),
    *bad("batch_size", collect(batch_size=0), *NO_INTEGERS, 0, -1),
    *bad(
        "arguments", collect(arguments=0),
        3, "x", [X], {"class_labels": 3}, {"class_labels": torch.ones(3)}, {"class_labels": torch.tensor(1)},
        {"added": WITH_NAN},
    ),
]  # fmt: skip

MODELS = [
    *bad("model", lambda s, value: dq_runtime.calibrate(value, s.calibration_set, distillation=None), *NO_MODELS),
    *bad(
        "calibration_set", lambda s, value: dq_runtime.calibrate(s.stock, value), None, 3, "calls.pt", [CALL], CALL
    ),
    *bad(
        "config", lambda s, value: dq_runtime.calibrate(s.stock, s.calibration_set, value, distillation=None),
        3, "w4a8", {"activation_bits": 8}, DilateQuantConfig, Distillation(), False,
    ),
    *bad(
        "distillation", lambda s, value: dq_runtime.calibrate(s.stock, s.calibration_set, None, value),
        3, "yes", True, {"samples": 3}, Distillation, DilateQuantConfig(),
    ),
    *(
        case
        for function in (
            dq_runtime.fuse, unfuse,
            dq_runtime.enable_cuda_graphs, dq_runtime.disable_cuda_graphs, dq_runtime.dequantize,
        )
        for case in bad("model", lambda _, value, function=function: function(value), *NO_MODELS)
    ),
    *bad(
        "max_graphs", lambda s, value: dq_runtime.enable_cuda_graphs(s.quantized, value), *NO_INTEGERS, 0, -1
    ),
    *bad(
        "timestep", lambda s, value: s.quantized(X, value),
        "10", [10], 1j, torch.tensor(True), torch.ones(2, 2), NAN,
    ),
]  # fmt: skip

EVALUATION = [
    *bad("unet", lambda _, value: footprint.footprint(value), *NO_MODELS),
    *bad(
        "unet", lambda s, value: layer_errors.layer_sqnr(value, s.stock, s.calibration_set), *NO_MODELS
    ),
    *bad(
        "reference", lambda s, value: layer_errors.layer_sqnr(s.quantized, value, s.calibration_set), *NO_MODELS
    ),
    *bad(
        "calibration_set",
        lambda s, value: layer_errors.layer_sqnr(s.quantized, s.stock, value), None, 3, "calls", [CALL]
    ),
    *(
        case
        for metric in (metrics.psnr, metrics.pooled_psnr, metrics.ssim)
        for case in (
            *bad("images", lambda _, value, metric=metric: metric(value, X), *NO_TENSORS, WITH_NAN, X[:1], X[0]),
            *bad("reference", lambda _, value, metric=metric: metric(X, value), *NO_TENSORS, WITH_NAN, X.long()),
        )
    ),
    *bad("images", lambda _, value: metrics.ssim(value, value), X[..., :6], X[..., :2, :2]),
    *bad(
        "features", lambda _, value: metrics.frechet_distance(value, X[0, 0]),
        *NO_TENSORS, X, WITH_NAN[1, 0], X[0, 0, :1],
    ),
    *bad(
        "reference_features", lambda _, value: metrics.frechet_distance(X[0, 0], value),
        *NO_TENSORS, X, WITH_NAN[1, 0], X[0, 0, :, :3],
    ),
    *bad(
        "sqnr", lambda _, value: plots.plot_layer_sqnr(value), None, 3, [1.0], {"a": "b"}, {3: 1.0}, {"a": None}
    ),
    *bad("unet", lambda _, value: plots.plot_activation_scales(value), *NO_MODELS),
    *bad("unet", lambda _, value: plots.plot_dilation(value), *NO_MODELS),
    *bad(
        "images", lambda _, value: plots.plot_image_grid(value), None, 3, X, {"a": None}, {"a": 3}, {"a": X[0]}
    ),
    *bad("columns", lambda _, value: plots.plot_image_grid({"a": X}, value), *NO_INTEGERS, 0, -1),
    *bad(
        "folder", lambda s, value: plots.write_report(s.quantized, s.stock, s.calibration_set, value), None, *NO_PATHS
    ),
]  # fmt: skip

OPERATORS = [
    *bad("values", lambda _, value: ops.pack_int4(value), *NO_TENSORS, X, X.byte(), torch.tensor(1, dtype=torch.int8)),
    *bad("packed", lambda _, value: ops.unpack_int4(value), *NO_TENSORS, X, X.char(), torch.tensor(1).byte()),
]

CASES = [*CONFIG, *DISTILLATION, *CALIBRATION_SET, *COLLECTION, *MODELS, *EVALUATION, *OPERATORS]


@pytest.fixture(scope="module")
def subject(unet2d):
    return SimpleNamespace(
        stock=unet2d.stock,
        quantized=unet2d.copy(),
        calibration_set=unet2d.calibration_set,
        pipeline=DDIMPipeline(unet2d.stock, DDIMScheduler()),
    )


@pytest.mark.supports("Errors", "bad arguments", "refused by the parameter's name")
@pytest.mark.parametrize("group", [CONFIG, DISTILLATION, CALIBRATION_SET, COLLECTION, MODELS, EVALUATION, OPERATORS])
def test_bad_values_are_refused_by_the_parameter_s_name(subject, group):
    accepted, unclear = [], []
    for parameter, call, value in group:
        case = f"{parameter}={shown(value)}: "
        try:
            call(subject, value)
        except (ValueError, TypeError) as error:
            if parameter not in str(error) or len(str(error)) > LONGEST:
                unclear.append(case + f"{type(error).__name__}: {error}"[:300])
        except Exception as error:
            unclear.append(case + repr(error)[:300])
        else:
            accepted.append(case)
    assert not accepted
    assert not unclear, "\n" + "\n".join(unclear)


def test_there_are_enough_cases():
    assert len(CASES) >= 343


@pytest.mark.supports("Errors", "failed calibration", "leaves the model as it was")
def test_a_bad_model_is_left_as_it_was(subject):
    assert not subject.pipeline.unet._forward_pre_hooks
