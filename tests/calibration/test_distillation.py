"""Block-wise distillation of tiny random UNets: what it gains, what it needs and what it leaves alone."""

import copy
import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from distilling import (
    FEW_BLOCKS,
    UNTRAINED,
    Subject,
    assert_same_state,
    distilled,
    interrupt,
    messages,
    output_error,
    quantized_layers,
    recorded,
    unet2d,
    unet2d_condition,
)

import dq_runtime
from dq_runtime import CalibrationSet, DilateQuantConfig, Distillation, QuantConv2d, calibrate, record
from dq_runtime.calibration import distillation, training
from dq_runtime.calibration.replay import TensorStore


@pytest.fixture(scope="module", params=[unet2d, unet2d_condition])
def subject(request):
    return Subject(request.param(), DilateQuantConfig(dilation="weight"))


def test_error_feedback_alone_brings_the_result_much_closer(subject):
    fed_back = subject.distil(iterations=0)

    rounded = subject.error(subject.rounded)
    # Each layer's rounding errors are made up for in the directions that its inputs have.
    assert subject.error(fed_back) < 0.6 * rounded


@pytest.mark.parametrize("bits", [8, 4])
def test_training_alone_brings_the_result_closer(plain, bits):
    config = DilateQuantConfig(activation_bits=bits, **FEW_BLOCKS)
    settings = {"iterations": 20, "error_feedback": False, "learning_rate": 0.1, "scale_learning_rate": 3e-3}

    error = plain.error(plain.distil(config, **settings))
    assert error < 0.9 * plain.error(
        calibrate(copy.deepcopy(plain.unet), plain.calibration_set, config, distillation=None)
    )


def test_each_timestep_comes_closer(subject):
    for call in subject.calibration_set.calls:
        at_timestep = CalibrationSet([call])
        rounded = output_error(subject.rounded, subject.unet, at_timestep)
        assert output_error(subject.distilled, subject.unet, at_timestep) < 0.8 * rounded


def test_two_distillations_agree_bit_by_bit(plain):
    torch.manual_seed(7)
    again = plain.distil()

    assert_same_state(again, plain.distilled)


def test_the_seed_and_the_settings_reach_the_result(plain):
    settings = ({"samples": 12}, {"samples": 12, "seed": 1}, {"error_feedback": False})
    packed = [
        torch.cat([layer.packed_weight.flatten() for layer in quantized_layers(unet).values()])
        for unet in (plain.distilled, *(plain.distil(**each) for each in settings))
    ]
    for i, first in enumerate(packed):
        assert not any(torch.equal(first, second) for second in packed[:i])


def test_what_is_not_quantized_is_not_touched(subject):
    stock, layers, compared = subject.unet.state_dict(), quantized_layers(subject.distilled), 0
    for name, tensor in subject.distilled.state_dict().items():
        if name.rpartition(".")[0] not in layers:
            assert torch.equal(tensor, stock[name]), name
            compared += 1
    assert compared > 20
    assert not any(module.training for module in subject.distilled.modules())
    assert not any(parameter.requires_grad for parameter in subject.distilled.parameters())


def test_every_layer_learns(subject):
    rounded, scales_learned = quantized_layers(subject.rounded), 0
    for name, layer in quantized_layers(subject.distilled).items():
        assert not torch.equal(layer.packed_weight, rounded[name].packed_weight), name
        assert torch.equal(layer.weight_dilation, rounded[name].weight_dilation), name
        scales_learned += not torch.equal(layer.act_scale, rounded[name].act_scale)
    assert scales_learned


def test_without_feedback_and_steps_it_is_the_post_training_result(subject):
    assert_same_state(subject.distil(**UNTRAINED), subject.rounded)


