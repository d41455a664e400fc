"""The emoji demo and the judges that it measures with: their shipped weights, and the demo on a tiny pipeline."""

import datetime
import json
import re
import sys
from types import SimpleNamespace

import pytest
import tiny_emoji
import torch
from safetensors.torch import load_file

from examples.emoji import data, demo, judges, task, train_judges

LIMIT = 3_000_000  # bytes of a judge


@pytest.fixture(scope="module")
def trained():
    return judges.load()


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return tiny_emoji.save_pipeline(tmp_path_factory.mktemp("emoji"))


def test_the_judges_are_small_and_in_fp16():
    for file in (judges.CLASSIFIER, judges.IMAGE_TEXT):
        assert file.stat().st_size < LIMIT
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}


def test_descriptions_have_distinct_names():
    descriptions = data.descriptions()

    assert len(descriptions) == len(data.CHOSEN.split())
    assert len({each.name for each in descriptions}) == len(descriptions)
    assert len(judges.categories(descriptions)) == 9


def test_the_classifier_knows_the_real_images(trained):
    classifier, _ = trained
    descriptions = data.descriptions()
    names = judges.categories(descriptions)

    predicted = [names[i] for i in classifier.head(classifier.real_features).argmax(1)]

    right = [guess == each.category for guess, each in zip(predicted, descriptions, strict=True)]
    assert sum(right) / len(right) >= 0.99


def test_both_judges_recognize_what_the_shipped_pipeline_draws(trained):
    classifier, image_text = trained
    descriptions = data.descriptions()
    wanted = list(range(3, len(descriptions), 20))
    captions = [data.known_captions(each) for each in descriptions]
    others = judges.other_captions(wanted, captions, torch.Generator().manual_seed(0))

    images = task.draw(task.load_pipeline(), [captions[i][0] for i in wanted], guidance=1.0, seed=4)

    names = judges.categories(descriptions)
    predicted = [names[i] for i in classifier(images).argmax(1)]
    assert sum(guess == descriptions[i].category for guess, i in zip(predicted, wanted, strict=True)) >= 21
    assert judges.prompt_agreement(image_text, images, [captions[i][0] for i in wanted], others) >= 0.9
    mixed = [captions[i][0] for i in wanted[1:] + wanted[:1]]
    assert judges.prompt_agreement(image_text, images, mixed, others) < 0.2


def test_an_image_agrees_if_its_own_prompt_is_closest():
    vectors = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [0.8, 0.6]}
    judge = SimpleNamespace(
        of_images=lambda images: images, of_captions=lambda captions: torch.tensor([vectors[each] for each in captions])
    )
    images = torch.tensor([vectors["a"], vectors["c"], vectors["b"], vectors["c"]])

    agreement = judges.prompt_agreement(judge, images, ["a", "c", "a", "a"], [["b", "c"]] * 2 + [["b"], ["c"]])

    assert agreement == 0.5 - 0.25  # the second is as close to the same caption among the others: no agreement


def test_other_captions_are_of_distinct_other_emoji():
    captions = [[f"{i}", f"{i} x"] for i in range(40)]

    (others,) = judges.other_captions([7], captions, torch.Generator().manual_seed(0))

    emoji = {int(caption.split()[0]) for caption in others}
    assert len(others) == len(emoji) == judges.CHOICES - 1
    assert 7 not in emoji


def test_the_frechet_distance_is_to_real_images_of_the_same_emoji(monkeypatch):
    judge, (asked, _) = task.Judge(), task.prompts(64, 4, seed=1)
    real = judge.classifier.real_features
    monkeypatch.setattr(judge.classifier, "features", lambda images: real[images])

    same, others = (judge.frechet({1.0: torch.tensor(emoji)}, asked) for emoji in (asked.emoji, list(range(64))))

    assert same == pytest.approx(0, abs=1e-3)
    assert others > 1


def test_evaluation_and_calibration_have_prompts_of_different_emoji():
    asked, for_calibration = task.prompts(200, 64, seed=1)
    name = {caption: each.name for each in data.descriptions() for caption in data.known_captions(each)}

    assert (len(asked), len(for_calibration)) == (200, 64)
    assert len({name[caption] for caption in asked.captions + for_calibration}) == 264
    assert task.prompts(200, 64, seed=1) == (asked, for_calibration)
    with pytest.raises(ValueError, match="ask for fewer"):
        task.prompts(400, 64, seed=1)


