"""Diffusion transformers."""

from __future__ import annotations

from dq_runtime.architectures.architecture import Architecture, all_result_tensors

FLUX = Architecture(
    "FluxTransformer2DModel",
    blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    sample="hidden_states",
    # The noise level in [0, 1], computed as FluxPipeline does.
    timestep_argument=lambda timestep, sample: timestep.expand(sample.shape[0]).to(sample) / 1000,
    shared_arguments=("img_ids", "txt_ids"),
    result=all_result_tensors,  # of both streams
    modules_to_not_convert=("x_embedder", "context_embedder", "time_text_embed", "norm_out", ".proj_out"),
)
