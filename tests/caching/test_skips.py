"""Images that are temporarily unreadable: every view group skips the same ones, and a cache can always grow."""

import dataclasses
import shutil

import pytest
import torch
from image_files import PNG, encoded, folder_tree, picture, write
from small_cache import CPU, options, shared_weights, tree

from scalekd_cache.audit.repair import repair_cache
from scalekd_cache.caching.job import cache_teacher
from scalekd_cache.caching.job_plan import make_plan
from scalekd_cache.caching.make_units import SkipPolicy, make_units
from scalekd_cache.caching.plan_check import check_plan
from scalekd_cache.codec import make_codec
from scalekd_cache.data.base import ListedSource
from scalekd_cache.data.source import open_source
from scalekd_cache.errors import UserError
from scalekd_cache.models.teacher import load_teacher
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.sidecar import read_unit, unit_folder
from scalekd_cache.store.verify import verify_cache

NAMES = [f"c{number}/{letter}.png" for number in range(10) for letter in "ab"]
BAD = "c3/b"
STORES = pytest.mark.parametrize("backend", ["webdataset", "zarr"])
FAULTS = {"cut": PNG[:40], "empty": b"", "no image": b"not an image"}


@pytest.fixture
def data(tmp_path):
    return folder_tree(tmp_path / "data", train=NAMES, val=NAMES[::2])


def grown(root, data, views, backend="webdataset", **changes):
    """Options of a cache with this many views, one view per group, four units per group."""
    layout = {"num_views": views, "views_per_group": 1, "samples_per_shard": 5, "backend": backend}
    return options(root, shared_weights(), data={"source": str(data), "max_samples": None}, cache=layout, **changes)


def make(*args, **changes):
    return cache_teacher(grown(*args, **changes), CPU)


def image(data):
    return data / "train" / f"{BAD}.png"


def mend(data):
    """Restore the image."""
    write(image(data), encoded(picture(NAMES.index(f"{BAD}.png"))))


def left_out(root):
    """(group, key) of every skipped image."""
    infos = [read_unit(folder)[0] for folder in sorted((root / "units").glob("g*"))]
    return [(info.group, row["key"]) for info in infos for row in info.skipped]


def untouched(tmp_path, data, views, backend="webdataset"):
    make(tmp_path / "untouched", data, views, backend)
    return tree(tmp_path / "untouched")


@STORES
@pytest.mark.parametrize("fault", FAULTS)
def test_growth_waits_for_an_image_that_cannot_be_decoded(tmp_path, data, backend, fault):
    root = tmp_path / "cache"
    make(root, data, 1, backend)
    write(image(data), FAULTS[fault])
    for _ in range(2):
        with pytest.raises(
            UserError,
            match=f"cannot decode some images that were decoded(.|\n)*g001-r0000.: {BAD}: .*(.|\n)*restore",
        ) as error:
            make(root, data, 2, backend)
    assert "delete the units that contain its image (units/g000-r0000" in str(error.value)
    assert read_manifest(root).num_views == 1  # the previous cache can be used for training
    assert verify_cache(root, deep=True) == []
    assert len(list((root / "units").glob("g001-*"))) == 3
    mend(data)
    make(root, data, 2, backend)
    assert tree(root) == untouched(tmp_path, data, 2, backend)


def test_an_image_that_is_lost_for_good_can_be_left_out_of_every_view(tmp_path, data):
    """Do what the error recommends."""
    root = tmp_path / "cache"
    make(root, data, 2)
    write(image(data), b"")
    with pytest.raises(UserError) as error:
        make(root, data, 3)
    for name in str(error.value).split("contain its image (")[1].split(")")[0].split(", "):
        shutil.rmtree(root / name)
    manifest = make(root, data, 3)
    assert manifest.num_samples == len(NAMES) - 1
    assert left_out(root) == [(0, BAD), (1, BAD), (2, BAD)]
    assert verify_cache(root, deep=True) == []


