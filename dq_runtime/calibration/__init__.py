"""Calibration: everything between a floating-point UNet and the tensors of a quantized one. Inference never imports it."""
