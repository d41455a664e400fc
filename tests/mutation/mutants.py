"""Defects that a user would suffer from, each with the tests that should notice it; ``run`` puts them in.

A mutant replaces a text that occurs once in its file. The texts are short and of the arithmetic itself, so that they
survive when code is moved: then only the name of the file changes here.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A defect.

    Attributes:
        file: the path from the repository's root; ``source`` occurs once in it.
        tests: paths of the test files that should notice the defect.
        select: a pytest -k expression: the quickest of those tests that do.
        note: why it survives, if it does.
    """

    name: str
    file: str
    source: str
    replacement: str
    tests: tuple[str, ...]
    select: str
    note: str = ""

    def applied_to(self, code: str) -> str:
        """The code of the file with the defect.

        Raises:
            ValueError: if the source text does not occur exactly once.
        """
        if code.count(self.source) != 1:
            raise ValueError(f"{self.name}: {self.source!r} occurs {code.count(self.source)} times in {self.file}")
        return code.replace(self.source, self.replacement)


GEMM = "kernels/triton/gemm.py"
QUANTIZE = "kernels/triton/quantization.py"
NORM = "kernels/triton/norm.py"
FLOAT_ATTENTION = "kernels/triton/float_attention.py"
ATTENTION = "kernels/triton/attention.py"
PACKING = "kernels/packing.py"
CPU = "kernels/cpu/onednn.py"
CPU_ATTENTION = "kernels/cpu/attention.py"
CPU_QUANTIZE = "kernels/cpu/quantization.py"
REFERENCE = "kernels/reference.py"
CHECKS = "kernels/checks.py"
TUNING = "kernels/triton/tuning.py"
OPS = "kernels/fake.py"

TEST_GEMM = ("tests/kernels/test_gemm.py",)
TEST_LINEAR = ("tests/kernels/test_linear.py",)
TEST_CONV2D = ("tests/kernels/test_conv2d.py",)
TEST_QUANTIZE = ("tests/kernels/test_quantize.py",)
TEST_NORM = ("tests/kernels/test_norm.py",)
TEST_FLOAT_ATTENTION = ("tests/kernels/test_float_attention.py",)
TEST_ATTENTION = ("tests/kernels/test_attention.py",)
TEST_PACKING = ("tests/kernels/test_packing.py",)
TEST_CPU = ("tests/kernels/test_cpu.py",)
TEST_NOT_FINITE = ("tests/kernels/test_not_finite.py",)
TEST_TUNING = ("tests/kernels/test_tuning.py",)
TEST_OPS = ("tests/kernels/test_ops.py",)
TEST_FUSED = ("tests/runtime/test_fused.py",)

