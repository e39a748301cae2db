"""Making units: skipped images, what a unit's bytes depend on, errors."""

import json
import os
import re

import pytest
import torch
from image_files import PNG, folder_tree, write
from small_cache import CPU, SHARD, copy_of_cache, make, options, shared_weights, unit_files, unit_stats

from scalekd_cache.caching import sample_views as drawing
from scalekd_cache.caching.job_plan import extend_groups, make_plan
from scalekd_cache.caching.make_units import make_units, plan_units
from scalekd_cache.codec import make_codec
from scalekd_cache.data.source import open_source
from scalekd_cache.data.workers import _SharedItem
from scalekd_cache.errors import UserError
from scalekd_cache.models.teacher import Teacher, TeacherOutput, load_teacher
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.sidecar import read_unit, unit_folder


def job_of(config):
    source = open_source(config.data, "train")
    teacher = load_teacher(config.teacher, image_size=64, num_classes=10, device=CPU.device)
    return make_plan(config, CPU, source, teacher, make_codec(config.cache.codec, teacher.spec.feature_shape))


def make_some(root, numbers, workers=0, **changes):
    """Make these units, in this order."""
    job = job_of(options(root, shared_weights(), cache={"views_per_group": 1}, **changes))
    done, arrived = [], []
    with torch.no_grad():
        make_units(job.stage, job.units, iter(numbers), workers, done.append, arrived=arrived.append)
    assert done == [job.units[number] for number in numbers]
    assert arrived == [len(unit.views) for unit in done for _ in unit.positions]  # the bar moves within a unit
    return unit_files(root)


def test_units_cover_every_image_and_view_once():
    source = open_source(options("x", "y").data, "train")
    units = plan_units(source.ranges(40), [[0, 1], [2]])
    assert [(unit.group, unit.range_id, unit.views) for unit in units] == [
        (0, 0, (0, 1)),
        (0, 1, (0, 1)),
        (0, 2, (0, 1)),
        (1, 0, (2,)),
        (1, 1, (2,)),
        (1, 2, (2,)),
    ]
    assert [unit.positions for unit in units[:3]] == [range(0, 40), range(40, 80), range(80, 96)]


def test_the_bytes_of_a_unit_do_not_depend_on_the_other_units(tmp_path):
    whole = make_some(tmp_path / "whole", range(6), teacher={"batch_size": 20})
    assert len(whole) == 6 * 5
    few = make_some(tmp_path / "few", [4, 1], teacher={"batch_size": 20})  # batches of 20 and 12 images
    assert few == {name: digest for name, digest in whole.items() if name in few}
    assert len(few) == 2 * 5
    backwards = make_some(tmp_path / "backwards", [5, 3, 2], workers=2, teacher={"batch_size": 20})
    assert backwards == {name: digest for name, digest in whole.items() if name in backwards}


def test_a_batch_never_spans_two_units(tmp_path, monkeypatch):
    sizes = []
    shared_weights()  # a teacher creates it if this is the first test
    forward = Teacher.forward
    monkeypatch.setattr(Teacher, "forward", lambda self, images: sizes.append(len(images)) or forward(self, images))
    make_some(tmp_path / "cache", range(3), teacher={"batch_size": 20})
    assert sizes == [20, 12] * 3


def test_unreadable_images_are_skipped_in_all_views_and_said_so(tmp_path):
    names = [f"ant/{number}.png" for number in range(8)] + [f"bee/{number}.png" for number in range(8)]
    root = folder_tree(tmp_path / "data", train=names)
    write(root / "train" / "ant" / "3.png", PNG[:40])
    write(root / "train" / "bee" / "5.png", b"")
    random = {"weights": None, "pretrained": False}
    groups = {"num_views": 3, "samples_per_shard": 6}
    cache = make(tmp_path / "cache", None, data={"source": str(root)}, teacher=random, cache=groups, workers=2)
    assert len(cache) == 14
    assert cache.manifest.num_views == 3
    keys = [{record.key for record in cache.read(range(14), view)} for view in range(3)]
    assert keys[0] == keys[1] == keys[2] == {name[:-4] for name in names} - {"ant/3", "bee/5"}
    for group in (0, 1):
        units = [read_unit(unit_folder(cache.root, group, number))[0] for number in range(3)]
        skipped = {row["key"]: row["reason"] for unit in units for row in unit.skipped}
        assert skipped.keys() == {"ant/3", "bee/5"}
        assert skipped["bee/5"] == "zero bytes"
        assert re.search("truncated|broken|cannot identify|not a known", skipped["ant/3"])
        assert sum(unit.count for unit in units) == 14
        assert all(unit.count + len(unit.skipped) == unit.stop - unit.start for unit in units)


