"""One student on the targets of several teachers, from caches that hold the same views."""

import dataclasses
import json

import numpy as np
import pytest
import sparse_cache
import torch
from cache_forms import sharing
from commands import steps_of
from growing import IMAGES, Writer, make_growing, two_groups
from small_cache import CPU, SAMPLES, VIEWS, copy_of_cache, make, shared_cache, shared_weights
from unlabeled_cache import unlabeled_cache, unlabeled_pictures, unlabeled_weights

from scalekd_cache.config.stage2 import DistillConfig, OptimConfig, ScaleKDConfig, StudentConfig, TrainConfig
from scalekd_cache.errors import UserError
from scalekd_cache.loader.loader import CacheLoader
from scalekd_cache.loader.order import WINDOW, Order
from scalekd_cache.loader.target_cache import check_joinable, feature_counts
from scalekd_cache.reports.run_data import RunReport
from scalekd_cache.reports.runs import run_report
from scalekd_cache.scalekd.losses import (
    FeatureTerms,
    HeadOutputs,
    Targets,
    distillation_losses,
    logit_loss,
    losses_of_teachers,
)
from scalekd_cache.store import growing as follow
from scalekd_cache.store.reader import Cache
from scalekd_cache.training.custom_loop import CachedTargets, ScaleKDLoss, timm_student
from scalekd_cache.training.dry_run import plan_distill
from scalekd_cache.training.run import distill

VIT = {"name": "vit_tiny_patch16_224", "pretrained": False, "num_classes": 0, "weights": None}
"""A teacher with another grid and width than the demo Swin, without a classifier."""


