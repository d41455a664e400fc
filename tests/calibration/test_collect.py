"""Collecting calibration data: the UNet's calls as a sampling run makes them, and nothing shared with the caller."""

import copy
import fcntl
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch.utils._pytree import tree_flatten

from dq_runtime import CalibrationSet, collect_from_pipeline, collect_from_scheduler, files, record
from dq_runtime.calibration.collect import RecordedCall
from dq_runtime.calibration.tree_files import write_tree

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' schedulers and NumPy 2

CHANNELS, TOKENS = 3, 32


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def unet():
    """Takes a class label as its third argument."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=4,
    ).eval()


@pytest.fixture(scope="module")
def unconditional_unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


@pytest.fixture(scope="module")
def condition_unet():
    """Takes encoder_hidden_states as its third argument, a class label as its fourth."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=CHANNELS,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        cross_attention_dim=TOKENS,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=4,
    ).eval()


def noise(batch, seed=0):
    return torch.randn(batch, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(seed))


def forward_hooks(unet):
    return [hook for module in unet.modules() for hook in (*module._forward_pre_hooks, *module._forward_hooks)]


@pytest.mark.parametrize(
    ("timestep", "recorded"),
    [
        (5, [5.0]),
        (2.5, [2.5]),
        (torch.tensor(7), [7.0]),
        (torch.tensor(749.25), [749.25]),
        (torch.tensor([3]), [3.0]),
        (torch.tensor([901, 1]), [901.0, 1.0]),
        (torch.tensor([0.5, 0.25], dtype=torch.float64), [0.5, 0.25]),
    ],
    ids=["int", "float", "0-d int64", "0-d fp32", "[1]", "[B]", "[B] fp64"],
)
@pytest.mark.parametrize("style", ["positional", "keyword"])
def test_a_call_is_recorded_as_it_was_made(condition_unet, timestep, recorded, style):
    sample, tokens, labels = noise(2), torch.randn(2, 5, TOKENS), torch.tensor([1, 3])
    with record(condition_unet) as calibration_set:
        if style == "positional":
            output = condition_unet(sample, timestep, tokens, class_labels=labels).sample
        else:
            output = condition_unet(
                class_labels=labels, encoder_hidden_states=tokens, timestep=timestep, sample=sample
            ).sample

    (call,) = calibration_set.calls
    assert torch.equal(call.sample, sample)
    assert call.timestep.dtype == torch.float32
    assert call.timestep.tolist() == recorded
    assert call.arguments.keys() == {"encoder_hidden_states", "class_labels"}
    assert torch.equal(call.arguments["encoder_hidden_states"], tokens)
    assert torch.equal(call.arguments["class_labels"], labels)
    assert torch.equal(call.run(condition_unet).sample, output)


def test_every_call_is_recorded_in_order_whoever_makes_it(unet):
    def somebody_else():
        unet(noise(1, seed=2), 30, class_labels=torch.tensor([2]))

    with record(unet) as calibration_set:
        unet(noise(2, seed=0), 10, class_labels=torch.tensor([0, 1]))
        unet(noise(2, seed=1), 10, class_labels=torch.tensor([0, 1]))
        somebody_else()

    assert [call.timestep.tolist() for call in calibration_set.calls] == [[10.0], [10.0], [30.0]]
    for seed, call in enumerate(calibration_set.calls):
        assert torch.equal(call.sample, noise(2 if seed < 2 else 1, seed))


def test_a_positional_class_label_of_unet2dmodel_keeps_its_name(unet):
    labels = torch.tensor([1, 3])
    with record(unet) as calibration_set:
        output = unet(noise(2), 5, labels).sample

    (call,) = calibration_set.calls
    assert call.arguments.keys() == {"class_labels"}
    assert torch.equal(call.run(unet).sample, output)


def test_no_positional_argument_of_unet2dconditionmodel_is_lost(condition_unet):
    tokens, labels = torch.randn(2, 5, TOKENS), torch.tensor([1, 3])
    with record(condition_unet) as calibration_set:
        output = condition_unet(noise(2), 5, tokens, labels).sample

    (call,) = calibration_set.calls
    assert torch.equal(call.arguments["encoder_hidden_states"], tokens)
    assert torch.equal(call.arguments["class_labels"], labels)
    assert torch.equal(call.run(condition_unet).sample, output)


