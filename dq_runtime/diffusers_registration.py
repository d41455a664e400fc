"""Registration of the quantization method with diffusers, without importing diffusers.

diffusers has no public registration function, so entries are added to its two mappings as soon as it is imported. The
quantizer itself is imported when a checkpoint asks for it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

METHOD = "dilatequant"
MAPPINGS = "diffusers.quantizers.auto"


def register() -> None:
    """Adds the method to diffusers' mappings, now or when diffusers is imported."""
    if MAPPINGS in sys.modules:
        _add_entries(import_module(MAPPINGS))  # waits for another thread that is importing it
    else:
        sys.meta_path.insert(0, _EntriesAfterImport())


def _add_entries(mappings: ModuleType) -> None:
    mappings.AUTO_QUANTIZER_MAPPING[METHOD] = _quantizer
    import_module("dq_runtime.config")  # adds its class, at its end: it may be what imports diffusers


def _quantizer(*args: Any, **kwargs: Any) -> Any:
    """A ``DilateQuantizer``; diffusers calls the entry of its mapping."""
    from dq_runtime.diffusers_quantizer import DilateQuantizer

    return DilateQuantizer(*args, **kwargs)


class _EntriesAfterImport(MetaPathFinder):
    """Adds the entries once the module with diffusers' mappings has been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == MAPPINGS else None
        if spec is None or spec.loader is None:
            return None
        import_it = spec.loader.exec_module

        def import_and_add_entries(module: ModuleType) -> None:
            import_it(module)
            _add_entries(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)

        spec.loader.exec_module = import_and_add_entries  # type: ignore[method-assign]
        return spec
