"""The demo teacher: a short training, an atomically written file, the augmentation."""

import errno
import os

import pytest
import torch
from safetensors.torch import load_file
from small_cache import CPU

from scalekd_cache.config.stage1 import DataConfig, TeacherConfig
from scalekd_cache.errors import UserError
from scalekd_cache.models import demo_teacher, weights
from scalekd_cache.models.demo_teacher import _augment, train_demo_teacher
from scalekd_cache.models.teacher import load_teacher


@pytest.fixture
def few_images(monkeypatch):
    images, source = demo_teacher._images, demo_teacher.open_source
    monkeypatch.setattr(demo_teacher, "_images", lambda source: tuple(part[:72] for part in images(source.first(72))))
    monkeypatch.setattr(demo_teacher, "open_source", lambda config, split: source(config, split).first(72))


def test_an_epoch_writes_a_teacher(few_images, tmp_path, capsys):
    file = tmp_path / "teachers" / "demo_swin.safetensors"
    top1 = train_demo_teacher(file, DataConfig(), epochs=1)
    assert 0 <= top1 <= 100
    assert f"top-1 {top1:.2f}% on 72 held-out images -> {file}" in capsys.readouterr().out
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    teacher = load_teacher(TeacherConfig(weights=str(file)), image_size=64, num_classes=10, device=CPU.device)
    assert teacher.spec.num_classes == 10
    again = tmp_path / "again.safetensors"
    assert train_demo_teacher(again, DataConfig(), epochs=1) == top1
    first, second = load_file(file), load_file(again)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    train_demo_teacher(again, DataConfig(), epochs=1, seed=1)
    assert not torch.equal(load_file(again)["head.fc.weight"], first["head.fc.weight"])


def test_a_failed_training_leaves_no_teacher(few_images, tmp_path, monkeypatch):
    def full(tensors, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(UserError, match="the disk is full"):
        train_demo_teacher(tmp_path / "demo_swin.safetensors", DataConfig(), epochs=1)
    assert not (tmp_path / "demo_swin.safetensors").exists()


def test_augmented_images_keep_shape_and_range():
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    augmented = _augment(images, torch.Generator().manual_seed(1))
    assert augmented.shape == images.shape
    assert augmented.dtype == torch.float32
    assert 0 <= float(augmented.min()) <= float(augmented.max()) <= 1
    assert not torch.equal(augmented, images)
    assert torch.equal(augmented, _augment(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(augmented, _augment(images, torch.Generator().manual_seed(2)))
    flat = torch.full((2, 3, 64, 64), 0.25)
    torch.testing.assert_close(_augment(flat, torch.Generator().manual_seed(0)), flat)
