"""Pulling without pixels: they are restored from the images, and the files equal the original ones."""

import shutil

import pytest
from image_files import encoded, picture, write
from servers import faulty_server, nginx
from small_cache import make, tree, write_weights

from scalekd_cache.config.publishing import PublishConfig
from scalekd_cache.config.pull import PullConfig
from scalekd_cache.errors import UserError
from scalekd_cache.publishing.publish import publish
from scalekd_cache.publishing.pull import pull_cache
from scalekd_cache.store.base import BACKENDS
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.verify import verify_cache


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of a few images in two classes."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 6), ("val", 1)):
        for label in ("cat", "dog"):
            for number in range(count):
                write(
                    root / split / label / f"{number:02d}.png",
                    encoded(picture(number + 10 * (label == "dog"), (64, 64))),
                )
    return root


@pytest.fixture(scope="module", params=list(BACKENDS))
def published(request, images, tmp_path_factory):
    """(cache, its publication without pixels)."""
    folder = tmp_path_factory.mktemp(request.param)
    cache = {"backend": request.param, "samples_per_shard": 8, "num_views": 2, "views_per_group": 2}
    data = {"source": str(images), "max_samples": None}
    make(folder / "cache", write_weights(folder / "teacher.safetensors", num_classes=2), data=data, cache=cache)
    publish(
        PublishConfig(
            cache=str(folder / "cache"),
            to=str(folder / "place"),
            data_license="cc-by-4.0",
            teacher_license="mit",
            without_pixels=True,
        )
    )
    return folder / "cache", folder / "place"


def pull(source, root, **options):
    return pull_cache(PullConfig(url=str(source), cache=str(root), **options))


def test_the_result_is_the_original_bit_for_bit(published, images, tmp_path):
    cache, place = published
    root = tmp_path / "pulled"
    pull(place, root, without_pixels=True, data=str(images))
    assert tree(root) == tree(cache)
    assert verify_cache(root, deep=True) == []
    assert pull(place, root, without_pixels=True, data=str(images)).complete


def test_a_bar_counts_the_images_whose_pixels_are_made(published, images, tmp_path, capfd):
    pull(published[1], tmp_path / "pulled", without_pixels=True, data=str(images))
    assert "pixels: 12/12 images" in capfd.readouterr().err


def test_the_first_views_and_then_the_rest(published, images, tmp_path):
    cache, place = published
    root = tmp_path / "pulled"
    pull(place, root, without_pixels=True, data=str(images), views="0")
    assert verify_cache(root, deep=True) == []
    pull(place, root, without_pixels=True, data=str(images))
    assert tree(root) == tree(cache)


def test_without_images_the_error_says_what_is_needed(published, tmp_path):
    with pytest.raises(UserError, match=r"needs the images that the cache was made from(?s:.)*--data"):
        pull(published[1], tmp_path / "pulled")


@pytest.mark.parametrize("change", ["missing", "other"])
def test_an_image_that_differs_is_named_and_the_rest_is_kept(published, images, tmp_path, change):
    cache, place = published
    data, root = shutil.copytree(images, tmp_path / "data"), tmp_path / "pulled"
    victim = data / "train" / "dog" / "05.png"
    original = victim.read_bytes()
    if change == "missing":
        victim.unlink()
    else:
        victim.write_bytes(original[:-20] if change == "cut" else encoded(picture(99, (64, 64))))
    with pytest.raises(UserError, match="dog/05"):
        pull(place, root, without_pixels=True, data=str(data))
    assert not (root / "manifest.json").exists()
    victim.write_bytes(original)
    assert pull(place, root, without_pixels=True, data=str(data)).bytes == 0  # everything had arrived
    assert tree(root) == tree(cache)


def test_a_publication_with_pixels_is_pulled_without_them(published, images, tmp_path):
    cache, _ = published
    done = pull(cache, tmp_path / "folder", without_pixels=True, data=str(images))
    assert tree(tmp_path / "folder") == tree(cache)
    pixels = done.manifest.bytes_per_view["pixels"] * done.manifest.num_samples * done.manifest.num_views
    everything = pull(cache, tmp_path / "whole").bytes
    assert done.bytes < everything - 0.9 * pixels


def test_a_server_without_ranges(published, images, tmp_path):
    cache, _ = published
    with faulty_server(cache) as server:
        if (cache / "units/g000-r00000/v0000.tar").exists():
            with pytest.raises(UserError, match="does not support range requests"):
                pull(server.url, tmp_path / "pulled", without_pixels=True, data=str(images))
        else:
            pull(server.url, tmp_path / "pulled", without_pixels=True, data=str(images))
            assert tree(tmp_path / "pulled") == tree(cache)
            assert not server.gets("pixels/c/0")


def test_a_server_with_ranges(published, images, tmp_path):
    cache, _ = published
    (tmp_path / "nginx").mkdir()
    with nginx(cache, tmp_path / "nginx") as url:
        pull(url, tmp_path / "pulled", without_pixels=True, data=str(images))
    assert tree(tmp_path / "pulled") == tree(cache)


def test_a_server_that_hides_which_files_are_missing(published, images, tmp_path):
    """As S3 does without ListBucket."""
    cache, place = published
    with faulty_server(place.parent) as server:
        for missing in ("/place/manifest.json", "/place/original/codec.json", "/nothing/manifest.json"):
            server.fail(missing, 403)
        pull(f"{server.url}/place", tmp_path / "pulled", without_pixels=True, data=str(images))
        assert tree(tmp_path / "pulled") == tree(cache)
        with pytest.raises(UserError, match="published without pixels"):
            Cache.open(f"{server.url}/place")
        with pytest.raises(UserError, match=r"status 403(?s:.)*/nothing/manifest\.json"):
            pull(f"{server.url}/nothing", tmp_path / "new")
