"""Replaying recorded calls: in which order blocks come, and what is seen of each."""

import copy

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from dq_runtime import DilateQuantConfig
from dq_runtime.architectures.architecture import result_tensor
from dq_runtime.calibration.collect import RecordedCall
from dq_runtime.calibration.deferred import deferred, on_meta
from dq_runtime.calibration.replay import (
    TensorStore,
    blocks_in_order,
    inputs_of,
    outputs_of,
    sources_of,
)
from dq_runtime.convert import plan_conversion


def unet2d():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=4,
    ).eval()  # fmt: skip


def unet2d_condition(**changes):
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=6, in_channels=2, out_channels=2, addition_embed_type="text",
        addition_embed_type_num_heads=2, encoder_hid_dim=6,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **changes,
    ).eval()  # fmt: skip


def some_calls(unet):
    """Two samples each, a timestep of their own in the second."""
    generator = torch.Generator().manual_seed(0)
    calls = []
    for timestep in ([10.0], [500.0, 20.0], [900.0]):
        sample = torch.randn(2, unet.config.in_channels, 8, 8, generator=generator)
        if isinstance(unet, UNet2DModel):
            arguments = {"class_labels": torch.randint(0, 4, (2,), generator=generator)}
        else:
            arguments = {"encoder_hidden_states": torch.randn(2, 5, 6, generator=generator)}
        calls.append(RecordedCall(sample, torch.tensor(timestep), arguments))
    return calls


@pytest.fixture(params=[unet2d, unet2d_condition])
def unet(request):
    return request.param()


@pytest.fixture
def layers(unet):
    return plan_conversion(unet, DilateQuantConfig(modules_to_not_convert=[])).layers


UNET2D_BLOCKS = [
    "time_embedding.linear_1", "time_embedding.linear_2", "conv_in",
    "down_blocks.0.resnets.0", "down_blocks.0.downsamplers.0",
    "down_blocks.1.resnets.0", "down_blocks.1.attentions.0",
    "mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1",
    "up_blocks.0.resnets.0", "up_blocks.0.attentions.0", "up_blocks.0.resnets.1", "up_blocks.0.attentions.1",
    "up_blocks.0.upsamplers.0", "up_blocks.1.resnets.0", "up_blocks.1.resnets.1", "conv_out",
]  # fmt: skip


def test_blocks_come_in_forward_order(unet, layers):
    blocks = blocks_in_order(unet, layers.values(), some_calls(unet)[0])

    names = [name for name in blocks if name.startswith(("time_embedding", "conv", "down", "mid", "up"))]
    assert names == UNET2D_BLOCKS
    if isinstance(unet, UNet2DConditionModel):
        others = [name for name in blocks if name not in names]
        assert others  # the text's embedding and projection
        assert all(type(blocks[name]) is nn.Linear or "add_embedding" in name for name in others)
        order = list(blocks)
        assert all(order.index(name) < order.index("conv_in") for name in others)
    for name, block in blocks.items():
        assert block is unet.get_submodule(name)


def test_a_transformer_of_several_layers_is_taken_apart():
    deep = unet2d_condition(transformer_layers_per_block=(1, 2))
    layers = plan_conversion(deep, DilateQuantConfig()).layers

    blocks = list(blocks_in_order(deep, layers.values(), some_calls(deep)[0]))
    attention = "mid_block.attentions.0"
    assert [name for name in blocks if name.startswith(attention)] == [
        f"{attention}.{part}" for part in ("proj_in", "transformer_blocks.0", "transformer_blocks.1", "proj_out")
    ]


def test_every_layer_is_in_exactly_one_block(unet, layers):
    blocks = blocks_in_order(unet, layers.values(), some_calls(unet)[0])

    for name, layer in layers.items():
        assert sum(layer in set(block.modules()) for block in blocks.values()) == 1, name


