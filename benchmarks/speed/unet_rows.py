"""The rows of the benchmark of whole UNets: each a way to run one UNet, in fp16 or in INT4.

fp16 runs as well as PyTorch can make it: channels last, compiled, and captured in a CUDA graph by the runner that INT4
has. The rows "without" leave out one optimisation of INT4. The rows "LoRA" have an adapter on every attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from benchmarks import quantized_unets, unets
from dq_kernels.triton import attention, gemm, norm, quantization
from dq_kernels.triton.launch import launch_options
from dq_kernels.triton.tuning import LaunchConfig, Problem, launch_config
from dq_runtime.forward_state import ForwardState
from dq_runtime.fused import fuse

LORA_RANK = 16
Switch = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Row:
    """One way to run a UNet.

    Attributes:
        make: builds the UNet.
        dtype: of its inputs.
        is_compiled: it is measured after all rows that are not, since compilation takes minutes.
        replays: a CUDA graph replays it.
        in_turn: it is measured again at the end, in turn with the other such rows; their ratios are the speed-ups.
        without: a context for its first calls, in which its kernels are chosen and captured.
    """

    name: str
    make: Callable[[], Any]
    dtype: torch.dtype = torch.float16
    is_compiled: bool = False
    replays: bool = False
    in_turn: bool = False
    without: Switch = contextlib.nullcontext


def rows(name: str, device: str) -> list[Row]:
    """The rows of a UNet, those of the greatest worth first."""

    def stock(dtype: torch.dtype = torch.float16) -> Any:
        return unets.build(name, device, dtype).to(memory_format=torch.channels_last)

    def quantized(dtype: torch.dtype = torch.float16, int8_attention: Sequence[str] = (), fused: bool = True) -> Any:
        unet = quantized_unets.build(name, device, dtype, int8_attention)
        if fused:
            fuse(unet)
        return unet

    if device == "cpu":
        return [
            Row("fp32", lambda: unets.build(name, device, torch.float32), torch.float32, in_turn=True),
            Row("bf16 channels_last", lambda: stock(torch.bfloat16), torch.bfloat16, in_turn=True),
            Row("int4", lambda: quantized(torch.float32), torch.float32, in_turn=True),
            Row(
                "bf16 compiled", lambda: _compiled(stock(torch.bfloat16), "default"), torch.bfloat16, is_compiled=True,
                in_turn=True,
            ),
        ]  # fmt: skip
    graph = {"replays": True, "in_turn": True}
    return [
        Row("int4 graph", quantized, **graph),
        Row("fp16 graph", stock, **graph),
        Row("fp16 eager", lambda: unets.build(name, device), in_turn=True),
        Row("fp16 channels_last", stock, in_turn=True),
        Row("int4 graph, LoRA", lambda: _with_lora(quantized()), **graph),
        Row("fp16 graph, LoRA", lambda: _with_lora(stock()), **graph),
        Row("int4 graph, int8 attention", lambda: quantized(int8_attention=["attentions"]), **graph),
        *(
            Row(f"int4 graph, without {what}", quantized, replays=True, without=without)
            for what, without in OPTIMISATIONS.items()
        ),
        Row("int4 graph, without fused blocks", lambda: quantized(fused=False), replays=True),
        Row("int4 eager", quantized),
        Row("fp16 compiled blocks, graph", lambda: _with_compiled_blocks(stock()), is_compiled=True, **graph),
        Row("fp16 compiled, graph", lambda: _compiled(stock(), "default"), is_compiled=True, **graph),
        Row(
            "fp16 max-autotune, graph", lambda: _compiled(stock(), "max-autotune-no-cudagraphs"), is_compiled=True,
            **graph,
        ),
        Row("int4 compiled, graph", lambda: _compiled(quantized(), "default"), is_compiled=True, **graph),
    ]  # fmt: skip


def _with_lora(unet: Any) -> Any:
    """The UNet with an adapter on the four linears of every attention; its weights are random."""
    from peft import LoraConfig  # the other rows do not need it

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets, init_lora_weights=False))
    return unet.eval()


def _with_compiled_blocks(unet: Any) -> Any:
    """The UNet with its resnets and transformer blocks compiled: far fewer minutes than the whole UNet."""
    torch._dynamo.config.recompile_limit = 64  # a block's code is compiled once for every shape
    for module in unet.modules():
        if isinstance(module, (ResnetBlock2D, BasicTransformerBlock)):
            module.compile(fullgraph=True)
    return unet


def _compiled(unet: nn.Module, mode: str) -> nn.Module:
    unet.compile(mode=mode, fullgraph=True)
    return unet


@contextlib.contextmanager
def _replaced(owners: Sequence[Any], name: str, value: Any) -> Iterator[None]:
    """Replaces an attribute of those owners that have it."""
    with contextlib.ExitStack() as stack:
        for owner in owners:
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _options_without_pdl(ptx: bool = True) -> dict[str, Any]:
    return {name: value for name, value in launch_options(ptx).items() if name != "launch_pdl"} | {"PDL": False}


def _config_without_split(problem: Problem) -> LaunchConfig:
    return replace(launch_config(problem), split_k=1)


def _forget_statistics(state: ForwardState, image: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
    return image


# What a row leaves out -> the context that leaves it out.
OPTIMISATIONS: dict[str, Switch] = {
    "one product a step": lambda: _replaced([gemm], "joins_halves", lambda target: False),
    "programmatic launches": lambda: _replaced(
        [attention, gemm, norm, quantization], "launch_options", _options_without_pdl
    ),
    "split-K": lambda: _replaced([gemm], "launch_config", _config_without_split),
    "statistics from convolutions": lambda: _replaced([ForwardState], "remember", _forget_statistics),
}