def test_layers_that_share_an_input_still_share_their_tables(subject):
    layers = quantized_layers(subject.distilled)
    groups = {}
    for name in layers:
        block, _, last = name.rpartition(".")
        if last == "time_emb_proj":
            groups.setdefault("time embedding", []).append(name)
        elif last in ("to_q", "to_k", "to_v") and not block.endswith("attn2"):
            groups.setdefault(block, []).append(name)
        elif last in ("to_k", "to_v"):
            groups.setdefault("encoder_hidden_states", []).append(name)

    assert sum(len(names) >= 3 for names in groups.values()) >= 4
    for names in groups.values():
        for name in names[1:]:
            for table in ("weight_dilation", "act_scale", "act_zero_point"):
                assert torch.equal(getattr(layers[name], table), getattr(layers[names[0]], table)), (name, table)


@torch.no_grad()
def test_a_quantizer_that_an_earlier_block_has_learned_is_fixed(monkeypatch):
    scales, original = {}, distillation.FinishedBlocks.save

    def save(self, name, layers):
        for layer in layers.values():
            scales.setdefault(layer.input_quantizer, []).append(layer.input_quantizer.tables())
        original(self, name, layers)

    monkeypatch.setattr(distillation.FinishedBlocks, "save", save)
    unet = unet2d()
    distilled(unet, recorded(unet), DilateQuantConfig(**FEW_BLOCKS), iterations=20)

    shared = [tables for tables in scales.values() if len(tables) > 1]  # the time embedding's
    assert shared
    for (scale, zero_point), *later in shared:
        assert all(torch.equal(scale, s) and torch.equal(zero_point, z) for s, z in later)


def test_a_distilled_unet_fuses(subject):
    fused = copy.deepcopy(subject.distilled)
    dq_runtime.fuse(fused)

    # Fused blocks round the same values; a few fall on the other side of a boundary.
    assert output_error(fused, subject.distilled, subject.calibration_set) < 1e-3


@torch.no_grad()
def test_a_distilled_unet_survives_saving_and_loading(subject, tmp_path):
    subject.distilled.save_pretrained(tmp_path)
    loaded = type(subject.distilled).from_pretrained(tmp_path)

    assert_same_state(loaded, subject.distilled)
    call = subject.calibration_set.calls[0]
    assert torch.equal(call.run(loaded).sample, call.run(subject.distilled).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_unets_are_distilled(dtype):
    unet = unet2d().to(dtype)
    calibration_set = recorded(unet)

    result = distilled(unet, calibration_set, DilateQuantConfig(**FEW_BLOCKS), polish_iterations=1)
    rounded = calibrate(copy.deepcopy(unet), calibration_set, DilateQuantConfig(**FEW_BLOCKS), distillation=None)
    assert result.dtype == dtype
    layers = quantized_layers(result).values()
    assert {layer.act_scale.dtype for layer in layers} == {torch.float32}
    assert {layer.bias.dtype for layer in layers if layer.bias is not None} == {dtype}
    error = output_error(result, unet, calibration_set)
    assert error < 0.7 * output_error(rounded, unet, calibration_set)


def first_gradients(monkeypatch, unet, calibration_set, block, **settings):
    """Of all that a block learns in steps, at its first step."""
    gradients, names = {}, []
    original_distil, original_step = training.Trainer.distil, torch.optim.Adam.step

    def distil(self, name, *args):
        names.append(name)
        original_distil(self, name, *args)

    def step(self, *args, **kwargs):
        if names[-1] not in gradients:
            gradients[names[-1]] = torch.cat([p.grad.flatten().double() for p in self.param_groups[0]["params"]])
        return original_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "distil", distil)
        patch.setattr(torch.optim.Adam, "step", step)
        distilled(unet, calibration_set, iterations=1, error_feedback=False, **settings)
    return gradients[block]


