"""Disk problems: full, read-only, no permission, stale and unknown files; a clock that runs backwards."""

import errno
import itertools
import os
import shutil
import subprocess
import sys
import time

import pytest
from commands import cache_flags, file_bytes
from small_cache import CPU, SAMPLES, copy_of_cache, flip_byte, make, options, shared_weights, unit_files
from stage1_process import Job, on_a_bad_disk

from scalekd_cache.caching.job import cache_teacher
from scalekd_cache.errors import UserError
from scalekd_cache.store import resume
from scalekd_cache.store.durable_files import disk_errors, host_tag, remove_stale, temp_path_for, write_atomically
from scalekd_cache.store.plan import read_plan
from scalekd_cache.store.resume import CommittedUnits, committed_unit
from scalekd_cache.store.sidecar import unit_folder
from scalekd_cache.store.verify import verify_cache


def words(path, backend):
    small = {"data.max_samples": 48, "cache.samples_per_shard": 16, "cache.backend": backend}
    return cache_flags(path, shared_weights(), **small)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """Files of a job on a healthy disk, by backend."""
    place = tmp_path_factory.mktemp("untouched")
    made = {}
    for backend in ("webdataset", "zarr"):
        outcome = Job(words(place / backend, backend), place / backend, place / "log").wait()
        assert outcome.statuses == [0], outcome.output
        made[backend] = file_bytes(place / backend)
    return made


@pytest.mark.parametrize(
    ("trouble", "backend", "operation", "text"),
    [
        ("full", "webdataset", 9, "the disk is full"),
        ("full", "zarr", 9, "the disk is full"),
        ("read-only", "webdataset", 0, "cannot write to"),
        ("denied", "webdataset", 0, "cannot write to"),
        ("denied", "webdataset", 9, "cannot write to"),
    ],
)
def test_a_job_goes_on_when_the_disk_is_mended(trouble, backend, operation, text, untouched, tmp_path):
    (tmp_path / "disk").mkdir()
    root = tmp_path / "disk" / "cache"
    result = on_a_bad_disk(words(root, backend), root, tmp_path / "log", trouble, operation)
    if result is None:
        pytest.skip("this machine does not allow a process to mount a disk of its own")
    (status, output, names), (again, second, _), files = result
    assert status == 2, output
    assert text in output
    assert "Traceback" not in output
    assert [name for name in names if name.startswith(".tmp-")] == [] or trouble == "denied"
    assert again == 0, second
    assert files.keys() == untouched[backend].keys()
    assert [name for name in files if files[name] != untouched[backend][name]] == []


def test_a_file_that_cannot_be_written_is_explained(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("scalekd_cache.store.durable_files.fsync", refuse)
    with pytest.raises(UserError, match=r"cannot write to this path\n.*Permission denied\n.*\n.*rerun"):
        write_atomically(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("inside", ["", "/weights.safetensors"])
def test_an_error_names_the_file_and_not_its_temporary_name(tmp_path, inside):
    file = tmp_path / "report.html"
    with pytest.raises(UserError, match="cannot write") as error, disk_errors(tmp_path, 1):
        raise PermissionError(13, "Permission denied", f"{temp_path_for(file)}{inside}")
    assert f"where: {file}\n" in str(error.value)


def a_dead_process():
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    return dead.pid


def test_what_killed_writers_left_is_removed_and_the_rest_is_named(tmp_path):
    units, dead = tmp_path / "units", a_dead_process()
    stale = [
        units / f".tmp-g000-r00000-{host_tag()}-{dead}-0a1b2c3d",
        units / f".tmp-g000-r00001-{host_tag()}-{dead}-0a1b2c3d-damaged",
        tmp_path / f".tmp-manifest.json-{host_tag()}-{dead}-0a1b2c3d",
    ]
    mine = temp_path_for(units / "g000-r00002")
    others = [units / f".tmp-g000-r00000-00000000-{dead}-0a1b2c3d", tmp_path / ".tmp-of-somebody"]
    whole = units / "g000-r00003"
    for path in (*stale[:2], mine, others[0], whole):
        path.mkdir(parents=True)
        (path / "unit.json").write_text("{}")
    for path in (stale[2], others[1]):
        path.write_text("x")
    os.utime(others[0], (0, 0))
    os.utime(others[1], (2**33, 2**33))  # written by a host whose clock is ahead
    found = {leftover.path: leftover.age_s for leftover in remove_stale(tmp_path) + remove_stale(units)}
    assert found.keys() == set(others)
    assert found[others[0]] > 10**9
    assert found[others[1]] == 0.0
    left = set(tmp_path.iterdir()) | set(units.iterdir())
    assert left == {units, mine, whole, *others}
    assert remove_stale(tmp_path / "not there") == []


def test_a_job_says_whose_leftovers_it_leaves_alone(tmp_path, capsys):
    root = copy_of_cache(tmp_path / "cache")
    stale = root / "units" / f".tmp-g000-r00000-{host_tag()}-{a_dead_process()}-0a1b2c3d"
    other = root / "units" / ".tmp-g000-r00000-00000000-7-0a1b2c3d"
    for path in (stale, other):
        path.mkdir()
    cache_teacher(options(root, shared_weights()), CPU)
    assert (stale.exists(), other.exists()) == (False, True)
    output = capsys.readouterr().out
    assert "kept 1 temporary file or folder written by other machines" in output
    assert f"the oldest is units/{other.name}, last modified < 1 second ago" in output
    assert verify_cache(root, deep=True) == []


# Resume accepts only verified units


def test_a_unit_that_lost_its_bytes_but_not_its_length_is_made_again(tmp_path, capsys):
    root = copy_of_cache(tmp_path / "cache")
    files = unit_files(root)
    (root / "manifest.json").unlink()
    tar = unit_folder(root, 0, 2) / "v0001.tar"
    tar.write_bytes(bytes(tar.stat().st_size))  # the state after a power cut if the disk ignored fsync
    cache_teacher(options(root, shared_weights()), CPU)
    assert f"{tar.parent} is damaged" in capsys.readouterr().out
    assert unit_files(root) == files
    assert verify_cache(root, deep=True) == []


def test_only_the_units_committed_last_are_hashed_at_a_start(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "RECHECKED_UNITS", 1)
    root = copy_of_cache(tmp_path / "cache")
    units = read_plan(root).units()
    for range_id in (0, 1):
        flip_byte(unit_folder(root, 0, range_id) / "v0000.tar", 700)
    assert CommittedUnits(root, units).drop_damaged() == []
    assert {problem.where.split("/")[1] for problem in verify_cache(root, deep=True)} == {"g000-r00000", "g000-r00001"}
    shutil.rmtree(unit_folder(root, 0, 2))
    assert CommittedUnits(root, units).drop_damaged() == [unit_folder(root, 0, 1)]
    assert not committed_unit(root, units[1])
    assert sorted(path.name for path in (root / "units").iterdir()) == ["g000-r00000"]


def test_a_whole_unit_that_came_in_between_is_put_back(tmp_path):
    root = copy_of_cache(tmp_path / "cache")
    files = unit_files(root)
    resume.remove_damaged_unit(unit_folder(root, 0, 1), resume.has_wrong_sizes)
    assert unit_files(root) == files
    resume.remove_damaged_unit(unit_folder(root, 7, 1), resume.has_wrong_sizes)  # another process removed it
    assert unit_files(root) == files


def test_a_unit_that_cannot_be_checked_is_put_back(tmp_path):
    root = copy_of_cache(tmp_path / "cache")
    files = unit_files(root)

    def unreadable(folder):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))

    with pytest.raises(OSError, match="Input/output"):
        resume.remove_damaged_unit(unit_folder(root, 0, 1), unreadable)
    assert unit_files(root) == files


