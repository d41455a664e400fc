"""``generate``, ``compare`` and ``bench`` on a tiny random pipeline."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from tiny_unets import unet2d

from dq_runtime.evaluation.metrics import psnr


def test_images_are_the_pipelines_and_hold_their_parameters(run_json, packed_folder, tmp_path):
    options = ["--seed", 7, "--batch", 2, "--steps", 3, "--guidance", 4, "--scheduler", "EulerDiscreteScheduler"]

    report = run_json("generate", packed_folder, "a [red] cat", "a dog", "-o", tmp_path, *options)

    parameters = [json.loads(Image.open(tmp_path / f"000{i}.png").text["parameters"]) for i in range(4)]
    assert [entry["file"] for entry in report["images"]] == [str(tmp_path / f"000{i}.png") for i in range(4)]
    assert [(p["prompt"], p["seed"]) for p in parameters] == [
        ("a [red] cat", 7), ("a [red] cat", 8), ("a dog", 7), ("a dog", 8)
    ]  # fmt: skip
    assert {(p["steps"], p["guidance"], p["scheduler"]) for p in parameters} == {(3, 4.0, "EulerDiscreteScheduler")}
    pipeline = DiffusionPipeline.from_pretrained(packed_folder)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    arguments = {"num_images_per_prompt": 2, "num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}
    expected = pipeline("a dog", generator=generators, **arguments).images[1]
    difference = np.abs(np.asarray(Image.open(tmp_path / "0003.png")) / 255 - expected)
    assert difference.max() < 0.02  # 8 bits, and other rounding in fused blocks


def test_a_lora_reaches_the_images(run_json, packed_folder, pipeline_folder, tmp_path):
    unet = DiffusionPipeline.from_pretrained(pipeline_folder).unet
    unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    StableDiffusionPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(unet))
    arguments = ["generate", packed_folder, "a cat", "-o", tmp_path, "--steps", 2]
    file = tmp_path / "pytorch_lora_weights.safetensors"

    entries = [run_json(*arguments, *more)["images"][0] for more in ([], ["--lora", file])]

    assert entries[1]["lora"] == [str(file)]
    assert len({Image.open(entry["file"]).tobytes() for entry in entries}) == 2


def test_a_second_run_overwrites_no_image(run, packed_folder, tmp_path):
    (tmp_path / "0000.png").write_bytes(b"mine")

    run("generate", packed_folder, "a cat", "-o", tmp_path, "--steps", 1)

    assert (tmp_path / "0000.png").read_bytes() == b"mine"
    assert (tmp_path / "0001.png").exists()


@pytest.fixture(scope="module")
def comparison(run_json, pipeline_folder, packed_folder, prompts, tmp_path_factory):
    page = tmp_path_factory.mktemp("comparison") / "page.html"
    options = ["-o", page, "--prompts", prompts, "--steps", 2]
    return run_json("compare", pipeline_folder, packed_folder, *options), page.read_text()


def test_a_comparison_measures_images_layers_times_and_sizes(comparison, run_json, packed_folder):
    report, _ = comparison

    assert len(report["psnr_db"]) == 2
    assert min(report["psnr_db"]) > 20
    assert 0.5 < report["ssim"] <= 1
    assert report["layer_sqnr_db"].keys() == run_json("inspect", packed_folder)["layers"].keys()
    assert min(report["layer_sqnr_db"].values()) > 5
    assert report["unet_megabytes"][1] < report["unet_megabytes"][0]
    assert all(seconds > 0 for seconds in report["seconds_per_image"])


def test_psnr_is_that_of_the_images(comparison, pipeline_folder, packed_folder):
    images = []
    for folder in (packed_folder, pipeline_folder):
        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        image = pipeline(
            "a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(1000), output_type="np"
        )
        images.append(2 * torch.from_numpy(image.images).permute(0, 3, 1, 2) - 1)

    assert comparison[0]["psnr_db"][0] == pytest.approx(psnr(*images)[0], abs=0.5)  # fused blocks round otherwise


def test_the_page_needs_nothing_else(comparison):
    _, page = comparison

    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "http" not in page
    assert page.count("data:image/png;base64,") == 2 * 2 + 2  # pairs of images, and two plots
    assert "a dog" in page


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
const slider = document.querySelector("input[type=range]"), pair = document.querySelector(".pair");
const cut = () => getComputedStyle(pair.lastElementChild).clipPath;
const found = {middle: cut()};
slider.value = 10;
slider.dispatchEvent(new Event("input"));
found.left = cut();
found.images = [...document.images].map(image => image.complete && image.naturalWidth > 0 && image.width > 0);
found.requests = performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:")).length;
found.overflow = document.documentElement.scrollWidth > innerWidth;
document.title = JSON.stringify(found);
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_the_page_works_in_a_browser(comparison, tmp_path):
    (tmp_path / "page.html").write_text(comparison[1] + PROBE)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    run = subprocess.run(
        [*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(html.unescape(run.stdout.split("<title>")[1].split("</title>")[0]))

    assert (found["middle"], found["left"]) == ("inset(0px 0px 0px 50%)", "inset(0px 0px 0px 10%)")
    assert found["images"]
    assert all(found["images"])
    assert found["requests"] == 0
    assert not found["overflow"]


def test_the_bench_has_both_forms(run_json, packed_folder, pipeline_folder):
    for folder in (packed_folder, pipeline_folder):
        report = run_json("bench", folder, "--rounds", 2, "--batch", 2)

        floating, packed = report["forms"].values()
        assert list(report["forms"]) == ["float32, eager", "INT4, fused"]
        assert report["batch"] == 4  # with guidance
        assert report["speedup"] == pytest.approx(floating["milliseconds"] / packed["milliseconds"])
        assert packed["megabytes"] < floating["megabytes"]


def test_a_pipeline_without_prompts_draws(run_json, tmp_path):
    unet = unet2d(block_out_channels=(16, 32), norm_num_groups=4)
    DDPMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "pipeline")

    report = run_json("generate", tmp_path / "pipeline", "-o", tmp_path / "images", "--steps", 1, "--batch", 2)

    assert [entry["prompt"] for entry in report["images"]] == [None, None]
    assert Image.open(tmp_path / "images" / "0001.png").size == (8, 8)
