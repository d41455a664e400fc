"""A device that no machine has, for tests that no tensor stays behind on the CPU.

Its tensors are computed on the CPU, but an operator that is given one of them and one of the CPU's raises, as a GPU's
would. Registering it is for the whole process and for good: use it in one of its own.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from dq_runtime.calibration.deferred import Deferred


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):  # autocast asks, even where it is off
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("elsewhere", _Backend())
DEVICE = torch.device("elsewhere", 0)
CPU = torch.device("cpu")
_BETWEEN_DEVICES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class _Tensor(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_cpu):
        return torch.Tensor._make_wrapper_subclass(
            cls, on_cpu.shape, strides=on_cpu.stride(), storage_offset=on_cpu.storage_offset(), dtype=on_cpu.dtype,
            device=DEVICE,
        )  # fmt: skip

    def __init__(self, on_cpu):
        self.on_cpu = on_cpu

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return NotImplemented if Deferred in types else _run(operator, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Inside its ``with`` block there is the device ``DEVICE``."""

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=DEVICE) makes it here, then moves it
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})


def _run(operator, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if any(isinstance(tensor, Deferred) for tensor in tensors):  # they know their device
        return operator(*args, **kwargs)
    ours = [tensor for tensor in tensors if isinstance(tensor, _Tensor)]
    if ours and operator not in _BETWEEN_DEVICES and any(t.ndim and not isinstance(t, _Tensor) for t in tensors):
        raise RuntimeError(f"{operator}: tensors on two devices: {[(str(t.device), list(t.shape)) for t in tensors]}")
    if operator is torch.ops.aten.copy_.default:
        device = tensors[0].device
    else:
        device = kwargs.get("device") or (DEVICE if ours else CPU)
    if "device" in kwargs and torch.device(kwargs["device"]).type == DEVICE.type:
        kwargs = {**kwargs, "device": CPU}
    args, kwargs = tree_map_only(_Tensor, lambda tensor: tensor.on_cpu, (args, kwargs))
    result = operator(*args, **kwargs)
    if torch.device(device).type != DEVICE.type:
        return result
    changed = {id(tensor.on_cpu): tensor for tensor in ours}  # in place
    return tree_map_only(torch.Tensor, lambda t: changed[id(t)] if id(t) in changed else _Tensor(t), result)