@pytest.mark.parametrize("kind", ["missing", "link loop"])
def test_a_unit_without_its_sidecar_is_replaced_at_once(kind, tmp_path):
    root = copy_of_cache(tmp_path / "cache")
    files = unit_files(root)
    (root / "manifest.json").unlink()
    sidecar = unit_folder(root, 0, 2) / "unit.json"
    sidecar.unlink()
    if kind == "link loop":
        sidecar.symlink_to(sidecar.name)
    cache_teacher(options(root, shared_weights()), CPU)
    assert unit_files(root) == files
    assert not list((root / "units").glob(".tmp-*"))


def test_a_unit_is_looked_at_once(tmp_path, monkeypatch):
    root = copy_of_cache(tmp_path / "cache")
    shutil.rmtree(unit_folder(root, 0, 2))
    ledger = CommittedUnits(root, read_plan(root).units())
    assert [ledger.committed(0, range_id) for range_id in range(3)] == [True, True, False]
    monkeypatch.setattr(resume, "committed_unit", lambda *_: pytest.fail("looked at twice"))
    assert ledger.committed(0, 1)


@pytest.mark.parametrize("entries", [1_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_crowded_folder(entries, tmp_path, monkeypatch):
    """A job lists the units folder once, not once per unit, and unknown entries do not stop it."""
    units = tmp_path / "cache" / "units"
    units.mkdir(parents=True)
    for number in range(entries):
        os.mkdir(f"{units}/g007-r{number:05d}")
    scan, list_, scans = os.scandir, os.listdir, []
    monkeypatch.setattr(os, "scandir", lambda path=".": (scans.append(str(path)), scan(path))[1])
    monkeypatch.setattr(os, "listdir", lambda path=".": (scans.append(str(path)), list_(path))[1])
    assert len(make(tmp_path / "cache", shared_weights())) == SAMPLES
    assert scans.count(str(units)) == 1
    shutil.rmtree(units / "g000-r00001")
    scans.clear()
    make(tmp_path / "cache", shared_weights())
    assert scans.count(str(units)) == 1
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "cache")


def test_a_clock_that_runs_backwards(tmp_path, monkeypatch):
    """Every clock call returns an earlier time, and every existing file is from the future."""
    now = itertools.count(2_000_000_000, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    root = copy_of_cache(tmp_path / "cache")
    files = file_bytes(root)
    (root / "manifest.json").unlink()
    shutil.rmtree(unit_folder(root, 0, 1))
    stale = root / "units" / f".tmp-g000-r00001-{host_tag()}-{a_dead_process()}-0a1b2c3d"
    stale.mkdir()
    for path in (root, *root.rglob("*")):
        os.utime(path, (2**33, 2**33))
    cache_teacher(options(root, shared_weights()), CPU)
    assert file_bytes(root) == files
