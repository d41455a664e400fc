"""CUDA graphs: a UNet's whole forward pass as one launch.

A quantized UNet is hundreds of short kernels, and Python takes longer to launch them than a GPU to run them. The
activation scales are selected on the device, so a captured forward serves every timestep.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel
from torch.utils import _pytree as pytree

WARM_UP_CALLS = 3


class CudaGraphRunner:
    """Captures a UNet's forward once for every combination of input shapes, and replays it.

    Args:
        unet: a UNet on a CUDA device, quantized or not.
    """

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.eager_forward = unet.forward
        self._captured: dict[Any, tuple[torch.cuda.CUDAGraph, list[torch.Tensor], Any]] = {}

    def __call__(self, sample: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        """As the UNet's forward; the result is a copy that later calls leave alone.

        With an adapter loaded the forward runs without a graph: the adapter and its scale may change at any call.
        """
        if getattr(self.unet, "_hf_peft_config_loaded", False):
            return self.eager_forward(sample, timestep, *args, **kwargs)
        if not isinstance(timestep, torch.Tensor):
            whole = isinstance(self.unet, UNet2DModel)  # as its forward makes of Python's numbers
            timestep = torch.tensor(timestep, dtype=torch.long if whole else None, device=sample.device)
        leaves, structure = pytree.tree_flatten(((sample, timestep.to(sample.device), *args), kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        constants = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        key = (str(structure), constants, tuple((t.shape, t.dtype, t.stride()) for t in tensors))
        if key not in self._captured:
            self._captured[key] = self._capture(leaves, structure)
        graph, inputs, result = self._captured[key]
        for static, given in zip(inputs, tensors, strict=True):
            static.copy_(given)
        graph.replay()
        return pytree.tree_map_only(torch.Tensor, torch.clone, result)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, leaves: list[Any], structure: Any) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor], Any]:
        static = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]

        def forward() -> Any:
            args, kwargs = pytree.tree_unflatten(static, structure)  # anew: a UNet empties the lists that it is given
            return self.unet(*args, **kwargs)

        # The UNet itself is called, so that its hooks are captured as well: they map the timestep, and let go of what
        # one forward pass has shared, which the next has to compute again.
        replaying = self.unet.forward  # this, or what somebody has wrapped around it
        self.unet.forward = self.eager_forward
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_CALLS):
                    forward()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = forward()
        finally:
            self.unet.forward = replaying
        return graph, [leaf for leaf in static if isinstance(leaf, torch.Tensor)], result


def enable_cuda_graphs(unet: Any) -> None:
    """Makes a UNet replay CUDA graphs, in place; the first call with new shapes captures one.

    Afterwards weights may change in place alone (``load_state_dict``). A graph repeats what was captured: before the
    UNet is moved or quantized, or its Python changes (FreeU, attention processors, an IP-Adapter's scale, hooks), call
    ``disable_cuda_graphs``; ``dequantize`` does.

    Raises:
        ValueError: if the UNet is not on a CUDA device, or replays graphs already.
    """
    if unet.device.type != "cuda":
        raise ValueError(f"CUDA graphs need the UNet on a CUDA device, it is on {unet.device}: move it first")
    if isinstance(unet.__dict__.get("forward"), CudaGraphRunner):
        raise ValueError("The UNet replays CUDA graphs already")
    unet.forward = CudaGraphRunner(unet)


def disable_cuda_graphs(unet: Any) -> None:
    """Gives a UNet its eager forward back, and frees the graphs."""
    runner = unet.__dict__.get("forward")
    if isinstance(runner, CudaGraphRunner):
        del unet.forward
        if unet.forward != runner.eager_forward:  # something else had replaced it before
            unet.forward = runner.eager_forward
