"""``save_pretrained`` of quantized models: the old or the new checkpoint, and the files of others, whatever happens."""

import copy
import errno
import os
import pickle
import shutil

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel
from killed_saves import killed_after, killed_at_event, loaded_from, number_of_events, with_full_disk

from dq_runtime import saving
from dq_runtime.layers import quantized_layers

WEIGHTS = "diffusion_pytorch_model.safetensors"
SINGLE, SHARDS = {}, {"max_shard_size": "200KB"}
ARGUMENTS = pytest.mark.parametrize("arguments", [SINGLE, SHARDS], ids=["single file", "shards"])


@pytest.fixture(scope="module")
def old(unet2d_condition):
    return unet2d_condition.quantized


@pytest.fixture(scope="module")
def new(unet2d_condition):
    """The UNet with other timesteps and biases."""
    unet = unet2d_condition.copy()
    unet.hf_quantizer.quantization_config.timesteps = [0.0, 10.0, 20.0, 30.0]
    for layer in quantized_layers(unet).values():
        if layer.bias is not None:
            layer.bias.data += 0.01
    return unet


@pytest.fixture
def found_in(old, new):
    def found_in(folder):
        return loaded_from(folder, old=old.state_dict(), new=new.state_dict())

    return found_in


@pytest.mark.supports(
    "Saving and loading",
    "killed saves",
    "leave the old or the new checkpoint",
    "a mount point or the current folder may be left without `config.json`",
)
@ARGUMENTS
def test_a_killed_save_leaves_the_old_or_the_new_checkpoint(old, new, tmp_path, found_in, arguments):
    folder, found = tmp_path / "unet", []

    def save():
        new.save_pretrained(folder, **arguments)

    old.save_pretrained(folder, **arguments)
    events = number_of_events(save)
    step = 2 if arguments is SINGLE else 5
    for event in (2, *range(events - 11, events, step)):  # at the end one checkpoint replaces the other
        if not found or found[-1] == "new":
            old.save_pretrained(folder, **arguments)
        assert killed_at_event(save, event)
        found.append(found_in(folder))
    assert found == sorted(found, reverse=True)
    assert set(found) == {"old", "new"}

    new.save_pretrained(folder, **arguments)
    assert found_in(folder) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]  # nothing of the killed ones


def test_a_save_that_is_killed_at_some_moment_leaves_the_old_or_the_new_checkpoint(old, new, tmp_path, found_in):
    for seconds in (0.01, 0.03, 0.1):
        old.save_pretrained(tmp_path / "unet")
        killed_after(lambda: new.save_pretrained(tmp_path / "unet"), seconds)
        assert found_in(tmp_path / "unet") in ("old", "new")


@ARGUMENTS
@pytest.mark.parametrize("largest", [10, 10_000, 180_000])
def test_a_full_disk_leaves_the_old_checkpoint(old, new, tmp_path, found_in, arguments, largest):
    old.save_pretrained(tmp_path / "unet", **arguments)

    with_full_disk(lambda: new.save_pretrained(tmp_path / "unet", **arguments), largest)
    assert found_in(tmp_path / "unet") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]


@pytest.fixture(params=["exchange", "no exchange", "current folder"])
def way(request, tmp_path, monkeypatch):
    """Each way to replace a filled folder."""
    folder = tmp_path / "unet"
    folder.mkdir(mode=0o750)
    if request.param == "no exchange":

        def unsupported(a, b):
            raise OSError(errno.EINVAL, "not supported")

        monkeypatch.setattr(saving, "_exchange", unsupported)
    if request.param == "current folder":
        monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("arguments", [(SINGLE, SINGLE), (SINGLE, SHARDS), (SHARDS, SINGLE), (SHARDS, SHARDS)])
def test_a_new_checkpoint_replaces_the_old_one_and_no_other_file(old, new, way, found_in, arguments):
    old.save_pretrained(way, **arguments[0])
    (way / "README.md").write_text("mine")
    (way / "diffusion_pytorch_model.fp16.safetensors").write_text("another variant")
    (way / "samples" / "deep").mkdir(parents=True)
    (way / "samples" / "deep" / "image.png").write_text("image")
    (way / "link").symlink_to("nowhere")

    new.save_pretrained(way, **arguments[1])
    assert found_in(way) == "new"
    assert (way / "README.md").read_text() == "mine"
    assert (way / "diffusion_pytorch_model.fp16.safetensors").read_text() == "another variant"
    assert (way / "samples" / "deep" / "image.png").read_text() == "image"
    assert os.readlink(way / "link") == "nowhere"
    assert way.stat().st_mode & 0o777 == 0o750
    weights = [path.name for path in way.glob("diffusion_pytorch_model*") if "fp16" not in path.name]
    assert weights == [WEIGHTS] if arguments[1] is SINGLE else WEIGHTS not in weights
    assert [path.name for path in way.parent.iterdir()] == ["unet"]


