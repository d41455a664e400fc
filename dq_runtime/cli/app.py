"""The commands and their options. Their modules, and torch with them, are imported when a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dq_runtime.cli.console import duration, say, show, size
from dq_runtime.cli.errors import explanation

USAGE_ERROR, INTERRUPTED = 2, 130
JSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DEVICE = Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu. Default: a GPU if there is one.")]


class Commands(TyperGroup):
    """Errors of the user are one line on stderr, with exit code 2; Ctrl-C is 130. Other errors have a traceback."""

    def main(  # type: ignore[override]
        self, args: Any = None, prog_name: Any = None, standalone_mode: bool = True, **extra: Any
    ) -> Any:
        try:
            code = super().main(args, prog_name, standalone_mode=False, **extra)
        except Exception as error:
            if not hasattr(error, "format_message"):  # else it is about the options
                raise
            text = " ".join(error.format_message().split())
            say(f"Error: {text} (dq-runtime --help lists commands, dq-runtime COMMAND --help their options)")
            code = USAGE_ERROR
        if standalone_mode:
            sys.exit(code)
        return code

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("Interrupted. The same command starts again; quantize continues where it was.")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            text = explanation(error)
            if text is None:
                raise
            say(f"Error: {text}")
            raise typer.Exit(USAGE_ERROR) from error


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Packed-INT4 diffusion models: quantize, inspect, run and compare them.",
)


@app.callback()
def _commands() -> None:
    """Packed-INT4 diffusion models: quantize, inspect, run and compare them."""


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Pipeline folder, UNet folder, OWNER/NAME of the hub, .safetensors.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="New folder of the packed pipeline.")],
    preset: Annotated[str, typer.Option(help="fast: error feedback; balanced: distillation; best: with polish.")] = (
        "balanced"
    ),
    bits: Annotated[int, typer.Option(help="Bits of activations: 8, 6 or 4. Weights have 4.")] = 8,
    steps: Annotated[int, typer.Option(help="Sampling steps of the calibration images.")] = 25,
    samples: Annotated[int, typer.Option(help="Recorded samples that blocks are trained on.")] = 512,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts, one a line. Default: 32 built-in ones.")
    ] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Layers to keep in floating point; may be repeated.")] = None,
    lora: Annotated[Path | None, typer.Option(help="LoRA file to merge before quantization.")] = None,
    seed: Annotated[int, typer.Option(help="Of the images and of training.")] = 0,
    device: DEVICE = None,
    as_json: JSON = False,
) -> None:
    """Quantizes a model to INT4. After an interruption, the same command continues."""
    from dq_runtime.cli.quantize import Options
    from dq_runtime.cli.quantize import quantize as run

    report = run(Options(model, output, preset, bits, steps, samples, tuple(keep or ()), lora, prompts, seed, device))
    show(
        report,
        as_json,
        f"{report['output']}: {report['layers']} layers in INT4, {report['component']} "
        f"{size(report['bytes_before'])} -> {size(report['bytes_after'])}, in {duration(report['seconds'])}",
    )