def vit_cache(root, first, **changes):
    """A cache of the ViT that shares the pixels of `first`."""
    layout = {"codec": "float16", "pixels_from": str(first), **changes.pop("cache", {})}
    return make(root, shared_weights(), teacher=VIT, cache=layout, **changes)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The small cache, and a cache of the ViT on its pixels."""
    folder = tmp_path_factory.mktemp("teachers")
    first = copy_of_cache(folder / "swin")
    return Cache.open(first), vit_cache(folder / "vit", first)


@pytest.fixture(scope="module")
def regrouped(tmp_path_factory):
    """The small cache again, with pixels of its own and one view per group: another order in view 1."""
    root = tmp_path_factory.mktemp("regrouped") / "cache"
    return make(root, shared_weights(), cache={"codec": "float32", "views_per_group": 1, "samples_per_shard": 40})


def config_of(caches, run, *, train=None, scalekd=None, **rest):
    small = {"epochs": 2, "global_batch_size": 16, "micro_batch_size": 8, "log_every": 1, "eval_epochs": 2}
    return DistillConfig(
        cache=",".join(str(cache.root) for cache in caches),
        run=str(run),
        student=StudentConfig(name="test_resnet"),
        scalekd=ScaleKDConfig(**(scalekd or {})),
        optim=OptimConfig(name="adamw", lr=1e-3, base_batch_size=16),
        train=TrainConfig(**{**small, **(train or {})}),
        **rest,
    )


def loader_of(caches, **rest):
    order = Order(num_samples=len(caches[0]), block=8, window=WINDOW, seed=0)
    sizes = {"epochs": VIEWS, "global_batch": 16, "micro_batch": 16}
    return CacheLoader(caches[0], order, others=caches[1:], **sizes, **rest)


def losses(run):
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait")} for line in steps_of(run)]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_teacher_has_the_targets_of_the_same_view_of_the_same_image(pair, regrouped, workers):
    """Oracle: the records by key, whatever the order of the other caches."""
    caches = [*pair, regrouped]
    keys = [[[record.key for record in cache.read(np.arange(SAMPLES), view)] for view in range(VIEWS)]
            for cache in caches]  # fmt: skip
    assert keys[0] == keys[1]
    assert keys[0][1] != keys[2][1]
    seen = 0
    for batch in loader_of(caches, workers=workers):
        for cache, stored in zip(caches, batch.stored, strict=True):
            for row, position in enumerate(batch.ids.tolist()):
                record = cache[keys[0][batch.view][position], batch.view]
                assert record.features == bytes(stored.codes[row].numpy()) or cache is caches[2]
                seen += 1
    assert seen == VIEWS * SAMPLES * len(caches)


def test_targets_in_another_order_are_those_of_the_image(pair, regrouped):
    """The Swin's float32 targets in another order are within the codec's error of its int8 targets."""
    for batch in loader_of([pair[0], regrouped]):
        int8, exact = (
            codecs.features.decode(stored.codes).features
            for codecs, stored in zip(loader_of([pair[0], regrouped]).codecs, batch.stored, strict=True)
        )
        cosine = torch.nn.functional.cosine_similarity(int8.flatten(1), exact.flatten(1))
        assert float(cosine.min()) > 0.999


def test_a_record_of_another_view_is_found_when_it_is_read(pair, tmp_path, monkeypatch):
    root = tmp_path / "vit"
    other = vit_cache(root, pair[0].root, cache={"codec": "float32"})
    read = Cache.read

    def shifted(self, ids, view):
        return read(self, (ids + 1) % SAMPLES if self.root == root else ids, view)

    monkeypatch.setattr(Cache, "read", shifted)
    with pytest.raises(UserError, match="two caches contain different records at the same position") as error:
        next(iter(loader_of([pair[0], other])))
    assert str(root) in str(error.value)


def test_caches_of_other_views_or_images_do_not_join(pair, tmp_path):
    seeded = make(tmp_path / "seed", shared_weights(), views={"seed": 1})
    fewer = make(tmp_path / "fewer", shared_weights(), data={"max_samples": 48})
    for other, what in ((seeded, "different views"), (fewer, "different datasets")):
        with pytest.raises(UserError, match=what) as error:
            plan_distill(config_of([pair[0], other], tmp_path / "run"), CPU)
        assert f"--pixels-from {pair[0].root}" in str(error.value)
    with pytest.raises(UserError, match="listed twice"):
        plan_distill(config_of([pair[0], pair[0]], tmp_path / "run"), CPU)
    with pytest.raises(UserError, match="the number of shares in"):
        plan_distill(config_of(pair, tmp_path / "run", scalekd={"teacher_shares": (1, 2, 3)}), CPU)
    with pytest.raises(UserError, match="the number of shares in"):
        plan_distill(config_of(pair, tmp_path / "run", scalekd={"teacher_shares": 2.0}), CPU)
    live = {"train": {"targets": "live"}}
    with pytest.raises(UserError, match="--teacher-weights needs one entry per cache"):
        plan_distill(config_of(pair, tmp_path / "run", teacher_weights="a,b,c", **live), CPU)
    with pytest.raises(UserError, match="weights file does not exist"):
        plan_distill(config_of(pair, tmp_path / "run", teacher_weights=f"{shared_weights()},b", **live), CPU)
    assert not (tmp_path / "run").exists()


def outputs(seed, shape, classes):
    """Projected maps that need a gradient, targets, and a student's logits."""
    draw = torch.Generator().manual_seed(seed)
    maps = [torch.randn(4, *shape, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    norms = torch.rand(4, 2, *shape[1:], generator=draw, dtype=torch.float64) + 1
    features = torch.randn(4, *shape, generator=draw, dtype=torch.float64)
    return HeadOutputs(*maps), Targets(features, norms, torch.randn(4, classes, generator=draw, dtype=torch.float64))


def test_one_teacher_has_the_terms_of_one():
    maps, targets = outputs(0, (5, 3, 3), 6)
    logits, labels = torch.randn(4, 6), torch.arange(4)
    terms, own = losses_of_teachers(ScaleKDConfig(), TrainConfig(), logits, labels, [(maps, targets)])
    assert len(own) == 1
    expected = distillation_losses(ScaleKDConfig(), TrainConfig(), logits, labels, maps, targets)
    assert all(torch.equal(a, b) for a, b in zip(terms, expected, strict=True))


def test_fixed_weights_are_a_weighted_sum_and_one_cross_entropy_with_mean_probabilities():
    """Widths 5 and 7, grids 3x3 and 2x2; the third teacher has no logits."""
    config, train = ScaleKDConfig(teacher_shares=(3, 1, 4)), TrainConfig(label_smoothing=0.1)
    given = [outputs(0, (5, 3, 3), 6), outputs(1, (7, 2, 2), 6), outputs(2, (3, 4, 4), 0)]
    logits, labels = torch.randn(4, 6, dtype=torch.float64), torch.arange(4)
    terms, own = losses_of_teachers(config, train, logits, labels, given)
    apart = [distillation_losses(config, train, logits, labels, *one) for one in given]
    for name in FeatureTerms._fields:
        expected = sum(w * getattr(one, name) for w, one in zip((3 / 8, 1 / 8, 4 / 8), apart, strict=True))
        assert torch.allclose(getattr(terms, name), torch.as_tensor(expected, dtype=torch.float64), rtol=1e-12)
        assert [float(getattr(one, name)) for one in own] == [float(getattr(one, name)) for one in apart]
    mean = 3 / 4 * given[0][1].logits.softmax(1) + 1 / 4 * given[1][1].logits.softmax(1)
    assert torch.allclose(terms.logit, logit_loss(logits, mean.log(), weight=0.5), rtol=1e-10)
    assert torch.equal(terms.label, apart[0].label)


def test_balance_scale_follows_the_gradient_of_log_losses_and_keeps_the_value():
    config = ScaleKDConfig(balance="scale", teacher_shares=(1, 3), logit_weight=0)
    given = [outputs(0, (5, 3, 3), 0), outputs(1, (7, 2, 2), 0)]
    logits, labels = torch.zeros(4, 6, dtype=torch.float64), torch.arange(4)
    terms, own = losses_of_teachers(config, TrainConfig(), logits, labels, given)
    losses = [torch.stack(one).sum() for one in own]
    mean = sum(share * loss.detach() for share, loss in zip((1 / 4, 3 / 4), losses, strict=True))
    feature = terms.total - terms.label
    assert torch.allclose(feature, mean)
    inputs = [value for maps, _ in given for value in maps[:4]]
    wanted = mean * sum(share * loss.log() for share, loss in zip((1 / 4, 3 / 4), losses, strict=True))
    expected = torch.autograd.grad(wanted, inputs, retain_graph=True)
    for got, want in zip(torch.autograd.grad(feature, inputs), expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-10)


@pytest.mark.parametrize("balance", ["fixed", pytest.param("scale", marks=pytest.mark.ci_slow)])
def test_a_run_with_two_teachers_resumes_and_reports_each(pair, tmp_path, capsys, balance):
    """Stopped at step 5 of 12, then resumed: the losses of the uninterrupted run, bit for bit."""
    scalekd = {"balance": balance, "teacher_shares": (2, 1), "feature_share": (1.0, 0.5)}
    whole = config_of(pair, tmp_path / "whole", scalekd=scalekd)
    plan = "\n".join(plan_distill(whole, CPU))
    assert "2 teachers, with loss weights" in plan
    assert "feature losses on 4 of 8 samples per micro-batch (vit_tiny_patch16_224)" in plan
    summary = distill(whole, CPU)
    line = steps_of(tmp_path / "whole")[-1]
    names = pair[0].manifest.facts.teacher["spec"]["name"], "vit_tiny_patch16_224"
    assert {name for name in line if "/" in name} == {
        f"{name}/{term}" for name in names for term in FeatureTerms._fields
    }
    assert summary["teacher"].startswith(names[0])
    assert summary["teacher"].count(",") == 1
    assert [(one["name"], one["share"]) for one in summary["teachers"]] == [(names[0], 0.666667), (names[1], 0.333333)]
    assert summary["teacher"].split(", ") == [one["label"] for one in summary["teachers"]]
    parts = [sum(line[f"{name}/{term}"] for term in FeatureTerms._fields) for name in names]
    total = sum(line[term] for term in FeatureTerms._fields)
    if balance == "fixed":
        assert total == pytest.approx(2 / 3 * parts[0] + parts[1] / 3, rel=1e-5)
    stopped = dataclasses.replace(whole, run=str(tmp_path / "stopped"))
    stopped = dataclasses.replace(stopped, train=dataclasses.replace(stopped.train, checkpoint_steps=5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scalekd_cache.training.trainer.Trainer._check_finite", interrupt_at(5))
        with pytest.raises(KeyboardInterrupt):
            distill(stopped, CPU)
    assert distill(stopped, CPU)["top1"] == summary["top1"]
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    with pytest.raises(UserError, match="a different cache"):
        distill(dataclasses.replace(whole, cache=str(pair[0].root)), CPU)
    assert "pixels" not in json.loads((tmp_path / "whole" / "cache.json").read_text())


def test_an_own_loop_has_the_losses_of_a_run(pair, regrouped, tmp_path):
    """The first step of two and of three teachers; caches given as places, or open."""
    scalekd = {"balance": "scale", "teacher_shares": (2, 1), "feature_share": (1.0, 0.5)}
    config = config_of(pair, tmp_path / "run", scalekd=scalekd, train={"micro_batch_size": 16, "epochs": 1})
    distill(config, CPU)
    for given in (config.cache, pair):
        torch.manual_seed(config.train.seed)
        targets = CachedTargets(given, batch_size=16, feature_share=(1.0, 0.5), seed=config.train.seed)
        student = timm_student("test_resnet", targets)
        loss = ScaleKDLoss(targets, student, config.scalekd, label_loss="ce", label_smoothing=0.0)
        images, labels, teachers = next(iter(targets))
        assert [len(one.features) for one in teachers] == [16, 8]
        terms = loss(*student(images), labels, teachers)
        first = losses(tmp_path / "run")[0]
        for name, value in terms._asdict().items():
            assert value.item() == pytest.approx(first[name], rel=1e-5), name
    terms.total.backward()
    assert all(one.grad is not None for one in loss.parameters())
    with pytest.raises(UserError, match="2 shares for 3 teachers"):
        CachedTargets([*pair, regrouped], batch_size=16, feature_share=(1.0, 0.5))
    with pytest.raises(UserError, match="a cache is listed twice"):
        CachedTargets([pair[0], pair[0].root], batch_size=16)
    three = CachedTargets([*pair, regrouped], batch_size=16)
    with pytest.raises(UserError, match="2 shares for 3 teachers"):
        ScaleKDLoss(three, student, config.scalekd)
    batch = next(iter(three))
    assert len(ScaleKDLoss(three, student, ScaleKDConfig())._tails) == len(batch.targets) == 3


def interrupt_at(step):
    def check(self, done, values):
        if done == step:
            raise KeyboardInterrupt

    return check


def test_live_teachers_give_the_losses_of_lossless_caches(pair, tmp_path):
    """First step; the targets of both teachers are computed in the training loop."""
    first = make(tmp_path / "swin", shared_weights(), cache={"codec": "float32"})
    other = vit_cache(tmp_path / "vit", first.root, cache={"codec": "float32"})
    train = {"epochs": 1, "global_batch_size": 32, "micro_batch_size": 32}
    lines = []
    for targets in ("cached", "live"):
        run = tmp_path / targets
        distill(config_of([first, other], run, train={**train, "targets": targets}), CPU)
        lines.append(losses(run)[0])
    assert lines[0].keys() == lines[1].keys()
    for name, value in lines[0].items():
        assert value == pytest.approx(lines[1][name], rel=2e-4, abs=1e-6), name


def test_a_run_without_targets_reads_the_first_cache_of_the_same_order(pair, tmp_path):
    """The baseline of a run with two teachers: the same batches."""
    assert distill(config_of(pair, tmp_path / "none", train={"targets": "none", "epochs": 1}), CPU)["steps"] == 6


def test_a_run_follows_two_caches_that_grow(tmp_path, monkeypatch):
    """The ViT's cache gets its second view group while the run waits for it."""
    monkeypatch.setattr(follow, "POLL_S", 0.02)
    swin = two_groups()
    layout = {"samples_per_shard": IMAGES // 3, "views_per_group": 1}
    vit = vit_cache(tmp_path / "vit", swin.root, data={"max_samples": IMAGES}, cache=layout)
    train = {"epochs": 2, "global_batch_size": 12, "micro_batch_size": 6}
    distill(config_of([swin, vit], tmp_path / "whole", train=train), CPU)
    writer = Writer(tmp_path / "growing", vit)
    writer.commit(0)
    timer = writer.later(1.0, group=1)
    growing = config_of([swin, vit], tmp_path / "run", train=train, follow=True, follow_timeout_minutes=0.5)
    distill(dataclasses.replace(growing, cache=f"{swin.root},{writer.root}"), CPU)
    timer.join()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_the_run_uses_the_views_that_all_caches_have(tmp_path):
    grown = make_growing(tmp_path / "swin", {"num_views": 3})
    assert grown.manifest.num_views == 3
    layout = {"samples_per_shard": IMAGES // 3, "views_per_group": 1, "num_views": 2}
    vit = vit_cache(tmp_path / "vit", grown.root, data={"max_samples": IMAGES}, cache=layout)
    planned = plan_distill(config_of([grown, vit], tmp_path / "run", train={"global_batch_size": 8}), CPU)
    assert "this run reads the first 2" in "\n".join(planned)


def test_sparse_caches_join_when_they_store_the_same_samples(tmp_path):
    """One in two samples has features: in both caches the same ones, or in one cache only."""
    sparse = {"stored_features": 0.5}
    first = make(tmp_path / "first", shared_weights(), cache=sparse)
    same = vit_cache(tmp_path / "same", first.root, cache=sparse)
    check_joinable(first, same)
    plan_distill(config_of([first, same], tmp_path / "run"), CPU)
    dense = shared_cache()
    order = Order(num_samples=SAMPLES, block=8, window=WINDOW, seed=0, features_every=2, ranges=3)
    for caches in ((first, same), (dense, first), (first, dense)):
        sizes = {"epochs": 2, "global_batch": 16, "micro_batch": 8}
        batches = list(CacheLoader(caches[0], order, others=caches[1:], **sizes))
        assert {len(stored.codes) for batch in batches for stored in batch.stored} == {4}
    other = vit_cache(tmp_path / "other", first.root, cache={"stored_features": 0.5, "samples_per_shard": SAMPLES})
    if not np.array_equal(first.has_features(np.arange(SAMPLES), 0), other.has_features(np.arange(SAMPLES), 0)):
        with pytest.raises(UserError, match="not for the same ones"):
            check_joinable(first, other)


@pytest.mark.ci_slow
def test_caches_without_labels_are_compared_with_each_teacher(tmp_path, capsys):
    """Both teachers have a classifier: without labels only the first one's soft labels are used, and that is said."""
    first = unlabeled_cache(10)
    teacher = {"name": "vit_tiny_patch16_224", "pretrained": False, "num_classes": 5, "weights": None}
    layout = {"codec": "float16", "pixels_from": str(first.root)}
    data = {"source": str(unlabeled_pictures(10)), "max_samples": None}
    other = make(tmp_path / "vit", unlabeled_weights(10), teacher=teacher, cache=layout, data=data)
    run = tmp_path / "run"
    summary = distill(config_of([first, other], run, train={"epochs": 1, "eval_epochs": 1}), CPU)
    said = capsys.readouterr().out
    assert "soft labels from" in said
    assert "(10 classes)" in said
    names = [one["name"] for one in summary["teachers"]]
    for one in summary["teachers"]:
        assert {"held_out_loss", "cosine_patch", "cosine_pooled"} <= one["held_out"].keys()
        assert "knn" not in one["held_out"]
    mean = sum(one["held_out"]["held_out_loss"] for one in summary["teachers"]) / 2
    assert summary["held_out"]["held_out_loss"] == pytest.approx(mean, abs=1e-4)
    page = run_report([run], RunReport(), CPU)
    assert all(name in page for name in names)
    assert "Unweighted feature loss for each teacher" in page


def test_a_cache_with_recomputed_logits_is_read_whole_beside_a_sparse_one():
    """Its logits need the features of all samples, whatever share the other cache stores."""
    caches = [sharing("recomputed"), sparse_cache.finished()]
    assert feature_counts(caches, None, 8, 32) == [32, 8]
    assert feature_counts(caches, [8, 4], 8, 32) == [32, 4]
    assert feature_counts(caches[::-1], None, 8, 32) == [8, 32]
