"""Caches with features for some of the views: what is written, read, checked, repaired, grown and rejected."""

import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from damage import rewrite_unit
from documented import call
from format_reader import read_cache
from growing import Writer
from loaders import assert_same_batches, make_loader
from small_cache import CPU, flip_byte, options, reseal, shared_weights, tree, unit_files
from sparse_cache import EVERY, IMAGES, finished, make_sparse

from pipelines import inspect_cache
from scalekd_cache.audit.repair import repair_cache
from scalekd_cache.audit.verify_cache import verify_deep
from scalekd_cache.caching import job, prepare
from scalekd_cache.caching import make_units as caching
from scalekd_cache.caching.job_plan import make_stage
from scalekd_cache.caching.size_probe import measure_sizes
from scalekd_cache.codec import make_codec
from scalekd_cache.codec.logits import DenseLogits
from scalekd_cache.config.stage1 import StoreConfig
from scalekd_cache.data.source import open_source
from scalekd_cache.errors import UserError
from scalekd_cache.loader.order import Order
from scalekd_cache.models.teacher import TeacherOutput
from scalekd_cache.reports.cache import CacheReport, cache_report
from scalekd_cache.store.base import BACKENDS, Parts
from scalekd_cache.store.growing import GrowingCache, open_growing_cache
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.shared_pixels import open_shared_pixels
from scalekd_cache.store.verify import verify_cache

EVERYTHING = range(IMAGES)
PROBED = {"num_views": EVERY, "views_per_group": EVERY, "samples_per_shard": 21, "stored_features": 0.25}


def copy_of(cache, root):
    shutil.copytree(cache.root, root)
    return root


@pytest.mark.parametrize("backend", BACKENDS)
def test_records_are_those_of_the_full_cache_without_some_features(backend):
    sparse, full = finished(backend=backend), finished(1.0, backend)
    counts = np.zeros(IMAGES, int)
    for view in range(EVERY):
        there = sparse.has_features(np.arange(IMAGES), view)
        counts += there
        records = sparse.read(EVERYTHING, view)
        assert [Parts.FEATURES in record.parts for record in records] == there.tolist()
        for record, whole, is_there in zip(records, full.read(EVERYTHING, view), there, strict=True):
            assert record == (whole if is_there else whole._replace(features=b""))
        for range_id in range(3):  # an exact quota in every shard
            rows = list(sparse.positions(view, range_id))
            assert len(rows) // EVERY <= there[rows].sum() <= -(-len(rows) // EVERY)
    assert counts.tolist() == [1] * IMAGES
    sizes, whole = (cache.manifest.bytes_per_view for cache in (sparse, full))
    assert sizes["features"] == whole["features"] / EVERY
    assert sparse.manifest.fidelity["cosine"]["count"] == IMAGES
    assert "features_every" not in full.manifest.facts.fingerprint_fields


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reader_written_from_the_page_alone(backend):
    """It checks the rule of docs/FORMAT.md too."""
    views = read_cache(finished(backend=backend).root)
    assert sum(record.features is not None for view in views.values() for record in view) == IMAGES


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_deep_check_compares_stored_features(backend):
    found = verify_deep(finished(backend=backend).root)
    assert found.findings.problems == []
    assert found.agreement.records > 4
    assert found.agreement.wrong == []


def test_inspect_and_the_report_say_what_is_stored(capsys):
    cache = finished()
    there = cache.has_features(np.arange(IMAGES), 1)
    for index, text in (
        (int(np.argmin(there)), "features: no features stored"),
        (int(np.argmax(there)), "codec: int8"),
    ):
        call(inspect_cache, ["--cache", cache.root, "--index", index, "--view", 1])
        out = capsys.readouterr().out
        assert text in out
        assert "logit" in out
    call(inspect_cache, ["--cache", cache.root])
    assert "stored features: 0.25" in capsys.readouterr().out
    page = cache_report(cache, CacheReport(views=40, teacher_views=4, images=3), CPU)
    assert "stored for one in 4 views of each image" in page
    assert "cannot decode it" not in page


def without_features(record):
    return record._replace(features=b"")


def with_features(record):
    return record if record.features else record._replace(features=b"x" * 2400)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [without_features, with_features], ids=["missing", "extra"])
