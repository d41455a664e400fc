"""Descriptions of the supported classes of models: the names and structure that quantization depends on."""
