"""Checkpoints of older versions of dq_runtime, and older versions of diffusers with fewer hooks for quantizers."""

import pytest
from diffusers import UNet2DModel
from diffusers.quantizers.base import DiffusersQuantizer
from safetensors.torch import load_file, save_file

from dq_runtime import diffusers_quantizer
from dq_runtime.diffusers_quantizer import DilateQuantizer

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def old_checkpoint(unet2d, tmp_path):
    """Packed weights have the name ``weight``, and there is no digest."""
    unet2d.quantized.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    old = {n.replace("packed_weight", "weight"): t for n, t in tensors.items() if "digest" not in n}
    save_file(old, tmp_path / WEIGHTS)
    return tmp_path


@pytest.mark.supports(
    "Saving and loading",
    "checkpoints of older versions of dq_runtime",
    "load with a warning",
    "with diffusers 0.39 or newer",
)
@pytest.mark.skipif(not diffusers_quantizer.RENAMES, reason="diffusers before 0.39 cannot rename tensors")
@pytest.mark.parametrize("arguments", [{}, {"device_map": "cpu"}])
def test_checkpoint_of_an_older_version_is_loaded(old_checkpoint, unet2d, assert_same_tensors, arguments):
    with pytest.warns(UserWarning, match="older version"):
        unet = UNet2DModel.from_pretrained(old_checkpoint, **arguments)

    assert_same_tensors(unet.state_dict(), unet2d.quantized.state_dict())
    loaded = unet2d.copy()
    loaded.load_state_dict({n.replace("packed_weight", "weight"): t for n, t in unet.state_dict().items()})
    assert_same_tensors(loaded.state_dict(), unet.state_dict())


def test_older_diffusers_names_the_version_that_loads_older_checkpoints(old_checkpoint, monkeypatch):
    monkeypatch.setattr(diffusers_quantizer, "RENAMES", False)
    monkeypatch.setattr(DilateQuantizer, "maybe_update_loaded_keys", lambda self, keys, files: keys)

    with pytest.raises(ValueError, match=r"diffusers 0\.39 or newer loads it"):
        UNet2DModel.from_pretrained(old_checkpoint)


@pytest.mark.supports("Saving and loading", "diffusers 0.36 to 0.38", "saves the same checkpoints")
def test_older_diffusers_saves_the_same_checkpoint(unet2d, tmp_path, monkeypatch, assert_same_tensors):
    """Before 0.39 it does not ask the quantizer for the tensors."""
    unet2d.quantized.save_pretrained(tmp_path / "new")
    tensors_to_save = DilateQuantizer.get_state_dict_and_metadata
    monkeypatch.delattr(DiffusersQuantizer, "get_state_dict_and_metadata", raising=False)

    def not_asked_by_diffusers(self, state_dict, safe_serialization=None):  # which diffusers names
        return (state_dict, {}) if safe_serialization is not None else tensors_to_save(self, state_dict)

    monkeypatch.setattr(DilateQuantizer, "get_state_dict_and_metadata", not_asked_by_diffusers)
    unet2d.quantized.save_pretrained(tmp_path / "old")

    assert_same_tensors(load_file(tmp_path / "old" / WEIGHTS), load_file(tmp_path / "new" / WEIGHTS))
    assert "state_dict" not in vars(unet2d.quantized)
