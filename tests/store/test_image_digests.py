"""Stage 1 detects an image file that changed between two view groups, and the error's fix works."""

import shutil

import pytest
from image_files import folder_tree, picture
from small_cache import CPU, flip_byte, options, shared_weights, unit_files

from scalekd_cache.caching import make_units as caching
from scalekd_cache.caching.job import cache_teacher
from scalekd_cache.caching.sample_views import views_of_units
from scalekd_cache.errors import UserError
from scalekd_cache.store.image_digests import ImageFiles, read_images
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.sidecar import read_keys, read_unit, unit_folder

NAMES = [f"{kind}/{number}.png" for kind in ("ant", "bee") for number in range(10)]
TEACHER = {"weights": None, "pretrained": False}


def job(folder, num_views, **changes):
    """A cache of groups of one view, in units of 6 images."""
    data = {"source": str(folder / "data"), "max_samples": None}
    cache = {"num_views": num_views, "views_per_group": 1, "samples_per_shard": 6}
    return options(folder / "cache", shared_weights(), data=data, cache=cache, teacher=TEACHER, **changes)


@pytest.fixture
def folder(tmp_path):
    folder_tree(tmp_path / "data", train=NAMES)
    return tmp_path


def replace(folder, key, number=99):
    picture(number).save(folder / "data" / "train" / f"{key}.png")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pixels", ["baked", "replayed"])
def test_growth_stops_at_an_image_that_changed_and_goes_on_once_it_is_back(folder, workers, pixels):
    def grow(views):
        cache_teacher(job(folder, views, views={"pixels": pixels}, workers=workers), CPU)

    grow(1)
    before = (folder / "data/train/bee/7.png").read_bytes()
    replace(folder, "bee/7")
    grow(1)  # nothing is sampled
    with pytest.raises(UserError, match="an image has changed since earlier views") as error:
        grow(2)
    assert "bee/7 differs from the file that units/g000-r0000" in str(error.value)
    assert Cache.open(folder / "cache").manifest.num_views == 1  # restored
    (folder / "data/train/bee/7.png").write_bytes(before)
    grow(2)
    assert Cache.open(folder / "cache").manifest.num_views == 2


def test_the_new_file_is_taken_by_making_the_units_of_the_old_one_again(folder):
    cache_teacher(job(folder, 2), CPU)
    replace(folder, "ant/3")
    holders = []
    for group in range(2):
        (number,) = (number for number in range(4) if "ant/3" in keys_of(folder, group, number))
        holders.append(f"units/g{group:03d}-r{number:05d}")
    for unit in holders:  # follow the messages one after the other
        with pytest.raises(UserError, match=f"changed(.|\n)*{unit}"):
            cache_teacher(job(folder, 3), CPU)
        shutil.rmtree(folder / "cache" / unit)
    cache_teacher(job(folder, 3), CPU)
    groups = [images_of(folder, group) for group in range(3)]
    assert groups[0] == groups[1] == groups[2]


def keys_of(folder, group, number):
    unit = unit_folder(folder / "cache", group, number)
    return read_keys(unit, read_unit(unit)[0]) if unit.exists() else []


def images_of(folder, group):
    """{key: digest of its file} of a group."""
    found = {}
    for number in range(4):
        unit = unit_folder(folder / "cache", group, number)
        found |= dict(zip(keys_of(folder, group, number), read_images(unit, read_unit(unit)[0]), strict=True))
    return found


def test_a_file_that_changes_within_one_job_is_found_before_the_manifest(folder, monkeypatch):
    """A process that started sampling the second group before the first group was finished."""

    def late(source, config, units, claims, workers, first):
        for item in views_of_units(source, config, units, claims, workers):
            if units[item.unit].group == 0 and item.sample.key == "ant/0":
                replace(folder, "ant/0")
            yield item

    monkeypatch.setattr(caching, "views_of_units", late)
    with pytest.raises(UserError, match="images changed while the cache was being made") as error:
        cache_teacher(job(folder, 2), CPU)
    assert "1 image; the first is ant/0, in units/g000-r0000" in str(error.value)
    assert not (folder / "cache/manifest.json").exists()


def test_within_one_job_of_one_process_the_second_group_stops(folder, monkeypatch):
    made = caching.fill_unit

    def spy(stages, unit, *rest):
        if unit.group == 1:
            replace(folder, "bee/2")
        return made(stages, unit, *rest)

    monkeypatch.setattr(caching, "fill_unit", spy)
    with pytest.raises(UserError, match="changed"):
        cache_teacher(job(folder, 2), CPU)


def test_an_image_that_was_unreadable_then_is_not_compared(folder):
    (folder / "data/train/ant/1.png").write_bytes(b"no image")
    cache_teacher(job(folder, 1), CPU)
    assert "ant/1" not in images_of(folder, 0)


def test_a_damaged_list_is_named(folder):
    cache_teacher(job(folder, 1), CPU)
    flip_byte(folder / "cache/units/g000-r00000/images.txt", 3)
    with pytest.raises(UserError, match=r"image file list is damaged(.|\n)*g000-r00000"):
        ImageFiles(folder / "cache", [(0, 0)])


def test_caches_without_lists_grow_as_before(folder):
    """Units of other versions, and those whose views come from another cache."""
    cache_teacher(job(folder, 1), CPU)
    shared = options(
        folder / "other",
        shared_weights(),
        data={"source": str(folder / "data"), "max_samples": None},
        cache={"num_views": 1, "pixels_from": str(folder / "cache")},
        teacher=TEACHER,
    )
    cache_teacher(shared, CPU)
    assert not [name for name in unit_files(folder / "other") if name.endswith("images.txt")]
    assert ImageFiles(folder / "other", [(0, 0), (0, 1), (0, 9)]).change("ant/1", "0" * 16) is None
