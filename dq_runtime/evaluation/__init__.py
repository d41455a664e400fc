"""Evaluation of a quantized UNet: image metrics, memory footprint, layer errors and plots."""