@pytest.mark.parametrize("part", ["features", "logits"])
def test_an_output_that_is_not_finite_names_the_image(tmp_path, monkeypatch, part):
    forward = Teacher.forward
    job = job_of(options(tmp_path / "cache", shared_weights()))

    def broken(self, images):
        output = forward(self, images)
        getattr(output, part)[5].view(-1)[-1] = float("nan") if part == "features" else float("inf")
        return TeacherOutput(*output)

    monkeypatch.setattr(Teacher, "forward", broken)
    with pytest.raises(UserError, match="contains NaN or Inf") as error, torch.no_grad():
        make_units(job.stage, job.units, iter([1]), 0, lambda unit: None)
    key = job.stage.source.samples[32 + 5].key
    assert f"1 image; the first is {key}" in str(error.value)
    assert "view 0" in str(error.value)
    assert list((tmp_path / "cache" / "units").iterdir()) == []


def test_an_error_of_a_drawing_process_reaches_the_main_process(tmp_path, monkeypatch):
    def fail(self, index):
        raise UserError("the disk went away", where=index)

    job = job_of(options(tmp_path / "cache", shared_weights()))
    monkeypatch.setattr(type(job.stage.source), "read", fail)
    with pytest.raises(UserError, match="the disk went away") as error:
        make_units(job.stage, job.units, iter([0]), 2, lambda unit: None)
    assert str(error.value) == "the disk went away\n  where: 0"


def test_groups_are_extended_and_never_changed():
    assert extend_groups([], 5, 2) == [[0, 1], [2, 3], [4]]
    assert extend_groups([[0, 1], [2]], 8, 4) == [[0, 1], [2], [3, 4, 5, 6], [7]]
    assert extend_groups([[0, 1, 2]], 2, 4) == [[0, 1, 2]]
    given = [[0]]
    extend_groups(given, 4, 2)
    assert given == [[0]]


def test_a_cache_grows_without_touching_what_is_there(tmp_path):
    root = copy_of_cache(tmp_path / "cache")
    stats, files = unit_stats(root), unit_files(root)
    before = Cache.open(root)
    cache = make(root, shared_weights(), cache={"num_views": 5})
    assert cache.manifest.num_views == 5
    assert cache.manifest.facts.groups == [[0, 1], [2, 3], [4]]
    assert stats == {path: value for path, value in unit_stats(root).items() if path in stats}
    assert files == {path: value for path, value in unit_files(root).items() if path in files}
    ids = range(len(cache))
    views = [{record.key: record for record in cache.read(ids, view)} for view in range(5)]
    assert views[0] == {record.key: record for record in before.read(ids, 0)}
    for view in range(1, 5):
        assert views[view].keys() == views[0].keys()
        for other in range(view):
            same = [key for key in views[view] if views[view][key].digest == views[other][key].digest]
            assert len(same) < 3, (view, other, same)
    orders = [[record.key for record in cache.read(ids, view)] for view in range(5)]
    assert orders[0] == orders[1] != orders[2] == orders[3] != orders[4]
    assert json.loads((root / "plan.json").read_text())["groups"] == cache.manifest.facts.groups


def test_drawn_views_are_what_is_stored(tmp_path):
    """The teacher sees the decoded bytes, not the view before encoding."""
    config = options(tmp_path, shared_weights(), views={"jpeg_quality": 20})
    source = open_source(config.data, "train")
    draw = drawing.ViewDataset(source, config.views, plan_units(source.ranges(32), [[0, 1]]))
    (drawn,) = draw[0, [7]]
    assert drawn.sample == source.samples[7]
    assert len(drawn.views) == 2
    for pixels, view in zip(drawn.pixels, drawn.views, strict=True):
        decoded = drawing.decode_pixels(view.encoded, 64)
        assert torch.equal(pixels, torch.from_numpy(decoded).permute(2, 0, 1))
        assert view.digest == drawing.pixel_digest(decoded)


def test_one_block_of_shared_memory_carries_several_images(tmp_path, monkeypatch):
    """32 images of a unit arrive in 4 blocks, one file descriptor each, and no more than a few are open at a time."""
    received, open_files = _SharedItem.received, []

    def counted(self, *, borrow):
        open_files.append(len(os.listdir("/proc/self/fd")))
        return received(self, borrow=borrow)

    monkeypatch.setattr(_SharedItem, "received", counted)
    make_some(tmp_path / "cache", [0, 1, 2], workers=1)
    assert len(open_files) == 3 * SHARD // drawing.IMAGES_PER_ITEM
    assert max(open_files) <= min(open_files) + 2 * drawing.SPAN // drawing.IMAGES_PER_ITEM