def test_blocks_without_a_wanted_layer_are_left_out(unet, layers):
    wanted = ["mid_block.resnets.1.conv1", "down_blocks.1.attentions.0.to_q", "conv_in"]
    if isinstance(unet, UNet2DConditionModel):
        wanted[1] = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"

    blocks = blocks_in_order(unet, [layers[name] for name in wanted], some_calls(unet)[0])
    assert list(blocks) == ["conv_in", "down_blocks.1.attentions.0", "mid_block.resnets.1"]


def hook_count(unet):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in unet.modules())


def assert_same_tree(actual, expected):
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same_tree(actual[key], expected[key])
    elif isinstance(expected, (tuple, list)):
        assert type(actual) is type(expected)
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same_tree(a, e)
    else:
        assert actual == expected


def test_inputs_and_output_of_a_block_are_those_of_the_whole_forward(unet, layers):
    calls = some_calls(unet)
    blocks = blocks_in_order(unet, layers.values(), calls[0])
    for call in calls[:2]:
        seen = {}

        def keep(block, args, kwargs, output, seen=seen):
            seen.setdefault(block, copy.deepcopy((args, kwargs, result_tensor(output))))

        handles = [block.register_forward_hook(keep, with_kwargs=True) for block in blocks.values()]
        call.run(unet)
        for handle in handles:
            handle.remove()
        outputs = {}
        outputs_of(unet, blocks, call, lambda name, output, outputs=outputs: outputs.setdefault(name, output) is output)
        assert list(outputs) == list(blocks)
        for name, block in blocks.items():
            *expected_inputs, expected_output = seen[block]
            args, kwargs = inputs_of(unet, block, call)
            assert_same_tree([args, kwargs], expected_inputs)
            assert torch.equal(outputs[name], expected_output), name
            assert not outputs[name].requires_grad
            with torch.no_grad():  # what was seen is all that the block needs
                assert torch.equal(result_tensor(block(*args, **kwargs)), expected_output), name
    assert hook_count(unet) == 0


def test_the_forward_stops_at_the_block(unet, layers):
    call = some_calls(unet)[0]
    blocks = blocks_in_order(unet, layers.values(), call)
    names = list(blocks)
    here = names.index("mid_block.attentions.0")
    called = []
    handles = [
        block.register_forward_hook(lambda _, args, output, name=name: called.append(name))
        for name, block in blocks.items()
    ]
    inputs_of(unet, blocks[names[here]], call)
    assert called == names[:here]

    called.clear()
    outputs_of(unet, {name: blocks[name] for name in names[: here + 1]}, call, lambda name, output: True)
    assert called == names[: here + 1]

    called.clear()
    outputs_of(unet, blocks, call, lambda name, output: name != names[here])
    assert called == names[: here + 1]
    for handle in handles:
        handle.remove()
    assert hook_count(unet) == 0


def test_hooks_go_also_where_the_block_is_not_reached_or_fails(unet, layers):
    call = some_calls(unet)[0]
    with pytest.raises(ValueError, match="another path"):
        inputs_of(unet, nn.Linear(1, 1), call)
    broken = RecordedCall(call.sample[:, :1], call.timestep, call.arguments)
    block = unet.mid_block.resnets[0]
    with pytest.raises(RuntimeError, match="channels"):
        inputs_of(unet, block, broken)
    with pytest.raises(RuntimeError, match="channels"):
        outputs_of(unet, {"": block}, broken, lambda name, output: True)
    with pytest.raises(RuntimeError, match="channels"):
        blocks_in_order(unet, layers.values(), broken)
    assert hook_count(unet) == 0


def counted(blocks, called):
    """Appends a block's name whenever the block computes."""

    def count(name, forward):
        def counting(*args, **kwargs):
            called.append(name)
            return forward(*args, **kwargs)

        return counting

    for name, block in blocks.items():
        block.forward = count(name, block.forward)


def outputs_in(unet, blocks, call):
    """What each block returns to a call."""
    outputs = {}
    handles = [
        block.register_forward_hook(lambda _, args, output, name=name: outputs.setdefault(name, output))
        for name, block in blocks.items()
    ]
    call.run(unet)
    for handle in handles:
        handle.remove()
    return outputs


