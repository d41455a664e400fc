"""Measuring a quantized UNet: image metrics and memory footprint."""
