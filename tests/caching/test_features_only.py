"""Stage 1 with a teacher without a classifier: only features are stored, and every command reports it."""

import dataclasses

import numpy as np
import pytest
import torch

from scalekd_cache.caching.job import cache_teacher
from scalekd_cache.codec.logits import DenseLogits, logit_codec_from_config
from scalekd_cache.config.stage1 import CacheTeacherConfig, DataConfig, StoreConfig, TeacherConfig, ViewConfig
from scalekd_cache.config.stage2 import DistillConfig, ScaleKDConfig, StudentConfig, TrainConfig
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError
from scalekd_cache.loader.loader import CacheLoader
from scalekd_cache.loader.order import Order
from scalekd_cache.models.evaluate import teacher_accuracy
from scalekd_cache.scalekd.losses import Targets, distillation_losses, label_loss
from scalekd_cache.store.reader import Cache
from scalekd_cache.training.run_summary import summary_table

torch.set_num_threads(1)
PROCESS = Process(0, 1, torch.device("cpu"))


def config(path, backend: str) -> CacheTeacherConfig:
    return CacheTeacherConfig(
        data=DataConfig(max_samples=6),
        views=ViewConfig(size=64, crop_scale=(0.5, 1.0)),
        teacher=TeacherConfig(name="vit_tiny_patch16_224", pretrained=False, num_classes=0),
        cache=StoreConfig(path=str(path), backend=backend, num_views=1, views_per_group=1, samples_per_shard=4),
    )


@pytest.mark.parametrize("backend", ["webdataset", "zarr"])
def test_stage_one_without_a_classifier(tmp_path, capsys, backend):
    student = DistillConfig(
        student=StudentConfig(name="resnet18"), train=TrainConfig(global_batch_size=2, micro_batch_size=2)
    )
    manifest = cache_teacher(config(tmp_path / "cache", backend), PROCESS, student)
    assert capsys.readouterr().out.count("only features are cached, and there is no logit loss") == 1
    assert manifest.facts.teacher["spec"]["has_classifier"] is False
    assert manifest.facts.teacher["spec"]["num_classes"] == manifest.facts.logit_codec["num_classes"] == 0
    assert manifest.facts.teacher["top1"] is None
    assert teacher_accuracy(manifest.facts.teacher) == "features only (no classifier)"

    cache = Cache.open(tmp_path / "cache")
    order = Order(num_samples=len(cache), block=4, window=1, seed=0)
    loader = CacheLoader(cache, order, epochs=1, global_batch=2, micro_batch=2, rank=0, world_size=1)
    batch = next(iter(loader))
    stored = batch.stored[0]
    assert stored.logits.shape == (2, 0)
    logits = torch.randn(2, 10)
    targets = Targets(torch.zeros(2, 192, 4, 4), torch.zeros(2, 2, 4, 4), stored.logits)
    terms = distillation_losses(ScaleKDConfig(), TrainConfig(), logits, batch.labels, None, targets)
    assert torch.equal(terms.label, label_loss(logits, batch.labels))  # its full weight instead of half
    assert float(terms.logit) == 0


def test_records_of_no_classes_are_empty():
    codec = DenseLogits(0)
    assert codec.encode(torch.zeros(3, 0)) == [b""] * 3
    assert codec.decode(b"").shape == (0,)
    assert codec.decode(b"").dtype == np.float32
    assert logit_codec_from_config(codec.get_config()).num_classes == 0
    with pytest.raises(UserError, match="record's logits are damaged"):
        codec.decode(b"\x00" * 9)
    with pytest.raises(UserError, match="record's logits are damaged"):
        DenseLogits(3).decode(b"")
    with pytest.raises(UserError, match="invalid number of classes"):
        DenseLogits(-1)


def test_the_closing_table_says_so(tmp_path):
    summary = {
        "student": "resnet18", "teacher": "dino", "targets": "cached", "top1": 50.0, "top5": 90.0, "teacher_top1": None,
        "has_classifier": False, "epochs": 1, "steps": 1, "images_per_s": 1.0, "minutes": 0.1, "views": 1,
        "bytes_per_view": 1, "seed": 0, "cache_fingerprint": "",
    }  # fmt: skip
    assert "dino, features only (no classifier)" in summary_table(tmp_path / "run", summary)
    known = {**summary, "has_classifier": True, "teacher_top1": 81.25}
    assert "dino, top-1 81.25%" in summary_table(tmp_path / "run", known)


def test_classes_below_zero_are_refused():
    with pytest.raises(UserError, match="num_classes"):
        dataclasses.replace(TeacherConfig(), num_classes=-1)
