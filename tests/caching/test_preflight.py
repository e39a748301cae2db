"""Checks before the start: teacher, disk, student, and options that match the cache."""

import shutil
from pathlib import Path

import pytest
import torch
from image_files import folder_tree, source_of, write
from small_cache import CPU

from scalekd_cache.caching import preflight
from scalekd_cache.caching.plan_check import check_plan
from scalekd_cache.caching.preflight import check_disk_space, check_student, check_teacher, probe_views
from scalekd_cache.caching.sample_views import spread_views
from scalekd_cache.config.base import to_plain
from scalekd_cache.config.recipes import check_recipe
from scalekd_cache.config.stage1 import TeacherConfig, ViewConfig
from scalekd_cache.config.stage2 import DistillConfig, OptimConfig, ScaleKDConfig, StudentConfig, TrainConfig
from scalekd_cache.errors import UserError
from scalekd_cache.models.teacher import load_teacher

CLASSES = tuple("abcdefghij")
NO_LOSS = DistillConfig(
    scalekd=ScaleKDConfig(s3=False, s4=False, logit_weight=0.0), train=TrainConfig(label_loss="none")
)
PIXELS = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return load_teacher(TeacherConfig(pretrained=False), image_size=64, num_classes=10, device=CPU.device)


def test_a_teacher_that_fits(teacher):
    check_teacher(teacher, CLASSES, PIXELS)


def test_a_tail_that_is_not_the_end_of_the_teacher(teacher, monkeypatch):
    for error in (2e-5, float("nan")):
        monkeypatch.setattr(preflight, "check_tail", lambda *args, error=error: error)
        with pytest.raises(UserError, match="does not reproduce the teacher's features") as raised:
            check_teacher(teacher, CLASSES, PIXELS)
        assert "demo_swin, family swin" in str(raised.value)
    monkeypatch.setattr(preflight, "check_tail", lambda *args: 1e-6)
    check_teacher(teacher, CLASSES, PIXELS)


def test_classes_that_are_not_the_data_sets(teacher):
    with pytest.raises(UserError, match="different numbers of classes") as error:
        check_teacher(teacher, CLASSES[:7], PIXELS)
    assert "has 10 classes" in str(error.value)
    assert "7 classes (a, b, c, ...)" in str(error.value)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("label_loss", ["ce", "bce"])
def test_a_student_that_fits(teacher, name, label_loss):
    config = DistillConfig(student=StudentConfig(name=name), train=TrainConfig(label_loss=label_loss))
    check_student(config, teacher, 10, teacher(PIXELS))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DistillConfig(student=StudentConfig(name="resnet81")), "resnet81"),
        (DistillConfig(scalekd=ScaleKDConfig(heads_s3=7)), "heads"),
        (NO_LOSS, "the run has no loss"),
    ],
)
def test_a_student_that_does_not_fit(teacher, config, message):
    with pytest.raises(UserError, match=message):
        check_student(config, teacher, 10, teacher(PIXELS))


@pytest.mark.parametrize("bad", [0, 2, 7])
def test_a_sample_covers_the_dataset_and_others_replace_unreadable_images(tmp_path, bad):
    images = [f"a/{number}.png" for number in range(8)]
    root = folder_tree(tmp_path, images, images[:1])
    source = source_of(root)
    keys = [sample.key for sample in source.samples]
    assert [one.sample.key for one in spread_views(source, ViewConfig(size=32), (0,), 6)] == \
        [keys[index] for index in (0, 1, 2, 4, 5, 6)]  # fmt: skip
    write(root / "train" / f"{keys[bad]}.png", b"nothing")
    found = [one.sample.key for one in spread_views(source, ViewConfig(size=32), (0,), 6)]
    assert found == [keys[index] for index in (0, 1, 2, 4, 5, 6, 3) if index != bad][:6]


def test_probing_passes_over_unreadable_images(tmp_path):
    root = folder_tree(tmp_path)
    write(root / "train" / "ant" / "1.png", b"nothing")
    pixels = probe_views(source_of(root), ViewConfig(size=32))
    assert pixels.shape == (3, 3, 32, 32)
    for name in ("ant/2.png", "bee/1.png", "bee/sub/x.png"):
        write(root / "train" / name, b"nothing")
    with pytest.raises(UserError, match="none of the images sampled from the dataset could be decoded"):
        probe_views(source_of(root), ViewConfig(size=32))


def test_space_is_asked_where_the_cache_will_be(tmp_path, monkeypatch):
    asked = []
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage)
    check_disk_space(tmp_path / "not" / "yet", 10, 1000.0)
    with pytest.raises(UserError, match="does not fit") as error:
        check_disk_space(tmp_path / "not" / "yet", 11, 1100.0)
    assert set(asked) == {tmp_path}
    assert "11 views" in str(error.value)


def test_plans_that_differ_are_compared_field_by_field():
    kept = {"a": {"b": 1, "c": 2}, "d": 3}
    check_plan(kept, {"d": 3, "a": {"c": 2, "b": 1}}, Path("here"))
    with pytest.raises(UserError, match="different options") as error:
        check_plan(kept, {"a": {"b": 1, "c": 5}, "e": 4}, Path("here"))
    assert "a.c: 5 (requested) / 2 (cache); d: None (requested) / 3 (cache); e: 4 (requested) / None (cache)" in str(
        error.value
    )
    assert "here" in str(error.value)
    assert "a.b" not in str(error.value)


def test_a_recipe_must_train_on_the_views_of_the_cache():
    kept = to_plain(ViewConfig(size=64))
    check_recipe(kept, "mine", to_plain(ViewConfig(size=64)), Path("here"))
    own = ViewConfig(size=64, seed=9, pixels="replayed", pixel_format="png", jpeg_quality=50, jpeg_subsampling="4:4:4")
    check_recipe(kept, "mine", to_plain(own), Path("here"))
    other = ViewConfig(size=96, flip_probability=0.1)
    with pytest.raises(UserError, match="differ from those of recipe mine") as error:
        check_recipe(kept, "mine", to_plain(other), Path("here"))
    assert "got: views.size=64, views.flip_probability=0.5" in str(error.value)
    assert "expected: views.size=96, views.flip_probability=0.1" in str(error.value)


def test_lamb_recipes_fit_too(teacher):
    check_student(DistillConfig(optim=OptimConfig(name="lamb")), teacher, 10, teacher(PIXELS))
