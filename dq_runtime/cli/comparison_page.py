"""The page of a comparison: one HTML file with all images in it, and nothing from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

SMALLEST_SIDE = 256  # pixels; smaller images are enlarged, without interpolation
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse }
td, th { padding: .2em 1em .2em 0; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
.pairs { display: flex; flex-wrap: wrap; gap: 1.5em } figure { margin: 0 } figcaption { max-width: 32em; color: #555 }
.pair { position: relative; display: inline-block; line-height: 0 }
.pair img { display: block; image-rendering: pixelated; max-width: 100%; height: auto }
.pair img + img { position: absolute; inset: 0; width: 100%; height: 100%; clip-path: inset(0 0 0 var(--cut, 50%)) }
.pair::after { content: ""; position: absolute; top: 0; bottom: 0; left: var(--cut, 50%); width: 1px; background: #fff }
input[type=range] { width: 100% } .plot { max-width: 100% }
"""
SLIDE = "this.previousElementSibling.style.setProperty('--cut', this.value + '%')"


def comparison_page(report: Mapping[str, Any], images: Sequence[np.ndarray], plots: Sequence[bytes]) -> str:
    """The HTML text.

    Args:
        report: of ``compare``.
        images: of both models, [B, C, H, W] in [-1, 1], C 1 or 3.
        plots: PNGs.
    """
    first, second = (escape(name) for name in report["models"])
    pairs = "".join(
        f'<figure><div class="pair">{_image(a)}{_image(b)}</div>'
        f'<input type="range" min="0" max="100" value="50" aria-label="left of it: first model" oninput="{SLIDE}">'
        f"<figcaption>{escape(prompt or 'without a prompt')}<br>PSNR {decibels:.1f} dB</figcaption></figure>"
        for a, b, prompt, decibels in zip(*images, report["prompts"], report["psnr_db"], strict=True)
    )
    rows = "".join(
        f"<tr><td>{name}</td><td>{seconds:.3g}</td><td>{megabytes:.4g}</td></tr>"
        for name, seconds, megabytes in zip(
            (first, second), report["seconds_per_image"], report["unet_megabytes"], strict=True
        )
    )
    mean = float(np.mean(report["psnr_db"]))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{first} and {second}</title>'
        f"<style>{STYLE}</style><h1>{first} and {second}</h1>"
        f"<p>The same noise through both: mean PSNR {mean:.1f} dB, SSIM {report['ssim']:.3f}; {report['steps']} steps, "
        f"seed {report['seed']}, {escape(report['device'])}. Left of the slider is the first model, right of it the "
        "second.</p>"
        f"<table><tr><th>model</th><th>seconds an image</th><th>UNet, MB</th></tr>{rows}</table>"
        f'<h2>Images</h2><div class="pairs">{pairs}</div>{"<h2>Layers</h2>" if plots else ""}'
        + "".join(f'<p><img class="plot" alt="plot of the layers" src="{_source(plot)}"></p>' for plot in plots)
        + "</html>\n"
    )


def _image(pixels: np.ndarray) -> str:
    from PIL import Image

    values = (127.5 * (pixels.clip(-1, 1) + 1)).round().astype(np.uint8).transpose(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values).save(stream, "PNG")
    height, width = values.shape[:2]
    zoom = max(1, -(-SMALLEST_SIDE // min(height, width)))
    return f'<img width="{zoom * width}" height="{zoom * height}" alt="" src="{_source(stream.getvalue())}">'


def _source(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