def test_later_changes_in_place_do_not_reach_the_record(condition_unet):
    sample, timestep = noise(2), torch.tensor([4.0, 8.0])
    tokens, labels = torch.randn(2, 5, TOKENS), torch.tensor([1, 3])
    added = {"text_embeds": torch.randn(2, 6), "time_ids": [torch.ones(2)]}
    expected = copy.deepcopy((sample, timestep, tokens, labels, added))

    with record(condition_unet) as calibration_set:
        condition_unet(sample, timestep, tokens, class_labels=labels, added_cond_kwargs=added)
    for tensor in (sample, timestep, tokens, labels, added["text_embeds"], added["time_ids"][0]):
        tensor.zero_()
    added.clear()

    (call,) = calibration_set.calls
    arguments = call.arguments
    assert torch.equal(call.sample, expected[0])
    assert torch.equal(call.timestep, expected[1])
    assert torch.equal(arguments["encoder_hidden_states"], expected[2])
    assert torch.equal(arguments["class_labels"], expected[3])
    assert torch.equal(arguments["added_cond_kwargs"]["text_embeds"], expected[4]["text_embeds"])
    assert torch.equal(arguments["added_cond_kwargs"]["time_ids"][0], expected[4]["time_ids"][0])


def test_what_calls_share_is_held_and_saved_once(condition_unet, tmp_path):
    tokens, other = torch.randn(2, 5, TOKENS), torch.randn(2, 5, TOKENS)
    with record(condition_unet) as calibration_set:
        for condition in (tokens, tokens.clone(), other, other.half().float(), tokens):
            condition_unet(noise(2), 5, condition, class_labels=torch.tensor([1, 3]))
    calibration_set.save(tmp_path / "calls.pt")

    for calls in (calibration_set.calls, CalibrationSet.load(tmp_path / "calls.pt").calls):
        kept = [call.arguments["encoder_hidden_states"] for call in calls]
        for i, expected in enumerate((tokens, tokens, other, other.half().float(), tokens)):
            assert torch.equal(kept[i], expected)
        addresses = [tensor.data_ptr() for tensor in kept]
        assert addresses[0] == addresses[1]
        assert len(set(addresses)) == 4
        assert len({call.arguments["class_labels"].data_ptr() for call in calls}) == 1
        assert len({call.sample.data_ptr() for call in calls}) == 5


def test_the_record_holds_no_graph(unet):
    sample = noise(1).requires_grad_()
    with torch.enable_grad(), record(unet) as calibration_set:
        unet(sample, 5, class_labels=torch.tensor([1]))

    assert not calibration_set.calls[0].sample.requires_grad


def test_recording_does_not_change_what_the_unet_returns(unet):
    arguments = {"class_labels": torch.tensor([1, 3])}
    expected = unet(noise(2), 5, **arguments).sample

    with record(unet):
        assert torch.equal(unet(noise(2), 5, **arguments).sample, expected)


def test_the_hook_goes_with_the_block(unet):
    with record(unet) as calibration_set:
        unet(noise(1), 5, class_labels=torch.tensor([1]))
        assert len(forward_hooks(unet)) == 1
    unet(noise(1), 6, class_labels=torch.tensor([1]))

    assert not forward_hooks(unet)
    assert calibration_set.timesteps == [5.0]