def test_gradients_do_not_underflow_in_float16(monkeypatch):
    """The derivative by a value is 1 / (number of values x error), here about 1e-9. float16 ends at 6e-8."""
    block = "down_blocks.0.downsamplers.0"
    unet = unet2d(sample_size=16, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    with torch.no_grad():
        unet.get_submodule(block).conv.weight *= 2.0**12  # for large errors
        with record(unet) as calibration_set:
            unet(torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)), 500)
    kept = ["time_embedding", "conv_in", "conv_out", "resnets", "attentions", "upsamplers"]
    config = DilateQuantConfig(dilation="weight", modules_to_not_convert=kept)

    gradients = [  # of the mean over a batch of which only eight samples are there
        first_gradients(monkeypatch, model, calibration_set, block, config=config, samples=8, batch_size=2**17)
        for model in (unet, copy.deepcopy(unet).half())
    ]
    # float16 rounds weights and activations to 11 bits, and the quantizers some of those the other way.
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.9


def test_what_a_layer_learns_does_not_depend_on_the_size_of_its_result():
    """A power of two changes no mantissa: a smaller error alone must not make training slower."""
    learned = []
    kept = ["conv_in", "conv_out", "down_blocks", "mid_block", "up_blocks", "linear_1"]
    for exponent in (0, -12):
        unet = unet2d()
        with torch.no_grad():
            unet.time_embedding.linear_2.weight *= 2.0**exponent
            unet.time_embedding.linear_2.bias *= 2.0**exponent
        settings = {"iterations": 10, "error_feedback": False, "learning_rate": 0.1}
        result = distilled(
            unet, recorded(unet), DilateQuantConfig(dilation="weight", modules_to_not_convert=kept), **settings
        )
        learned.append(result.time_embedding.linear_2)

    assert torch.equal(learned[0].packed_weight, learned[1].packed_weight)
    assert torch.equal(learned[0].act_scale, learned[1].act_scale)


def test_gradients_are_on_while_it_trains_whatever_the_caller_set(plain):
    with torch.no_grad():
        result = plain.distil()

    assert_same_state(result, plain.distilled)


def test_a_bf16_unet_whose_first_layer_is_quantized_can_be_polished():
    """While it is trained, that layer's fp32 parameters are the UNet's first; the UNet's dtype stays bf16."""
    unet = unet2d().bfloat16()
    calibration_set = recorded(unet)
    config = DilateQuantConfig(dilation="weight", modules_to_not_convert=["conv_out", "mid_block", "up_blocks"])

    result = distilled(unet, calibration_set, config, iterations=0, polish_iterations=1)
    assert isinstance(result.conv_in, QuantConv2d)
    assert output_error(result, unet, calibration_set) < 0.1


def test_arguments_without_dimensions_are_no_reason_to_fail():
    unet = unet2d_condition()
    calibration_set = recorded(unet, cross_attention_kwargs={"scale": torch.tensor(1.0)})

    result = distilled(unet, calibration_set, DilateQuantConfig(**FEW_BLOCKS), **UNTRAINED)
    assert quantized_layers(result)


def test_few_samples_of_a_timestep_are_worth_a_warning(plain, log):
    def lines():
        return [line for line in messages(log, logging.WARNING) if line.startswith("Only 3 samples of some timesteps")]

    plain.distil(**UNTRAINED | {"samples": 12})
    assert not lines()

    plain.distil(**UNTRAINED | {"samples": 9})
    (line,) = lines()
    assert "9 of all 3 timesteps" in line


@pytest.mark.parametrize("settings", [{"learning_rate": 1e6}, {"scale_learning_rate": 1e6}], ids=str)
def test_training_that_diverges_is_undone_and_named(plain, settings, log):
    result = plain.distil(**settings)

    without = plain.distil(iterations=0)
    error = plain.error(result)
    # Blocks are judged one at a time; what all of them do to the result may differ a little.
    assert error < 1.1 * plain.error(without)
    named = messages(log, logging.WARNING)
    for block in ("down_blocks.0.resnets.0", "down_blocks.1.attentions.0", "time_embedding.linear_1"):
        assert any(line.startswith(f"{block}: training ") for line in named), block


