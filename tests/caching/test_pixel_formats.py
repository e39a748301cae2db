"""Caches whose views are WebP or optimized JPEG: the teacher's pixels, stores, checks, repair, sharing."""

import tarfile

import pytest
from documented import call
from loaders import make_loader
from small_cache import CPU, flip_byte, make, shared_cache, shared_weights, tree

from pipelines import inspect_cache
from scalekd_cache.audit.describe import describe_record
from scalekd_cache.audit.repair import repair_cache
from scalekd_cache.audit.verify_cache import verify_deep
from scalekd_cache.caching import prepare
from scalekd_cache.config.base import to_plain
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.errors import UserError
from scalekd_cache.loader.order import Order
from scalekd_cache.models.teacher import Teacher
from scalekd_cache.reports.cache import CacheReport, cache_report
from scalekd_cache.views.pixels import decode_pixels, pixel_digest

COUNT = 32
SUFFIX = {"webp": "webp", "jpeg-optimized": "jpg", "png": "png"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{(pixel format, backend): (cache, digests of the teacher's input images, forecast bytes)}."""
    folder, found = tmp_path_factory.mktemp("formats"), {}
    forward = Teacher.forward
    for kind, backend in (("webp", "webdataset"), ("webp", "zarr"), ("jpeg-optimized", "webdataset"), ("png", "zarr")):
        seen, forecast = set(), []

        def watched(self, images, seen=seen):
            seen.update(pixel_digest(image.permute(1, 2, 0).numpy()) for image in images)
            return forward(self, images)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Teacher, "forward", watched)
            patch.setattr(prepare, "check_disk_space", lambda path, views, needed, asked=forecast: asked.append(needed))
            root = folder / f"{kind}-{backend}"
            few, recipe = {"max_samples": COUNT}, {"pixel_format": kind}
            cache = make(root, shared_weights(), data=few, views=recipe, cache={"backend": backend})
        found[kind, backend] = cache, seen, forecast[-1]
    return found


def test_the_teacher_saw_what_is_stored(made):
    for (kind, _), (cache, seen, _) in made.items():
        for view in range(2):
            for record in cache.read(range(len(cache)), view):
                pixels = decode_pixels(record.pixels, 64)
                assert record.digest == pixel_digest(pixels)
                assert record.digest in seen, kind


def test_both_stores_hold_the_same_views(made):
    tar, zarr = (made["webp", backend][0] for backend in ("webdataset", "zarr"))
    assert [bytes(record.pixels) for record in tar.read(range(COUNT), 1)] == [
        bytes(record.pixels) for record in zarr.read(range(COUNT), 1)
    ]


def test_optimized_files_have_the_pixels_features_and_digests_of_the_default(made):
    plain, small = shared_cache(), made["jpeg-optimized", "webdataset"][0]
    for ours, theirs in zip(small.read(range(COUNT), 0), plain.read(range(COUNT), 0), strict=True):
        assert (ours.digest, bytes(ours.features)) == (theirs.digest, bytes(theirs.features))
    assert small.manifest.bytes_per_view["pixels"] < 0.8 * plain.manifest.bytes_per_view["pixels"]
    assert (
        made["webp", "webdataset"][0].manifest.bytes_per_view["pixels"] < 0.5 * plain.manifest.bytes_per_view["pixels"]
    )


def test_members_of_a_tar_have_the_suffix_of_their_format(made, tmp_path):
    for kind in ("webp", "jpeg-optimized"):
        cache = made[kind, "webdataset"][0]
        record = cache.read([20], 1)[0]
        with tarfile.open(cache.root / "units/g000-r00000/v0001.tar") as tar:
            assert f"{record.key}.{SUFFIX[kind]}" in tar.getnames()
        out = tmp_path / f"view.{SUFFIX[kind]}"
        call(inspect_cache, ["--cache", str(cache.root), "--index", "20", "--view", "1", "--out", str(out)])
        assert out.read_bytes() == record.pixels
        with pytest.raises(UserError, match=rf"(?s)the stored pixel format.*\.{SUFFIX[kind]}"):
            call(inspect_cache, ["--cache", str(cache.root), "--index", "20", "--out", str(tmp_path / "view.png")])


def test_training_checks_and_reports_read_them(made):
    for cache, _, forecast in made.values():
        assert forecast == pytest.approx(cache.manifest.bytes_per_view["total"] * COUNT * 2, rel=0.05)
        batch = next(iter(make_loader(cache, order=Order(num_samples=COUNT, block=8, window=3, seed=5))))
        assert batch.images.shape[1:] == (3, 64, 64)
        assert describe_record(cache, 0, 3, None)["digest_ok"] is True
        result = verify_deep(cache.root, records=4)
        assert result.findings.problems == result.findings.notes == []
    page = cache_report(made["webp", "zarr"][0], CacheReport(views=8, teacher_views=4, images=2), CPU)
    assert "webp" in page
    assert "jpeg_subsampling" not in page


def test_damaged_webp_views_are_found_and_made_again(made, tmp_path):
    root = tmp_path / "cache"
    cache = make(root, shared_weights(), data={"max_samples": COUNT}, views={"pixel_format": "webp"})
    before = tree(root)
    tar = root / "units/g000-r00000/v0001.tar"
    flip_byte(tar, tar.read_bytes().index(cache.read([5], 1)[0].pixels) + 5)
    assert verify_deep(root, records=0).findings.problems
    assert repair_cache(root, CPU).units == [(0, 0)]
    assert tree(root) == before


def test_another_codec_for_webp_views(made, tmp_path):
    first = made["webp", "webdataset"][0]
    few, views = {"max_samples": COUNT}, {"pixel_format": "webp"}
    shared = {"codec": "float16", "pixels_from": str(first.root)}
    cache = make(tmp_path / "second", shared_weights(), data=few, views=views, cache=shared)
    digests = [[record.digest for record in one.read(range(COUNT), 0)] for one in (first, cache)]
    assert digests[0] == digests[1]
    with pytest.raises(UserError, match=r"(?s)made with different view options.*pixel_format"):
        make(tmp_path / "third", shared_weights(), data=few, cache=shared)


def test_recipes_of_earlier_releases_are_unchanged():
    assert to_plain(ViewConfig()).keys() >= {"pixel_format", "jpeg_quality", "jpeg_subsampling"}
    assert ViewConfig().pixel_format == "jpeg"
    with pytest.raises(UserError, match=r"jpeg_subsampling.*4:2:0"):
        ViewConfig(pixel_format="webp", jpeg_subsampling="4:4:4")