def test_judges_learn_which_caption_belongs_to_which_image(tmp_path):
    torch.manual_seed(0)
    descriptions = [
        data.Description(name, ("tint", "shade"), kind) for name, kind in (("red", "warm"), ("blue", "cold"))
    ]
    images = torch.ones(2, 2, 3, 64, 64)
    images[0, :, 1:] = images[1, :, :2] = -1
    recipe = train_judges.Recipe(steps=30, batch_size=2, learning_rate=3e-3, ema_decay=0.5, warmup_steps=1)

    classifier, image_text = train_judges.train(images, descriptions, recipe, tmp_path / "judges.pt")

    assert train_judges.accuracies(classifier, image_text, images[:, 0], descriptions) == (1.0, 1.0, 1.0)
    assert (tmp_path / "judges.pt").exists()


def test_distorted_images_stay_on_white():
    images = torch.ones(3, 3, 64, 64)
    images[:, :, 24:40, 24:40] = -1

    distorted = train_judges.distorted(images, torch.Generator().manual_seed(0))

    assert distorted.min() >= -1
    assert distorted.max() <= 1
    assert distorted[:, :, :4].mean() > 0.9
    assert (distorted - images).abs().mean((1, 2, 3)).min() > 0.01


def test_the_demo_writes_and_prints_its_report(monkeypatch, tmp_path, tiny_folder, capsys):
    load = task.load_pipeline
    monkeypatch.setattr(task, "load_pipeline", lambda folder=tiny_folder: load(folder))
    monkeypatch.setattr(task, "STEPS", 2)
    monkeypatch.setattr(demo, "SETTINGS", None)
    monkeypatch.setattr(demo, "KEPT", ("conv_in", "conv_out", "down_blocks", "mid_block", "attentions"))
    monkeypatch.setattr(demo, "CALIBRATION_PROMPTS", 4)
    monkeypatch.setattr(demo, "SHOWN_PROMPTS", ("panda", "fox"))
    monkeypatch.setattr(demo, "TIMED_BATCHES", (1, 2))
    monkeypatch.setattr(demo, "TIMING_ROUNDS", 1)
    monkeypatch.setattr(demo, "COLUMNS", tuple(each for each in demo.COLUMNS if each[0] != "ms, batch 16"))
    monkeypatch.setattr(sys, "argv", ["demo", "--images", "6", "--output", str(tmp_path)])

    demo.main()

    report, printed = json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out
    original, packed = report["models"]
    assert (original["model"], packed["model"]) == ("fp32", "INT4 W4A8")
    assert original["psnr_db, guidance 1"] is None
    assert 15 < packed["psnr_db, guidance 5"] < 100
    assert 0.2 < packed["quantized_weights_over_fp16"] < 0.5
    assert packed["unet_mb"] < original["unet_mb"]
    assert all(row[f"ms, batch {batch}"] > 0 for row in report["models"] for batch in (1, 2))
    assert datetime.date.fromisoformat(report["environment"]["date"])
    assert report["environment"]["torch"] == torch.__version__
    assert "INT4 W4A8" in printed.splitlines()[-2]
    assert (tmp_path / "w4a8" / "model_index.json").is_file()
    assert (tmp_path / "w4a8" / "report" / "layers.json").is_file()
    assert (tmp_path / "grid.png").is_file()


def test_print_table_aligns_its_columns(capsys):
    row = dict.fromkeys((name for name, _ in demo.COLUMNS), 1.25) | {"not in the table": 1}

    demo.print_table([row | {"model": "fp32", "psnr_db, guidance 1": None}, row | {"model": "INT4 W4A8"}])

    header, *lines = capsys.readouterr().out.splitlines()
    titles = re.split(r" {2,}", header.strip())
    assert titles == [name for name, _ in demo.COLUMNS]
    starts = [header.index(title) for title in titles]
    table = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines]
    first = ["fp32", "125.0%", "-", "1.2", "1.250", "1.250", "1.250", "1.25", "1.25", "1.2", "1.2"]
    assert table == [first, ["INT4 W4A8", "125.0%", "1.2", *first[3:]]]