def finished_with(blocks, outputs, read):
    """The argument ``finished`` of ``inputs_of``, which notes the outputs that are read."""

    def output(name):
        def value():
            read.append(name)
            return outputs[name]

        return lambda: deferred(name, on_meta(outputs[name]), torch.device("cpu"), value)

    return {block: output(name) for name, block in blocks.items()}


def test_inputs_depend_on_few_blocks_which_do_not_run_again(unet, layers):
    call, called = some_calls(unet)[1], []
    blocks = blocks_in_order(unet, layers.values(), call)
    outputs = outputs_in(unet, blocks, call)
    expected = {name: inputs_of(unet, block, call) for name, block in blocks.items()}
    sources = sources_of(unet, blocks, call)
    counted(blocks, called)

    earlier = {}
    for name, block in blocks.items():
        read = []
        assert_same_tree(inputs_of(unet, block, call, finished_with(earlier, outputs, read)), expected[name])
        assert len(read) == len(set(read))
        assert set(read) == sources[name]
        earlier[name] = block
    assert called == []
    assert max(map(len, sources.values())) <= 4  # the sample, its skip, the embeddings of time and text
    assert {"up_blocks.1.resnets.0", "conv_in", "time_embedding.linear_2"} <= sources["up_blocks.1.resnets.1"]


