"""The commands and their options. Their modules, and torch with them, are imported when a command runs."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from functools import partialmethod
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dq_runtime.cli.console import are_several_processes, duration, is_first_process, say, show, size, table
from dq_runtime.cli.errors import UserError, explanation

FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130
FOR_SEVERAL_PROCESSES = ("quantize", "generate")
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
def _commands(context: typer.Context) -> None:
    """Packed-INT4 diffusion models: quantize, inspect, run and compare them."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, which users cannot heed
    # transformers warns that torchvision is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if are_several_processes() and context.invoked_subcommand not in FOR_SEVERAL_PROCESSES:
        raise UserError(f"{context.invoked_subcommand} runs in one process: start it without torchrun or accelerate")
    if not is_first_process():  # libraries, too, speak in the first one alone
        from tqdm import tqdm

        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")


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
    """Quantizes a model to INT4. After an interruption, the same command continues.

    The processes of torchrun or accelerate launch share the work, on a GPU each.
    """
    from dq_runtime.cli.quantize import Options
    from dq_runtime.cli.quantize import quantize as run

    report = run(Options(model, output, preset, bits, steps, samples, tuple(keep or ()), lora, prompts, seed, device))
    show(
        report,
        as_json,
        f"{report['output']}: {report['layers']} layers in INT4, {report['component']} "
        f"{size(report['bytes_before'])} -> {size(report['bytes_after'])}, in {duration(report['seconds'])}",
    )


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a packed UNet, or of its pipeline.")],
    as_json: JSON = False,
) -> None:
    """Lists a packed checkpoint's layers, bits, sizes and timesteps, and what stayed in floating point and why."""
    from dq_runtime.cli.inspection import inspect_checkpoint

    report = inspect_checkpoint(checkpoint)
    rows = [
        (
            name,
            "x".join(map(str, layer["shape"])),
            f"W{layer['weight_bits']}A{layer['activation_bits']}",
            size(layer["bytes"]),
        )
        for name, layer in report["layers"].items()
    ]
    timesteps = report["timesteps"]
    show(
        report,
        as_json,
        table(f"{report['model']} in {report['folder']}", ("layer", "shape", "bits", "size"), rows),
        table("Kept in floating point", ("layer", "reason"), report["floating_point"].items()),
        table("Sizes", ("part", "size"), ((part, size(count)) for part, count in report["bytes"].items())),
        f"{len(report['layers'])} layers; {len(timesteps)} timesteps from {timesteps[0]:g} to {timesteps[-1]:g}",
    )
    if report["missing"]:
        say(f"Missing in the files: {', '.join(report['missing'])}. Download or save the checkpoint again")
        raise typer.Exit(FAILED)


@app.command()
def doctor(device: DEVICE = None, as_json: JSON = False) -> None:
    """Checks every operator against its oracle on this machine; the exit code is 1 if one fails."""
    from dq_runtime.cli.doctor import examine

    report = examine(device)
    operators = report["operators"]
    facts = [item for part in ("device", "versions", "kernels") for item in report[part].items()]
    checks = [(name, "PASS" if check["passed"] else "FAIL", check["detail"]) for name, check in operators.items()]
    show(
        report,
        as_json,
        table("This machine", ("", "found"), facts),
        table("Operators against their oracles", ("operator", "", "result"), checks),
    )
    if not all(check["passed"] for check in operators.values()):
        raise typer.Exit(FAILED)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Pipeline folder, OWNER/NAME of the hub, or .safetensors.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="One or more prompts.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the PNGs.")] = Path("."),
    seed: Annotated[int, typer.Option(help="Of a prompt's first image; the next ones follow.")] = 0,
    batch: Annotated[int, typer.Option(help="Images for each prompt, drawn together.")] = 1,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 25,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the pipeline's.")] = None,
    lora: Annotated[list[Path] | None, typer.Option(help="LoRA file; may be repeated.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Class of diffusers: EulerDiscreteScheduler.")] = None,
    device: DEVICE = None,
    as_json: JSON = False,
) -> None:
    """Draws images; their PNGs hold the parameters. A packed model runs fused and, on a GPU, as CUDA graphs.

    The processes of torchrun or accelerate launch share the prompts.
    """
    from dq_runtime.cli.generate import Options
    from dq_runtime.cli.generate import generate as run

    report = run(
        Options(model, prompts or (), output, seed, batch, steps, guidance, tuple(lora or ()), scheduler, device)
    )
    lines = [f"{image['file']}  seed {image['seed']}  {image['prompt'] or ''}" for image in report["images"]]
    show(report, as_json, *lines, f"{duration(sum(report['seconds']))} of drawing")


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="Pipeline folder, UNet folder, OWNER/NAME of the hub, .safetensors.")],
    batch: Annotated[int, typer.Option(help="Images; guidance doubles the UNet's batch.")] = 1,
    rounds: Annotated[int, typer.Option(help="Calls of each form, of which the median counts.")] = 10,
    device: DEVICE = None,
    as_json: JSON = False,
) -> None:
    """Times the UNet in floating point and in INT4 on this machine, in turns."""
    from dq_runtime.cli.bench import bench as run

    report = run(model, batch, rounds, device)
    rows = [
        (form, f"{row['milliseconds']:.4g}", f"{row['least_milliseconds']:.4g}", f"{row['megabytes']:.4g}")
        for form, row in report["forms"].items()
    ]
    title = f"{model}, batch {report['batch']}, {report['device']}, {report['threads']} threads, {rounds} rounds"
    show(
        report,
        as_json,
        table(title, ("one call of the UNet", "ms, median", "ms, least", "MB"), rows),
        f"INT4 is {report['speedup']:.2f} times as fast",
    )


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A pipeline, usually the original.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one, usually packed.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="New HTML file.")] = Path("comparison.html"),
    prompts: Annotated[Path | None, typer.Option(help="File of prompts, one a line. Default: 4 built-in ones.")] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 25,
    seed: Annotated[int, typer.Option(help="Of the first image's noise; the next ones follow.")] = 1000,
    device: DEVICE = None,
    as_json: JSON = False,
) -> None:
    """Draws from the same noise with both; PSNR, SSIM, times, and a page with the images and the layers' errors."""
    from dq_runtime.cli.compare import compare as run

    report = run((first, second), prompts, output, steps, seed, device)
    pairs = zip(report["prompts"], report["psnr_db"], strict=True)
    sides = zip(report["models"], report["seconds_per_image"], report["unet_megabytes"], strict=True)
    show(
        report,
        as_json,
        table("The same noise through both", ("prompt", "PSNR, dB"), ((p or "", f"{db:.1f}") for p, db in pairs)),
        table(
            "Sizes and times", ("model", "s an image", "UNet, MB"), ((n, f"{s:.3g}", f"{m:.4g}") for n, s, m in sides)
        ),
        f"SSIM {report['ssim']:.3f}; the page is {report['page']}",
    )
