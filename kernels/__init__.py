"""dq_kernels: INT4 x INT8 operators for diffusion UNets, on torch and triton alone.

``ops`` is the one door: every operator there dispatches through ``torch.library`` to Triton on GPUs (``quantize`` and
``norm`` make int8 activations; ``linear`` and ``conv2d`` launch the one ``gemm``) and to ``cpu`` on CPUs. ``reference``
states what each operator computes, in plain torch; tests hold every implementation against it.
"""
