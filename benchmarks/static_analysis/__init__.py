"""Measurements without a GPU: machine code of compiled kernels, rooflines, and Python's time for launches."""
