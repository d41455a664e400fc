"""Registration with diffusers, and with transformers for its pipelines, without importing either.

They have no public registration functions. So some of their modules are changed as soon as they are imported: the
mappings of quantization methods get an entry each, and the loaders of single files refuse packed ones. The quantizer
itself is imported when a checkpoint asks for it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, NoReturn

METHOD = "dilatequant"


def register() -> None:
    """Changes those modules that are imported already, and the others when they are imported."""
    for name, change in _CHANGES.items():
        if name in sys.modules:
            change(import_module(name))  # waits for another thread that is importing it
    sys.meta_path.insert(0, _ChangesAfterImport())


class _ChangesAfterImport(MetaPathFinder):
    """Finds the modules of ``_CHANGES`` as Python does, and changes them once they are imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in _CHANGES else None
        if spec is None or spec.loader is None:
            return None
        import_it = spec.loader.exec_module

        def import_and_change(module: ModuleType) -> None:
            import_it(module)
            _CHANGES[name](module)

        spec.loader.exec_module = import_and_change  # type: ignore[method-assign]
        return spec


def _add_to_diffusers(mappings: Any) -> None:
    mappings.AUTO_QUANTIZER_MAPPING[METHOD] = _quantizer
    import_module("dq_runtime.config")  # adds its class, at its end: it may be what imports diffusers


def _quantizer(*args: Any, **kwargs: Any) -> Any:
    """A ``DilateQuantizer``; diffusers calls the entry of its mapping."""
    from dq_runtime.diffusers_quantizer import DilateQuantizer

    return DilateQuantizer(*args, **kwargs)


def _add_to_transformers(mappings: Any) -> None:
    """``PipelineQuantizationConfig(quant_backend="dilatequant")`` asks for an entry there, too."""
    mappings.AUTO_QUANTIZER_MAPPING[METHOD] = _refused
    config: Any = sys.modules.get("dq_runtime.config")
    if hasattr(config, "DilateQuantConfig"):
        mappings.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = config.DilateQuantConfig


def _refused(*args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "dq_runtime quantizes models of diffusers, and this one is of transformers: name the others alone, as in "
        "PipelineQuantizationConfig(..., components_to_quantize=['unet'])"
    )


def _refuse_packed_files(loaders: Any) -> None:
    """Converting the names of packed tensors would lose them."""
    load = loaders.load_single_file_checkpoint

    @functools.wraps(load)
    def load_single_file_checkpoint(*args: Any, **kwargs: Any) -> Any:
        from dq_runtime.diffusers_quantizer import refuse_packed

        checkpoint = load(*args, **kwargs)
        refuse_packed(checkpoint)
        return checkpoint

    loaders.load_single_file_checkpoint = load_single_file_checkpoint


_CHANGES: dict[str, Callable[[Any], None]] = {
    "diffusers.quantizers.auto": _add_to_diffusers,
    "transformers.quantizers.auto": _add_to_transformers,
    "diffusers.loaders.single_file": _refuse_packed_files,
    "diffusers.loaders.single_file_model": _refuse_packed_files,
}
