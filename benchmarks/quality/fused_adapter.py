"""A LoRA on packed weights: beside them, or fused into them by rounding again.

    python -m benchmarks.quality.fused_adapter [--task TASK] [--strength 0.2] [--seeds 3] [--output FILE]

A random LoRA of rank 8 on all attentions and the resnets' first convolutions changes each weight by ``strength`` of its
norm. The reference is the floating-point UNet with this adapter. Compared with it are, at W4A8
without dilation or training,

- beside: packed weights, rounded with error feedback, and the adapter beside them, as PEFT runs it;
- fused to nearest: the packed weights plus the adapter's product, rounded to nearest again;
- fused with feedback: the same sum, rounded with error feedback on the original calibration set;
- merged before: the adapter is merged into the floating-point weights, which are then quantized (with feedback).

The figures are PSNR to the reference, from the same noise.
"""

from __future__ import annotations

from copy import deepcopy
from statistics import mean
from typing import Any

import torch
from peft import LoraConfig

import dq_runtime
from benchmarks.quality.study import FIRST_IMAGE_SEED, slug, task_parser, write_report
from dq_kernels.ops import pack_int4
from dq_runtime.evaluation.metrics import psnr
from dq_runtime.layers import quantized_layers
from dq_runtime.weights import quantize_weight
from examples.small_unets.tasks import TASKS

IMAGES, SAMPLES, STEPS = 100, 50, 20
CONFIG = dq_runtime.DilateQuantConfig(dilation="none")
LORA = LoraConfig(
    r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1"], init_lora_weights=False
)

Products = dict[str, torch.Tensor]  # layer -> the product of its adapter, in the weight's shape


def with_adapter(unet: Any, products: Products, seed: int) -> Any:
    """A copy of a UNet with the random adapter, scaled as in ``products``."""
    unet = deepcopy(unet)
    torch.manual_seed(seed)
    unet.add_adapter(LORA)
    for name, product in products.items():
        layer = unet.get_submodule(name)
        drawn = layer.get_delta_weight("default").norm()
        layer.scaling["default"] *= float(product.norm() / drawn)
    return unet.eval()


def products_of(unet: Any, strength: float, seed: int) -> Products:
    """The products of a random adapter, each ``strength`` times as large as its layer's weight."""
    unet = deepcopy(unet)
    torch.manual_seed(seed)
    unet.add_adapter(LORA)
    products = {}
    for name, module in unet.named_modules():
        if hasattr(module, "get_delta_weight"):
            product = module.get_delta_weight("default").detach()
            products[name] = product * (strength * module.base_layer.weight.norm() / product.norm())
    return products


def merged(unet: Any, products: Products) -> Any:
    """A copy of a floating-point UNet with the products added to its weights."""
    unet = deepcopy(unet)
    with torch.no_grad():
        for name, product in products.items():
            unet.get_submodule(name).weight += product
    return unet


def fused_to_nearest(quantized: Any, products: Products) -> Any:
    """A copy of a quantized UNet whose weights are those with the products added, rounded again."""
    quantized = deepcopy(quantized)
    layers = quantized_layers(quantized)
    for name, product in products.items():
        layer = layers[name]
        weight = (layer.dequantized_weight() + product.movedim(1, -1)) * layer.weight_dilation
        values, weight_scale = quantize_weight(weight)
        layer.packed_weight.copy_(pack_int4(values))
        layer.weight_scale.copy_(weight_scale)
        layer.weight_sum.copy_(values.flatten(1).sum(1, dtype=torch.int32))
    return quantized


def main() -> None:
    parser = task_parser(__doc__)
    parser.add_argument("--strength", type=float, default=0.2, help="norm of the product by that of the weight")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    unet = task.unet()
    feedback = dq_runtime.Distillation(iterations=0)
    psnr_db: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        condition = task.condition(task.labels(SAMPLES))
        calibration_set = dq_runtime.collect_from_scheduler(
            unet, task.noise_scheduler(), task.noise(SAMPLES, seed), STEPS, condition
        )

        def quantized(model: Any, calls: Any = calibration_set) -> Any:
            return dq_runtime.calibrate(model, calls, CONFIG, feedback)

        products = products_of(unet, arguments.strength, seed)
        packed = quantized(deepcopy(unet))
        models = {
            "reference": merged(unet, products),
            "without the adapter": unet,
            "beside": with_adapter(packed, products, seed),
            "fused to nearest": fused_to_nearest(packed, products),
            "fused with feedback": quantized(merged(deepcopy(packed).dequantize(), products)),
            "merged before": quantized(merged(unet, products)),
        }
        labels = task.labels(IMAGES)
        images = {name: task.sample(model, labels, FIRST_IMAGE_SEED + seed) for name, model in models.items()}
        for name, drawn in images.items():
            if name != "reference":
                psnr_db.setdefault(name, []).append(float(psnr(drawn, images["reference"]).mean()))
                print(f"seed {seed}  {name:22s} {psnr_db[name][-1]:.2f} dB", flush=True)
    rows = [{"model": name, "psnr_db": values, "mean_psnr_db": mean(values)} for name, values in psnr_db.items()]
    report = {"task": arguments.task, "strength": arguments.strength, "images": IMAGES, "rows": rows}
    options = f"--task {arguments.task} --strength {arguments.strength} --seeds {arguments.seeds}"
    write_report("fused_adapter", options, slug(arguments.task), report, arguments.output)


if __name__ == "__main__":
    with torch.no_grad():
        main()
