"""Random damage of a saved checkpoint, and what comes of loading it: an error, the same images, or silent ones.

All damage counts that leaves the digest's tensor under its name and the quantization method in ``config.json``: without
these the folder is a checkpoint of an older version, or none of ours. What diffusers refuses before it calls us has
diffusers' own errors, in whatever words.
"""

import json
import os
import random
import shutil
import signal
import struct
import time
import traceback
import warnings
from pathlib import Path

import tiny_unets
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import dq_runtime
from dq_runtime import digest

OURS = str(Path(dq_runtime.__file__).parent)
SECONDS, MEGABYTES, LONGEST = 5, 200, 2000  # limits of a load: time, memory above the base; characters of a message
GARBAGE = (None, True, -1, 0, 1, 3, 7, 8, 1e-6, 1e9, 2**63, float("nan"), "", "silu", "relu", "x" * 10_000, [], [1], {})


def weights_of(folder):
    return sorted(folder.glob("*.safetensors"))


def _bit_flips(folder, draw):
    file = draw.choice(weights_of(folder))
    content = bytearray(file.read_bytes())
    places = [draw.randrange(len(content)) for _ in range(draw.choice((1, 1, 2, 100)))]
    for place in places:
        content[place] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return f"bits of bytes {places[:3]} of {file.name} flipped"


def _header_flips(folder, draw):
    file = draw.choice(weights_of(folder))
    content = bytearray(file.read_bytes())
    place = draw.randrange(8 + int.from_bytes(content[:8], "little"))
    content[place] = draw.randrange(256)
    file.write_bytes(content)
    return f"byte {place} of the header of {file.name} is {content[place]}"


def _truncation(folder, draw):
    file = draw.choice([*weights_of(folder), *folder.glob("*.json")])
    content = file.read_bytes()
    kept = draw.choice((0, 1, 7, 8, 9, draw.randrange(len(content)), len(content) - 1))
    file.write_bytes(content[:kept])
    return f"{file.name} cut to {kept} bytes"


def _appended(folder, draw):
    file = draw.choice([*weights_of(folder), *folder.glob("*.json")])
    with file.open("ab") as stream:
        stream.write(draw.randbytes(draw.choice((1, 8, 1000))))
    return f"bytes appended to {file.name}"


def _header_length(folder, draw):
    file = draw.choice(weights_of(folder))
    content = file.read_bytes()
    length = draw.choice((0, 1, 2**16, 2**27, 2**31, 2**40, 2**63, 2**64 - 1))
    file.write_bytes(struct.pack("<Q", length) + content[8:])
    return f"header length of {file.name} is {length}"


def _exchanged_bytes(folder, draw):
    file = draw.choice(weights_of(folder))
    content = bytearray(file.read_bytes())
    size = draw.choice((4, 64, 512))
    a, b = (draw.randrange(len(content) - size) for _ in range(2))
    content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]
    file.write_bytes(content)
    return f"{size} bytes at {a} and {b} of {file.name} exchanged"


def _rewritten(change):
    """Damage of the tensors of one file."""

    def damage(folder, draw):
        file = draw.choice(weights_of(folder))
        tensors = load_file(file)
        said = change(tensors, draw)
        save_file(tensors, file, metadata={"format": "pt"})
        return f"{file.name}: {said}"

    return damage


def _names(tensors):
    return [name for name in sorted(tensors) if not name.endswith(f".{digest.NAME}")]


def _exchanged_tensors(tensors, draw):
    a = draw.choice(_names(tensors))
    alike = [b for b in _names(tensors) if b != a and tensors[b].shape == tensors[a].shape] or _names(tensors)
    b = draw.choice(alike)
    tensors[a], tensors[b] = tensors[b], tensors[a]
    return f"{a} and {b} exchanged"


def _lost_tensor(tensors, draw):
    name = draw.choice(_names(tensors))
    del tensors[name]
    return f"{name} lost"