@STORES
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_fault_that_passes_leaves_no_trace(tmp_path, data, monkeypatch, backend, times):
    """In the first group or in later ones, an image is read a second time before it is skipped."""
    root = tmp_path / "cache"
    real, seen = ListedSource.read, []

    def flaky(self, index):
        if self.samples[index].key == BAD and self.name == str(data) and len(self.samples) == len(NAMES):
            seen.append(index)
            if len(seen) in range(faulty, faulty + times):
                return PNG[:40]
        return real(self, index)

    expected = untouched(tmp_path, data, 3, backend)
    for views in (1, 3):
        faulty = len(seen) + (4 if views == 1 else 2)
        monkeypatch.setattr(ListedSource, "read", flaky)
        try:
            make(root, data, views, backend)
        except UserError:
            make(root, data, views, backend)
        monkeypatch.setattr(ListedSource, "read", real)
    assert verify_cache(root, deep=True) == []
    if not left_out(root):
        assert tree(root) == expected
    else:  # it was unreadable in the first group, on both attempts
        assert times > 1
        assert left_out(root) == [(0, BAD), (1, BAD), (2, BAD)]


def test_an_image_that_was_mended_stays_left_out(tmp_path, data):
    """The first group decides, even if the image is readable now; existing units are not changed."""
    root = tmp_path / "cache"
    write(image(data), b"")
    make(root, data, 1)
    mend(data)
    assert make(root, data, 3).num_samples == len(NAMES) - 1
    assert left_out(root) == [(0, BAD), (1, BAD), (2, BAD)]
    reasons = {row["reason"] for folder in (root / "units").glob("g*") for row in read_unit(folder)[0].skipped}
    assert reasons == {"zero bytes"}
    assert verify_cache(root, deep=True) == []


def apart(root, data, backend="webdataset", *, first_misses=False):
    """A cache from an older version: units of group 1 skip images that group 0 holds, or the reverse."""
    make(root, data, 1, backend)
    config = grown(root, data, 2, backend)
    if first_misses:
        (root / "manifest.json").unlink()
    source = open_source(config.data, "train")
    teacher = load_teacher(config.teacher, image_size=64, num_classes=10, device=CPU.device)
    job = make_plan(config, CPU, source, teacher, make_codec("int8", teacher.spec.feature_shape))
    group = 0 if first_misses else 1
    if first_misses:
        for unit in job.units[:4]:
            shutil.rmtree(unit_folder(root, 0, unit.range_id))
    write(image(data), b"")
    numbers = [n for n, unit in enumerate(job.units) if unit.group == group]
    with torch.no_grad():
        make_units(job.stage, job.units, iter(numbers), 0, lambda _: None)
        mend(data)
        if first_misses:
            make_units(job.stage, job.units, iter(range(4, 8)), 0, lambda _: None)
    from scalekd_cache.store.plan import read_plan, write_plan

    tail, teacher_facts = read_plan(root).facts.tail_sha256, read_plan(root).facts.teacher
    facts = dataclasses.replace(job.plan.facts, tail_sha256=tail, teacher=teacher_facts)
    write_plan(root, dataclasses.replace(job.plan, facts=facts))
    return {key for _, key in left_out(root)}


@STORES
@pytest.mark.parametrize("first_misses", [False, True])
def test_units_that_older_versions_left_apart_are_named_and_made_again(tmp_path, data, backend, first_misses, capsys):
    root = tmp_path / "cache"
    assert apart(root, data, backend, first_misses=first_misses) == {BAD}
    problems = verify_cache(root)
    assert [(problem.key, problem.unit[0]) for problem in problems if problem.key] == [(BAD, 1)]
    again = shutil.copytree(root, tmp_path / "again")
    capsys.readouterr()
    make(root, data, 2, backend)
    assert "does not contain the same images as view group 0 and will be rebuilt" in capsys.readouterr().out
    done = repair_cache(again, CPU)
    assert [unit for unit in done.units if unit[0] == 1] == [problem.unit for problem in problems if problem.key]
    for folder in (root, again):
        assert verify_cache(folder, deep=True) == []
        make(folder, data, 2, backend)
    assert tree(root) == tree(again)
    if not first_misses:
        assert tree(root) == untouched(tmp_path, data, 2, backend)