def test_records_that_do_not_follow_the_share_are_damaged(tmp_path, monkeypatch, backend, change):
    """With valid checksums: the deep check names them, readers refuse them, and a repair writes the original."""
    root = copy_of(finished(backend=backend), tmp_path / "cache")
    original = unit_files(root)
    rewrite_unit(root, change, range_id=2)
    assert verify_cache(root, deep=True) == []
    problems = verify_deep(root, records=0).findings.problems
    wrong = IMAGES - 2 * 21
    assert len(problems) == (wrong if change is without_features else wrong * (EVERY - 1))
    assert all("for the wrong views of an image" in problem.what for problem in problems)
    cache = Cache.open(root)
    with pytest.raises(UserError, match="damaged cache: features are stored for the wrong views"):
        cache.read(range(42, IMAGES), 0)
    monkeypatch.setattr(prepare, "_teacher_top1", None)
    assert repair_cache(root, CPU).left == []
    assert unit_files(root) == original


def test_a_flipped_byte_in_a_record_without_features(tmp_path, monkeypatch):
    root = copy_of(finished(), tmp_path / "cache")
    original, cache = tree(root), finished()
    row = int(np.argmin(cache.has_features(np.arange(IMAGES), 2)))
    tar = root / "units/g000-r00000/v0002.tar"
    logits = bytes(cache.read([row], 2)[0].logits)
    flip_byte(tar, tar.read_bytes().index(logits) + 3)
    problems = verify_cache(root, deep=True)
    assert cache.read([row], 2)[0].key in {problem.key for problem in problems}
    monkeypatch.setattr(prepare, "_teacher_top1", None)
    assert repair_cache(root, CPU).left == []
    assert tree(root) == original


@pytest.mark.parametrize("value", [1, 3, "4", 4.0, True])
def test_a_manifest_with_another_share_is_refused(tmp_path, value):
    root = copy_of(finished(), tmp_path / "cache")
    reseal(root / "manifest.json", lambda fields: fields["fingerprint_fields"].update(features_every=value))
    with pytest.raises(UserError, match="is inconsistent") as caught:
        read_manifest(root)
    assert "features_every" in str(caught.value)


def test_an_interrupted_job_leaves_the_same_bytes(tmp_path, monkeypatch):
    root, append, calls = tmp_path / "cache", caching._append_batch, []

    def interrupted(stage, *args):
        if stage.root == root:
            calls.append(1)
            if len(calls) == 12:  # in the second unit
                raise KeyboardInterrupt
        append(stage, *args)

    monkeypatch.setattr(caching, "_append_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_sparse(root)
    assert [path.name for path in (root / "units").iterdir()] == ["g000-r00000"]
    make_sparse(root)
    assert unit_files(root) == unit_files(finished().root)


def test_rows_are_counted_over_written_records(tmp_path):
    """An image that is skipped has no row, so the rule is that of the remaining images."""
    root, victim = tmp_path / "cache", finished().read([1], 0)[0].key
    skips = caching.SkipPolicy.required_skips
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching.SkipPolicy, "required_skips", lambda self, unit: {**skips(self, unit), victim: "test"})
        patch.setattr(caching.SkipPolicy, "accepts", lambda *_: True)
        cache = make_sparse(root)
    assert len(cache) == IMAGES - 1
    for view in range(EVERY):
        there = [len(record.features) > 0 for record in cache.read(range(20), view)]
        assert there == [(row + row // 4 + view) % 4 == 0 for row in range(20)]  # docs/FORMAT.md, sparse caches
    assert verify_deep(root).findings.problems == []


def test_growth_keeps_the_share(tmp_path):
    root = copy_of(finished(), tmp_path / "cache")
    before = unit_files(root)
    with pytest.raises(UserError, match="made with different options") as caught:
        make_sparse(root, 1.0, cache={"num_views": 2 * EVERY})
    assert "stored_features: 1 (requested) / 0.25 (cache)" in str(caught.value)
    cache = make_sparse(root, cache={"num_views": 2 * EVERY})
    assert before.items() <= unit_files(root).items()
    counts = {}
    for view in range(EVERY, 2 * EVERY):
        for record in cache.read(EVERYTHING, view):
            counts[record.key] = counts.get(record.key, 0) + bool(record.features)
    assert set(counts.values()) == {1}
    assert verify_deep(root).findings.problems == []


def test_a_full_cache_does_not_become_sparse(tmp_path):
    root = copy_of(finished(1.0), tmp_path / "cache")
    with pytest.raises(UserError, match="made with different options") as caught:
        make_sparse(root, cache={"num_views": 2 * EVERY})
    assert "stored_features: 0.25 (requested) / 1 (cache)" in str(caught.value)


def test_following_reads_what_the_finished_cache_has(tmp_path):
    order = Order(num_samples=IMAGES, block=8, window=3, seed=5, features_every=EVERY, ranges=3)
    sizes = {"order": order, "global_batch": 16, "micro_batch": 8, "epochs": EVERY}
    Writer(tmp_path, finished()).commit(0)
    cache = open_growing_cache(tmp_path, 60, print)
    assert isinstance(cache, GrowingCache)
    assert_same_batches(make_loader(cache, **sizes), make_loader(finished(), **sizes))


@pytest.mark.parametrize(("share", "of_pixels"), [(0.25, 1.0), (1.0, 0.25), (0.5, 0.25)])
def test_pixels_of_a_cache_with_another_share(tmp_path, share, of_pixels):
    pixels = finished(of_pixels)
    cache = make_sparse(tmp_path / "second", share, cache={"codec": "float16", "pixels_from": str(pixels.root)})
    every = round(1 / share)
    for view in range(EVERY):
        records = cache.read(EVERYTHING, view)
        assert [bool(record.features) for record in records] == cache.has_features(np.arange(IMAGES), view).tolist()
        assert sum(bool(record.features) for record in records) in range(IMAGES // every - 3, IMAGES // every + 4)
        assert [record.digest for record in records] == [record.digest for record in pixels.read(EVERYTHING, view)]
    assert verify_deep(cache.root).findings.problems == []
    order = Order(num_samples=IMAGES, block=8, window=3, seed=5, features_every=every, ranges=3)
    shared = open_shared_pixels(cache, None, EVERY)
    batch = next(iter(make_loader(cache, order=order, global_batch=8, micro_batch=8, pixels=shared)))
    assert (len(batch.images), len(batch.stored[0].codes)) == (8, 8 // every)


def test_view_groups_of_shared_pixels_must_fit(tmp_path):
    pixels = make_sparse(tmp_path / "first", 1.0, cache={"views_per_group": 2}, data={"max_samples": 8})
    with pytest.raises(UserError, match="does not match the view groups") as caught:
        make_sparse(tmp_path / "second", cache={"pixels_from": str(pixels.root)}, data={"max_samples": 8})
    assert "a multiple of 4 views per group" in str(caught.value)
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"stored_features": 0.3}, ["must be a whole number", "0.333333 or 0.25"]),
        ({"stored_features": 0.25, "num_views": 6}, ["cache.num_views=6", "--views to 4 or 8"]),
        ({"stored_features": 0.5, "num_views": 1}, ["cache.num_views=1", "--views to 2,"]),
        ({"stored_features": 0.125, "num_views": 8}, ["cache.views_per_group=4", "--cache.views_per_group to 8,"]),
        ({"stored_features": 0.25, "logits": "recomputed"}, ["features for every view", "--cache.logits=dense"]),
        ({"stored_features": 0.0}, ["invalid value for cache.stored_features"]),
        ({"stored_features": 1.5}, ["invalid value for cache.stored_features"]),
    ],
)
def test_shares_that_do_not_fit_are_refused(changes, texts):
    with pytest.raises(UserError) as caught:
        StoreConfig(**changes)
    for text in texts:
        assert text in str(caught.value)


