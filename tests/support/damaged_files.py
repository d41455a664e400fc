"""Random damage of files of calibration, and random arguments: an error that is a sentence, or the same as before."""

import random

import torch
from damaged_checkpoints import LONGEST, outcome_of
from diffusers import DDIMScheduler
from torch.utils._pytree import tree_leaves

from dq_runtime import CalibrationSet, DilateQuantConfig, Distillation
from dq_runtime.calibration.collect import RecordedCall

VALUES = (
    None, True, False, 0, 1, -1, 3, 4, 8, 2**31, 2**70, 10**5000, 0.0, 0.5, -1e9, 1e300, float("nan"), float("inf"), 1j,
    "", "joint", "x" * 10**5, b"x", "a\0b", [], [0], [0.0, 1.0], [1, 0], [None], ["mid_block"], [[]], (), (1, 2), {},
    {"a": 8}, {1: 2}, {"a": None}, {3}, object(), int, torch.ones(3), torch.tensor(3), torch.tensor(float("nan")), len,
)  # fmt: skip
FIELDS = {
    DilateQuantConfig: (
        "weight_bits", "activation_bits", "layer_activation_bits", "dilation", "max_dilation", "timestep_groups",
        "modules_to_not_convert", "int8_attention", "timesteps", "quant_method",
    ),
    Distillation: (
        "samples", "batch_size", "iterations", "error_feedback", "learning_rate", "scale_learning_rate",
        "polish_iterations", "polish_learning_rate", "gradient_checkpointing", "autocast", "folder", "seed", "progress",
    ),
    RecordedCall: ("sample", "timestep", "arguments", "shared"),
    CalibrationSet: ("calls", "scheduler"),
}  # fmt: skip
VALID = {RecordedCall: {"sample": torch.ones(2, 3), "timestep": torch.ones(1), "arguments": {}}}


def calibration_file(file):
    """Writes a small calibration set; returns it."""
    generator = torch.Generator().manual_seed(0)
    arguments = {"encoder_hidden_states": torch.randn(2, 3, 4, generator=generator), "scale": 0.5, "names": ["a", None]}
    calls = [
        RecordedCall(torch.randn(2, 3, 4, 4, generator=generator), torch.tensor([t]), arguments) for t in (1.0, 2.0)
    ]
    calibration_set = CalibrationSet(calls, DDIMScheduler())
    calibration_set.save(file)
    return calibration_set


def _content(calibration_set):
    calls = [(call.sample, call.timestep, call.arguments, call.shared) for call in calibration_set.calls]
    leaves = [leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf for leaf in tree_leaves(calls)]
    return leaves, dict(calibration_set.scheduler.config)


def damaged_calibration_file(file, copy, seed, calibration_set):
    """Damages a copy of a calibration set's file and loads it; returns what was done, the outcome and the error."""
    draw = random.Random(seed)
    content = bytearray(file.read_bytes())
    place, header = draw.randrange(len(content)), 8 + int.from_bytes(content[:8], "little")
    kind = draw.choice(("flip", "flip", "header", "cut", "appended", "length", "exchanged", "garbage"))
    if kind in ("flip", "header"):
        place = draw.randrange(header) if kind == "header" else place
        content[place] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "appended":
        content += draw.randbytes(draw.choice((1, 100)))
    elif kind == "length":
        content[:8] = draw.choice((0, 1, 2**27, 2**40, 2**64 - 1)).to_bytes(8, "little")
    elif kind == "exchanged":
        other = draw.randrange(len(content) - 4)
        place = min(place, len(content) - 4)
        content[place : place + 4], content[other : other + 4] = content[other : other + 4], content[place : place + 4]
    else:
        content = bytearray(draw.choice((b"", b"{}", b"[" * 10**5, draw.randbytes(1000))))
    copy.write_bytes(content)
    done = f"{kind} at byte {place}"
    try:
        loaded = CalibrationSet.load(copy)
    except Exception as error:
        return done, *outcome_of(error)
    return done, "the same" if _content(loaded) == _content(calibration_set) else "SILENT", ""


def random_argument(seed):
    """Makes a config, settings or a call with a random value; returns what was done, the outcome, the error."""
    draw = random.Random(seed)
    kind = draw.choice(list(FIELDS))
    name, value = draw.choice(FIELDS[kind]), draw.choice(VALUES)
    if isinstance(value, list) and draw.random() < 0.3:
        value = [*value, draw.choice(VALUES)]
    done = f"{kind.__name__}({name}={type(value).__name__})"
    try:
        kind(**VALID.get(kind, {}) | {name: value})
    except (ValueError, TypeError) as error:
        said = f"{type(error).__name__}: {str(error)[:300]}"
        return done, "refused" if name in str(error) and len(str(error)) < LONGEST else "unclear", said
    except Exception as error:
        return done, "unclear", f"{type(error).__name__}: {str(error)[:300]}"
    return done, "accepted", ""
