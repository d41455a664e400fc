"""Measurements of speed, machine code and image quality.

Each script runs as ``python -m benchmarks.<package>.<script>``.
Imports between the packages have no cycles. All packages use the modules of this folder, which import no package:

- ``tuning``: the search for launch configurations;
- ``speed``: operators, whole UNets and the GPU suite;
- ``static_analysis``: compiled kernels, rooflines and launch overhead, without a GPU;
- ``quality``: the image quality of quantization methods, and studies of single questions;
- ``peers``: other libraries, for comparison.

Shared code lives in modules without a command line; no module imports a script. ``results/`` holds the output files.
"""