def test_a_polish_that_diverges_is_undone_and_named(plain, log):
    result = plain.distil(polish_iterations=2, polish_learning_rate=1e6)

    assert_same_state(result, plain.distilled)
    assert any(line.startswith("whole UNet: training ") for line in messages(log, logging.WARNING))


@pytest.mark.parametrize("make", [unet2d, unet2d_condition])
def test_polishing_helps_and_may_compute_activations_twice(make):
    unet = make()
    calibration_set, config = recorded(unet), DilateQuantConfig(**FEW_BLOCKS)
    settings = {"iterations": 0, "error_feedback": False, "polish_learning_rate": 1e-2, "scale_learning_rate": 3e-3}

    results = [
        distilled(unet, calibration_set, config, polish_iterations=6, gradient_checkpointing=twice, **settings)
        for twice in (False, True)
    ]
    rounded = calibrate(copy.deepcopy(unet), calibration_set, config, distillation=None)
    # Every timestep counts the same.
    at_timesteps = [CalibrationSet([call]) for call in calibration_set.calls]
    before = torch.tensor([output_error(rounded, unet, part) for part in at_timesteps])
    gains = [
        (torch.tensor([output_error(result, unet, part) for part in at_timesteps]) / before).mean().item()
        for result in results
    ]
    assert gains[0] < 0.97
    assert gains[1] == pytest.approx(gains[0], rel=0.05)  # the same gradients, summed alike but for fp32
    assert not results[1].is_gradient_checkpointing


def test_autocast_trains_nearly_as_well(plain):
    result = plain.distil(autocast=True)

    error = plain.error(result)
    assert error < 1.3 * plain.error(plain.distilled)  # bf16 has 8 bits
    assert result.dtype == torch.float32


def test_activations_lie_on_the_disk_while_a_block_is_trained_and_no_longer(plain, monkeypatch, tmp_path):
    original, sizes = training.Trainer._train, {}

    def train(self, name, *args):
        files = list((tmp_path / "activations").iterdir())
        sizes[name] = sum(file.stat().st_size for file in files)
        return original(self, name, *args)

    monkeypatch.setattr(training.Trainer, "_train", train)
    plain.distil(folder=tmp_path, iterations=0)
    # Inputs and target of 24 samples, 8 x 8: 16 channels each, and the time embedding of 64.
    assert sizes["down_blocks.0.resnets.0"] >= 4 * 24 * (2 * 16 * 64 + 64)
    assert not list((tmp_path / "activations").iterdir())


def test_targets_of_many_blocks_at_once_are_those_of_each_by_itself(plain, monkeypatch):
    original, wanted = training.outputs_of, []

    def outputs_of(unet, blocks, *args):
        wanted.append(len(blocks))
        return original(unet, blocks, *args)

    monkeypatch.setattr(training, "outputs_of", outputs_of)
    plain.distil(iterations=0)
    batches = len(wanted)
    assert wanted == batches * [6]

    wanted.clear()
    monkeypatch.setattr(training, "STORED_BYTES", 1)
    one_by_one = plain.distil()
    later = [1] * (batches - 1)
    assert wanted == [6, *later, 5, *later, 4, *later, 3, *later, 2, *later, 1, *later]
    assert_same_state(one_by_one, plain.distilled)


@pytest.fixture
def results(monkeypatch):
    """Names under which results of finished blocks are stored, and read."""
    put, get, names = TensorStore.__setitem__, TensorStore.__getitem__, {"stored": [], "read": []}

    def noting(what, original):
        def method(store, name, *tree):
            if name.startswith("output_"):
                names[what].append(name)
            return original(store, name, *tree)

        return method

    monkeypatch.setattr(TensorStore, "__setitem__", noting("stored", put))
    monkeypatch.setattr(TensorStore, "__getitem__", noting("read", get))
    return names