def _added_tensor(tensors, draw):
    name = draw.choice(_names(tensors))
    name = draw.choice((f"{name}.x", f"x.{name}", name.rpartition(".")[0] + ".weight", name[:-1], ""))
    tensors[name] = torch.ones(draw.choice((0, 1, 100)))
    return f"{name!r} added"


def _other_dtype(tensors, draw):
    name = draw.choice(sorted(tensors))
    tensors[name] = tensors[name].to(draw.choice((torch.float16, torch.float64, torch.int8, torch.int64, torch.bool)))
    return f"{name} is {tensors[name].dtype}"


def _other_shape(tensors, draw):
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    change = draw.choice(("more", "flat", "narrow", "empty", "double"))
    changed = {
        "more": tensor[None], "flat": tensor.flatten(), "narrow": tensor[..., :-1], "empty": tensor[:0],
        "double": tensor.repeat(2, *[1] * (tensor.ndim - 1)),
    }  # fmt: skip
    tensors[name] = changed[change].contiguous()
    return f"{name} is {list(tensors[name].shape)}"


def _other_values(tensors, draw):
    name = draw.choice(sorted(tensors))
    tensor = tensors[name].view(-1)
    change = draw.choice(("zero", "order", "one", "negated", "scaled"))
    if change == "zero":
        tensor.zero_()
    elif change == "order":
        tensors[name] = tensor.flip(0).view_as(tensors[name]).contiguous()
    elif change == "one":
        tensor[draw.randrange(len(tensor))] += 1
    elif change == "negated":
        tensor.neg_()
    else:
        tensor.copy_(tensor * 2)
    return f"{name}: {change}"


def _config_of(folder, draw):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    inside = draw.random() < 0.5
    fields = config["quantization_config"] if inside else config
    kept = ("quant_method",) if inside else ("quantization_config", "_class_name", "_diffusers_version")
    return file, config, fields, draw.choice(sorted(name for name in fields if name not in kept))


def _changed_field(folder, draw):
    file, config, fields, name = _config_of(folder, draw)
    old, fields[name] = fields[name], draw.choice(GARBAGE)
    if isinstance(old, bool):
        fields[name] = not old
    elif isinstance(old, (int, float)) and draw.random() < 0.7:
        fields[name] = draw.choice((old + 1, old * 2, -old, old / 2, str(old)))
    elif isinstance(old, list) and old and draw.random() < 0.7:
        fields[name] = draw.choice((old[:-1], old[::-1], [*old, old[-1]], old * 2, [draw.choice(GARBAGE)] * len(old)))
    file.write_text(json.dumps(config))
    return f"config.json: {name} is {str(fields[name])[:60]}"


def _lost_field(folder, draw):
    file, config, fields, name = _config_of(folder, draw)
    del fields[name]
    file.write_text(json.dumps(config))
    return f"config.json: {name} lost"