def test_models_that_change_an_output_in_place_are_replayed_with_values(unet, layers, monkeypatch):
    call = some_calls(unet)[0]
    blocks = blocks_in_order(unet, layers.values(), call)
    original = type(unet).forward

    def forward(self, *args, **kwargs):
        handle = self.conv_in.register_forward_hook(lambda _, args, output: output.mul_(2))
        try:
            return original(self, *args, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(type(unet), "forward", forward)
    outputs = outputs_in(unet, blocks, call)
    last = blocks.pop("conv_out")
    expected = inputs_of(unet, last, call)
    plain = outputs | {"conv_in": outputs["conv_in"] / 2}

    assert_same_tree(inputs_of(unet, last, call, finished_with(blocks, plain, [])), expected)
    assert sources_of(unet, blocks, call)["mid_block.resnets.0"] >= {"conv_in"}


def test_a_block_that_is_called_again_computes_again(unet, monkeypatch):
    block, second, call = unet.conv_in, unet.mid_block.resnets[0], some_calls(unet)[0]
    other = torch.ones(1, unet.config.in_channels, 4, 4)
    monkeypatch.setattr(unet.mid_block, "forward", lambda x, temb, **_: second(x + block(other).sum(), temb))
    expected = inputs_of(unet, second, call)
    outputs = outputs_in(unet, {"conv_in": block}, call)

    assert_same_tree(inputs_of(unet, second, call, finished_with({"conv_in": block}, outputs, [])), expected)
    assert "forward" not in vars(block)


def test_replaced_forwards_come_back_after_an_error_too(unet):
    call = some_calls(unet)[0]
    block, replaced = unet.mid_block.resnets[0], unet.conv_in
    replacement = replaced.forward = lambda x: x + 1
    finished = finished_with({"conv_in": replaced, "time": unet.time_embedding.linear_1}, {"time": torch.ones(1)}, [])

    with pytest.raises(RuntimeError, match="reduction dim"):  # ones have another shape than the embedding
        inputs_of(unet, block, call, finished)
    assert replaced.forward is replacement
    assert "forward" not in vars(unet.time_embedding.linear_1)


def test_a_blocks_result_is_found_in_whatever_it_returns():
    tensor = torch.ones(2)

    for output in (tensor, (tensor,), (None, tensor), {"sample": tensor}, [3, (tensor, torch.zeros(1))]):
        assert result_tensor(output) is tensor


TREE = (
    (torch.arange(12.0).view(3, 4).T, torch.tensor([1, 2], dtype=torch.int64)),
    {
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "deep": {"bf16": torch.full((2, 1, 3), 0.1, dtype=torch.bfloat16), "flag": torch.tensor([True, False])},
        "scalar": torch.tensor(3.25),
        "row": torch.arange(6.0).expand(2, 6),
        "empty": torch.empty(0, 4),
        "none": None,
        "number": 0.5,
        "text": "a",
        "list": [1, torch.ones(1, dtype=torch.int8), (None,)],
    },
)


def test_a_tree_comes_back_from_the_disk_as_it_was(tmp_path):
    store = TensorStore(tmp_path / "deep" / "folder")
    store["a"], store["b"] = TREE, torch.ones(3)
    store["constants alone"] = {"x": 1, "y": None}

    assert_same_tree(store["a"], TREE)
    assert_same_tree(store["a"], TREE)  # reading takes nothing away
    assert torch.equal(store["b"], torch.ones(3))
    assert store["constants alone"] == {"x": 1, "y": None}
    store["b"] = torch.zeros(2, requires_grad=True)
    assert torch.equal(store["b"], torch.zeros(2))
    assert not store["b"].requires_grad


def test_memory_layouts_come_back_too(tmp_path):
    store, image = TensorStore(tmp_path), torch.randn(2, 3, 4, 5)
    layouts = [image, image.transpose(1, 3), image.permute(2, 0, 3, 1), image[..., 0], image[:, :1]]
    layouts += [torch.randn(1, 3, 4).expand(2, 3, 4), torch.tensor(1.0)]
    for shape in ((2, 3, 4, 5), (2, 3, 1, 1), (2, 1, 4, 5), (1, 1, 4, 4)):
        layouts += [torch.randn(shape), torch.randn(shape).to(memory_format=torch.channels_last)]

    store["images"] = layouts
    for restored, expected in zip(store["images"], layouts, strict=True):
        assert torch.equal(restored, expected)
        dense = torch.empty_like(expected)  # without the gaps of a slice
        assert restored.stride() == dense.stride()


def test_files_of_other_names_stay_and_are_not_read(tmp_path):
    TensorStore(tmp_path, "earlier.")["x"] = torch.ones(3)

    with TensorStore(tmp_path, "this.") as store:
        assert "x" not in store
        store["x"] = torch.zeros(3)
    assert [file.name for file in tmp_path.iterdir()] == ["earlier.x.safetensors"]
    assert (tmp_path / "earlier.x.safetensors").stat().st_mode & 0o777 == 0o600


def test_views_of_one_tensor_may_be_stored_together(tmp_path):
    store, whole = TensorStore(tmp_path), torch.arange(6.0)

    store["views"] = whole, whole[:3], whole
    assert_same_tree(store["views"], (whole, whole[:3], whole))


def test_stored_tensors_are_on_the_disk_and_are_deleted_at_the_end(tmp_path):
    other = tmp_path / "not the stores"
    other.touch()
    with TensorStore(tmp_path) as store:
        for i in range(3):
            store[f"inputs_{i}"] = torch.full((1000,), float(i))
        assert len(list(tmp_path.iterdir())) == 4
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) >= 3 * 4000

        assert store.nbytes == 3 * 4000
        store["inputs_2"] = torch.ones(10), {"x": torch.ones(2, dtype=torch.float16)}, None
        assert store.nbytes == 2 * 4000 + 44
        del store["inputs_0"]
        assert store.nbytes == 4044

    assert store.nbytes == 0
    assert list(tmp_path.iterdir()) == [other]
    with pytest.raises(KeyError):
        store["inputs_0"]


def test_mapped_tensor_is_read_from_its_file(tmp_path):
    weight = torch.randn(64, 3, 3, 3).to(memory_format=torch.channels_last)

    with TensorStore(tmp_path) as store:
        mapped = store.mapped("weight", weight)
        assert torch.equal(mapped, weight)
        assert mapped.stride() == weight.stride()
        (file,) = tmp_path.iterdir()
        content = bytearray(file.read_bytes())
        content[-4:] = np.float32(7.0).tobytes()  # the last element
        with file.open("r+b") as stream:
            stream.write(content)
        assert 7.0 in mapped
