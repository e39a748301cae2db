"""Training from a cache without labels: the losses, the metrics on held-out images, and the export."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from commands import steps_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_cache import CPU, flip_byte, make, options, shared_weights, tree
from small_run import config_of as labeled_config
from torch import nn
from unlabeled_cache import NO_HEAD, TRAIN, VAL, unlabeled_cache, unlabeled_pictures, unlabeled_weights

from scalekd_cache.audit.repair import repair_cache
from scalekd_cache.audit.verify_cache import verify_deep
from scalekd_cache.caching.job import cache_teacher
from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.config.stage2 import DistillConfig, OptimConfig, ScaleKDConfig, StudentConfig, TrainConfig
from scalekd_cache.data.images import UnreadableImage, decode_image
from scalekd_cache.data.source import open_cache_source, open_source
from scalekd_cache.errors import UserError
from scalekd_cache.models import evaluate
from scalekd_cache.models.evaluate import center_views
from scalekd_cache.models.teacher import cache_teacher_config, load_cache_teacher
from scalekd_cache.models.teacher_outputs import held_out_images, load_held_out
from scalekd_cache.reports.neighbors import read_spaces
from scalekd_cache.scalekd.losses import Targets, distillation_losses
from scalekd_cache.store.base import NO_LABEL
from scalekd_cache.store.manifest import HELD_OUT
from scalekd_cache.store.reader import Cache
from scalekd_cache.training import held_out_evaluation
from scalekd_cache.training.custom_loop import CachedTargets, ScaleKDLoss, timm_student
from scalekd_cache.training.dry_run import plan_distill
from scalekd_cache.training.held_out_evaluation import FIGURES, TeacherComparison, _label_figures
from scalekd_cache.training.run import distill
from scalekd_cache.training.run_evaluation import evaluate_run
from scalekd_cache.training.run_summary import _held_out_rows


def config_of(run, classes=0, *, student="resnet10t", **train):
    small = {"epochs": 2, "global_batch_size": 32, "micro_batch_size": 16, "log_every": 1}
    return DistillConfig(
        cache=str(unlabeled_cache(classes).root),
        run=str(run),
        student=StudentConfig(name=student),
        optim=OptimConfig(name="adamw", lr=1e-3, base_batch_size=32),
        scalekd=ScaleKDConfig(projector="linear"),
        train=TrainConfig(**{**small, **train}),
    )


def validation(classes=0):
    return open_cache_source(unlabeled_cache(classes).manifest.facts.data, None, "val")


def test_records_have_no_label_and_the_teacher_is_run_on_held_out_images():
    cache, source = unlabeled_cache(), validation()
    facts = cache.manifest.facts
    assert (facts.class_names, facts.labeled, facts.num_classes, len(cache)) == ([], False, 0, TRAIN)
    assert {record.label for record in cache.read(np.arange(TRAIN), 1)} == {NO_LABEL}
    held_out = load_held_out(cache.root / HELD_OUT, source)
    assert held_out.indices.tolist() == list(range(VAL))
    teacher = load_cache_teacher(cache.manifest, cache_teacher_config(facts.teacher["config"], None), CPU.device)
    (batch,) = center_views(source, range(VAL), 64)
    output = teacher(batch.images)
    assert torch.allclose(held_out.features, output.features[held_out.mapped], atol=1e-5)
    assert torch.allclose(held_out.pooled, output.features.mean((2, 3)), atol=1e-5)
    assert verify_deep(cache.root, records=8).findings.problems == []


@pytest.mark.parametrize(("total", "count"), [(1, 1), (5000, 5000), (5001, 2501), (12_500, 4167), (50_000, 5000)])
def test_at_most_5000_images_are_held_out(total, count):
    chosen = held_out_images(SimpleNamespace(samples=range(total)))
    assert len(chosen) == count
    assert total - chosen[-1] <= -(-total // 5000)


def test_a_run_without_labels(tmp_path, capsys):
    """mobilenetv3 has layers between its last map and its embedding; only the pooled target reaches them."""
    run = tmp_path / "run"
    summary = distill(config_of(run, student="mobilenetv3_small_050"), CPU)
    assert (
        "no labels, so there is no label loss; the student learns the teacher's feature map and its pooled embedding"
        in (capsys.readouterr().out)
    )
    lines = steps_of(run)
    assert {line["label"] for line in lines} == {line["logit"] for line in lines} == {0.0}
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert summary["top1"] is None
    assert summary["held_out"].keys() == FIGURES.keys()
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    during = sorted({*FIGURES, "step"} - _probes())  # linear probes are fitted only in the last evaluation
    assert [sorted(line) for line in logged if "knn" in line] == [during, sorted({*FIGURES, "step"})]
    model = timm.create_model(f"local-dir:{run / 'export'}", pretrained=True, features_only=True)
    assert len(model(torch.zeros(1, 3, 64, 64))) > 1
    first = timm.create_model("mobilenetv3_small_050", num_classes=0).state_dict()
    assert not torch.equal(load_file(run / "export/model.safetensors")["conv_head.weight"], first["conv_head.weight"])
    with pytest.raises(UserError, match="scalekd probe"):
        evaluate_run(run, None, CPU, 0)


def _probes():
    return {name for name in FIGURES if "linear_probe" in name}


def test_a_teacher_with_a_classifier_gives_soft_labels(tmp_path):
    summary = distill(config_of(tmp_path / "run", 10, epochs=1), CPU)
    assert summary["has_classifier"]
    lines = steps_of(tmp_path / "run")
    assert {line["label"] for line in lines} == {0.0}
    assert all(line["logit"] > 0 for line in lines)
    assert json.loads((tmp_path / "run/export/config.json").read_text())["num_classes"] == 10


@pytest.mark.parametrize(
    ("classes", "options", "learned"),
    [
        (0, {"s4": False}, "pooled embedding"),
        (0, {"projector": "cap", "s3": False, "s4": False}, "pooled embedding"),
        (0, {"projector": "cap", "spatial_weight": 0.0}, "feature map"),
        (10, {"spatial_weight": 0.0}, "soft labels (10 classes)"),
        (10, {}, "feature map, its pooled embedding and its soft labels (10 classes)"),
    ],
)
def test_a_dry_run_lists_only_what_the_student_learns(tmp_path, classes, options, learned):
    config = config_of(tmp_path / "run", classes)
    config = dataclasses.replace(config, scalekd=dataclasses.replace(config.scalekd, **options))
    assert any(line.endswith(f"; the student learns the teacher's {learned}") for line in plan_distill(config, CPU))


def test_without_labels_and_a_classifier_the_feature_weights_must_not_be_0(tmp_path):
    for off in ({"projector": "linear"}, {"s3": False, "s4": False}):
        scalekd = ScaleKDConfig(spatial_weight=0.0, **off)
        with pytest.raises(UserError, match=r"no loss(.|\n)*no labels, no teacher with a classifier"):
            plan_distill(dataclasses.replace(config_of(tmp_path / "run"), scalekd=scalekd), CPU)
        with pytest.raises(UserError, match="no loss"):
            ScaleKDLoss(unlabeled_cache(), timm_student("test_resnet", unlabeled_cache()), scalekd)


@pytest.mark.parametrize(("logit_weight", "expected"), [(0.5, 1.0), (0.25, 1.0), (0.0, 0.0)])
def test_without_a_label_loss_the_logit_loss_has_weight_1(logit_weight, expected):
    scalekd = ScaleKDConfig(logit_weight=logit_weight)
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    targets = Targets(torch.zeros(0, 1, 2, 2), torch.zeros(0, 2, 2, 2), teacher)
    terms = distillation_losses(
        scalekd, TrainConfig(label_loss="none"), student, torch.full((4,), NO_LABEL), None, targets
    )
    cross_entropy = -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()
    assert terms.label == 0
    assert torch.allclose(terms.logit, expected * cross_entropy)
    assert terms.total == terms.logit


@pytest.mark.parametrize("train", [{"targets": "none"}, {"targets": "none", "label_loss": "none"}])
def test_nothing_to_train_on_is_refused(tmp_path, train):
    with pytest.raises(UserError, match=r"the run has no loss|training needs the teacher's targets"):
        plan_distill(config_of(tmp_path / "run", **train), CPU)
    assert not (tmp_path / "run").exists()


def test_other_held_out_images_are_refused(tmp_path):
    shutil.copytree(unlabeled_pictures(), tmp_path / "data")
    next((tmp_path / "data/val/1").iterdir()).unlink()
    config = dataclasses.replace(config_of(tmp_path / "run"), data=str(tmp_path / "data"))
    with pytest.raises(UserError, match="the held-out images are not those of the cache"):
        distill(config, CPU)


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: flip_byte(file, file.stat().st_size - 9)])
def test_damaged_teacher_outputs_are_found_and_repaired(tmp_path, damage):
    root = tmp_path / "cache"
    shutil.copytree(unlabeled_cache().root, root)
    before = tree(root)
    damage(root / HELD_OUT)
    assert [problem.where for problem in verify_deep(root, records=0).findings.problems] == [HELD_OUT]
    assert repair_cache(root, CPU).left == []
    assert tree(root) == before


def test_an_interrupted_job_keeps_what_it_has(tmp_path):
    """The outputs are written with the plan, before the first unit, and are not computed again."""
    root = tmp_path / "cache"
    shutil.copytree(unlabeled_cache().root, root)
    shutil.rmtree(root / "units/g000-r00001")
    (root / "manifest.json").unlink()
    written = (root / HELD_OUT).stat().st_mtime_ns
    data = {"source": str(unlabeled_pictures()), "max_samples": None}
    cache_teacher(options(root, unlabeled_weights(), data=data, teacher=NO_HEAD), CPU)
    assert (root / HELD_OUT).stat().st_mtime_ns == written
    assert tree(root) == tree(unlabeled_cache().root)


@pytest.mark.parametrize("classes", [0, 10])
def test_a_custom_loop(classes):
    """The third output of a student is its logits, or its pooled embedding where the cache has no classes."""
    targets = CachedTargets(unlabeled_cache(classes), batch_size=16)
    student = timm_student("test_resnet", targets)
    loss = ScaleKDLoss(targets, student, ScaleKDConfig(projector="linear"))
    images, labels, target = next(iter(targets))
    terms = loss(*student(images), labels, target)
    terms.total.backward()
    assert terms.label == 0
    assert bool(terms.logit > 0) is (classes > 0)
    assert float(terms.pooled.detach()) > 0
    trained = {name for name, value in student.model.named_parameters() if value.grad is not None}
    assert trained == {name for name, _ in student.model.named_parameters()}


class TwoMaps(nn.Module):
    """A student with a classifier for `classes`, or with a pooled embedding if `classes` is None."""

    def __init__(self, classes):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 16, 2, 2)
        self.head = nn.Identity() if classes is None else nn.Linear(16, classes)

    def forward(self, images):
        s3 = self.stem(images)
        s4 = self.last(s3)
        return s3, s4, self.head(s4.mean((2, 3)))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_custom_student_of_an_unlabeled_cache_returns_an_embedding():
    targets = CachedTargets(unlabeled_cache(), batch_size=16)
    with pytest.raises(UserError, match=r"(?s)\(S3, S4, embedding\).*\(1, 0\).*s4.mean\(\(2, 3\)\)"):
        ScaleKDLoss(targets, TwoMaps(targets.num_classes))
    student = TwoMaps(None)
    loss = ScaleKDLoss(targets, student)
    images, labels, target = next(iter(targets))
    assert set(labels.tolist()) == {-1}
    assert loss(*student(images), labels, target).pooled > 0


@pytest.mark.parametrize("classes", [0, 10])
def test_the_printed_weights_name_the_terms_of_an_unlabeled_cache(classes, capsys):
    cache = unlabeled_cache(classes)
    capsys.readouterr()  # of the cache, if this test is the first to use it
    ScaleKDLoss(cache, TwoMaps(classes or None))
    terms = "loss weights: spatial 0.005, frequency 0.004 and 0.004, pooled 0.245"
    assert capsys.readouterr().out.startswith(f"{terms}, logits 1, from " if classes else f"{terms}, from ")


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_a_label_loss_without_labels_is_an_error(kind):
    with pytest.raises(UserError, match=f"(?s)no labels.*label_loss={kind}.*omit label_loss"):
        ScaleKDLoss(unlabeled_cache(), TwoMaps(None), label_loss=kind)
    assert ScaleKDLoss(unlabeled_cache(), TwoMaps(None), label_loss="none").train_config.label_loss == "none"


@pytest.mark.parametrize(
    ("labels", "names"),
    [([3], set()), ([3, 3], {"knn"}), ([3, 1, 3, 1], {"knn"}), ([3, 1, 1, 3], {"knn", "linear_probe"})],
)
def test_few_labeled_images(labels, names):
    """A linear classifier is fitted on every other image, which may have one class only."""
    embeddings = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(0))
    assert _label_figures(embeddings, torch.tensor(labels), "", True).keys() == names


def unreadable(keys):
    """A `decode_image` that fails for images whose key ends in one of `keys`."""

    def decode(data, key):
        if key.endswith(keys):
            raise UnreadableImage(key, "damaged")
        return decode_image(data, key)

    return decode


def test_unreadable_held_out_images_are_reported(tmp_path, capsys, monkeypatch):
    """In stage 1 and in training; also if no image with a feature map is left."""
    monkeypatch.setattr(evaluate, "decode_image", unreadable(("1", "2")))
    distill(config_of(tmp_path / "run", epochs=2), CPU)
    lost = [sample.key for sample in validation().samples if sample.key.endswith(("1", "2"))]
    note = f"omitted {len(lost)} held-out images that could not be read (the first: {lost[0]})"
    assert capsys.readouterr().out.count(note) == 1  # not after every epoch
    make(
        tmp_path / "cache",
        unlabeled_weights(),
        data={"source": str(unlabeled_pictures()), "max_samples": None},
        teacher=NO_HEAD,
    )
    assert note in capsys.readouterr().out
    assert _held_out_rows({"retrieval": 0.5, "knn": 1.0, "teacher_knn": 2.0})[0][0] == "neighbors"
    assert _held_out_rows({}) == []


def test_an_accuracy_of_no_image_is_not_0(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "decode_image", unreadable(""))
    config = labeled_config(tmp_path / "run", epochs=2)
    capsys.readouterr()  # the shared cache may have been made just now
    summary = distill(config, CPU)
    assert (summary["top1"], summary["val_images"]) == (None, 0)
    output = capsys.readouterr().out
    first = open_source(DataConfig(source="demo"), "val").samples[0].key
    note = f"validation images that could not be read (the first: {first})"
    assert output.count(note) == 1  # not after every epoch
    assert "top-1 not measured" in output
    cache = make(tmp_path / "cache", shared_weights(), cache={"num_views": 1, "views_per_group": 1})
    assert cache.manifest.facts.teacher["top1"] is None
    assert note in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda file: file["indices"].__setitem__(-1, 10**9), "indices: not ascending numbers below 60"),
        (lambda file: file["indices"].__setitem__(0, -1), "indices: not ascending"),
        (lambda file: file["indices"].__setitem__(0, 1), "indices: not ascending"),
        (lambda file: file["mapped"].__setitem__(-1, 10**9), "mapped: not ascending"),
        (lambda file: file.update(mapped=file["mapped"].view(-1, 1)), "mapped: torch.int64 with shape"),
        (lambda file: file.update(pooled=file["pooled"][:3].clone()), "3 embeddings for 60 images"),
        (lambda file: file.update(features=file["features"][:2].clone()), "2 maps for 60"),
        (lambda file: file.update(features=file["features"].to(torch.int8)), "features: torch.int8"),
        (lambda file: file.update({name: value[:0].clone() for name, value in file.items()}), r"indices: .* \(0,\)"),
        (lambda file: file["pooled"].fill_(float("nan")), "NaN or Inf"),
        (lambda file: file.update(digests=file["digests"][:3].clone()), r"digests: .* \(3,\) for 60"),
        (lambda file: file.pop("features"), "does not contain tensor features"),
    ],
)
def test_crafted_teacher_outputs_are_one_error(tmp_path, change, text):
    """With the right hash in the manifest, as someone who shares a cache could write it."""
    source = unlabeled_cache().root / HELD_OUT
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, tmp_path / HELD_OUT, metadata)
    with pytest.raises(UserError, match=text):
        load_held_out(tmp_path / HELD_OUT, validation())


def test_teacher_outputs_from_before_digests_are_not_compared_by_file(tmp_path):
    tensors = load_file(unlabeled_cache().root / HELD_OUT)
    del tensors["digests"]
    with safe_open(unlabeled_cache().root / HELD_OUT, "pt") as file:
        save_file(tensors, tmp_path / HELD_OUT, file.metadata())
    found = load_held_out(tmp_path / HELD_OUT, validation())
    (batch,) = center_views(validation(), range(VAL), 64)
    found.check_images(batch._replace(digests=batch.digests + 1), range(VAL), validation())
    kept = load_held_out(unlabeled_cache().root / HELD_OUT, validation())
    with pytest.raises(UserError, match="has changed since stage 1"):
        kept.check_images(batch._replace(digests=batch.digests + 1), range(VAL), validation())


@pytest.mark.parametrize("name", ["pooled", "features"])
def test_teacher_outputs_of_another_width_are_refused(tmp_path, name, monkeypatch):
    kept = load_held_out(unlabeled_cache().root / HELD_OUT, validation())
    narrow = kept._replace(**{name: getattr(kept, name)[:, :3]})
    monkeypatch.setattr(held_out_evaluation, "load_held_out", lambda *_: narrow)
    with pytest.raises(UserError, match="belong to a different teacher"):
        TeacherComparison(unlabeled_cache(), 0, validation(), CPU)


@pytest.mark.parametrize("place", [-9, -4000])
def test_a_flipped_bit_in_the_teacher_outputs_is_an_error(tmp_path, place):
    """It would change figures only, of one image."""
    root = tmp_path / "cache"
    shutil.copytree(unlabeled_cache().root, root)
    size = (root / HELD_OUT).stat().st_size
    flip_byte(root / HELD_OUT, size + place)
    with pytest.raises(UserError, match=r"sha256 differs(?s:.*)scalekd repair"):
        TeacherComparison(Cache.open(root), 0, validation(), CPU)


def test_a_held_out_image_that_changed_since_stage_1_is_an_error(tmp_path):
    """Its metrics would compare a student with the teacher's outputs on the old image."""
    shutil.copytree(unlabeled_pictures(), tmp_path / "data")
    changed = sorted((tmp_path / "data/val").rglob("*.png"))[-1]
    Image.open(changed).rotate(90).save(changed)
    config = dataclasses.replace(config_of(tmp_path / "run"), data=str(tmp_path / "data"))
    with pytest.raises(UserError, match="has changed since stage 1") as raised:
        distill(config, CPU)
    assert changed.stem in str(raised.value)
    shutil.copy(unlabeled_pictures() / changed.relative_to(tmp_path / "data"), changed)
    assert distill(config, CPU)["held_out"]
    Image.open(changed).rotate(90).save(changed)
    notes = []
    with pytest.raises(UserError, match="has changed since stage 1"):
        read_spaces(tmp_path / "run", str(tmp_path / "data"), CPU, notes)
