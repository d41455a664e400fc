"""Calibration on another device than the CPU, which this process emulates: no tensor may stay behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration

SUPPORT = Path(__file__).parents[1] / "support"
CALIBRATE = """
import copy, json, sys
import torch
import distilling
from dq_runtime import CalibrationSet, DilateQuantConfig, Distillation, calibrate
from elsewhere import DEVICE, Elsewhere

make, dilation, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
distillation = None if settings is None else Distillation(**{**distilling.SMALL, **settings})
unet = getattr(distilling, make)()
calibration_set = distilling.recorded(unet, rows=8)
kept = [*distilling.FEW_BLOCKS["modules_to_not_convert"], "down_blocks.0"]
config = DilateQuantConfig(activation_bits=4, dilation=dilation, modules_to_not_convert=kept)

def error_on(device):
    quantized = calibrate(copy.deepcopy(unet).to(device), calibration_set, config, distillation)
    assert all(tensor.device == torch.device(device) for tensor in quantized.state_dict().values())
    return distilling.output_error(quantized.to("cpu"), unet, calibration_set)

errors = {"cpu": error_on("cpu")}
with Elsewhere():
    errors[str(DEVICE)] = error_on(DEVICE)
print(json.dumps(errors))
"""


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot emulate a device",
)
@pytest.mark.parametrize(
    ("make", "dilation", "settings"),
    [
        ("unet2d", "joint", None),
        ("unet2d_condition", "weight", {"iterations": 1, "polish_iterations": 1, "gradient_checkpointing": True}),
    ],
    ids=str,
)
def test_everything_is_calibrated_where_the_unet_is(make, dilation, settings):
    done = subprocess.run(
        [sys.executable, "-c", CALIBRATE, make, dilation, json.dumps(settings)],
        cwd=SUPPORT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert set(errors) == {"cpu", "elsewhere:0"}
    # Operators differ in the last bits, and with them weights that lie between two values.
    assert errors["elsewhere:0"] == pytest.approx(errors["cpu"], rel=0.1)
