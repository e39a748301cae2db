"""Damage anywhere in a cache: the deep check reports it, and a training run never uses a wrong record."""

import functools
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from loaders import assert_same
from small_cache import make, reseal, shared_weights

from scalekd_cache.errors import UserError
from scalekd_cache.loader.loader import CacheLoader
from scalekd_cache.loader.order import Order
from scalekd_cache.store.base import BACKENDS
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.plan import read_plan
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.verify import check_cache, expected_contents, verify_cache
from scalekd_cache.store.verify_unit import unit_problems

SAMPLES, SHARD, VIEWS = 16, 8, 2
FLIPS = 500
backends = pytest.mark.parametrize("backend", BACKENDS)


@functools.cache
def pristine(backend):
    holder = tempfile.TemporaryDirectory(prefix="flips-")
    root = Path(holder.name) / "cache"
    sizes = {"backend": backend, "samples_per_shard": SHARD, "num_views": VIEWS}
    make(root, shared_weights(), data={"max_samples": SAMPLES}, cache=sizes)
    return holder, root, batches_of(root)


@pytest.fixture
def cache(backend, tmp_path):
    _, root, batches = pristine(backend)
    return Path(shutil.copytree(root, tmp_path / "cache")), batches


def batches_of(root):
    """Read every record as a training run does."""
    order = Order(num_samples=SAMPLES, block=SHARD, window=2, seed=1)
    return list(CacheLoader(Cache.open(root), order, epochs=VIEWS, global_batch=SHARD, micro_batch=SHARD))


def assert_right_or_refused(root, batches):
    """Either all original batches, or an error that names the file, and the sample if there is one."""
    try:
        found = batches_of(root)
    except UserError as error:
        named = re.search(r"units/g\d+-r\d+/(v\d+|unit\.json|keys\.txt)|manifest\.json", str(error))
        if named is None:
            pytest.fail(f"the error does not say where: {error}")
        return str(error)
    assert len(found) == len(batches)
    for mine, theirs in zip(found, batches, strict=True):
        assert_same(mine, theirs)
    return None


def all_files(root):
    return sorted(path for path in root.rglob("*") if path.is_file())


