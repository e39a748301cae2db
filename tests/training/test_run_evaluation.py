"""Accuracy of a student: as with timm's own transform; only on images of its classes."""

import dataclasses
import shutil

import pytest
import timm
import torch
from image_files import folder_tree
from PIL import Image
from small_cache import CPU, shared_cache
from timm.data import create_transform, resolve_data_config

from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.config.stage2 import DistillConfig, StudentConfig, TrainConfig
from scalekd_cache.convert.timm_export import export_student
from scalekd_cache.data.images import decode_image
from scalekd_cache.data.source import open_source
from scalekd_cache.errors import UserError
from scalekd_cache.models.student import build_student
from scalekd_cache.training.dry_run import plan_distill
from scalekd_cache.training.run import distill
from scalekd_cache.training.run_evaluation import evaluate_folder, open_validation
from scalekd_cache.training.trainer import Trainer

SIZE = 40
"""Pixels; 40 / 0.875 is not a whole number, and rounding it up or down gives other images."""


@torch.no_grad()
def test_timm_measures_the_same_accuracy(tmp_path):
    torch.manual_seed(3)
    config = StudentConfig(name="test_resnet", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    student = build_student(config, num_classes=10, image_size=SIZE)
    source, folder = open_source(DataConfig(source="demo"), "val"), tmp_path / "export"

    def export():
        export_student(student, config, folder, image_size=SIZE, class_names=source.class_names)
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        transform = create_transform(**resolve_data_config({}, model=model))
        images = (Image.fromarray(decode_image(source.read(i), one.key)) for i, one in enumerate(source.samples))
        return model(torch.stack([transform(image) for image in images]))

    student.model.fc.bias -= export().mean(0)  # purely random weights predict one class for all images
    predicted, labels = export().argmax(1), torch.tensor([sample.label for sample in source.samples])
    assert len(predicted.unique()) > 3
    assert int((predicted == labels).sum()) == evaluate_folder(folder, "demo", CPU, 0).top1


def test_only_a_missing_split_is_a_note_for_a_given_dataset(tmp_path, capsys):
    """Images without a val/ still train a student; a mistyped folder or one with other classes is an error."""
    manifest = shared_cache().manifest
    other = folder_tree(tmp_path / "other", ["a/1.png", "b/1.png"], ["a/1.png", "b/1.png"])
    flat = folder_tree(tmp_path / "flat", ["1.png", "2.png"], ["1.png", "2.png"])
    for data, text in ((other, "different classes"), (flat, "no labels"), (tmp_path / "othr", "did you mean")):
        with pytest.raises(UserError, match=text):
            open_validation(manifest, str(data), print)
    shutil.rmtree(other / "val")
    assert open_validation(manifest, str(other), print) is None
    assert "no usable validation images found, so accuracy will not be measured" in capsys.readouterr().out
    moved = dataclasses.replace(manifest.facts, data={**manifest.facts.data, "source": str(tmp_path / "gone")})
    assert open_validation(dataclasses.replace(manifest, facts=moved), None, print) is None
    assert "not at the path stored in the cache" in capsys.readouterr().out
    assert open_validation(manifest, None, print) is not None


@pytest.mark.parametrize("number", ["images", "step"])
def test_nodes_that_find_different_files_are_refused(tmp_path, monkeypatch, number):
    """Evaluation or training would hang if only one node had the validation images or the run's checkpoints."""
    other = {"images": (-1.0, 0.0), "step": (64.0, 3.0)}[number]  # images and step of the other node
    ranges = [(min(mine, its), max(mine, its)) for mine, its in zip((64.0, 0.0), other, strict=True)]
    monkeypatch.setattr(Trainer, "range_over_ranks", lambda self, mine: ranges.pop(0))
    config = DistillConfig(
        cache=str(shared_cache().root),
        run=str(tmp_path / "run"),
        student=StudentConfig(name="test_resnet"),
        train=TrainConfig(epochs=1, global_batch_size=32, micro_batch_size=16, targets="none"),
    )
    texts = {
        "images": r"validation images is not the same on all nodes(.|\n)*0 on one process, 64 on another(.|\n)*--data",
        "step": r"step to resume from is not the same on all nodes(.|\n)*0 on one process, 3 on another(.|\n)*--run",
    }
    with pytest.raises(UserError, match=texts[number]):
        distill(config, CPU)
    assert not (tmp_path / "run").exists()


def test_a_mistyped_dataset_stops_a_run_before_its_first_step(tmp_path):
    config = DistillConfig(
        cache=str(shared_cache().root),
        data=str(tmp_path / "nowhere"),
        run=str(tmp_path / "run"),
        student=StudentConfig(name="test_resnet"),
        train=TrainConfig(epochs=1, global_batch_size=32, micro_batch_size=16),
    )
    for start in (plan_distill, distill):
        with pytest.raises(UserError, match="there is no dataset"):
            start(config, CPU)
    assert not (tmp_path / "run").exists()
