"""A student at another image size than the views: training, evaluation and export use the student's size."""

import json

import pytest
import torch
from small_cache import CPU, shared_cache

from scalekd_cache.config.stage2 import DistillConfig, StudentConfig, TrainConfig
from scalekd_cache.errors import UserError
from scalekd_cache.models.normalize import resize
from scalekd_cache.models.student import build_student
from scalekd_cache.training.custom_loop import CachedTargets, ScaleKDLoss, timm_student
from scalekd_cache.training.dry_run import plan_distill
from scalekd_cache.training.run import distill
from scalekd_cache.training.run_evaluation import evaluate_run
from scalekd_cache.training.run_files import read_facts

SMALL = TrainConfig(epochs=1, global_batch_size=32, micro_batch_size=16, log_every=1)


def config_of(run, size, student="test_resnet"):
    return DistillConfig(
        cache=str(shared_cache().root), run=str(run), student=StudentConfig(name=student, image_size=size), train=SMALL
    )


def test_views_are_resized_without_leaving_the_scale_of_pixels():
    images = torch.randint(0, 2, (2, 3, 64, 64), dtype=torch.uint8) * 255
    assert resize(images, 64) is images
    for size in (32, 96):
        resized = resize(images, size)
        assert (resized.shape, resized.dtype) == ((2, 3, size, size), torch.float32)
        assert 0 <= resized.min() < resized.max() <= 255
    flat = torch.full((1, 3, 64, 64), 7, dtype=torch.uint8)
    assert torch.allclose(resize(flat, 40), torch.tensor(7.0))


@pytest.mark.parametrize(("name", "grid"), [("test_resnet", 3), ("test_vit", 6)])
def test_a_student_is_built_for_its_own_size(name, grid):
    student = build_student(StudentConfig(name=name, image_size=96), num_classes=10, image_size=64)
    assert student.image_size == 96
    assert student.tap_shapes[1][1:] == (grid, grid)


def test_a_run_at_another_size(tmp_path):
    run = tmp_path / "run"
    summary = distill(config_of(run, 96), CPU)
    assert summary["image_size"] == read_facts(run)["image_size"] == 96
    exported = json.loads((run / "export" / "config.json").read_text())
    assert exported["pretrained_cfg"]["input_size"] == [3, 96, 96]
    assert "96 x 96 pixels" in (run / "export" / "README.md").read_text()
    assert round(evaluate_run(run, None, CPU, 0).top1_percent, 4) == summary["top1"]
    with pytest.raises(UserError, match=r"student\.image_size=64(.|\n)*student\.image_size=96"):
        distill(config_of(run, 64), CPU)


def test_a_size_that_the_student_does_not_support_is_refused_before_the_run(tmp_path):
    with pytest.raises(UserError, match="failed on images of 50 x 50 pixels"):
        plan_distill(config_of(tmp_path / "run", 50, "test_vit"), CPU)
    with pytest.raises(UserError, match=r"invalid value for student\.image_size"):
        StudentConfig(image_size=4)
    assert not list(tmp_path.iterdir())


def test_a_custom_loop_at_another_size():
    targets = CachedTargets(shared_cache(), batch_size=8, image_size=96)
    student = timm_student("test_resnet", targets)
    batch = next(iter(targets))
    assert batch.images.shape == (8, 3, 96, 96)
    terms = ScaleKDLoss(targets, student)(*student(batch.images), batch.labels, batch.targets)
    assert terms.total.isfinite()
