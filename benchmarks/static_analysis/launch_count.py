"""Counts the kernels of one forward pass of a fused UNet on a GPU, without a GPU.

    python -m benchmarks.static_analysis.launch_count [--unet sd15]... [--int8-attention attn1] [--batch 2]

The forward pass runs on the meta device, where operators compute shapes alone, and starts every Triton kernel that it
would start on a GPU. An operator of PyTorch counts as one kernel, a view or an allocation as none. The kernels that
cuBLAS and cuDNN add inside one operator are unknown and not counted, nor are copies of a graph's inputs and results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import quantized_unets, unets
from benchmarks.command_line import new_parser
from dq_kernels import reference, triton
from dq_kernels.registration import NAMESPACE, takes_fields
from dq_kernels.triton import attention, float_attention, gemm, norm, quantization
from dq_runtime import fuse
from dq_runtime.timesteps import TimestepGrid

NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
SEVERAL_KERNELS = {"native_group_norm": 3}  # moments, their products with the parameters, the normalization


class _Kernel:
    """Stands in for a Triton kernel, which is launched as ``kernel[grid](...)``."""

    def __init__(self, name: str, count: Counter[str]) -> None:
        self.name, self.count = name, count

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: self.count.update([self.name])


class _Dispatch(TorchDispatchMode):
    """Counts PyTorch's kernels, and calls the Triton form of our operators."""

    def __init__(self, count: Counter[str]) -> None:
        super().__init__()
        self.count = count
        self.operators = {
            name: takes_fields(getattr(triton, name), getattr(reference, name)) for name in triton.__all__
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == NAMESPACE:
            with self:
                return self.operators[name](*args)
        if not func.is_view and name not in NO_KERNEL:
            self.count[name] += SEVERAL_KERNELS.get(name, 1)
        return func(*args, **kwargs or {})


@contextmanager
def counted_kernels() -> Iterator[Counter[str]]:
    """Counts, by name, the kernels that calls with tensors on the meta device would start on a GPU."""
    count: Counter[str] = Counter()

    def attend(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        batch, heads, tokens, channels = query.shape  # the result has flash attention's layout
        count["scaled_dot_product_attention"] += 1
        return query.new_empty(batch, tokens, heads, channels).transpose(1, 2)

    def zero_already(number: int, device: torch.device) -> torch.Tensor:
        return torch.empty(number, dtype=torch.int32, device=device)

    with ExitStack() as replaced:
        for module in (attention, float_attention, gemm, norm, quantization):
            for name in vars(module):
                if name.endswith("_kernel"):
                    kernel = _Kernel(name.removesuffix("_kernel"), count)
                    replaced.enter_context(mock.patch.object(module, name, kernel))
        replaced.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attend))
        replaced.enter_context(mock.patch.object(gemm, "arrival_counters", zero_already))
        replaced.enter_context(_Dispatch(count))
        yield count


@torch.no_grad()
def forward_kernels(model: Any, arguments: dict[str, Any]) -> Counter[str]:
    """The kernels of one call of a fused model; model and arguments are on the meta device."""
    for module in model.modules():
        if isinstance(module, TimestepGrid):
            module.boundaries = module.boundaries.to("meta")
    with counted_kernels() as count:
        model(**arguments)
    return count


def kernels_of(name: str, batch: int = 2, int8_attention: tuple[str, ...] = ()) -> Counter[str]:
    """The kernels of one forward pass of a UNet of ``unets.CONFIGS``, in fp16."""
    model = quantized_unets.build(name, "meta", torch.float16, int8_attention)
    fuse(model)
    return forward_kernels(model, unets.inputs(name, batch, "meta"))


def main() -> None:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--unet", action="append", choices=unets.CONFIGS, help="may be repeated (default: sd15, sdxl)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument(
        "--int8-attention", action="append", default=[], help="names of attentions, such as attn1; may be repeated"
    )
    arguments = parser.parse_args()
    for name in arguments.unet or ("sd15", "sdxl"):
        count = kernels_of(name, arguments.batch, tuple(arguments.int8_attention))
        print(f"{name}: {count.total()} kernels")
        for kernel, number in count.most_common():
            print(f"  {number:5d}  {kernel}")


if __name__ == "__main__":
    main()