def test_a_third_may_be_rounded():
    assert StoreConfig(stored_features=0.333, num_views=3, views_per_group=3).features_every == 3


def test_the_probe_measures_the_share(tmp_path):
    """The disk check before the first unit uses it too."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "check_disk_space", lambda path, views, needed: asked.append(needed / views))
        job.dry_run(options(tmp_path / "cache", shared_weights(), data={"max_samples": IMAGES}, cache=PROBED), CPU)
    assert asked == [pytest.approx(finished().manifest.bytes_per_view["total"], rel=0.03)]


@dataclass(frozen=True)
class PlaceholderTeacher:
    """Random features with the shapes of a large teacher."""

    feature_shape: tuple[int, int, int]
    num_classes: int

    def __call__(self, images):
        generator = torch.Generator().manual_seed(len(images))
        features = torch.randn(len(images), *self.feature_shape, generator=generator)
        logits = torch.randn(len(images), self.num_classes, generator=generator)
        return TeacherOutput(features, logits, torch.zeros(len(images), 0))


def test_bytes_at_the_size_of_swin_l():
    """Exact for int8. All but features and pixels takes at most 2.7 KB in Zarr; the headers of a tar take more."""
    config = options("unused", shared_weights(), views={"size": 224}, cache={**PROBED, "backend": "zarr"})
    teacher, source = PlaceholderTeacher((1536, 7, 7), 1000), open_source(config.data, "train")
    codecs = make_codec("int8", teacher.feature_shape), DenseLogits(1000)
    stage = make_stage(config, CPU, source, teacher, *codecs, None, fingerprint="")
    sizes = measure_sizes(stage, config.cache, num_views=32, pixel_images=4).bytes_of([range(512)], EVERY)
    per_view = {name: size / (512 * EVERY) for name, size in sizes.items()}
    assert per_view["features"] == 79_708 / EVERY
    assert per_view["target"] + per_view["index"] < 2700
