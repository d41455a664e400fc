"""Measurements of speed, machine code and image quality. Each script runs as ``python -m benchmarks.<room>.<script>``.

The rooms, whose imports point down without cycles; all of them use the modules of this folder, which import no room:

- ``tuning``: the search for launch configurations;
- ``speed``: operators, whole UNets and the GPU suite;
- ``static_analysis``: compiled kernels, rooflines and launch overhead, without a GPU;
- ``quality``: the image quality of quantization methods, and studies of single questions;
- ``peers``: other libraries, for comparison.

What a script shares with other modules lives in a module without a command line. ``results/`` holds what they wrote.
"""
