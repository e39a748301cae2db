"""A cache that grows while it is read: waiting, progress messages, errors."""

import dataclasses
import json

import pytest
from growing import IMAGES, Writer, two_groups
from loaders import assert_same_batches, make_loader
from small_cache import SAMPLES, copy_of_cache, reseal

from scalekd_cache.errors import UserError
from scalekd_cache.loader.order import Order
from scalekd_cache.store import growing as follow
from scalekd_cache.store.growing import GrowingCache, open_growing_cache, read_cache_facts
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.plan import read_plan, write_plan
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.remote.remote_path import open_place


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(follow, "POLL_S", 0.02)


ORDER = Order(num_samples=IMAGES, block=8, window=3, seed=5)


def batches_of(cache, **changes):
    return make_loader(cache, order=ORDER, global_batch=8, micro_batch=4, **changes)


def silent(text):
    pass


@pytest.mark.parametrize(("backend", "workers"), [("webdataset", 0), ("webdataset", 2), ("zarr", 0)])
def test_batches_are_those_of_the_finished_cache(tmp_path, capfd, backend, workers):
    whole = two_groups(backend)
    writer = Writer(tmp_path, whole)
    writer.commit(0)
    cache = open_growing_cache(tmp_path, 60, silent)
    assert isinstance(cache, GrowingCache)
    assert (len(cache), cache.manifest.num_views) == (IMAGES, 2)
    batches = iter(batches_of(cache, epochs=4, workers=workers))
    growing = [next(batches) for _ in range(6)]  # the first epoch; the loader now waits for the next one
    timer = writer.later(1.0, group=1)
    growing += batches
    timer.join()
    assert_same_batches(growing, batches_of(whole, epochs=4))
    said = capfd.readouterr().out
    assert said.count(f"waiting for {tmp_path}: view 1 has 0 of 3 units") == 1
    assert "units/min" in said or "not known yet" in said


def test_following_begins_with_the_first_whole_group(tmp_path):
    writer = Writer(tmp_path, two_groups())
    said = []
    timer = writer.later(0.3, group=0)
    cache = open_growing_cache(tmp_path, 60, said.append)
    timer.join()
    assert "view 0 has 0 of 3 units" in said[0]
    assert cache.read(range(IMAGES), 0) == two_groups().read(range(IMAGES), 0)
    timer = writer.later(0.3, group=1)
    cache.wait_for(1, said.append)
    timer.join()
    assert cache.read(range(IMAGES), 1) == two_groups().read(range(IMAGES), 1)
    assert len(said) == 2
    cache.wait_for(0, said.append)
    assert len(said) == 2


def test_a_finished_cache_is_not_waited_for(tmp_path):
    root = copy_of_cache(tmp_path / "cache")
    assert type(open_growing_cache(root, 0.1, silent)) is Cache
    (root / "plan.json").unlink()  # a copy of the files that readers need
    assert type(open_growing_cache(root, 0.1, silent)) is Cache


@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
def test_a_link_loop_is_an_error_and_not_a_missing_file(tmp_path, name):
    root = copy_of_cache(tmp_path / "cache")
    (root / name).unlink()
    (root / name).symlink_to(name)
    with pytest.raises(UserError, match=name):
        open_growing_cache(root, 0.1, silent)


def test_no_writer_and_no_progress_are_errors_that_say_so(tmp_path):
    with pytest.raises(UserError, match="no writer has started this cache yet"):
        open_growing_cache(tmp_path / "nothing", 0.1, silent)
    writer = Writer(tmp_path / "cache", two_groups())
    with pytest.raises(UserError, match="no new units") as error:
        open_growing_cache(writer.root, 0.1, silent)
    assert "view 0 has 0 of 3 units" in str(error.value)
    writer.commit(0)
    cache = open_growing_cache(writer.root, 0.1, silent)
    with pytest.raises(UserError, match="no new units") as error:
        cache.wait_for(1, silent)
    assert "view 1 has 0 of 3 units" in str(error.value)


def test_a_time_out_reaches_the_trainer_from_a_worker(tmp_path):
    writer = Writer(tmp_path, two_groups())
    writer.commit(0)
    seen = []
    with pytest.raises(UserError, match="no new units"):
        seen.extend(batches_of(open_growing_cache(tmp_path, 0.5, silent), epochs=2, workers=1))
    assert {batch.view for batch in seen} == {0}
    assert len(seen) == 6  # the whole first epoch was returned


def test_not_following_an_unfinished_cache_names_the_option(tmp_path):
    Writer(tmp_path, two_groups()).commit(0)
    with pytest.raises(UserError, match="--follow"):
        read_cache_facts(tmp_path, False, 60, silent)


def test_a_url_is_not_followed(tmp_path):
    with pytest.raises(UserError, match="--follow needs a cache in a local folder"):
        open_growing_cache(open_place("https://example.com/cache"), 0.1, silent)


def test_a_finished_cache_that_is_growing_is_followed_to_its_new_end(tmp_path):
    root = copy_of_cache(tmp_path / "cache")
    plan = read_plan(root)
    facts = dataclasses.replace(plan.facts, groups=[[0, 1], [2]])
    write_plan(root, dataclasses.replace(plan, facts=facts))
    cache = open_growing_cache(root, 0.1, silent)
    assert (cache.manifest.num_views, len(cache)) == (3, SAMPLES)
    assert Cache.open(root).manifest.num_views == 2
    assert cache.read([5], 1) == Cache.open(root).read([5], 1)


def test_views_that_a_later_plan_adds_are_not_followed():
    whole = two_groups()
    plan = read_plan(whole.root)
    plan = dataclasses.replace(plan, facts=dataclasses.replace(plan.facts, groups=[[0]]))
    cache = GrowingCache(whole.root, plan, 0.1, silent)
    assert cache.manifest.num_views == 1
    assert cache.read(range(IMAGES), 0) == whole.read(range(IMAGES), 0)


def test_a_group_of_other_images_is_refused(tmp_path):
    writer = Writer(tmp_path, two_groups())
    writer.commit(0, 1)
    sidecar = tmp_path / "units" / "g001-r00001" / "unit.json"
    unit = json.loads(sidecar.read_text())
    unit["fingerprint"] = "0" * 64
    sidecar.write_text(json.dumps(unit))
    cache = open_growing_cache(tmp_path, 0.1, silent)
    with pytest.raises(UserError, match="a different cache"):
        cache.wait_for(1, silent)


def test_plan_and_manifest_say_the_same(tmp_path):
    whole = two_groups()
    plan, manifest = read_plan(whole.root), read_manifest(whole.root)
    assert plan.facts == manifest.facts
    assert plan.ranges == [[0, 8], [8, 16], [16, 24]]
    assert manifest.facts.teacher["top1"] is not None


@pytest.mark.parametrize(
    "change",
    [
        {"groups": [[1], [0]]},
        {"groups": [[0], []]},
        {"groups": []},
        {"ranges": [[0, 8], [9, 24]]},
        {"ranges": []},
        {"samples_per_shard": 0},
        {"backend": "hdf5"},
        {"fingerprint": "x"},
        {"more": 1},
        {"class_names": "a"},
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(tmp_path, change):
    writer = Writer(tmp_path, two_groups())
    file = writer.root / "plan.json"
    reseal(file, lambda fields: fields.update(change))
    with pytest.raises(UserError, match=r"plan (has invalid values|is inconsistent)") as error:
        open_growing_cache(tmp_path, 0.1, silent)
    assert next(iter(change)) in str(error.value)