def test_each_block_reads_what_it_depends_on_alone(plain, results):
    plain.distil(**UNTRAINED)
    batches = len({name.rpartition("_")[2] for name in results["stored"]})
    assert len(set(results["stored"])) == len(results["stored"]) == 5 * batches  # none reads the sixth block's
    # The blocks: two linears of the time embedding, then conv1, conv2 and the shortcut of a resnet, conv_out.
    assert len(results["read"]) == 6 * batches


def test_blocks_run_once_for_each_batch_before_their_training_and_once_after(plain, monkeypatch):
    """However many blocks come after them."""
    calls, original = [], training.Trainer._call_block

    def call_block(self, block, i):
        calls.append(block)
        return original(self, block, i)

    monkeypatch.setattr(training.Trainer, "_call_block", call_block)
    plain.distil(**UNTRAINED | {"error_feedback": False})
    numbers = {block: calls.count(block) for block in calls}
    assert len(numbers) == 6
    assert len(set(numbers.values())) == 1


def test_layers_hold_more_than_four_bits_a_weight_in_their_block_alone(plain, monkeypatch):
    unpacked, original = [], training.Trainer.distil

    def distil(self, name, blocks, layers):
        original(self, name, blocks, layers)
        held = {other for other, layer in self.layers.items() if layer._values is not None}
        unpacked.append(held == layers.keys())

    monkeypatch.setattr(training.Trainer, "distil", distil)
    assert_same_state(plain.distil(), plain.distilled)
    assert unpacked == [True] * 6


def test_samples_whose_activations_do_not_fit_run_apart_and_train_together(plain, monkeypatch):
    batches, steps = [], []
    call_block, step = training.Trainer._call_block, torch.optim.Adam.step

    def counted(self, block, i):
        batches.append(len(self.indices[i]))
        return call_block(self, block, i)

    monkeypatch.setattr(training.Trainer, "_call_block", counted)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *args: steps.append(self) or step(self, *args))
    monkeypatch.setattr(distillation, "ACTIVATION_BYTES", 1)
    apart = plain.distil()

    assert set(batches) == {1}
    assert len(steps) == 2 * 6
    assert plain.error(apart) == pytest.approx(plain.error(plain.distilled), rel=0.1)


def test_what_no_later_block_reads_is_deleted(plain, monkeypatch):
    """At the end of the last block nothing is left."""
    left = []
    original = training.Trainer.store_outputs

    def store_outputs(self, name, block):
        original(self, name, block)
        left.append(sorted({key.rpartition("_")[0] for key in self.store._trees if key.startswith("output_")}))

    monkeypatch.setattr(training.Trainer, "store_outputs", store_outputs)
    plain.distil(**UNTRAINED)
    assert len(left) == 6
    assert max(map(len, left)) <= 3
    assert left[-1] == []


@pytest.mark.parametrize("most", [1, 200_000])
def test_targets_that_do_not_fit_on_the_disk_are_computed_again(plain, monkeypatch, tmp_path, most):
    monkeypatch.setattr(training, "STORED_BYTES", most)
    assert_same_state(plain.distil(), plain.distilled)

    with monkeypatch.context() as patch:
        interrupt(patch, training.Trainer, "distil", 3)
        with pytest.raises(KeyboardInterrupt):
            plain.distil(folder=tmp_path)
    assert_same_state(plain.distil(folder=tmp_path), plain.distilled)


