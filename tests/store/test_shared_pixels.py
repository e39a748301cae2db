"""Two caches that share pixels: the same images, features of another codec, and pixels that must be rejected."""

import json
import shutil

import numpy as np
import pytest
import torch
from growing import Writer
from image_files import PNG, folder_tree, write
from loaders import make_loader
from small_cache import (
    SAMPLES,
    VIEWS,
    copy_of_cache,
    flip_byte,
    make,
    options,
    shared_cache,
    shared_weights,
    unit_stats,
)

from scalekd_cache.caching import pixel_cache
from scalekd_cache.caching.job import cache_teacher
from scalekd_cache.config.stage2 import DistillConfig, TrainConfig
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError
from scalekd_cache.store.growing import open_growing_cache
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.shared_pixels import open_shared_pixels
from scalekd_cache.store.verify import verify_cache
from scalekd_cache.training.run_cache import open_run_cache

CPU = Process(0, 1, torch.device("cpu"))


def second(root, pixels, *, cache=None, **changes):
    """A cache with another codec and the pixels of the first."""
    return make(
        root, shared_weights(), cache={"codec": "float16", "pixels_from": str(pixels), **(cache or {})}, **changes
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The small cache, and a float16 cache that shares its pixels; made without the dataset."""
    folder = tmp_path_factory.mktemp("pair")
    first = copy_of_cache(folder / "first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixel_cache, "open_source", None)
        patch.setattr("scalekd_cache.caching.sample_views.sample_view", None)
        cache = second(folder / "second", first)
    return Cache.open(first), cache


def test_both_give_the_same_images_labels_and_views(pair, tmp_path):
    first, cache = pair
    own = make(tmp_path / "own", shared_weights(), cache={"codec": "float16"})
    for view in range(VIEWS):
        ids = range(SAMPLES)
        for record, other, direct in zip(
            cache.read(ids, view), first.read(ids, view), own.read(ids, view), strict=True
        ):
            assert record.pixels == b""
            assert len(other.pixels) > 100
            assert record[:4] == other[:4]  # key, label, view, digest
            assert record == direct._replace(pixels=b"")  # the same as in a cache with its own pixels
    assert list(verify_cache(cache.root, deep=True)) == []
    sizes = cache.manifest.bytes_per_view
    assert sizes["pixels"] == 0
    assert sizes["total"] < own.manifest.bytes_per_view["total"] - 1000
    assert cache.manifest.facts.fingerprint != own.manifest.facts.fingerprint
    assert cache.manifest.facts.pixels_from["path"] == "../first"


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_the_images_of_the_first(pair, workers):
    first, cache = pair
    pixels = open_shared_pixels(cache, None, VIEWS)
    for batch, other in zip(make_loader(cache, pixels=pixels, workers=workers), make_loader(first), strict=True):
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.labels, other.labels)
        assert torch.equal(batch.ids, other.ids)
        assert batch.stored[0].codes.shape != other.stored[0].codes.shape


def test_the_two_move_together_and_apart(pair, tmp_path):
    first, cache = pair
    shutil.copytree(first.root.parent, tmp_path / "moved")
    moved = Cache.open(tmp_path / "moved" / "second")
    found = open_shared_pixels(moved, None, VIEWS)
    assert found is not None
    assert found.root == tmp_path / "moved" / "first"
    (tmp_path / "moved" / "first").rename(tmp_path / "elsewhere")
    config = DistillConfig(cache=str(moved.root), train=TrainConfig())
    with pytest.raises(UserError, match="that stores the shared pixels is missing") as error:
        open_run_cache(config, tmp_path / "run", CPU)
    assert "--pixels-from" in str(error.value)
    config = DistillConfig(cache=str(moved.root), pixels_from=str(tmp_path / "elsewhere"))
    assert open_run_cache(config, tmp_path / "run", CPU).pixels.root == tmp_path / "elsewhere"
    with pytest.raises(UserError, match="does not share the pixels of another cache"):
        open_shared_pixels(first, str(cache.root), VIEWS)


def test_other_pixels_are_refused_before_training(pair, tmp_path):
    _, cache = pair
    other = make(tmp_path / "other", shared_weights(), views={"seed": 5}, data={"max_samples": 40})
    with pytest.raises(UserError, match="was made from a different dataset or view recipe") as error:
        open_shared_pixels(cache, str(other.root), VIEWS)
    assert f"40 images, {VIEWS} views" in str(error.value)
    with pytest.raises(UserError, match="shares those of another cache") as error:
        open_shared_pixels(cache, str(cache.root), VIEWS)
    assert "--pixels-from" in str(error.value)


def test_a_view_of_another_digest_is_refused(pair, tmp_path, monkeypatch):
    """Pixels encoded by another library are different pixels, even with the same recipe and data."""
    first, cache = pair
    pixels = Cache.open(first.root)
    read = pixels.read
    monkeypatch.setattr(pixels, "read", lambda ids, view: [r._replace(digest="0" * 16) for r in read(ids, view)])
    with pytest.raises(UserError, match="two caches contain different records at the same position") as error:
        list(make_loader(cache, pixels=pixels))
    assert "view 0 of" in str(error.value)


def test_a_damaged_pixel_is_found_by_the_checksum_of_the_cache_that_holds_it(pair, tmp_path):
    _, cache = pair
    root = copy_of_cache(tmp_path / "first")
    record = Cache.open(root).read([40], 1)[0]
    tar = root / "units" / "g000-r00001" / "v0001.tar"
    flip_byte(tar, tar.read_bytes().index(record.pixels) + 100)
    with pytest.raises(UserError, match="checksum") as error:
        list(make_loader(cache, pixels=open_shared_pixels(cache, str(root), VIEWS)))
    assert record.key in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": {"seed": 7}}, "views.seed=0"),
        ({"views": {"pixels": "replayed"}}, "views.pixels=baked"),
        ({"data": {"max_samples": 64}}, "a different dataset"),
        ({"cache": {"num_views": 3}}, "fewer views"),
    ],
)
def test_what_does_not_fit_the_pixels_is_refused(pair, tmp_path, changes, message):
    first, _ = pair
    with pytest.raises(UserError, match=message):
        second(tmp_path / "new", first.root, **changes)
    assert not (tmp_path / "new").exists()


def test_chains_replayed_views_and_itself_are_refused(pair, tmp_path):
    first, cache = pair
    with pytest.raises(UserError, match="does not store its pixels") as error:
        second(tmp_path / "third", cache.root)
    assert f"set --pixels-from to {first.root}" in str(error.value)
    with pytest.raises(UserError, match="stores no pixels"):
        second(tmp_path / "third", shared_cache("replayed").root)
    with pytest.raises(UserError, match="are the same folder"):
        second(first.root, first.root)
    with pytest.raises(UserError, match="pixels: None \\(requested\\) / shared"):
        make(cache.root, shared_weights(), cache={"codec": "float16"})


def test_growth_of_the_first_disturbs_nothing_and_reaches_the_second(tmp_path):
    first = copy_of_cache(tmp_path / "first")
    cache = second(tmp_path / "second", first, cache={"num_views": 1})
    assert cache.manifest.facts.groups == [[0]]
    before = list(make_loader(cache, pixels=open_shared_pixels(cache, None, 1)))
    make(first, shared_weights(), cache={"num_views": 4, "views_per_group": 1})
    stats = unit_stats(cache.root)
    again = list(make_loader(cache, pixels=open_shared_pixels(cache, None, 1)))
    assert all(torch.equal(a.images, b.images) for a, b in zip(before, again, strict=True))
    cache = second(tmp_path / "second", first, cache={"num_views": 4})
    assert cache.manifest.facts.groups == [[0], [1], [2], [3]]  # no group spans two of the first cache's
    assert stats == {path: value for path, value in unit_stats(cache.root).items() if path in stats}
    whole = Cache.open(first)
    for batch, other in zip(
        make_loader(cache, epochs=4, pixels=open_shared_pixels(cache, None, 4)),
        make_loader(whole, epochs=4),
        strict=True,
    ):
        assert torch.equal(batch.images, other.images)


def test_a_zarr_cache_shares_the_pixels_of_tars(pair, tmp_path):
    first, cache = pair
    zarr = second(tmp_path / "zarr", first.root, cache={"backend": "zarr"})
    for view in range(VIEWS):
        assert zarr.read(range(SAMPLES), view) == cache.read(range(SAMPLES), view)
    batches = make_loader(zarr, pixels=open_shared_pixels(zarr, None, VIEWS))
    assert sum(len(batch.images) for batch in batches) == VIEWS * SAMPLES


@pytest.mark.slow
def test_a_cache_of_tars_shares_the_pixels_of_zarr(pair, tmp_path):
    zarr = make(tmp_path / "zarr", shared_weights(), cache={"backend": "zarr"})
    tars = second(tmp_path / "tars", zarr.root, workers=1)
    for view in range(VIEWS):
        assert tars.read(range(SAMPLES), view) == pair[1].read(range(SAMPLES), view)
    assert len(list(make_loader(tars, pixels=open_shared_pixels(tars, None, VIEWS)))) > 0


def test_a_second_cache_can_be_followed(pair, tmp_path):
    first, cache = pair
    writer = Writer(tmp_path / "second", cache)
    writer.commit(0)
    growing = open_growing_cache(tmp_path / "second", 1, print)
    pixels = open_shared_pixels(growing, str(first.root), VIEWS)
    assert torch.equal(next(iter(make_loader(growing, pixels=pixels))).images, next(iter(make_loader(first))).images)


def test_images_that_were_skipped_stay_skipped(tmp_path):
    names = [f"ant/{number}.png" for number in range(8)] + [f"bee/{number}.png" for number in range(8)]
    root = folder_tree(tmp_path / "data", train=names)
    write(root / "train" / "ant" / "3.png", PNG[:40])
    write(root / "train" / "bee" / "5.png", b"")
    given = {
        "data": {"source": str(root), "max_samples": None},
        "teacher": {"weights": None, "pretrained": False},
        "views": {"flip_probability": 0.5},
    }
    layout = {"num_views": 3, "samples_per_shard": 6}
    first = make(tmp_path / "first", None, cache=layout, **given)
    write(root / "train" / "ant" / "3.png", PNG)  # repaired since then; the pixels are the old ones
    config = options(tmp_path / "second", None, cache={**layout, "pixels_from": str(first.root)}, workers=1, **given)
    manifest = cache_teacher(config, CPU)
    cache = Cache(tmp_path / "second", manifest)
    assert len(cache) == 14
    for view in range(3):
        pairs = zip(cache.read(range(14), view), first.read(range(14), view), strict=True)
        assert all(record == other._replace(pixels=b"") for record, other in pairs)
    for unit in ("g000-r00000", "g001-r00002"):
        mine, others = (json.loads((c.root / "units" / unit / "unit.json").read_text()) for c in (cache, first))
        assert [mine[name] for name in ("start", "stop", "count", "skipped")] == [
            others[name] for name in ("start", "stop", "count", "skipped")
        ]


def test_stored_pixels_that_decode_differently_stop_the_teacher(pair, tmp_path, monkeypatch):
    first, _ = pair
    monkeypatch.setattr(
        "scalekd_cache.caching.sample_views.decode_pixels", lambda data, size: np.zeros((size, size, 3), np.uint8)
    )
    with pytest.raises(UserError, match="no longer decode to the values"):
        second(tmp_path / "new", first.root)