KERNELS = [
    # The GEMM: its loop over taps and channels, split-K, the epilogue
    Mutant(
        "gemm_zero_point_correction", QUANTIZE,
        "accumulator - 16 * tl.load(weight_sum_ptrs)",
        "accumulator - 8 * tl.load(weight_sum_ptrs)",
        TEST_LINEAR, "test_integer_sums_are_exact and triton",
    ),
    Mutant(
        "gemm_dilated_columns", GEMM,
        "tap % KERNEL_W * DILATION_W",
        "tap % KERNEL_W * DILATION_H",
        TEST_CONV2D, "test_integer_sums_are_exact and triton and columns-unlike-rows",
    ),
    Mutant(
        "gemm_stride_of_columns", GEMM,
        "left = pixel % out_width * STRIDE_W",
        "left = pixel % out_width * STRIDE_H",
        TEST_CONV2D, "test_integer_sums_are_exact and triton and rows-unlike-columns",
    ),
    Mutant(
        "gemm_upsampled_row", GEMM,
        "source = (top + row + 1 >> 1) * width",
        "source = (top + row >> 1) * width",
        TEST_CONV2D, "test_integer_sums_of_an_upsampled_image_are_exact and triton",
    ),
    Mutant(
        "gemm_ragged_channels", GEMM,
        "inside = start + k < half_channels",
        "inside = start + k <= half_channels",
        TEST_CONV2D, "test_integer_sums_are_exact and triton and 3x3-stride2-even",
    ),
    Mutant(
        "gemm_split_share", GEMM,
        "share = tl.cdiv(TAPS * blocks, tl.num_programs(1))",
        "share = TAPS * blocks // tl.num_programs(1)",
        TEST_GEMM, "test_split_sums_are_exact_and_leave_zeroed_counters",
    ),
    Mutant(
        "gemm_split_starts_inside_a_tap", GEMM,
        "start = first % blocks * BLOCK_K if IS_SPLIT else 0",
        "start = 0",
        TEST_GEMM, "test_split_sums_are_exact_and_leave_zeroed_counters",
    ),
    Mutant(
        "gemm_split_starts_at_a_tap", GEMM,
        "tap = first // blocks if IS_SPLIT else 0",
        "tap = 0",
        TEST_GEMM, "test_splitting_the_sum_does_not_change_a_bit and int4_conv2d",
    ),
    Mutant(
        "gemm_split_finished_early", GEMM,
        'sem="acq_rel") != tl.num_programs(1) - 1:',
        'sem="acq_rel") != tl.num_programs(1) - 2:',
        TEST_GEMM, "test_split_sums_are_exact_and_leave_zeroed_counters",
    ),
    Mutant(
        "gemm_arrivals_not_reset", GEMM,
        "tl.store(arrivals_ptr + tile, 0)",
        "tl.store(arrivals_ptr + tile, 1)",
        TEST_GEMM, "test_split_sums_are_exact_and_leave_zeroed_counters",
    ),
    Mutant(
        "tuning_split_gates", TUNING,
        'problem.op == "linear_geglu" and config.split_k > 1',
        "config.split_k > 64",
        TEST_TUNING, "test_geglu_is_never_split",
    ),
    Mutant(
        "gemm_timestep_of_the_tile", GEMM,
        "first_row // rows_per_sample if TILE_IN_SAMPLE else",
        "first_row // rows_per_sample if BLOCK_M > 0 else",
        TEST_GEMM, "test_rows_of_a_tile_take_their_own_samples_timestep",
    ),
    Mutant(
        "gemm_geglu_second_half", GEMM,
        "gate = tl.dot(w_high, x_high, gate,",
        "gate = tl.dot(w_high, x_low, gate,",
        TEST_LINEAR, "test_requantized_result_is_the_references and triton",
    ),
    Mutant(
        "gemm_geglu_gate_scale", GEMM,
        "tl.load(weight_scale_ptr + out_channels + channel)",
        "tl.load(weight_scale_ptr + channel + 0)",
        TEST_LINEAR, "test_requantized_result_is_the_references and triton",
    ),
    Mutant(
        "gemm_geglu_gate_bias", GEMM,
        "z += tl.load(bias_ptr + out_channels + channel)",
        "z += tl.load(bias_ptr + channel)",
        TEST_LINEAR, "test_requantized_result_is_the_references and triton",
    ),
    Mutant(
        "gemm_gelu_of_negative_numbers", GEMM,
        "tl.maximum(x, 0.0) - u *",
        "x - u *",
        TEST_LINEAR, "test_requantized_result_is_the_references and triton",
    ),
    Mutant(
        "gemm_time_embedding_of_a_view", GEMM,
        "sample * channel_add_stride + channel",
        "sample * out_channels + channel",
        TEST_CONV2D, "test_added_channels_may_be_a_view_of_more and triton",
    ),
    Mutant(
        "gemm_statistics_not_centred", GEMM,
        "centred = runs - (total / STATISTICS_ROWS)[:, :, None]",
        "centred = runs",
        TEST_CONV2D, "test_statistics_are_those_of_the_stored_result and triton",
    ),
    # Quantization
    Mutant(
        "quantize_halves_down", QUANTIZE,
        "return floor_to_int(q + 0.5, PTX) + zero_point",
        "return zero_point - floor_to_int(0.5 - q, PTX)",
        TEST_QUANTIZE, "test_halves_round_up_whatever_their_sign and triton",
    ),
    Mutant(
        "quantize_wraps_at_the_top", QUANTIZE,
        "(2 ** (BITS - 1) - 1 - zero_point)",
        "(2 ** (BITS - 1) - zero_point)",
        TEST_QUANTIZE, "test_saturates_at_the_ends_of_the_range_after_the_shift and triton",
    ),
    Mutant(
        "quantize_odd_channel_not_written", QUANTIZE,
        "(k < out_channels)[None, :]",
        "(k < channels)[None, :]",
        TEST_QUANTIZE, "test_odd_channel_count_is_padded_with_the_zero_point and triton",
    ),
    Mutant(
        "quantize_border_of_rows", QUANTIZE,
        "row = position // padded_width - pad_h",
        "row = position // padded_width - pad_w",
        TEST_QUANTIZE, "test_border_holds_the_quantized_zero_of_its_sample and triton",
    ),
    Mutant(
        "quantize_timestep_beyond_the_tables", QUANTIZE,
        "tl.minimum(tl.maximum(timestep_index, 0), num_timesteps - 1)",
        "tl.maximum(timestep_index, 0)",
        TEST_OPS, "test_timestep_outside_the_tables_is_clamped_and_nothing_is_read_there and triton",
    ),
    # NaN and infinity
    Mutant(
        "quantize_infinity_not_marked", QUANTIZE,
        "& 0x7FFFFFFF) >= 0x7F800000",
        "& 0x7FFFFFFF) > 0x7F800000",
        TEST_NOT_FINITE, "test_sample_that_is_not_finite_is_marked and triton and quantize-x-inf",
    ),
    Mutant(
        "norm_mean_not_checked", NORM,
        "(mean + scale + shift) * 0 != 0",
        "shift * 0 != 0",
        TEST_NOT_FINITE, "test_sample_that_is_not_finite_is_marked and triton and group_norm_quantize-x-nan",
    ),
    Mutant(
        "norm_parameters_not_checked", NORM,
        "((weight + bias) * 0)",
        "(k * 0.0)",
        TEST_NOT_FINITE, "test_parameter_of_a_norm_that_is_not_finite_marks_all_samples and triton",
    ),
    Mutant(
        "gemm_marked_sample_stays_finite", GEMM,
        "tl.where(timestep_index < 0,",
        "tl.where(timestep_index < -99,",
        TEST_NOT_FINITE, "test_results_of_a_marked_sample_are_nan_and_others_are_as_without_it and triton",
    ),
    Mutant(
        "cpu_negative_infinity_not_marked", CPU_QUANTIZE,
        "x.amax(values) * 0 + x.amin(values) * 0",
        "x.amax(values) * 0",
        TEST_NOT_FINITE, "test_sample_that_is_not_finite_is_marked and compiler-quantize-x--inf",
    ),
    Mutant(
        "cpu_timestep_of_a_marked_sample_lost", CPU,
        "max(timestep, ~timestep)",
        "max(timestep, 0)",
        TEST_NOT_FINITE, "test_the_only_sample_that_is_left_is_as_in_the_whole_batch and cpu",
    ),
    Mutant(
        "cpu_attention_to_nan_is_zero", CPU_ATTENTION,
        "for x in (query, key):",
        "for x in (key,):",
        TEST_NOT_FINITE, "test_sample_that_is_not_finite_is_marked and cpu-attention_quantize-query-nan",
    ),
    # Norms
    Mutant(
        "norm_means_of_runs_ignored", NORM,
        "centred + run_length * shift * shift",
        "centred",
        TEST_NORM, "test_group_norm_is_the_references and triton and one-group",
    ),
    Mutant(
        "norm_last_run_is_shorter", NORM,
        "tl.maximum(tl.minimum(length - run * rows, rows), 1)",
        "(run * 0 + rows)",
        TEST_NORM, "test_group_norm_is_the_references and triton and one-group",
    ),
    Mutant(
        "norm_means_of_merged_runs_ignored", NORM,
        "centred + rows * shift * shift",
        "centred",
        TEST_NORM, "test_merged_statistics_are_those_of_longer_runs",
    ),
    Mutant(
        "norm_first_tile_repeated", NORM,
        "tl.program_id(0) * positions + start",
        "tl.program_id(0) * positions",
        TEST_NORM, "test_group_norm_of_a_larger_image_is_the_references and triton",
    ),
    Mutant(
        "norm_plain_result_with_the_norms_dilation", NORM,
        "x, plain_inverse_dilation[None, :]",
        "x, inverse_dilation[None, :]",
        TEST_NORM, "test_group_norm_also_quantizes_the_concat_itself and triton",
    ),
    Mutant(
        "norm_group_without_eps", NORM,
        "tl.sqrt_rn(variance + eps)",
        "tl.sqrt_rn(variance)",
        TEST_NORM, "test_group_norm_is_the_references and triton and a-group-a-channel",
    ),
    Mutant(
        "norm_layer_without_eps", NORM,
        "tl.sum(tl.fma(centred, centred, zero_or_nan), 1) / channels + eps",
        "tl.sum(tl.fma(centred, centred, zero_or_nan), 1) / channels",
        TEST_NORM, "test_layer_norm_adds_eps_to_the_variance and triton",
    ),
    Mutant(
        "norm_variance_of_the_skip", NORM,
        "centred += tl.load(ptrs + skip_channels,",
        "centred += tl.load(ptrs,",
        TEST_NORM, "test_group_norm_is_the_references and triton and third-group-straddles",
    ),
    Mutant(
        "norm_border_is_normalized", NORM,
        "q = tl.where(inside[:, None], q, quantized_zero)",
        "q = tl.where(inside[:, None], q, q)",
        TEST_NORM, "test_group_norms_border_holds_the_quantized_zero and triton",
    ),
    # Attention
    Mutant(
        "float_attention_to_padding", FLOAT_ATTENTION,
        'tl.where(n_inside[None, :], score * score_scale, float("-inf"))',
        "score * score_scale",
        TEST_FLOAT_ATTENTION, "test_equals_the_reference and triton",
    ),
    Mutant(
        "attention_total_does_not_fade", ATTENTION,
        "total = total * fade + tl.sum(p, 1)[:, None]",
        "total = total + tl.sum(p, 1)[:, None]",
        TEST_ATTENTION, "test_attention_of_any_lengths_is_the_references and triton",
    ),
    Mutant(
        "attention_largest_of_the_block", ATTENTION,
        "so_far = tl.maximum(largest, highest * scale)",
        "so_far = highest * scale",
        TEST_ATTENTION, "test_attention_of_any_lengths_is_the_references and triton",
    ),
    Mutant(
        "attention_keys_not_smoothed", ATTENTION,
        "tl.where(inside, x.to(tl.float32) - mean[None, :], 0.0)",
        "tl.where(inside, x.to(tl.float32), 0.0)",
        TEST_ATTENTION, "test_what_all_keys_have_in_common_changes_nothing and triton",
    ),
    Mutant(
        "attention_one_key_beyond", ATTENTION,
        "(block * BLOCK_N + n - (key_length - 1))",
        "(block * BLOCK_N + n - key_length)",
        TEST_ATTENTION, "test_attention_of_any_lengths_is_the_references and triton",
    ),
    Mutant(
        "attention_offset_of_probabilities", ATTENTION,
        "+ 128 * value8_sum",
        "+ 127 * value8_sum",
        TEST_ATTENTION, "test_attention_of_any_lengths_is_the_references and triton",
    ),
    # The packing
    Mutant(
        "packing_sign_of_the_low_nibble", PACKING,
        "return (low & 0x0F) | (high << 4)",
        "return low | (high << 4)",
        TEST_PACKING, "test_byte_j_holds_channel_j_low",
    ),
    Mutant(
        "packing_range_not_checked", PACKING,
        "values.max() > INT4_MAX",
        "values.max() > -INT4_MIN",
        TEST_PACKING, "test_value_outside_four_bits_is_refused",
    ),
    Mutant(
        "packing_high_nibble_keeps_the_low", "kernels/triton/intrinsics.py",
        "high = (packed & 0xF0).to(tl.int8, bitcast=True)",
        "high = packed.to(tl.int8, bitcast=True)",
        TEST_LINEAR, "test_integer_sums_are_exact and triton",
    ),
    # CPUs
    Mutant(
        "cpu_rows_not_shifted", CPU,
        "unsigned = x.view(torch.uint8) ^ 0x80",
        "unsigned = x.view(torch.uint8)",
        TEST_LINEAR, "test_integer_sums_are_exact and cpu",
    ),
    Mutant(
        "cpu_zero_point_of_convolutions", CPU,
        "int(quantizer.zero_point[t]) + 128",
        "int(quantizer.zero_point[t]) + 127",
        TEST_CONV2D, "test_integer_sums_are_exact and cpu and 1x1",
    ),
    Mutant(
        "cpu_samples_out_of_order", CPU,
        "number in numbers]).argsort()]",
        "number in numbers])]",
        TEST_LINEAR, "test_integer_sums_are_exact and cpu",
    ),
    Mutant(
        "cpu_stale_prepacked_weight", CPU,
        "if entry is None or entry.made_from != made_from:",
        "if entry is None:",
        TEST_CPU, "test_copy_is_refreshed_when_the_weight_changes",
    ),
    Mutant(
        "cpu_upsampled_pixel", CPU,
        "(torch.arange(2 * size - 2) + 1) // 2",
        "torch.arange(2 * size - 2) // 2",
        TEST_CONV2D, "test_integer_sums_of_an_upsampled_image_are_exact and cpu",
    ),
    Mutant(
        "cpu_unbiased_statistics", CPU,
        "runs.var(2, correction=0)",
        "runs.var(2)",
        TEST_CONV2D, "test_statistics_are_those_of_the_stored_result and cpu",
    ),
    Mutant(
        "cpu_attention_beyond_the_keys", "kernels/cpu/attention.py",
        "p[:, :, -1, -beyond:] = -torch.inf",
        "p[:, :, -1, -beyond:] = 0.0",
        TEST_ATTENTION, "test_attention_of_any_lengths_is_the_references and cpu",
    ),
    # The oracle
    Mutant(
        "reference_rounds_to_even", REFERENCE,
        "q = torch.floor(x * (1 / dilation) * (1 / scale) + 0.5)",
        "q = torch.round(x * (1 / dilation) * (1 / scale))",
        TEST_QUANTIZE, "test_halves_round_up_whatever_their_sign or test_values_at_and_beside_half_steps",
    ),
    Mutant(
        "reference_sign_of_the_zero_point", REFERENCE,
        "(accumulator - zero_point * sums)",
        "(accumulator + zero_point * sums)",
        TEST_LINEAR, "test_reference_agrees_with_torchs_linear_in_float64",
    ),
    Mutant(
        "reference_probability_steps", REFERENCE,
        "p8 = torch.floor(255 * p + 0.5).long()",
        "p8 = torch.floor(254 * p + 0.5).long()",
        TEST_ATTENTION, "test_attention_of_any_lengths_is_the_references and cpu",
    ),
    # What is asked of arguments
    Mutant(
        "checks_size_of_the_result", CHECKS,
        "if x.numel() > MAX_ELEMENTS or rows * out_channels > MAX_ELEMENTS:",
        "if x.numel() > MAX_ELEMENTS:",
        TEST_OPS, "test_result_with_more_elements_than_int32_counts_is_refused",
    ),
    Mutant(
        "checks_strides", CHECKS,
        "(any_strides or tensor.is_contiguous())",
        "(any_strides or tensor.numel() >= 0)",
        TEST_OPS, "test_bad_argument_is_refused_by_name_with_what_was_expected",
    ),
    Mutant(
        "checks_bits", CHECKS,
        "if bits < 2 or bits > 8:",
        "if bits < 2 or bits > 16:",
        TEST_OPS, "test_bad_argument_is_refused_by_name_with_what_was_expected",
    ),
    # Launch configurations
    Mutant(
        "tuning_reduction_does_not_count", TUNING,
        "abs(math.log2(self.reduction / reduction))",
        "0.0 * abs(math.log2(self.reduction / reduction))",
        TEST_TUNING, "test_lookup_takes_the_shape_that_is_fewest_doublings_away",
    ),
    Mutant(
        "tuning_part_of_a_run", TUNING,
        "return self if self.block_m % rows == 0 else",
        "return self if rows % self.block_m == 0 else",
        TEST_TUNING, "test_tiles_of_whole_runs_keep_all_else",
    ),
    Mutant(
        "tuning_registers_at_the_limit", TUNING,
        "if self.block_m * self.block_n < 64 * 32 * self.num_warps:",
        "if self.block_m * self.block_n <= 64 * 32 * self.num_warps:",
        TEST_TUNING, "test_tiles_with_fewer_registers_hold_fewer_than_64_accumulators_a_thread",
    ),
    Mutant(
        "tuning_architecture_itself", TUNING,
        "if number <= target.arch",
        "if number < target.arch",
        TEST_TUNING, "test_nvidia_gpu_takes_the_file_of_what_it_resembles",
    ),
    # Registration
    Mutant(
        "ops_fake_dtype", OPS,
        '"int8_attention_quantize", query, key, value, quantizer.scale)\n'
        "    return query.new_empty(query.shape, dtype=torch.int8)",
        '"int8_attention_quantize", query, key, value, quantizer.scale)\n    return query.new_empty(query.shape)',
        TEST_OPS, "test_meta_tensors_give_the_shape_dtype_and_strides_of_real_ones and int8_attention_quantize",
    ),
    Mutant(
        "ops_fake_dtype_of_convolutions", OPS,
        "y = x.new_empty(batch, *size, out_channels, dtype=out_dtype)",
        "y = x.new_empty(batch, *size, out_channels)",
        TEST_OPS, "test_meta_tensors_give_the_shapes_of_real_ones_with_other_arguments",
    ),
    Mutant(
        "ops_statistics_of_part_of_a_run", "kernels/ops.py",
        "with_statistics and size[0] * size[1] % STATISTICS_ROWS == 0",
        "with_statistics and size[0] * size[1] >= STATISTICS_ROWS",
        TEST_OPS + TEST_FUSED,
        "test_statistics_of_runs_that_would_not_be_whole_are_empty or test_sizes_that_no_doubling_reaches",
    ),
]  # fmt: skip