def test_the_temporary_folder_is_removed(plain, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    original, seen = training.Trainer.distil, set()

    def distil(self, *args):
        seen.update(tmp_path.iterdir())
        return original(self, *args)

    monkeypatch.setattr(training.Trainer, "distil", distil)
    plain.distil(**UNTRAINED)
    assert len(seen) == 1
    assert isinstance(next(iter(seen)), Path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("samples", 0),
        ("batch_size", 0),
        ("iterations", -1),
        ("polish_iterations", -1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("scale_learning_rate", -1e-3),
        ("polish_learning_rate", float("inf")),
    ],
)
def test_settings_that_cannot_be_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be"):
        Distillation(**{name: value})


def test_progress_is_told_of_the_beginning_and_of_every_block(plain):
    told = []

    plain.distil(iterations=0, progress=lambda *report: told.append(report))

    names, numbers, counts = zip(*told, strict=True)
    assert numbers == tuple(range(len(told)))
    assert set(counts) == {len(told) - 1}
    assert names[0] == ""
    assert {"time_embedding.linear_1", "down_blocks.0.resnets.0"} <= set(names)


def test_progress_must_be_a_function():
    with pytest.raises(TypeError, match=r"^progress must be a function, got 3"):
        Distillation(progress=3)


def test_convolutions_keep_their_library_while_it_trains(plain, monkeypatch):
    # torch.backends.cudnn.flags turns off what it is not told about.
    seen, original = [], training.Trainer.distil

    def distil(self, *arguments):
        cudnn = torch.backends.cudnn
        seen.append((cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32))
        original(self, *arguments)

    monkeypatch.setattr(training.Trainer, "distil", distil)
    plain.distil(iterations=0)
    assert set(seen) == {(True, False, True, False)}


def test_transformers_of_a_block_may_compute_activations_twice(monkeypatch):
    unet = unet2d_condition()
    kept = ["conv_in", "conv_out", "time_embedding", "resnets", "downsamplers", "upsamplers"]
    config = DilateQuantConfig(dilation="weight", modules_to_not_convert=kept)
    calibration_set, forwards = recorded(unet), []
    monkeypatch.setattr(
        BasicTransformerBlock,
        "forward",
        lambda self, *args, _forward=BasicTransformerBlock.forward, **kwargs: (
            forwards.append(torch.is_grad_enabled()) or _forward(self, *args, **kwargs)
        ),
    )

    results, counts = [], []
    for twice in (False, True):
        forwards.clear()
        results.append(distilled(unet, calibration_set, config, gradient_checkpointing=twice))
        counts.append(sum(forwards))
    assert counts[1] == 2 * counts[0] > 0
    assert not results[1].is_gradient_checkpointing
    errors = [output_error(result, unet, calibration_set) for result in results]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_a_block_without_finite_second_moments_does_without_error_feedback(plain, monkeypatch, log):
    def overflow(self):
        raise ValueError("the inputs' second moments hold NaN or infinity")

    monkeypatch.setattr(training.SecondMoments, "rounded", overflow)
    result = plain.distil()

    assert plain.error(result) < plain.error(plain.rounded)
    assert any("mid_block" not in line and "no error feedback" in line for line in messages(log, logging.WARNING))


def test_training_that_is_judged_by_what_it_sees_says_so(plain, log):
    many = CalibrationSet(plain.calibration_set.calls * 4, plain.calibration_set.scheduler)
    for calibration_set, expected in ((plain.calibration_set, True), (varied(many), False)):
        log.clear()
        distilled(plain.unet, calibration_set, plain.config, iterations=0)
        assert any("uses the training samples" in line for line in messages(log, logging.WARNING)) == expected


def varied(calibration_set):
    """The same calls, each with other latents."""
    calls = [replace(call, sample=call.sample * (1 + i / 10)) for i, call in enumerate(calibration_set.calls)]
    return CalibrationSet(calls, calibration_set.scheduler)


@pytest.mark.cuda
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu_it_comes_as_close_as_on_the_cpu(plain, autocast):
    unet = copy.deepcopy(plain.unet).to("cuda")

    twice = [
        distilled(unet, plain.calibration_set, plain.config, autocast=autocast, polish_iterations=1) for _ in range(2)
    ]

    assert_same_state(*twice)
    assert plain.error(twice[0].to("cpu")) < (1.3 if autocast else 1.1) * plain.error(plain.distilled)