def positions(files, count, seed):
    """Random (file, offset) pairs: two thirds uniform over bytes, one third uniform over files to cover small ones."""
    rng = np.random.default_rng(seed)
    sizes = np.array([path.stat().st_size for path in files])
    ends = np.cumsum(sizes)
    places = rng.integers(0, ends[-1], 2 * count // 3)
    chosen = [
        (int(at), int(place - ends[at] + sizes[at]))
        for place in places
        for at in [np.searchsorted(ends, place, "right")]
    ]
    for at in rng.integers(0, len(files), count - len(chosen)).tolist():
        chosen.append((at, int(rng.integers(0, sizes[at]))))
    return [(files[at], offset) for at, offset in chosen]


@pytest.mark.parametrize("flips", [40, pytest.param(FLIPS, marks=pytest.mark.ci_slow)])
@backends
def test_flipped_bytes_are_reported_and_never_used(backend, cache, flips):
    root, batches = cache
    units = {unit.place: unit for unit in expected_contents(read_manifest(root), read_plan(root)).units}
    rng = np.random.default_rng(7)
    refused, files = 0, all_files(root)
    for path, offset in positions(files, flips, 11 + flips):
        data = path.read_bytes()
        changed = bytearray(data)
        changed[offset] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        name = path.relative_to(root).as_posix()
        place = re.match(r"units/g(\d+)-r(\d+)/", name)
        if place:
            unit = units[int(place[1]), int(place[2])]
            problems = list(unit_problems(root, unit, deep=True))
        else:
            problems = verify_cache(root, deep=True)
        file = name.split("/", 2)[-1] if place else name
        assert any(file in problem.where for problem in problems), (name, offset, problems)
        refused += assert_right_or_refused(root, batches) is not None
        path.write_bytes(data)
    assert refused > flips / 4
    assert verify_cache(root, deep=True) == []
    assert assert_right_or_refused(root, batches) is None


@pytest.mark.parametrize("every_file", [False, pytest.param(True, marks=pytest.mark.ci_slow)])
@backends
def test_every_file_that_is_gone_cut_swapped_copied_or_renamed_is_reported(backend, cache, every_file):
    root, batches = cache
    files = all_files(root)
    if not every_file:  # one of each kind: an array of one chunk and one of many, with its offsets
        skipped = r"r00000/|v0000|/(pixels|logits|target|crc32c)"
        files = [path for path in files if not re.search(skipped, path.as_posix())]
    contents = {path: path.read_bytes() for path in files}
    for number, path in enumerate(files):
        other = files[number - 1]
        data = contents[path]
        stray = path.with_name("stray")
        changes = {
            "deleted": {path: None},
            "renamed": {path: None, stray: data},
            "duplicated": {stray: data},
            "another's": {path: contents[other]},
            "swapped": {path: contents[other], other: data},
            "empty": {path: b""},
            "longer": {path: data + b"\0"},
            **{f"cut at {at}": {path: data[:at]} for at in {len(data) // 3, max(0, len(data) - 512), len(data) - 1}},
        }
        for what, change in changes.items():
            if what in ("another's", "swapped") and contents[other] == data:
                continue
            for file, content in change.items():
                file.unlink(missing_ok=True) if content is None else file.write_bytes(content)
            findings = check_cache(root, deep=True)
            if path.name == "plan.json" and what == "deleted":
                assert "no plan.json" in findings.notes[0]
            else:
                names = {file.relative_to(root).as_posix().split("/")[0] for file in change}
                assert names & {problem.where.split("/")[0] for problem in findings.problems}, (path, what)
            if path.suffix != ".safetensors":
                assert_right_or_refused(root, batches)
            stray.unlink(missing_ok=True)
            for file in (path, other):
                file.write_bytes(contents[file])
    assert verify_cache(root, deep=True) == []


@backends
def test_tar_members_and_zarr_chunks_that_are_cut_off(backend, cache):
    """Every truncation class: between members, inside a header, inside a payload, inside the padding."""
    root, batches = cache
    path = root / "units/g000-r00001" / ("v0001.tar" if backend == "webdataset" else "v0001.zarr/features/c/0")
    data = path.read_bytes()
    cuts = range(0, len(data), 512) if backend == "webdataset" else range(0, len(data), 700)
    for cut in [at + more for at in list(cuts)[1::5] for more in (0, 100, 511) if at + more < len(data)]:
        path.write_bytes(data[:cut])
        assert any("v0001" in problem.where for problem in verify_cache(root)), cut
        assert "v0001" in assert_right_or_refused(root, batches)
    path.write_bytes(data)


@backends
@pytest.mark.parametrize("what", ["unit", "shard", "group", "top"])
def test_strange_files_and_folders_are_reported(backend, cache, what):
    root, _ = cache
    unit = root / "units/g000-r00001"
    path = {
        "unit": unit / "v0002.tar",
        "shard": unit / "v0000.zarr/extra/c",
        "group": root / "units/g000-r00002",
        "top": root / "views.csv",
    }[what]
    shutil.copytree(unit, path) if what == "group" else (path.mkdir(parents=True) if what == "shard" else path.touch())
    for deep in (False, True):
        problems = verify_cache(root, deep=deep)
        assert any(problem.where in path.as_posix() for problem in problems), problems
    (root / "units/.tmp-g000-r00009-0-0-0").mkdir()
    assert len(check_cache(root).notes) == 1


@backends
def test_an_unfinished_cache_says_what_is_there_and_what_is_missing(backend, cache):
    root, _ = cache
    (root / "manifest.json").unlink()
    shutil.rmtree(root / "units/g000-r00001")
    findings = check_cache(root, deep=True)
    assert findings.units == 1
    assert [problem.part.value for problem in findings.problems] == ["unfinished"] * 2
    assert findings.problems[1].where == "units/g000-r00001"
    victim = next(
        path for path in all_files(root / "units") if path.stat().st_size > 1000 and "v0001" in path.as_posix()
    )
    data = bytearray(victim.read_bytes())
    data[500] ^= 1
    victim.write_bytes(data)
    problems = check_cache(root, deep=True).problems
    assert any("v0001" in problem.where and problem.part.value == "unit" for problem in problems)


@backends
def test_a_cache_that_grows_is_whole_as_far_as_its_manifest_goes(backend, cache):
    root, _ = cache
    reseal(root / "plan.json", lambda plan: plan["groups"].append([2, 3]))
    findings = check_cache(root, deep=True)
    assert findings.problems == []
    assert "2 more units" in findings.notes[0]
