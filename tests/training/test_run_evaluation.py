"""Accuracy of a student: as with timm's own transform; only on images of its classes."""

import pytest
import timm
import torch
from image_files import folder_tree
from PIL import Image
from small_cache import CPU, shared_cache
from timm.data import create_transform, resolve_data_config

from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.config.stage2 import StudentConfig
from scalekd_cache.convert.timm_export import export_student
from scalekd_cache.data.images import decode_image
from scalekd_cache.data.source import open_source
from scalekd_cache.models.student import build_student
from scalekd_cache.training.run import _validation
from scalekd_cache.training.run_evaluation import evaluate_folder

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


@pytest.mark.parametrize(("classes", "text"), [("ab", "different classes"), ("", "no labels")])
def test_a_run_on_images_of_other_classes_measures_no_accuracy(tmp_path, capsys, classes, text):
    names = [f"{name}/1.png" for name in classes] or ["1.png", "2.png"]
    data = folder_tree(tmp_path, names, names)
    assert _validation(shared_cache().manifest, str(data), CPU) is None
    assert text in capsys.readouterr().out
    assert _validation(shared_cache().manifest, None, CPU) is not None
