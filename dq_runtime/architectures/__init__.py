"""What quantization has to know of each class of models; all else in dq_runtime asks these descriptions."""