LAYERS = "dq_runtime/layers.py"
GRADIENTS = "dq_runtime/gradients.py"
TIMESTEPS = "dq_runtime/timesteps.py"
TABLES = "dq_runtime/tables.py"
CONFIG = "dq_runtime/config.py"
CONVERT = "dq_runtime/convert.py"
DEQUANTIZATION = "dq_runtime/dequantization.py"
UNETS = "dq_runtime/architectures/unets.py"
FORWARD_STATE = "dq_runtime/forward_state.py"
FUSED_BLOCKS = "dq_runtime/fused_blocks.py"
FUSED_TRANSFORMERS = "dq_runtime/fused_transformers.py"
ADAPTERS = "dq_runtime/adapters.py"
FUSED = "dq_runtime/fused.py"
GRAPHS = "dq_runtime/graphs.py"
CAPTURED_STATE = "dq_runtime/captured_state.py"
PROCESSOR = "dq_runtime/attention.py"
QUANTIZER = "dq_runtime/diffusers_quantizer.py"

TEST_LAYERS = ("tests/runtime/test_layers.py",)
TEST_TIMESTEPS = ("tests/runtime/test_timesteps.py",)
TEST_CONFIG = ("tests/runtime/test_config.py",)
TEST_CONVERT = ("tests/runtime/test_convert.py",)
TEST_FUSED_STATE = ("tests/runtime/test_fused_state.py",)
TEST_LORA = ("tests/runtime/test_lora.py",)
TEST_GRAPHS = ("tests/runtime/test_graphs.py", "tests/runtime/test_captured_state.py")
TEST_PROCESSOR = ("tests/runtime/test_attention.py",)
TEST_ON_LOADING = ("tests/runtime/test_on_loading.py",)
TEST_CHECKPOINT = ("tests/runtime/test_checkpoint.py",)