def test_the_hook_goes_even_when_the_block_raises_and_the_calls_stay(unet):
    recorded = []

    def interrupted():
        with record(unet) as calibration_set:
            recorded.append(calibration_set)
            unet(noise(1), 5, class_labels=torch.tensor([1]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not forward_hooks(unet)
    assert recorded[0].timesteps == [5.0]


def test_a_record_replays_in_the_dtype_of_another_unet(condition_unet):
    with record(condition_unet) as calibration_set:
        condition_unet(noise(2), 5, torch.randn(2, 5, TOKENS), class_labels=torch.tensor([1, 3]))

    output = calibration_set.calls[0].run(copy.deepcopy(condition_unet).to(torch.bfloat16)).sample

    assert output.dtype == torch.bfloat16  # and the labels stayed integers, or the embedding would have raised
    assert bool(output.isfinite().all())


def test_timesteps_are_distinct_and_sorted_over_calls_and_samples(unet):
    labels = torch.tensor([1, 3])
    with record(unet) as calibration_set:
        unet(noise(2), torch.tensor([900.0, 2.5]), class_labels=labels)
        unet(noise(2), 30, class_labels=labels)
        unet(noise(2), torch.tensor([2.5, 30.0]), class_labels=labels)

    assert calibration_set.timesteps == [2.5, 30.0, 900.0]
    assert all(type(timestep) is float for timestep in calibration_set.timesteps)


def test_an_empty_set_names_the_remedy():
    with pytest.raises(ValueError, match=r"empty.*dq_runtime\.record"):
        _ = CalibrationSet().timesteps


SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(),
    "euler": lambda: EulerDiscreteScheduler(),
    "heun": lambda: HeunDiscreteScheduler(),
    "pndm": lambda: PNDMScheduler(skip_prk_steps=True),
    "dpmsolver++": lambda: DPMSolverMultistepScheduler(),
}


def trajectory_by_hand(unet, scheduler, sample, labels, num_inference_steps):
    """The inputs of the UNet's calls, for samples that run together."""
    scheduler.set_timesteps(num_inference_steps)
    sample = sample * scheduler.init_noise_sigma
    inputs = []
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, timestep)
        inputs.append((scaled.clone(), float(timestep)))
        predicted = unet(scaled, timestep, class_labels=labels, return_dict=False)[0]
        sample = scheduler.step(predicted, timestep, sample, return_dict=False)[0]
    return inputs


@pytest.mark.parametrize("name", SCHEDULERS)
def test_collecting_follows_the_real_trajectory(unet, name):
    labels = torch.tensor([0, 3, 1])
    calibration_set = collect_from_scheduler(
        unet, SCHEDULERS[name](), noise(3), num_inference_steps=5, arguments={"class_labels": labels}, batch_size=2
    )

    expected = []
    for rows in (slice(0, 2), slice(2, 3)):  # a fresh scheduler a batch: no state may pass from one to the next
        by_hand = trajectory_by_hand(unet, SCHEDULERS[name](), noise(3)[rows], labels[rows], 5)
        expected += [(sample, timestep, labels[rows]) for sample, timestep in by_hand]
    assert len(calibration_set.calls) == len(expected)
    for call, (sample, timestep, batch_labels) in zip(calibration_set.calls, expected, strict=True):
        assert torch.equal(call.sample, sample)
        assert call.timestep.tolist() == [timestep]
        assert torch.equal(call.arguments["class_labels"], batch_labels)
    assert not forward_hooks(unet)


def test_euler_timesteps_keep_their_fractions(unet):
    calibration_set = collect_from_scheduler(
        unet, SCHEDULERS["euler"](), noise(1), 5, {"class_labels": torch.tensor([1])}
    )

    assert calibration_set.timesteps == [0.0, 249.75, 499.5, 749.25, 999.0]


def test_pndm_repeats_a_call_but_not_a_timestep(unet):
    calibration_set = collect_from_scheduler(
        unet, SCHEDULERS["pndm"](), noise(1), 5, {"class_labels": torch.tensor([1])}
    )

    called_at = [call.timestep.item() for call in calibration_set.calls]
    assert len(called_at) == 6
    assert len(set(called_at)) == 5
    assert calibration_set.timesteps == sorted(set(called_at))


@pytest.mark.parametrize(
    ("pipeline_class", "scheduler_class"), [(DDIMPipeline, DDIMScheduler), (DDPMPipeline, DDPMScheduler)]
)
def test_collecting_from_a_pipeline_records_each_of_its_runs(unconditional_unet, pipeline_class, scheduler_class):
    def run_arguments(seed, steps, batch):
        generator = torch.Generator().manual_seed(seed)
        return {
            "batch_size": batch,
            "num_inference_steps": steps,
            "generator": generator,
            "output_type": "np",
        }

    pipeline = pipeline_class(unet=unconditional_unet, scheduler=scheduler_class())
    pipeline.set_progress_bar_config(disable=True)
    calibration_set = collect_from_pipeline(pipeline, iter([run_arguments(0, 2, 2), run_arguments(1, 4, 1)]))

    assert [call.sample.shape[0] for call in calibration_set.calls] == [2, 2, 1, 1, 1, 1]
    called_at = [call.timestep.item() for call in calibration_set.calls]
    assert called_at == [500.0, 0.0, 750.0, 500.0, 250.0, 0.0]
    assert calibration_set.timesteps == [0.0, 250.0, 500.0, 750.0]
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(calibration_set.calls[0].sample, start)
    assert not forward_hooks(pipeline.unet)