def _garbage_json(folder, draw):
    file = draw.choice(sorted(folder.glob("*.json")))
    deep = "[" * 100_000
    file.write_bytes(
        draw.choice((b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", deep.encode(), b"{}", draw.randbytes(99)))
    )
    return f"{file.name} is garbage"


def _json_byte(folder, draw):
    file = draw.choice(sorted(folder.glob("*.json")))
    content = bytearray(file.read_bytes())
    place = draw.randrange(len(content))
    content[place] = draw.randrange(256)
    file.write_bytes(content)
    return f"byte {place} of {file.name} is {content[place]}"


def _lost_file(folder, draw):
    file = draw.choice(sorted(folder.iterdir()))
    file.unlink()
    return f"{file.name} lost"


def _exchanged_files(folder, draw):
    files = weights_of(folder)
    a, b = draw.sample(files, 2) if len(files) > 1 else (files[0], folder / "config.json")
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    if draw.random() < 0.5:
        b.write_bytes(content)
    return f"{a.name} is {b.name}"


KINDS = (
    _bit_flips, _bit_flips, _header_flips, _truncation, _appended, _header_length, _exchanged_bytes,
    *(_rewritten(change) for change in (
        _exchanged_tensors, _lost_tensor, _added_tensor, _other_dtype, _other_shape, _other_values,
    )),
    _changed_field, _changed_field, _lost_field, _garbage_json, _json_byte, _lost_file, _exchanged_files,
)  # fmt: skip


def damage(folder, seed):
    """Damages a checkpoint in place, at random; returns what was done."""
    draw = random.Random(seed)
    return draw.choice(KINDS)(folder, draw)


def is_ours(folder):
    """False if the folder no longer is a checkpoint with a digest (see above)."""
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["quantization_config"]["quant_method"] != "dilatequant":
            return False
    except (ValueError, LookupError, TypeError, OSError, RecursionError):
        return True  # it must be refused
    content = b"".join(file.read_bytes() for file in weights_of(folder))
    return f'.{digest.NAME}":'.encode() in content


def _memory(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return 0.0


def saved_checkpoints(folder):
    """A small quantized UNet's image, and its checkpoints: a single file and shards."""
    unet = tiny_unets.unet2d_condition(
        block_out_channels=(16,), norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    with dq_runtime.record(unet) as calls:
        for timestep in (100, 300, 500):
            image_of(unet, timestep)
    dq_runtime.calibrate(unet, calls, dq_runtime.DilateQuantConfig(dilation="none"), distillation=None)
    unet.save_pretrained(folder / "single file")
    unet.save_pretrained(folder / "shards", max_shard_size="40KB")
    return image_of(unet), [folder / "single file", folder / "shards"]


def image_of(unet, timestep=300):
    generator = torch.Generator().manual_seed(0)
    sample, prompt = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 32, generator=generator)
    with torch.no_grad():
        return unet(sample, timestep, encoder_hidden_states=prompt).sample


def outcome_of(error):
    """Of a call that raised an error: "refused" in a sentence, "unclear", or "refused by diffusers"."""
    text = f"{type(error).__name__}: {str(error)[:300]}"
    if not any(frame.filename.startswith(OURS) for frame in traceback.extract_tb(error.__traceback__)):
        return "refused by diffusers", text
    clear = isinstance(error, (ValueError, TypeError, OSError)) and 20 < len(str(error)) <= LONGEST
    return "refused" if clear else "unclear", text


def _outcome(folder, image):
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            unet = UNet2DConditionModel.from_pretrained(folder)
    except Exception as error:
        return outcome_of(error)
    told = any("digest" in str(warning.message) for warning in caught)
    try:
        same = torch.equal(image_of(unet), image)
    except Exception as error:
        return "unclear", f"in the forward pass: {type(error).__name__}: {error}"[:300]
    return "the same image" if same else "warned" if told else "SILENT", ""


def load(folder, image):
    """Loads a checkpoint in a process of its own.

    Returns:
        "refused", "refused by diffusers", "the same image", "warned" (it says that it has no digest), "unclear" (an
        error that is no sentence), "SILENT", "crash", "slow" or "large"; what the error says; and the memory in MB.
    """
    reading, writing = os.pipe()
    start = time.monotonic()
    process = os.fork()
    if process == 0:
        try:
            os.close(reading)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = _memory("VmRSS")
            found, said = _outcome(folder, image)
            peak = _memory("VmHWM") - before
            if peak > MEGABYTES:
                found, said = "large", f"{peak:.0f} MB, {found}: {said}"
            os.write(writing, json.dumps([found, said, peak]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(process, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, 4 * SECONDS)
    with open(reading, "rb") as pipe:
        content = pipe.read()
    os.waitpid(process, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.monotonic() - start
    if seconds > SECONDS:
        return "slow", f"{seconds:.1f} s", 0.0
    return tuple(json.loads(content)) if content else ("crash", "", 0.0)


def damaged_load(folder, copy, seed, image):
    """Damages a copy of a checkpoint and loads it; returns what was done, and ``load``'s result."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    done = damage(copy, seed)
    counts = is_ours(copy)
    found, said, megabytes = load(copy, image)
    return done, found if counts or found != "SILENT" else "no checkpoint of ours", said, megabytes
