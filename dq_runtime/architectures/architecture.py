"""The description of a class of models: data and small functions.

Classes are given by name, so that a description does not import diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dq_runtime.config import NOT_CONVERTED

Activation = Callable[[torch.Tensor], torch.Tensor]


def is_a(module: nn.Module, *names: str) -> bool:
    """True if a module's class or one of its base classes has one of these names."""
    return any(cls.__name__ in names for cls in type(module).__mro__)


def result_tensor(output: Any) -> torch.Tensor:
    """The first tensor in the output of a block or a model."""
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))


def all_result_tensors(output: Any) -> torch.Tensor:
    """All tensors in the output of a block or a model as one: several are concatenated to [B, elements]."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    return tensors[0] if len(tensors) == 1 else torch.cat([tensor.flatten(1) for tensor in tensors], dim=1)


@dataclass(frozen=True)
class Architecture:
    """The names and structure of a class of models that quantization depends on.

    Attributes:
        model_class: name of the class; its subclasses are included.
        blocks: names of the classes that distillation trains as one block each; the outermost one if they are nested.
        taken_apart: True for a module of these classes that is too large for this; the blocks inside it are trained.
        entry_name: dotted name of the module whose calls are recorded and whose layers are quantized; "" is the model.
        sample, timestep: names of two arguments of the entry's forward. None if there is no timestep; then T = 1.
        timestep_argument: a scheduler's timestep [] and a sample -> the timestep argument of the entry.
        timestep_dtype: dtype to which the entry converts a timestep that is a Python number; None: torch's default.
        predicts: True if a sampler steps with the entry's output (noise, velocity or flow).
        shared_arguments: names of arguments that have no batch dimension, whatever their shape.
        result: output of a block or of the entry -> the tensor [B, ...] that training compares.
        linears_by_input: model -> linears of several blocks that read one tensor, and the activation applied to it
            first; by the name that the blocks' fused forwards use.
        modules_to_not_convert: default of ``DilateQuantConfig.modules_to_not_convert``.
    """

    model_class: str
    blocks: tuple[str, ...]
    taken_apart: Callable[[Any], bool] = lambda module: False
    entry_name: str = ""
    sample: str = "sample"
    timestep: str | None = "timestep"
    timestep_argument: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda timestep, sample: timestep
    timestep_dtype: torch.dtype | None = None
    predicts: bool = True
    shared_arguments: tuple[str, ...] = ()
    result: Callable[[Any], torch.Tensor] = result_tensor
    linears_by_input: Callable[[nn.Module], dict[str, tuple[Sequence[nn.Module], Activation | None]]] = lambda model: {}
    modules_to_not_convert: tuple[str, ...] = NOT_CONVERTED

    def entry(self, model: nn.Module) -> nn.Module:
        """The module whose calls are recorded and whose layers are quantized."""
        return model.get_submodule(self.entry_name)

    def looks_up_timestep(self, model: nn.Module) -> bool:
        """True if the timestep is an index, so an integer, into learned embeddings."""
        return isinstance(getattr(self.entry(model), "time_proj", None), nn.Embedding)

    def is_block(self, module: nn.Module) -> bool:
        """True if distillation trains the module as one block."""
        return is_a(module, *self.blocks) and not self.taken_apart(module)

    def signature(self, model: nn.Module) -> inspect.Signature:
        """The signature of the forward of the entry's class, even if the instance's forward is replaced.

        Raises:
            TypeError: if it lacks the sample or the timestep.
        """
        entry = type(self.entry(model))
        _, *parameters = inspect.signature(entry.forward).parameters.values()
        signature = inspect.Signature(parameters)
        missing = [name for name in (self.sample, self.timestep) if name and name not in signature.parameters]
        if missing:
            raise TypeError(
                f"{entry.__name__}.forward has no argument {missing[0]!r}, found {', '.join(signature.parameters)}. "
                f"Each sample's scales depend on it: give the forward the arguments of {self.model_class}"
            )
        return signature
