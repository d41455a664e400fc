"""Measurements that need no GPU: machine code of compiled kernels, rooflines, and what Python takes for launches."""