def test_a_repair_of_units_apart_needs_the_image(tmp_path, data):
    root = tmp_path / "cache"
    apart(root, data)
    write(image(data), b"")
    before = tree(root)
    with pytest.raises(UserError, match="cannot decode some images that were decoded for the first view group"):
        repair_cache(root, CPU)
    assert {path: data for path, data in tree(root).items() if "g000" in path} == {
        path: data for path, data in before.items() if "g000" in path
    }
    mend(data)
    assert repair_cache(root, CPU).left == []
    make(root, data, 2)
    assert len(Cache.open(root)) == len(NAMES)


def test_a_later_group_waits_for_the_first(tmp_path, data, capsys):
    """A rank that starts group 1 while group 0 is incomplete does not know yet which images are skipped."""
    config = grown(tmp_path / "cache", data, 2)
    write(image(data), b"")
    source = open_source(config.data, "train")
    teacher = load_teacher(config.teacher, image_size=64, num_classes=10, device=CPU.device)
    job = make_plan(config, CPU, source, teacher, make_codec("int8", teacher.spec.feature_shape))
    policy = SkipPolicy(job.stage.root, source, job.ledger)
    with torch.no_grad():
        make_units(job.stage, job.units, iter([7, 6, 5, 4, 0, 1, 2, 3]), 0, lambda _: None, policy)
    assert len(list((tmp_path / "cache" / "units").glob("g001-*"))) == 3
    assert "will be rebuilt at the end of this job" in capsys.readouterr().out
    assert cache_teacher(config, CPU).num_samples == len(NAMES) - 1
    assert left_out(tmp_path / "cache") == [(0, BAD), (1, BAD)]


def test_undecodable_images_are_named(tmp_path, data, capsys):
    for name in NAMES[3:8]:
        write(data / "train" / name, b"")
    make(tmp_path / "cache", data, 1)
    text = "5 images could not be decoded: c1/b, c2/a, c2/b and 2 more (listed in units/*/unit.json)"
    assert text in capsys.readouterr().out


def test_changed_files_are_named(tmp_path, data):
    """Also those that the cache skipped; with other differences, the message lists options as before."""
    root = tmp_path / "cache"
    write(image(data), b"")
    make(root, data, 1)
    image(data).unlink()
    with pytest.raises(UserError, match="the dataset's files have changed") as error:
        make(root, data, 2)
    assert f"got: 1 missing: {BAD}\n" in str(error.value)
    mend(data)
    make(root, data, 1)
    for name in NAMES[:5]:
        (data / "train" / name).rename(data / "train" / name.replace("/", "/new-"))
    with pytest.raises(UserError, match="the dataset's files have changed") as error:
        make(root, data, 2)
    missing, new = "c0/a, c0/b, c1/a and 2 more", "c0/new-a, c0/new-b, c1/new-a and 2 more"
    assert f"got: 5 missing: {missing}; 5 new: {new}\n" in str(error.value)
    with pytest.raises(UserError, match="different options"):
        make(root, data, 2, teacher={"precision": "bfloat16"})


def test_changed_files_of_an_unfinished_cache(tmp_path, data):
    """Its units do not tell new files from those that were not yet reached."""
    root = tmp_path / "cache"
    make(root, data, 1)
    shutil.rmtree(unit_folder(root, 0, 3))
    (root / "manifest.json").unlink()
    kept = (unit_folder(root, 0, 0) / "keys.txt").read_text().splitlines()[0]
    (data / "train" / f"{kept}.png").rename(data / "train" / f"{kept}-new.png")
    with pytest.raises(UserError, match="the dataset's files have changed") as error:
        make(root, data, 1)
    assert f"got: 1 missing: {kept}\n" in str(error.value)


def test_changed_labels(tmp_path, data):
    root = tmp_path / "cache"
    make(root, data, 1)
    kept, asked = ({"fingerprint_fields": {"data": {"listing": name, "samples": len(NAMES)}}} for name in "ab")
    with pytest.raises(UserError) as error:
        check_plan(kept, asked, root, lambda: [name.removesuffix(".png") for name in NAMES])
    assert "got: the same files with different labels" in str(error.value)