RUNTIME = [
    # Layers, timesteps, tables
    Mutant(
        "layers_wrong_batch_of_mixed_timesteps", LAYERS,
        "if not grid.uniform:",
        "if index.numel() == 0:",
        TEST_LAYERS, "test_wrong_batch_is_refused_by_the_layer_s_name",
    ),
    Mutant(
        "layers_gradient_lost", GRADIENTS,
        "return x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()",
        "return False",
        TEST_LAYERS, "test_gradient_reaches_the_sample_of_a_unet",
    ),
    Mutant(
        "layers_zero_point_at_the_limit", LAYERS,
        "(self.act_zero_point < limit)",
        "(self.act_zero_point <= limit)",
        TEST_CHECKPOINT, "test_corrupt_values_are_refused_by_the_layer_s_name and act_zero_point",
    ),
    Mutant(
        "layers_weight_keeps_its_dilation", LAYERS,
        "return weight * per_output / self.weight_dilation",
        "return weight * per_output",
        TEST_CONVERT, "test_dequantized_unet_is_stock_with_the_rounded_weights",
    ),
    Mutant(
        "timesteps_floor_of_the_grid", TIMESTEPS,
        "self.boundaries = _middles(values)",
        "self.boundaries = values[1:]",
        TEST_TIMESTEPS, "test_fractions_go_to_the_nearest_and_ties_to_the_smaller",
    ),
    Mutant(
        "timesteps_ties_to_the_larger", TIMESTEPS,
        "self.boundaries.to(device), out_int32=True)",
        "self.boundaries.to(device), out_int32=True, right=True)",
        TEST_TIMESTEPS, "test_fractions_go_to_the_nearest_and_ties_to_the_smaller",
    ),
    Mutant(
        "timesteps_in_the_default_dtype", TIMESTEPS,
        "torch.full((1,), float(timestep), dtype=torch.float32, device=device)",
        "torch.full((1,), float(timestep), device=device)",
        TEST_TIMESTEPS, "test_numbers_keep_their_precision_whatever_the_default_dtype",
    ),
    Mutant(
        "timesteps_of_the_last_call", TIMESTEPS,
        "rows.index = NO_INDEX",
        "rows.index = rows.index.clone()",
        TEST_LAYERS, "test_a_forward_past_the_hooks_does_not_use_the_timestep_of_the_last_call",
    ),
    Mutant(
        "timesteps_each_reader_has_its_own_copy", TIMESTEPS,
        "known = rows.copies[batch_size, device] = index.to(device)",
        "known = index.to(device, copy=True)",
        ("tests/runtime/test_not_finite.py",), "test_layer_of_another_batch_marks_its_copy_of_the_index",
    ),
    Mutant(
        "tables_restored_from_the_cast", TABLES,
        "restored = tensor.to(moved.device)",
        "restored = moved.to(tensor.dtype)",
        TEST_LAYERS, "test_no_cast_touches_tables_and_packed_weights and not unet2d_condition",
    ),
    Mutant(
        "tables_memory_format", TABLES,
        "if moved.dtype != tensor.dtype or moved.stride() != tensor.stride():",
        "if moved.dtype != tensor.dtype:",
        TEST_LAYERS, "test_no_cast_touches_tables_and_packed_weights and not unet2d_condition",
    ),
    # Config and conversion
    Mutant(
        "config_part_of_a_part", CONFIG,
        'else f".{entry}." in f".{name}."',
        "else entry in name",
        TEST_CONVERT, "test_modules_are_kept_by_name_or_by_whole_parts_of_one",
    ),
    Mutant(
        "config_shortest_entry_counts", CONFIG,
        "[max(fitting, key=len)]",
        "[min(fitting, key=len)]",
        (*TEST_CONFIG, "tests/calibration/test_calibrate.py"), "test_single_layers_can_have_other_activation_bits",
    ),
    Mutant(
        "convert_grouped_convolutions", CONVERT,
        "module.groups > 1:",
        "module.groups > 1_000:",
        TEST_CONVERT, "test_grouped_convolution_stays_and_one_warning_says_so",
    ),
    Mutant(
        "layers_padding_mode_ignored", LAYERS,
        'return conv.padding_mode == "zeros" and not',
        'return conv.padding_mode != "" and not',
        ("tests/runtime/test_stock_behaviour.py",), "test_padding_mode_is_heeded",
    ),
    Mutant(
        "gradients_of_clamped_inputs", LAYERS,
        "return (q > -limit) & (q < limit - 1)",
        "return (q >= -limit) & (q < limit)",
        TEST_LAYERS, "test_gradient_of_an_input_is_that_of_the_rounded_weights",
    ),
    Mutant(
        "call_state_is_shared_by_threads", "dq_runtime/call_state.py",
        "return self._threads.state",
        "return self.of_compiled_code",
        ("tests/runtime/test_stock_behaviour.py",), "test_threads_share_a_unet",
    ),
    Mutant(
        "convert_fir_resampler", CONVERT,
        "if name.startswith(fir_prefixes):",
        "if name in fir_prefixes:",
        TEST_CONVERT, "test_fir_resampler_keeps_its_convolution or test_unet_of_fir_blocks",
    ),
    Mutant(
        "convert_training_mode", CONVERT,
        "layer.train(plan.layers[name].training)",
        "layer.train()",
        TEST_CONVERT, "test_training_mode_is_kept",
    ),
    Mutant(
        "dequantize_without_gradients", DEQUANTIZATION,
        "model.requires_grad_(True)",
        "model.requires_grad_(False)",
        TEST_LAYERS, "test_a_quantized_unet_asks_for_no_gradient and not unet2d_condition",
    ),
    # Fused UNets
    Mutant(
        "statistics_of_a_changed_image", FORWARD_STATE,
        "if known() is image and version == _version(image) else None",
        "if known() is image else None",
        TEST_FUSED, "test_no_norm_is_given_the_statistics_of_an_image_that_a_hook_has_changed",
    ),
    Mutant(
        "statistics_of_an_image_that_will_change", FORWARD_STATE,
        'kwargs.get("down_intrablock_additional_residuals") is None',
        'kwargs.get("down_intrablock_additional_residuals") is not unet',
        TEST_FUSED, "test_no_norm_is_given_the_statistics_of_an_image_before_it_was_changed",
    ),
    Mutant(
        "group_does_not_follow_its_members", FORWARD_STATE,
        "if not torch.compiler.is_compiling() and self._addresses != self._members_addresses():",
        "if not self._addresses:",
        TEST_FUSED_STATE, "test_weights_loaded_into_a_fused_unet_are_used or test_copy_of_a_fused_unet",
    ),
    Mutant(
        "group_keeps_its_old_weights", FORWARD_STATE,
        "self.packed_weight.add_(0)",
        "self.packed_weight.abs()",
        TEST_FUSED_STATE, "test_weights_loaded_into_a_fused_unet_are_used or test_weights_loaded_into_a_part",
    ),
    Mutant(
        "group_keeps_its_results", FORWARD_STATE,
        "results.read, results.of_members = None, ()",
        "results.read = results.read",
        TEST_FUSED_STATE, "test_prompt_changed_in_place_is_read_anew",
    ),
    Mutant(
        "group_of_unlike_quantizers", FORWARD_STATE,
        "all(_equal(getattr(layer, name), getattr(first, name)) for name in QUANTIZER)",
        "True",
        TEST_FUSED_STATE, "test_layers_of_unlike_quantizers_are_no_group",
    ),
    Mutant(
        "run_as_made_with_hooks", ADAPTERS,
        'if "forward" in own or len(own["_forward_hooks"]) or len(own["_forward_pre_hooks"]):',
        'if "forward" in own or own["_forward_pre_hooks"]:',
        TEST_FUSED, "test_whoever_changes_what_a_module_returns_is_heeded",
    ),
    Mutant(
        "fused_scaled_output", FUSED_BLOCKS,
        "and block.output_scale_factor == 1",
        "and block.output_scale_factor > 0",
        TEST_FUSED, "test_blocks_of_other_kinds_compute_as_unfused and mid_block_scale_factor",
    ),
    Mutant(
        "fused_residual_of_cross_attention", FUSED_TRANSFORMERS,
        "x = _attend(attention, query, key, value, x, adapters)\n        return",
        "x = _attend(attention, query, key, value, hidden_states, adapters)\n        return",
        TEST_FUSED, "test_fused_unet_computes_what_the_unfused_one_does",
    ),
    Mutant(
        "fused_mask_of_the_prompt", FUSED_TRANSFORMERS,
        "or encoder_attention_mask is not None",
        "or timestep is not None",
        TEST_FUSED, "test_mask_of_the_prompt_is_heeded",
    ),
    Mutant(
        "fused_other_processors", FUSED_TRANSFORMERS,
        "if type(attention.processor) not in (AttnProcessor2_0, Int8AttnProcessor):",
        "if attention.processor is None:",
        TEST_FUSED, "test_other_attention_processors_are_called",
    ),
    Mutant(
        "fused_size_of_upsampling", FUSED_BLOCKS,
        "list(output_size) != doubled",
        "len(output_size) != 2",
        TEST_FUSED, "test_sizes_that_no_doubling_reaches_are_upsampled_as_unfused",
    ),
    Mutant(
        "fused_bits_of_the_next_layer", LAYERS,
        "following.quantizer(q), self._parameters",
        "following.quantizer(q)._replace(bits=self.activation_bits), self._parameters",
        TEST_FUSED, "test_layers_of_other_bits_compute_as_unfused",
    ),
    Mutant(
        "fused_silu_before_a_transformer", FUSED_TRANSFORMERS,
        "silu=False",
        "silu=True",
        TEST_FUSED, "test_fused_unet_computes_what_the_unfused_one_does",
    ),
    Mutant(
        "fused_skip_of_freeu", FUSED_BLOCKS,
        "return not (freeu or block.training",
        "return not (block.training",
        TEST_FUSED, "test_freeu_is_heeded",
    ),
    Mutant(
        "fused_time_embedding_without_silu", UNETS,
        "if projection is not None], F.silu)",
        "if projection is not None], None)",
        TEST_FUSED, "test_fused_unet_computes_what_the_unfused_one_does",
    ),
    Mutant(
        "adapters_without_scaling", ADAPTERS,
        "result.baddbmm_(low, up, alpha=scaling)",
        "result.baddbmm_(low, up)",
        TEST_LORA, "test_changes_of_adapters_are_seen and weights",
    ),
    Mutant(
        "adapters_copied_once", ADAPTERS,
        "if part.data_ptr() != end or part.untyped_storage().data_ptr() != storage",
        "if part.untyped_storage().data_ptr() != storage",
        TEST_LORA, "test_stacked_weights_are_views_of_one",
    ),
    Mutant(
        "unfuse_leaves_its_hooks", FUSED,
        "hook.remove()",
        "hook.id",
        TEST_FUSED_STATE, "test_dequantized_fused_unet_is_a_stock_one or test_what_was_merged_goes",
    ),
    # CUDA graphs, attention, checkpoints
    Mutant(
        "graphs_strides_are_in_the_key", GRAPHS,
        "return value.shape, value.dtype, value.stride()",
        "return value.shape, value.dtype",
        TEST_GRAPHS, "test_new_signature_gets_a_graph_of_its_own_and_keeps_the_others",
    ),
    Mutant(
        "graphs_result_of_a_changed_model_is_returned", GRAPHS,
        "if self._state.unchanged():  # compared",
        "if True:  # compared",
        TEST_GRAPHS, "test_a_changed_model_is_captured_again",
    ),
    Mutant(
        "graphs_threads_share_inputs", GRAPHS,
        "        with self._lock:\n",
        "        if True:\n",
        TEST_GRAPHS, "test_calls_of_several_threads_run_one_after_another",
    ),
    Mutant(
        "graphs_addresses_are_not_compared", CAPTURED_STATE,
        "and list(map(torch.Tensor.data_ptr, self._parameters)) == self._addresses",
        "",
        TEST_GRAPHS, "test_a_changed_model_is_captured_again",
    ),
    Mutant(
        "graphs_settings_are_in_the_key", GRAPHS,
        "key.extend(self._state.settings())",
        "pass",
        TEST_GRAPHS, "test_the_scale_of_an_ip_adapter_is_part_of_the_key",
    ),
    Mutant(
        "graphs_result_is_overwritten", GRAPHS,
        "leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf",
        "leaf for leaf",
        TEST_GRAPHS, "test_replay_computes_from_new_inputs_without_python",
    ),
    Mutant(
        "processor_ignores_masks", PROCESSOR,
        "if attention_mask is not None or reason_against_int8(attn)",
        "if reason_against_int8(attn)",
        TEST_PROCESSOR, "test_what_int8_cannot_do_is_done_in_floating_point",
    ),
    Mutant(
        "processor_rescaled_output", PROCESSOR,
        "return tokens / attn.rescale_output_factor",
        "return tokens",
        TEST_PROCESSOR, "test_processor_computes_what_the_stock_one_does",
    ),
    Mutant(
        "processor_gradient_lost", PROCESSOR,
        "differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in projected)",
        "differentiable = False",
        TEST_PROCESSOR, "test_gradients_are_those_of_the_stock_processor",
    ),
    Mutant(
        "quantizer_dtype_of_a_table", QUANTIZER,
        "if stored.dtype != empty.dtype:",
        "if stored.is_complex():",
        TEST_CHECKPOINT, "test_tensor_of_another_dtype_is_refused_by_name",
    ),
    Mutant(
        "quantizer_unexpected_tensors", QUANTIZER,
        'self._refuse("unexpected", unexpected_keys or [])',
        'self._refuse("unexpected", [])',
        TEST_CHECKPOINT, "test_unexpected_tensor_is_refused_by_name",
    ),
    Mutant(
        "digest_of_no_field_of_the_config", "dq_runtime/digest.py",
        "table = digest(checksums, config, fields_to_check(model_config))",
        "table = digest(checksums, config, {})",
        TEST_CHECKPOINT, "test_changed_field_of_the_model_s_config_is_refused",
    ),
    Mutant(
        "rollback_of_nothing", "dq_runtime/rollback.py",
        "module.restore()",
        "module._class",
        ("tests/runtime/test_rollback.py",), "test_an_error_takes_every_change_back",
    ),
    Mutant(
        "rollback_that_ctrl_c_cuts_in_half", "dq_runtime/rollback.py",
        "lambda *arguments: delayed.append(arguments)",
        "signal.default_int_handler",
        ("tests/runtime/test_rollback.py",), "test_a_second_ctrl_c_waits_until_the_model_is_restored",
    ),
    Mutant(
        "checks_no_classes", CHECKS,
        "for name, expected, value in _wrong_types(operator, args, kwargs):",
        "for name, expected, value in ():",
        ("tests/kernels/test_argument_types.py",), "test_an_argument_of_another_class_is_refused_by_name",
    ),
    Mutant(
        "copies_of_the_index_outlive_the_call", TIMESTEPS,
        "rows.copies.clear()",
        "rows.copies = rows.copies",
        TEST_TIMESTEPS, "test_copies_of_the_index_end_with_the_call",
    ),
    Mutant(
        "quantizer_corrupt_values", QUANTIZER,
        "layer.check_tensors(weights)",
        "layer.eval()",
        TEST_CHECKPOINT, "test_corrupt_values_are_refused_by_the_layer_s_name and act_zero_point",
    ),
    Mutant(
        "quantizer_config_of_a_single_file_is_lost", QUANTIZER,
        "model.register_to_config(quantization_config=self.quantization_config)",
        "model.register_to_config()",
        TEST_ON_LOADING, "test_single_file_is_quantized_and_saved_as_packed",
    ),
    Mutant(
        "quantizer_shards_in_parallel", QUANTIZER,
        "return self.pre_quantized",
        "return True",
        TEST_ON_LOADING, "test_shards_are_read_one_by_one_unless_they_are_packed",
    ),
    Mutant(
        "saving_without_the_quantizer", "dq_runtime/saving.py",
        'if hasattr(DiffusersQuantizer, "get_state_dict_and_metadata"):',
        "if model is not None:",
        ("tests/runtime/test_older_versions.py",), "test_older_diffusers_saves_the_same_checkpoint",
    ),
    Mutant(
        "convert_quantizes_what_stays_in_fp32", CONVERT,
        "any(is_part(entry, name) for entry in in_fp32)",
        "any(entry == name for entry in in_fp32)",
        TEST_CONVERT, "test_modules_that_diffusers_keeps_in_fp32_stay_in_fp32",
    ),
    Mutant(
        "timesteps_of_two_threads_in_compiled_blocks", TIMESTEPS,
        "and compiled.thread != thread",
        "and compiled.thread == thread",
        ("tests/runtime/test_compile.py",), "test_a_call_of_compiled_blocks_is_not_disturbed_by_another_thread",
    ),
]  # fmt: skip

