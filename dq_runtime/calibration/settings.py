"""Settings of a distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dq_runtime.validation import boolean, integer, number, path, shown

LEARNING_RATES = 1e-12, 1e9  # the smallest and the largest


@dataclass(frozen=True)
class Distillation:
    """Settings for training a quantized UNet towards its floating-point original.

    Args:
        samples: drawn from the calibration set, more from timesteps that are more important to the image.
        batch_size: samples per step, of all ranks together.
        iterations: steps per block; 0 stops after error feedback.
        error_feedback: True rounds weights again, in closed form, before a block's first step.
        learning_rate: of weights, biases and zero points, in steps of their quantizers, with cosine decay.
        scale_learning_rate: of the logarithms of scales.
        polish_iterations: steps of training the whole UNet on its predicted noise, after the last block.
        polish_learning_rate: ``learning_rate`` of the polish.
        gradient_checkpointing: True recomputes activations in the backward pass instead of keeping them, in a block's
            transformers and, in the polish, everywhere.
        autocast: True trains in bfloat16 where torch's autocast does.
        folder: where finished blocks are written, so that an interrupted calibration resumes after the last one. The
            activations that blocks are trained on are stored there, too. Other files in it are left alone. By default a
            temporary folder.
        seed: of the samples drawn and their order.
        progress: is called on each rank, after each finished block with its name, the number of finished blocks, and
            the number of all blocks; and once before the first, with "" and 0.

    Raises:
        ValueError: if a value is out of range or has another type.
        TypeError: if ``folder`` is no path, or ``progress`` cannot be called.
    """

    samples: int = 512
    batch_size: int = 32
    iterations: int = 100
    error_feedback: bool = True
    learning_rate: float = 1e-2
    scale_learning_rate: float = 3e-4
    polish_iterations: int = 0
    polish_learning_rate: float = 5e-3
    gradient_checkpointing: bool = False
    autocast: bool = False
    folder: str | Path | None = None
    seed: int = 0
    progress: Callable[[str, int, int], None] | None = None

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("batch_size", 1), ("iterations", 0), ("polish_iterations", 0)):
            integer(name, getattr(self, name), least)
        for name in ("learning_rate", "scale_learning_rate", "polish_learning_rate"):
            number(name, getattr(self, name), *LEARNING_RATES)
        for name in ("error_feedback", "gradient_checkpointing", "autocast"):
            boolean(name, getattr(self, name))
        if self.folder is not None:
            path("folder", self.folder)
        integer("seed", self.seed, -(2**63), 2**63 - 1)
        if not (self.progress is None or callable(self.progress)):
            raise TypeError(f"progress must be a function, got {shown(self.progress)}")

    def described(self) -> str:
        """The training in a few words, for model cards."""
        steps = [
            *(["error feedback"] if self.error_feedback else []),
            *([f"{self.iterations} iterations for each block"] if self.iterations else []),
            *([f"{self.polish_iterations} of the whole model"] if self.polish_iterations else []),
        ]
        return ", ".join(steps) or "rounded to nearest"


ERROR_FEEDBACK = Distillation(iterations=0)
