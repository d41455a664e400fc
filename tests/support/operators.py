"""The operators that PyTorch dispatches while code runs: by name, with arguments, and as a number of kernels."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

# They allocate or annotate. Views are recognized by their schemas.
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias"}


class Operators(TorchDispatchMode):
    """Records calls of operators, without those inside of dq_kernels' operators."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.kernels = 0  # at least one on a GPU for each operator that is no view and no allocation

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = [argument.name for argument in func._schema.arguments]
        name = func.overloadpacket.__name__
        self.calls.append((name, dict(zip(names, args, strict=False)) | (kwargs or {})))
        self.kernels += not (func.is_view or name in NO_KERNEL)
        return func(*args, **kwargs or {})

    def count(self):
        return Counter(name for name, _ in self.calls)

    def arguments(self, operator):
        """By the names in its schema."""
        return [arguments for name, arguments in self.calls if name == operator]