FOLDER = "dq_runtime/calibration"
TESTS = "tests/calibration"

CALIBRATION = [
    Mutant(
        "dilation_largest_of_the_layers", "dq_runtime/weights.py",
        "for weight in weights]).amin(0)",
        "for weight in weights]).amax(0)",
        (f"{TESTS}/test_dilation.py",), "test_the_shared_rule_is_the_smallest_of_the_layers",
    ),
    Mutant(
        "dilation_timesteps_alike", f"{FOLDER}/dilation.py",
        "- y).square() * factor",
        "- y).square() * 1.0",
        (f"{TESTS}/test_dilation.py",), "test_timesteps_count_by_their_importance",
    ),
    Mutant(
        "dilation_chosen_on_few_samples", f"{FOLDER}/dilation.py",
        "return best if bool(with_best < with_none) else none",
        "return best",
        (f"{TESTS}/test_dilation.py",), "test_joint_dilation_is_judged_on_all_samples",
    ),
    Mutant(
        "temporal_lower_end_is_not_searched", f"{FOLDER}/temporal.py",
        "low = _best_end(values, bits, lowest * fractions, high.expand(candidates, -1))[0]",
        "low = lowest",
        (f"{TESTS}/test_temporal.py",), "test_either_end_is_clipped_when_that_pays",
    ),
    Mutant(
        "temporal_zero_point_not_rounded", f"{FOLDER}/temporal.py",
        "- low / scale + 0.5)",
        "- low / scale)",
        (f"{TESTS}/test_temporal.py",), "test_zero_is_exact or test_one_sided or test_the_search_is_never_worse",
    ),
    Mutant(
        "temporal_rows_of_all_timesteps", f"{FOLDER}/temporal.py",
        "members = (index == t).nonzero()[:, 0]",
        "members = (index >= 0).nonzero()[:, 0]",
        (f"{TESTS}/test_temporal.py",), "test_each_sample_of_a_mixed_batch_counts_for_its_own_timestep",
    ),
    Mutant(
        "weights_last_scale_wins", "dq_runtime/weights.py",
        "best_error = torch.minimum(error, best_error)",
        "best_error = error",
        ("tests/runtime/test_weights.py",), "test_the_search_is_never_worse_than_rounding_to_nearest",
    ),
    Mutant(
        "weights_symmetric_range", "dq_runtime/weights.py",
        "(steps + 0.5).floor_().clamp_(INT4_MIN, INT4_MAX)",
        "(steps + 0.5).floor_().clamp_(-INT4_MAX, INT4_MAX)",
        ("tests/runtime/test_weights.py",), "test_the_negative_end_of_four_bits_is_used",
    ),
    Mutant(
        "feedback_smallest_inputs_first", f"{FOLDER}/error_feedback.py",
        "order = second_moment.diagonal().argsort(descending=True)",
        "order = second_moment.diagonal().argsort()",
        (f"{TESTS}/test_error_feedback.py",), "test_error_feedback_is_optimal_brain_quantization",
    ),
    Mutant(
        "feedback_stops_at_the_block", f"{FOLDER}/error_feedback.py",
        "-= errors @ factor[block, start + BLOCK :]",
        "-= 0 * errors @ factor[block, start + BLOCK :]",
        (f"{TESTS}/test_error_feedback.py",), "test_error_feedback_is_optimal_brain_quantization",
    ),
    Mutant(
        "feedback_keeps_the_scale", f"{FOLDER}/error_feedback.py",
        "squares += (seen * values).sum(1)",
        "squares += (seen * exact).sum(1)",
        (f"{TESTS}/test_error_feedback.py",), "test_the_new_scale_is_the_best_one_for_the_rounded_values",
    ),
    Mutant(
        "batches_equal_shares", f"{FOLDER}/batches.py",
        "count / sum(counts.values())",
        "1 / len(counts)",
        (f"{TESTS}/test_batches.py",), "test_importance_and_share_are_those_of_each_samples_timestep",
    ),
    Mutant(
        "batches_in_proportion_to_importance", f"{FOLDER}/batches.py",
        "round(samples * value**0.5 / total)",
        "round(samples * value / total)",
        (f"{TESTS}/test_batches.py",), "test_timesteps_are_drawn_in_proportion_to_the_root_of_their_importance",
    ),
    Mutant(
        "batches_latent_with_another_prompt", f"{FOLDER}/batches.py",
        "if _latent(row) not in latents[timestep]",
        "if _latent(row)",
        (f"{TESTS}/test_batches.py",), "test_a_latent_that_is_judged_by_is_not_trained_on_with_another_prompt",
    ),
    Mutant(
        "replay_remembers_a_second_call", f"{FOLDER}/replay.py",
        "            if reached:",
        "            if False:",
        (f"{TESTS}/test_replay.py",), "test_a_block_that_is_called_again_computes_again",
    ),
    Mutant(
        "replay_memory_layout", f"{FOLDER}/replay.py",
        'leaves[i] = leaf.shape, torch.empty_like(leaf, device="meta").stride()',
        "leaves[i] = leaf.shape, torch.empty(leaf.shape).stride()",
        (f"{TESTS}/test_replay.py",), "test_memory_layouts_come_back_too",
    ),
    Mutant(
        "collect_records_a_view", f"{FOLDER}/collect.py",
        'return tensor.detach().to("cpu", copy=True)',
        'return tensor.detach().to("cpu")',
        (f"{TESTS}/test_collect.py",), "test_later_changes_in_place_do_not_reach_the_record",
    ),
    Mutant(
        "collect_noise_of_unit_variance", f"{FOLDER}/collect.py",
        "noise[rows].to(device, dtype) * getattr(scheduler, \"init_noise_sigma\", 1.0)",
        "noise[rows].to(device, dtype)",
        (f"{TESTS}/test_collect.py",), "test_collecting_follows_the_real_trajectory",
    ),
    Mutant(
        "importance_of_v_prediction", f"{FOLDER}/importance.py",
        "return 1 / (1 + level**2)",
        "return 1 / level**2",
        (f"{TESTS}/test_importance.py",), "test_the_importance_is_what_ddim_makes_of_an_error_where_images_are_normal",
    ),
    Mutant(
        "importance_does_not_contract", f"{FOLDER}/importance.py",
        "(level - following) ** 2 / (1 + following**2)",
        "(level - following) ** 2",
        (f"{TESTS}/test_importance.py",), "test_two_steps_by_hand",
    ),
    Mutant(
        "simulated_gradient_of_zero_points", f"{FOLDER}/simulated.py",
        "grad_zero_point = _row_sum(through - grad) * scale",
        "grad_zero_point = _row_sum(grad - through) * scale",
        (f"{TESTS}/test_simulated.py",), "test_gradients_are_those_of_the_straight_through_estimator",
    ),
    Mutant(
        "simulated_weight_crosses_the_middle", f"{FOLDER}/simulated.py",
        "torch.where(round_to_int4(halves.float()) == fixed[some], halves, fixed[some].half())",
        "halves",
        (f"{TESTS}/test_simulated.py",), "test_weight_just_below_the_middle_of_two_values_keeps_its_value",
    ),
    Mutant(
        "distillation_keeps_the_last_state", f"{FOLDER}/training.py",
        "ranks.from_first(self.store[_state(best)])",
        "ranks.from_first(self.store[_state(len(errors) - 1)])",
        (f"{TESTS}/test_distillation.py",), "test_a_polish_that_diverges_is_undone_and_named",
    ),
    Mutant(
        "distillation_gradients_underflow", f"{FOLDER}/training.py",
        "LOSS_SCALE = 2.0**10",
        "LOSS_SCALE = 1.0",
        (f"{TESTS}/test_distillation.py",), "test_gradients_do_not_underflow_in_float16",
    ),
    Mutant(
        "distillation_shares_ignored", f"{FOLDER}/training.py",
        "1 / present[self.indices[i]] / self.shares[i]",
        "1 / present[self.indices[i]]",
        (f"{TESTS}/test_lessons.py",), "test_in_a_block_every_timestep_counts_the_same",
    ),
    Mutant(
        "trees_without_checksums", f"{FOLDER}/tree_files.py",
        'for key, tensor in tensors.items()} != content["checksums"]',
        "for key, tensor in tensors.items()} is None",
        (f"{TESTS}/test_collect.py",), "test_every_flipped_bit_of_a_file_is_found",
    ),
    Mutant(
        "any_class_as_scheduler", f"{FOLDER}/collect.py",
        "not issubclass(scheduler_class, diffusers.SchedulerMixin)",
        "not issubclass(scheduler_class, diffusers.ConfigMixin)",
        (f"{TESTS}/test_collect.py",), "test_only_schedulers_are_made_of_a_file",
    ),
    Mutant(
        "folder_without_lock", f"{FOLDER}/finished_blocks.py",
        "if not lock(descriptor, wait=False):",
        "if lock(descriptor, wait=False) is None:",
        (f"{TESTS}/test_finished_blocks.py",), "test_a_second_calibration_in_one_folder_is_told_so",
    ),
    Mutant(
        "saved_in_place", "dq_runtime/saving.py",
        "_exchange(staging, folder)\n    except",
        "raise OSError\n    except",
        ("tests/runtime/test_saving.py",), "test_a_killed_save_leaves",
    ),
    Mutant(
        "finished_blocks_of_another_calibration", f"{FOLDER}/finished_blocks.py",
        "if found != fingerprint:",
        'if found == "unreadable":',
        (f"{TESTS}/test_finished_blocks.py",), "test_the_folder_of_another_calibration_is_refused",
    ),
    Mutant(
        "whole_unet_shares_ignored", f"{FOLDER}/whole_unet.py",
        "batches.importance(i) / batches.share(i)",
        "batches.importance(i)",
        (f"{TESTS}/test_whole_unet.py",), "test_the_errors_are_those_of_the_packed_unets",
    ),
    Mutant(
        "calibrate_dilation_that_helps_by_chance", f"{FOLDER}/calibrate.py",
        "if not errors[0] < CLEARLY_LESS * errors[1]:",
        "if not errors[0] < errors[1]:",
        (f"{TESTS}/test_whole_unet.py",), "test_dilation_that_clearly_helps_the_whole_unet_stays",
    ),
]  # fmt: skip

MUTANTS = [*KERNELS, *RUNTIME, *CALIBRATION]
