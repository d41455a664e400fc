"""Times whole images: a Stable Diffusion pipeline of 25 steps with guidance, and the VAE's decoder.

    python -m benchmarks.speed.bench_pipeline [--unet sd15]... [--row 'int4 graph']... [--steps 25] [--output FILE]

The pipeline is diffusers' own, with random weights in the real configurations. The text encoders are left out: prompt
embeddings are given. Each round draws one image with each row in turn.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from benchmarks import environment, unets
from benchmarks.command_line import new_parser
from benchmarks.result_files import write_whole
from benchmarks.speed.unet_rows import Row, rows
from dq_runtime.graphs import enable_cuda_graphs

PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
ROWS = ("fp16 channels_last", "fp16 graph", "fp16 compiled blocks, graph", "int4 graph")
VAE = {  # the autoencoder of both models
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def pipeline(name: str, unet: Any, vae_config: dict[str, Any] = VAE) -> DiffusionPipeline:
    """A pipeline with a random autoencoder and without text encoders."""
    vae = AutoencoderKL(**vae_config).to(unet.device, unet.dtype).eval()
    # The schedule of Stable Diffusion.
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    options: dict[str, Any] = {
        "vae": vae,
        "unet": unet,
        "scheduler": scheduler,
        "text_encoder": None,
        "tokenizer": None,
    }
    if name == "sdxl":
        options |= {"text_encoder_2": None, "tokenizer_2": None}
    else:
        options |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    made = PIPELINES[name](**options)
    made.set_progress_bar_config(disable=True)
    return made


def prompt(name: str, unet: Any) -> dict[str, torch.Tensor]:
    """Random embeddings of a prompt and of the negative prompt."""
    conditions = unets.inputs(name, 2, unet.device, unet.dtype)
    negative, positive = conditions["encoder_hidden_states"].chunk(2)
    embeddings = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    if name == "sdxl":
        negative, positive = conditions["added_cond_kwargs"]["text_embeds"].chunk(2)
        embeddings |= {"pooled_prompt_embeds": positive, "negative_pooled_prompt_embeds": negative}
    return embeddings


def drawing(row: Row, name: str, steps: int) -> Callable[[], Any]:
    """A function that draws one image with a row's UNet."""
    with row.without():
        unet = row.make()
        pipe: Any = pipeline(name, unet)
        if row.replays:
            enable_cuda_graphs(unet)
        embeddings = prompt(name, unet)

        def draw() -> Any:
            return pipe(**embeddings, num_inference_steps=steps, output_type="pt")

        draw()
    return draw


def measure(chosen: Sequence[Row], name: str, steps: int, rounds: int) -> dict[str, float]:
    """Median seconds per image of each row; a row that cannot be built is left out, and one line gives the reason."""
    draws = {}
    for row in chosen:
        try:
            draws[row.name] = drawing(row, name, steps)
        except Exception as error:
            if not row.is_compiled:
                raise
            print(f"{name}: {row.name} failed: {error!r}"[:1000], flush=True)
    times: dict[str, list[float]] = {row: [] for row in draws}
    for _ in range(rounds):
        for row, draw in draws.items():
            start = time.perf_counter()
            draw()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[row].append(time.perf_counter() - start)
    return {row: statistics.median(measured) for row, measured in times.items()}


def main() -> None:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--unet", action="append", choices=PIPELINES, help="may be repeated (default: both)")
    parser.add_argument("--row", action="append", default=[], help=f"may be repeated (default: {', '.join(ROWS)})")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="the JSON file; written after each UNet")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here")
    torch.backends.cudnn.benchmark = True
    document: dict[str, Any] = {**environment.describe(), "steps": arguments.steps, "seconds_per_image": {}}
    for name in arguments.unet or PIPELINES:
        chosen = [row for row in rows(name, "cuda") if row.name in (arguments.row or ROWS)]
        measured = measure(chosen, name, arguments.steps, arguments.rounds)
        document["seconds_per_image"][name] = measured
        for row, time_per_image in measured.items():
            print(f"{name}: {row:<32} {time_per_image:8.3f} s per image", flush=True)
        if arguments.output is not None:
            write_whole(arguments.output, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