def test_a_saved_calibration_set_is_read_as_it_was(unconditional_unet, tmp_path):
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    calibration_set = collect_from_scheduler(unconditional_unet, scheduler, torch.randn(3, 3, 8, 8), 2)
    nested = {
        "added_cond_kwargs": {"text_embeds": torch.randn(3, 4).half(), "time_ids": None},
        "down_block_additional_residuals": (torch.randn(3, 2, 4, 4), torch.arange(3)),
        "return_dict": False,
        "scale": 0.5,
    }
    calibration_set.calls[0].arguments.update(nested)

    calibration_set.save(tmp_path / "calls.pt")
    loaded = CalibrationSet.load(tmp_path / "calls.pt")

    assert [file.name for file in tmp_path.iterdir()] == ["calls.pt"]
    assert loaded.timesteps == calibration_set.timesteps
    for call, expected in zip(loaded.calls, calibration_set.calls, strict=True):
        torch.testing.assert_close((call.sample, call.timestep), (expected.sample, expected.timestep), rtol=0, atol=0)
        leaves, structure = tree_flatten(call.arguments)
        expected_leaves, expected_structure = tree_flatten(expected.arguments)
        assert structure == expected_structure
        for leaf, expected_leaf in zip(leaves, expected_leaves, strict=True):
            assert type(leaf) is type(expected_leaf)
            if isinstance(leaf, torch.Tensor):
                assert leaf.dtype == expected_leaf.dtype
            assert torch.equal(leaf, expected_leaf) if isinstance(leaf, torch.Tensor) else leaf == expected_leaf
    assert type(loaded.scheduler) is DDIMScheduler
    assert torch.equal(loaded.scheduler.alphas_cumprod, scheduler.alphas_cumprod)
    assert loaded.scheduler.config.prediction_type == "v_prediction"


