"""Fine-tuning: what is written, which images are used, what a start folder may be, errors, interruption."""

import json
import os
import shutil

import numpy as np
import pytest
import timm
import torch
from documented import call
from image_files import encoded, write
from PIL import Image
from small_cache import shared_weights

import scalekd_cache
from pipelines import finetune as command
from pipelines import probe as probe_command
from scalekd_cache import UserError
from scalekd_cache.config.downstream import FinetuneConfig, FinetuneViews
from scalekd_cache.config.stage1 import DataConfig, TeacherConfig
from scalekd_cache.data.source import open_source
from scalekd_cache.errors import RunInterrupted
from scalekd_cache.models import evaluate
from scalekd_cache.models.tail import is_teacher
from scalekd_cache.models.teacher import load_teacher
from scalekd_cache.store import durable_files
from scalekd_cache.training import finetune as module
from scalekd_cache.training.finetune import TrainingViews, chosen_images
from scalekd_cache.training.probe import labeled_splits

torch.set_num_threads(1)
COLORS = {"blue": (40, 60, 200), "green": (30, 180, 70), "red": (200, 50, 40)}
QUICK = {"epochs": 3, "batch": 16, "device": "cpu", "workers": 0}


def colored(root, train=10, val=4):
    """Noisy images whose class is their color."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name, color in COLORS.items():
            for number in range(count):
                pixels = np.clip(np.array(color) + generator.normal(0, 30, (40, 40, 3)), 0, 255).astype(np.uint8)
                write(root / split / name / f"{number}.png", encoded(Image.fromarray(pixels)))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return colored(tmp_path_factory.mktemp("colored"))


@pytest.fixture(scope="module")
def tuned(data, tmp_path_factory):
    """A small network from random weights, by the Python function."""
    out = tmp_path_factory.mktemp("finetune") / "out"
    options = {**QUICK, "pretrained": False, "lr": 3e-3, "ema_decay": 0.5, "epochs": 8}
    facts = scalekd_cache.finetune(model="resnet10t", data=data, size=32, out=out, options=options)
    return out, facts


def test_it_learns_and_timm_loads_it(tuned, data):
    out, facts = tuned
    assert facts["top1"] > 80
    assert (facts["train_images"], facts["val_images"], facts["classes"]) == (30, 12, 3)
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert json.loads((out / "config.json").read_text())["label_names"] == ["blue", "green", "red"]
    assert f"top-1 {facts['top1']:.2f}%" in (out / "README.md").read_text()


def test_from_an_export_the_classifier_is_new(tuned, data, tmp_path, capsys):
    words = [word for name, value in QUICK.items() for word in (f"--{name}", value)]
    out = tmp_path / "second"
    call(command, ["--init", tuned[0], "--data", data, "--out", out, "--labels-per-class", 2, "--json", *words])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["train_images"], facts["labels_per_class"], facts["image_size"]) == (6, 2, 32)
    again = scalekd_cache.finetune(
        init=tuned[0], data=data, labels_per_class=2, out=tmp_path / "third", options={**QUICK, "workers": 1}
    )
    first, second = ((folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "third"))
    assert first == second  # with a worker too
    assert again["top1"] == facts["top1"]
    call(probe_command, ["--backbone", out, "--data", data, "--device", "cpu"])
    assert "linear probe" in capsys.readouterr().out


def test_a_teacher_for_cache_teacher(data, tmp_path, capsys):
    options = {**QUICK, "epochs": 1, "pretrained": False}
    scalekd_cache.finetune(model="demo_swin", data=data, out=tmp_path / "t", options=options)
    weights = tmp_path / "t" / "model.safetensors"
    assert f"--teacher demo_swin --teacher-weights {weights} --size 64" in capsys.readouterr().out
    config = TeacherConfig(name="demo_swin", weights=str(weights))
    teacher = load_teacher(config, image_size=64, num_classes=3, device=torch.device("cpu"))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    model = timm.create_model(f"local-dir:{tmp_path / 't'}", pretrained=True).eval()
    torch.testing.assert_close(teacher(images).logits, model(teacher.normalize(images)).detach())
    start = scalekd_cache.finetune(  # from its own file, which has a classifier of 3
        model="demo_swin", weights=weights, data="demo", labels_per_class=1, out=tmp_path / "u", options=options
    )
    assert start["classes"] == 10


def test_few_labels_are_the_same_for_any_listing():
    source = open_source(DataConfig(), "train")
    chosen = chosen_images(source, 3, 0)
    labels = [source.samples[index].label for index in chosen]
    assert sorted(labels) == sorted([*range(10)] * 3)
    more, other = chosen_images(source, 5, 0), chosen_images(source, 3, 1)
    assert set(chosen) < set(more)
    assert set(chosen) != set(other)
    part = source.first(700)
    keys = {source.samples[index].key for index in chosen}
    inside = {sample.key for sample in part.samples} & keys
    assert inside <= {part.samples[index].key for index in chosen_images(part, 3, 0)}
    assert len(chosen_images(source, 10**6, 0)) == len(source.samples)
    assert chosen_images(source, None, 0).tolist() == [*range(len(source.samples))]


def test_unreadable_images_are_skipped_and_reported(tmp_path, capsys):
    root = colored(tmp_path, train=3, val=1)
    (root / "train" / "red" / "0.png").write_bytes(b"nothing")
    source = open_source(DataConfig(source=str(root)), "train")
    views = TrainingViews(source, FinetuneConfig(model="resnet10t").views)
    pixels, labels, bad = views[0, [*range(9)]]
    assert (pixels.shape, pixels.dtype, len(labels), len(bad)) == ((8, 3, 224, 224), torch.uint8, 8, 1)
    assert not torch.equal(pixels, views[1, [*range(9)]][0])
    assert torch.equal(pixels, views[0, [*range(9)]][0])
    (root / "val" / "red" / "0.png").write_bytes(b"nothing")
    options = {**QUICK, "epochs": 1, "pretrained": False}
    facts = scalekd_cache.finetune(model="resnet10t", data=root, size=32, out=tmp_path / "o", options=options)
    assert (facts["train_images"], facts["val_images"]) == (8, 2)
    said = capsys.readouterr().out
    assert "9 training images in 3 classes, 1 epoch, 32 x 32" in said
    assert "omitted 1 training image that could not be read" in said
    assert "of 2 validation images (1 more could not be read)" in said


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "set either --init"),
        ({"init": "a", "model": "resnet10t"}, "set either --init"),
        ({"init": "runs/none"}, "the folder runs/none does not exist"),
        ({"model": "resnet1O"}, "there is no model resnet1O"),
        ({"model": "resnet10t", "weights": "no.safetensors"}, "no.safetensors"),
        ({"model": "resnet10t", "options": {"batch": 1}}, "invalid value for batch"),
        ({"model": "resnet10t", "options": {"epoch": 1}}, "did you mean epochs"),
        ({"model": "vit_tiny_patch16_224", "size": 9, "options": {"pretrained": False}}, "9"),
        ({"model": "demo_swin"}, "no published weights"),
    ],
)
def test_errors_before_anything_is_written(data, tmp_path, given, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=text.replace(".", r"\.")):
        scalekd_cache.finetune(**{"data": data, **given})
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_used(data, tmp_path):
    options = {**QUICK, "pretrained": False}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(UserError, match="scalekd export --run"):
        scalekd_cache.finetune(init=tmp_path / "run", data=data, options=QUICK)
    with pytest.raises(UserError, match="does not contain an exported student"):
        scalekd_cache.finetune(init=tmp_path, data=data, options=QUICK)
    with pytest.raises(UserError, match="is a dataset"):
        scalekd_cache.finetune(model="resnet10t", data=data, out=data, options=options)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match="other files"):
        scalekd_cache.finetune(model="resnet10t", data=data, out=tmp_path / "other", options=options)
    flat = tmp_path / "flat"
    for number in range(3):
        write(flat / f"{number}.png", encoded(Image.new("RGB", (40, 40))))
    with pytest.raises(UserError, match="no labels"):
        scalekd_cache.finetune(model="resnet10t", data=flat, out=tmp_path / "o", options=options)


def test_a_model_that_cannot_be_a_teacher_is_not_suggested_as_one(data, tmp_path, capsys):
    options = {**QUICK, "epochs": 1, "pretrained": False}
    scalekd_cache.finetune(model="resnet10t", data=data, size=32, out=tmp_path / "o", options=options)
    assert "to use it as a teacher" not in capsys.readouterr().out
    assert is_teacher(timm.create_model("test_vit"))
    assert not is_teacher(timm.create_model("test_resnet"))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda val: (val / "red" / "0.png").symlink_to("0.png"), "a path with an image extension is not a file"),
        (lambda val: os.mkfifo(val / "red" / "0.png"), "a path with an image extension is not a file"),
        (lambda val: (val / "red").rename(val / "ruby"), "val/ has a class that is missing from train/"),
        (lambda val: (val / "0.png").touch(), "both class folders and images"),
        (lambda val: val.rename(val.parent / "valid"), "rename valid/ to val/"),
        (lambda val: (shutil.rmtree(val), val.touch()), "val is not a folder"),
    ],
)
def test_a_damaged_val_is_not_a_missing_one(tmp_path, damage, text):
    """Otherwise fine-tuning would not measure anything, and the probe would test on training images."""
    root = colored(tmp_path / "data", train=3, val=1)
    if "image extension" in text:
        (root / "val" / "red" / "0.png").unlink()
    damage(root / "val")
    with pytest.raises(UserError, match=text):
        scalekd_cache.finetune(
            model="resnet10t", data=root, size=32, out=tmp_path / "o", options={**QUICK, "pretrained": False}
        )
    assert not (tmp_path / "o").exists()
    with pytest.raises(UserError, match=text):
        labeled_splits(DataConfig(source=str(root)))


def test_an_evaluation_that_fails_does_not_lose_the_training(data, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise UserError("cannot read an image")

    monkeypatch.setattr(module, "_accuracy", fail)
    with pytest.raises(UserError, match="trained and exported, but not evaluated: cannot read an image"):
        scalekd_cache.finetune(
            model="resnet10t", data=data, size=32, out=tmp_path / "o", options={**QUICK, "pretrained": False}
        )
    model = timm.create_model(f"local-dir:{tmp_path / 'o'}", pretrained=True)
    assert model.num_classes == 3
    assert "not measured" in (tmp_path / "o" / "README.md").read_text()


def test_a_folder_that_cannot_be_written_is_found_before_training(data, tmp_path, monkeypatch):
    options = {"model": "resnet10t", "data": data, "size": 32, "options": {**QUICK, "pretrained": False}}
    monkeypatch.setattr(module, "_train", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match="cannot write to the folder"):
        scalekd_cache.finetune(**options, out="/proc/none/out")
    monkeypatch.setattr(durable_files, "free_bytes", lambda _: 1 << 20)
    with pytest.raises(UserError, match="not enough disk space"):
        scalekd_cache.finetune(**options, out=tmp_path / "o")
    one = tmp_path / "one"
    for split in ("train", "val"):
        write(one / split / "red" / "0.png", encoded(Image.new("RGB", (40, 40))))
    monkeypatch.undo()
    with pytest.raises(UserError, match="belong to one class"):
        scalekd_cache.finetune(**{**options, "data": one}, out=tmp_path / "o")
    with pytest.raises(UserError, match="belong to one class"):
        scalekd_cache.probe(backbone="demo_swin", data=one, weights=shared_weights(), options={"device": "cpu"})
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_the_start_and_the_export_of_a_run_are_not_replaced(tuned, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(UserError, match="the output folder contains the initial weights"):
        scalekd_cache.finetune(init=tuned[0], data=data, out=tuned[0], options=QUICK)
    shutil.copytree(tuned[0], tmp_path / "run" / "export")
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(UserError, match="inside a run folder"):
        scalekd_cache.finetune(init=tmp_path / "run", data=data, out=tmp_path / "run" / "export", options=QUICK)
    earlier = shutil.copytree(tuned[0], tmp_path / "earlier")
    with pytest.raises(RunInterrupted):
        scalekd_cache.finetune(init=tuned[0], data=data, out=earlier, options=QUICK)
    assert "earlier exists and will be replaced when training finishes" in capsys.readouterr().out
    assert (earlier / "model.safetensors").exists()


@pytest.mark.parametrize("place", ["training", "evaluation"])
def test_ctrl_c_leaves_nothing(data, tmp_path, monkeypatch, place):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module if place == "training" else evaluate, "decode_image", interrupt)
    with pytest.raises(RunInterrupted, match="nothing was written") as stop:
        scalekd_cache.finetune(
            model="resnet10t", data=data, size=32, out=tmp_path / "o", options={**QUICK, "pretrained": False}
        )
    assert stop.value.exit_code == 130
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite(data, tmp_path):
    with pytest.raises(UserError, match="NaN or Inf"):
        scalekd_cache.finetune(
            model="resnet10t", data=data, size=32, out=tmp_path / "o",
            options={**QUICK, "pretrained": False, "lr": 1e30},
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"size": 128}, r"does not use --views\.size[\s\S]*set --size"),
        ({"jpeg_quality": 50}, r"does not use --views\.jpeg_quality[\s\S]*remove it"),
        ({"pixels": "replayed"}, r"does not use --views\.pixels"),
    ],
)
def test_view_options_that_fine_tuning_does_not_use(option, text):
    with pytest.raises(UserError, match=text):
        FinetuneConfig(model="resnet18", views=FinetuneViews(**option))
