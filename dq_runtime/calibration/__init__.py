"""Calibration: from a floating-point UNet to the tensors of a quantized one. Inference never imports it."""