def own_memory():
    """Bytes of the process that no file backs."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def test_a_loaded_set_stays_on_disk_and_can_be_saved_over_its_own_file(tmp_path):
    file = tmp_path / "calls.pt"
    size = 64 * 2**20
    CalibrationSet([RecordedCall(torch.full((1, 1, size // 4), 3.0), torch.tensor([1.0]), {})]).save(file)

    before = own_memory()
    loaded = CalibrationSet.load(file)
    assert own_memory() - before < size / 4

    loaded.save(file)
    assert CalibrationSet.load(file).calls[0].sample.mean() == loaded.calls[0].sample.mean() == 3


def test_what_cannot_be_saved_is_named_and_leaves_the_file_alone(tmp_path):
    file = tmp_path / "calls.pt"
    one = RecordedCall(torch.zeros(1, 3, 8, 8), torch.tensor([1.0]), {})
    CalibrationSet([one]).save(file)
    before = file.read_bytes()

    with pytest.raises(ValueError, match=r"\['arguments'\]\['cross_attention_kwargs'\]\['gligen'\] is a object"):
        CalibrationSet([replace(one, arguments={"cross_attention_kwargs": {"gligen": object()}})]).save(file)
    assert file.read_bytes() == before
    loaded = CalibrationSet.load(file)
    assert (len(loaded.calls), loaded.scheduler) == (1, None)


@pytest.mark.parametrize("damage", ["half", "garbage", "empty", "another", "tensor"])
def test_a_damaged_calibration_set_is_refused(tmp_path, damage):
    file = tmp_path / "calls.pt"
    CalibrationSet([RecordedCall(torch.zeros(1, 3, 8, 8), torch.tensor([1.0]), {})]).save(file)
    content = file.read_bytes()
    if damage in ("another", "tensor"):
        torch.save({"state": 1} if damage == "another" else torch.zeros(3), file)
    else:
        file.write_bytes({"half": content[: len(content) // 2], "garbage": b"\xff" * 99, "empty": b""}[damage])

    with pytest.raises(ValueError, match=f"{file} holds no calibration set: record it again"):
        CalibrationSet.load(file)


@pytest.fixture
def saved(tmp_path):
    """The file of a set, and the set."""
    generator = torch.Generator().manual_seed(0)
    calls = [
        RecordedCall(torch.randn(2, 3, 4, 4, generator=generator), torch.tensor([float(t)]), {"y": (torch.ones(2), 1)})
        for t in (1, 500)
    ]
    CalibrationSet(calls, DDIMScheduler()).save(tmp_path / "calls.pt")
    return tmp_path / "calls.pt", calls


def test_every_flipped_bit_of_a_file_is_found(saved):
    file, _ = saved
    content = file.read_bytes()
    for place in range(0, len(content), len(content) // 150):
        flipped = bytearray(content)
        flipped[place] ^= 0x40
        file.write_bytes(flipped)
        with pytest.raises(ValueError, match=f"{file} holds no calibration set: record it again"):
            CalibrationSet.load(file)


def test_every_truncated_file_is_refused(saved):
    file, _ = saved
    content = file.read_bytes()
    for length in (1, 7, 8, 9, 100, len(content) // 4, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{file} holds no calibration set: record it again"):
            CalibrationSet.load(file)


def write(file, **changes):
    content = {"calls": [], "scheduler": None} | changes
    with file.open("wb") as stream:
        write_tree(stream, content)


@pytest.mark.parametrize(
    ("scheduler", "found"),
    [
        ({"_class_name": "AutoencoderTiny"}, "is no scheduler"),
        ({"_class_name": "__version__"}, "is no scheduler"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 10**12}, "num_train_timesteps must be at most"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": "many"}, "num_train_timesteps must be an integer"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "unknown"}, "unknown"),
        ({}, "_class_name"),
    ],
)
def test_only_schedulers_are_made_of_a_file(tmp_path, scheduler, found):
    write(tmp_path / "calls.pt", scheduler=json.dumps(scheduler))

    with pytest.raises(ValueError, match=rf"calls\.pt holds no calibration set.*{found}"):
        CalibrationSet.load(tmp_path / "calls.pt")


@pytest.mark.parametrize(
    "call",
    [
        {"sample": torch.zeros(1), "timestep": torch.tensor([float("nan")]), "arguments": {}},
        {"sample": 3, "timestep": torch.tensor([1.0]), "arguments": {}},
        {"sample": torch.zeros(1)},
        {"unknown": 1},
        3,
    ],
)
def test_what_is_no_call_is_refused(tmp_path, call):
    write(tmp_path / "calls.pt", calls=[call])

    with pytest.raises(ValueError, match="holds no calibration set"):
        CalibrationSet.load(tmp_path / "calls.pt")


def test_only_the_owner_may_read_a_file_and_a_link_is_replaced(saved, tmp_path):
    file, calls = saved
    assert file.stat().st_mode & 0o777 == 0o600
    (tmp_path / "precious").write_text("precious")
    link = tmp_path / "link.pt"
    link.symlink_to(tmp_path / "precious")

    CalibrationSet(calls).save(link)
    assert not link.is_symlink()
    assert (tmp_path / "precious").read_text() == "precious"
    assert len(CalibrationSet.load(link).calls) == 2


def test_a_failed_save_leaves_the_old_file_and_nothing_else(saved, monkeypatch):
    file, calls = saved

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        CalibrationSet(calls[:1]).save(file)
    assert [path.name for path in file.parent.iterdir()] == ["calls.pt"]
    assert len(CalibrationSet.load(file).calls) == 2


def test_what_a_killed_save_left_is_removed_and_what_another_process_writes_is_not(saved):
    file, calls = saved
    killed, running, foreign = (
        file.with_name(name)
        for name in (".calls.pt.0123456789abcdef.partial", ".calls.pt.fedcba9876543210.partial", "calls.pt.partial")
    )
    for path in (killed, running, foreign):
        path.write_bytes(b"half")
    with running.open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        CalibrationSet(calls).save(file)

    assert {path.name for path in file.parent.iterdir()} == {"calls.pt", running.name, foreign.name}


def test_a_scheduler_that_diffusers_does_not_have_is_not_known(tmp_path):
    class Ours(DDIMScheduler):
        pass

    CalibrationSet([RecordedCall(torch.zeros(1, 3, 8, 8), torch.tensor([1.0]), {})], Ours()).save(tmp_path / "calls.pt")
    assert CalibrationSet.load(tmp_path / "calls.pt").scheduler is None
