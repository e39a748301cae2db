"""Training from a sparse cache: losses, resuming, ranks, errors."""

import dataclasses

import pytest
from small_cache import CPU
from small_trainer import GLOBAL, MICRO, Lines, config_of, finish, trainer_of
from sparse_cache import EVERY, finished

from scalekd_cache import CachedTargets
from scalekd_cache.audit.gradients import compare_gradients
from scalekd_cache.config.stage2 import DistillConfig, ScaleKDConfig, StudentConfig, TrainConfig
from scalekd_cache.errors import UserError
from scalekd_cache.loader.loader import CacheLoader
from scalekd_cache.store.reader import Cache
from scalekd_cache.training.dry_run import plan_distill
from scalekd_cache.training.run import distill
from scalekd_cache.training.targets import feature_samples, make_order
from scalekd_cache.training.trainer import start_processes

TERMS = ("loss", "label", "logit", "s3_spatial", "s3_frequency", "s4_spatial", "s4_frequency")
CONFIG = config_of(train={"epochs": 5})


def sparse_trainer(cache=None, folder=None, config=CONFIG):
    sparse = finished()
    order, features = make_order(CONFIG.train, sparse, CPU), feature_samples(CONFIG.scalekd, sparse, MICRO)
    assert (order.features_every, features) == (EVERY, MICRO // EVERY)
    return trainer_of(config, folder, cache=cache or sparse, order=order, features=features)


def test_losses_are_those_of_a_full_cache_in_the_same_order():
    """Five epochs over four views; bit for bit."""
    start_processes(CPU)
    full = Cache.open(finished(1.0).root)
    full.has_features = finished().has_features
    lines, others = finish(sparse_trainer()).lines, finish(sparse_trainer(full)).lines
    assert len(lines) > 5
    for line, other in zip(lines, others, strict=True):
        assert [line[name] for name in TERMS] == [other[name] for name in TERMS]


def test_a_resumed_run_is_exact(tmp_path):
    start_processes(CPU)
    whole, lines = sparse_trainer(), Lines()
    per_epoch = whole.loader.steps_per_epoch
    at = 2 * per_epoch + 1
    for step in whole.train(lines):
        if step == at:
            whole.save(tmp_path)
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, workers=1))
    resumed = sparse_trainer(folder=tmp_path, config=config)
    assert resumed.loader.step == at
    assert finish(resumed).column("loss") == lines.column("loss")[at:]


def test_ranks_share_the_micro_batches():
    cache = finished()

    def ids(**ranks):
        order = make_order(CONFIG.train, cache, CPU)
        loader = CacheLoader(
            cache, order, epochs=EVERY, global_batch=GLOBAL, micro_batch=MICRO, features=[MICRO // EVERY], **ranks
        )
        return [batch.ids.tolist() for batch in loader]

    one, first, second = ids(), ids(rank=0, world_size=2), ids(rank=1, world_size=2)
    assert one == [batch for pair in zip(first, second, strict=True) for batch in pair]


def test_custom_loops_have_the_stored_share():
    batch = next(iter(CachedTargets(finished(), batch_size=8)))
    assert (len(batch.images), len(batch.targets.logits), len(batch.targets.features)) == (8, 8, 2)


@pytest.mark.parametrize(
    ("share", "micro", "texts"),
    [
        (None, 6, ["train.micro_batch_size=6", "--train.micro_batch_size=4"]),
        (0.5, 8, ["scalekd.feature_share=0.5", "--feature-share 0.25"]),
        (None, 4, ["samples per micro-batch, at least 2", "train.micro_batch_size=8, or a larger multiple of 4"]),
    ],
)
def test_more_than_is_stored_is_refused(share, micro, texts):
    with pytest.raises(UserError) as caught:
        feature_samples(ScaleKDConfig(feature_share=share), finished(), micro)
    for text in texts:
        assert text in str(caught.value)


def test_prove_compares_the_stored_features():
    """Of 32 views, a quarter has features; logits and the student's gradient use all."""
    train = dataclasses.replace(CONFIG.train, epochs=1)
    config = DistillConfig(cache=str(finished().root), student=StudentConfig(name="test_resnet"), train=train)
    found = compare_gradients(config, CPU, views=32)
    assert found.holds
    assert found.fidelity["cosine"]["count"] == 32 // EVERY
    assert found.fidelity["logit_kl"]["count"] == found.views == 32
    assert found.gradient_cosine > 0.999


@pytest.mark.parametrize(("batch", "micro", "workers"), [(24, 6, 1), (2, 2, 0), (16, 8, 0)])
def test_a_baseline_takes_any_batch_and_reads_no_features(tmp_path, monkeypatch, batch, micro, workers):
    """Its batches are those of the distilled run, if there can be one with this micro-batch size."""
    train = TrainConfig(targets="none", epochs=1, global_batch_size=batch, micro_batch_size=micro, workers=workers)
    config = DistillConfig(
        cache=str(finished().root), run=str(tmp_path), student=StudentConfig(name="test_resnet"), train=train
    )
    orders, original = [], CacheLoader.__init__

    def spied(loader, cache, order, *, features, **options):
        orders.append((order, features))
        original(loader, cache, order, features=features, **options)

    monkeypatch.setattr(CacheLoader, "__init__", spied)
    assert any(f"{batch} images per step" in line for line in plan_distill(config, CPU))
    summary = distill(config, CPU)
    assert summary["steps"] == (24 if batch == 2 else 2)
    order, features = orders[-1]  # the dry run builds a loader too
    assert features == [0]
    distilled = make_order(dataclasses.replace(train, targets="cached"), finished(), CPU)
    assert (order == distilled) == (micro == 8)