@pytest.mark.parametrize("way", ["current folder"], indirect=True)
def test_where_folders_cannot_change_places_a_kill_leaves_no_mixture(old, new, way, found_in):
    found, event = [], 0
    old.save_pretrained(way)
    while killed_at_event(lambda: new.save_pretrained(way), event):
        found.append(found_in(way))
        old.save_pretrained(way)
        event += 9
    assert set(found) <= {"old", "new", "refused"}
    assert "old" in found


def test_an_error_leaves_the_old_checkpoint_and_no_other_folder(old, new, tmp_path, found_in, monkeypatch):
    old.save_pretrained(tmp_path / "unet")
    monkeypatch.setattr(type(new), "save_config", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        new.save_pretrained(tmp_path / "unet")
    monkeypatch.undo()

    assert found_in(tmp_path / "unet") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]


def test_a_link_to_a_folder_stays_a_link(old, new, tmp_path, found_in):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").symlink_to("there")

    for unet in (old, new):
        unet.save_pretrained(tmp_path / "here")
    assert (tmp_path / "here").is_symlink()
    assert found_in(tmp_path / "there") == "new"


def test_variants_live_side_by_side(old, new, tmp_path, found_in):
    new.save_pretrained(tmp_path, variant="int4", **SHARDS)
    new.save_pretrained(tmp_path, variant="other")
    new.save_pretrained(tmp_path, variant="int4")

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "config.json", "diffusion_pytorch_model.int4.safetensors", "diffusion_pytorch_model.other.safetensors",
    ]  # fmt: skip
    for variant in ("int4", "other"):
        UNet2DConditionModel.from_pretrained(tmp_path, variant=variant)


def test_pickled_weights_replace_safetensors(old, new, tmp_path, found_in):
    old.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path, safe_serialization=False)

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.bin",
    ]
    assert found_in(tmp_path) == "new"


def test_another_process_of_a_distributed_run_leaves_the_config_alone(old, tmp_path, found_in):
    old.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors").touch()
    old.save_pretrained(tmp_path, is_main_process=False)

    assert len(list(tmp_path.iterdir())) == 4
    assert found_in(tmp_path) == "old"


def test_a_loaded_unet_is_saved_over_its_own_files(old, new, tmp_path, found_in):
    new.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)

    loaded.save_pretrained(tmp_path, **SHARDS)
    loaded.save_pretrained(tmp_path)
    assert found_in(tmp_path) == "new"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_a_copy_saves_itself(old, tmp_path, found_in, duplicate):
    changed = duplicate(old)
    changed.conv_in.weight.data += 1
    changed.save_pretrained(tmp_path)

    assert found_in(tmp_path) == "mixture"
    assert torch.equal(UNet2DConditionModel.from_pretrained(tmp_path).conv_in.weight, changed.conv_in.weight)


@pytest.mark.parametrize("dequantized", [False, True])
def test_floating_point_models_are_saved_by_diffusers_alone(unet2d_condition, tmp_path, monkeypatch, dequantized):
    monkeypatch.setattr(saving, "_staging", None)
    unet = unet2d_condition.copy().dequantize() if dequantized else unet2d_condition.stock
    unet.save_pretrained(tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]


def test_a_unet_that_nobody_else_holds_is_saved(old, tmp_path, found_in):
    copy.deepcopy(old).save_pretrained(tmp_path)

    assert found_in(tmp_path) == "old"


def test_a_pipeline_passes_its_arguments_on(unet2d, tmp_path):
    DDIMPipeline(unet2d.copy(), DDIMScheduler()).save_pretrained(tmp_path, variant="int4", max_shard_size="100KB")

    assert len(list((tmp_path / "unet").glob("diffusion_pytorch_model.int4-*.safetensors"))) > 1


def test_what_is_pushed_to_the_hub_is_the_checkpoint(old, new, tmp_path, monkeypatch, found_in):
    pushed = tmp_path / "pushed"
    module = __import__("diffusers.models.modeling_utils", fromlist=["x"])

    class Repository:
        repo_id = "me/unet"

    class Card:
        def save(self, file):
            open(file, "w").close()

    def upload(self, folder, repo_id, **options):
        assert (repo_id, options) == ("me/unet", {"token": "t", "commit_message": "m", "create_pr": False})
        shutil.copytree(folder, pushed)

    monkeypatch.setattr(module, "create_repo", lambda name, **options: Repository if name == "local" else None)
    monkeypatch.setattr(module, "load_or_create_model_card", lambda repo_id, **options: Card())
    monkeypatch.setattr(module, "populate_model_card", lambda card: card)
    monkeypatch.setattr(UNet2DConditionModel, "_upload_folder", upload)

    old.save_pretrained(tmp_path / "local", push_to_hub=True, token="t", commit_message="m")
    assert found_in(pushed) == found_in(tmp_path / "local") == "old"
    assert (pushed / "README.md").exists()
