"""Calibration: computes the tensors of a quantized UNet from a floating-point one. Inference never imports it."""
