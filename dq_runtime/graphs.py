"""CUDA graphs: a model's whole forward pass as one launch.

A quantized model runs hundreds of short kernels; launching them from Python takes longer than running them on a GPU.
The activation scales are selected on the device, so one captured forward is valid for every timestep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from dq_runtime.architectures.supported import architecture_of

WARM_UP_CALLS = 3


class CudaGraphRunner:
    """Captures a model's forward once per combination of input shapes, and replays it.

    Args:
        model: on a CUDA device, quantized or not.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.architecture = architecture_of(model)
        self.entry: Any = self.architecture.entry(model)  # the module whose forward is replaced
        self.eager_forward = self.entry.forward
        self._signature = self.architecture.signature(model)
        self._captured: dict[Any, tuple[torch.cuda.CUDAGraph, list[torch.Tensor], Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the entry's forward; the result is a copy, which later calls do not overwrite.

        With an adapter loaded, the forward runs without a graph: the adapter and its scale may change between calls.
        """
        if getattr(self.model, "_hf_peft_config_loaded", False):
            return self.eager_forward(*args, **kwargs)
        arguments = self._signature.bind(*args, **kwargs).arguments
        timestep = self.architecture.timestep
        if timestep in arguments:
            device, dtype = arguments[self.architecture.sample].device, self.architecture.timestep_dtype
            if not isinstance(arguments[timestep], torch.Tensor):
                arguments[timestep] = torch.tensor(arguments[timestep], dtype=dtype, device=device)
            arguments[timestep] = arguments[timestep].to(device)
        leaves, structure = pytree.tree_flatten(arguments)
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
            arguments = pytree.tree_unflatten(static, structure)  # new lists: a UNet empties those that it is given
            return self.entry(**arguments)

        # The entry itself is called, so that its hooks are captured as well: they map the timestep, and clear the state
        # that the fused blocks share within one forward pass.
        replaying = self.entry.forward  # this runner, or a wrapper around it
        self.entry.forward = self.eager_forward
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
            self.entry.forward = replaying
        return graph, [leaf for leaf in static if isinstance(leaf, torch.Tensor)], result


def enable_cuda_graphs(model: Any) -> None:
    """Makes a model replay CUDA graphs, in place; the first call with new shapes captures a graph.

    Afterwards weights may change only in place (``load_state_dict``). A graph repeats the captured kernels: call
    ``disable_cuda_graphs`` before the model is moved or quantized, or its Python behaviour changes (FreeU, attention
    processors, an IP-Adapter's scale, hooks). ``dequantize`` does so itself.

    Raises:
        TypeError: if the model's class is not supported.
        ValueError: if the model is not on a CUDA device, or already replays graphs.
    """
    if model.device.type != "cuda":
        raise ValueError(f"CUDA graphs need the model on a CUDA device, it is on {model.device}: move it first")
    runner = CudaGraphRunner(model)
    if isinstance(runner.eager_forward, CudaGraphRunner):
        raise ValueError("The model replays CUDA graphs already")
    runner.entry.forward = runner


def disable_cuda_graphs(model: Any) -> None:
    """Restores a model's eager forward, and frees the graphs."""
    entry: Any = architecture_of(model).entry(model)
    runner = entry.__dict__.get("forward")
    if isinstance(runner, CudaGraphRunner):
        del entry.forward
        if entry.forward != runner.eager_forward:  # the class's forward had been replaced before
            entry.forward = runner.eager_forward
