"""The description of a class of models: data and small functions.

Classes are named, not imported: a description loads nothing of diffusers.
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
    """True if a module's class, or one that it inherits from, has one of these names."""
    return any(cls.__name__ in names for cls in type(module).__mro__)


def result_tensor(output: Any) -> torch.Tensor:
    """The tensor that a block or a model returns, alone or in a tuple; of several tensors the first."""
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))


def all_result_tensors(output: Any) -> torch.Tensor:
    """All tensors that a block or a model returns as one: a single tensor as it is, several as [B, elements]."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    return tensors[0] if len(tensors) == 1 else torch.cat([tensor.flatten(1) for tensor in tensors], dim=1)


@dataclass(frozen=True)
class Architecture:
    """What quantization has to know of a class of models.

    Attributes:
        model_class: name of the class; it stands for classes that inherit from it, too.
        blocks: names of the classes that distillation trains as one piece each. The outermost one counts.
        taken_apart: True for a module of these classes that is too large for that; the blocks inside it count.
        entry_name: dotted name of the module whose calls are recorded, and whose layers are quantized; "" is the model.
        sample, timestep: names of two arguments of the entry's forward. A timestep of None: it has none, and T = 1.
        timestep_argument: from a scheduler's timestep [] and a sample to the entry's argument.
        timestep_dtype: which tensor the entry makes of a timestep that is a Python number; None: torch's choice.
        predicts: True if the entry predicts what a sampler takes its next step by.
        shared_arguments: names of arguments that hold no row for each sample, whatever their shape.
        result: what a block, or the entry, returns -> the tensor [B, ...] that training compares.
        linears_by_input: from a model to linears of several blocks that read one tensor, and what is applied to that
            tensor before; by the name under which the blocks' fused forwards know them.
        modules_to_not_convert: what ``DilateQuantConfig.modules_to_not_convert`` is by default.
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
        """The module whose calls are recorded, and whose layers are quantized."""
        return model.get_submodule(self.entry_name)

    def is_block(self, module: nn.Module) -> bool:
        """True if distillation trains the module as one piece."""
        return is_a(module, *self.blocks) and not self.taken_apart(module)

    def signature(self, model: nn.Module) -> inspect.Signature:
        """That of the forward of the entry's class, whatever replaces it in this model.

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
