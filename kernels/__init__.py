"""dq_kernels: INT4 x INT8 operators for diffusion models, on torch and triton alone.

``ops`` is the interface: every operator there dispatches through ``torch.library`` to ``triton`` on GPUs and to ``cpu``
on CPUs. ``reference`` defines what each operator computes, in plain torch; tests hold every implementation to it.
"""
