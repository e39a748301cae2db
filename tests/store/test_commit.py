"""One conformance suite for both backends: a unit is committed as a whole or not at all."""

import contextlib
import errno
import os
import shutil
import subprocess

import pytest
from cache_facts import FINGERPRINT
from store_cases import (
    GROUPS,
    NUM_SAMPLES,
    RANGES,
    backends,
    expected,
    facts,
    fill,
    flip_byte,
    make_record,
    open_unit,
    order,
    payload_file,
    tree,
    write_unit,
)

from scalekd_cache.errors import UserError
from scalekd_cache.store import durable_files as store_files
from scalekd_cache.store.manifest import build_manifest, write_manifest
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.resume import committed_unit
from scalekd_cache.store.sidecar import read_unit, unit_folder
from scalekd_cache.store.verify import verify_cache
from scalekd_cache.store.verify_unit import ExpectedUnit


def planned(backend: str, group: int = 0, range_id: int = 0) -> ExpectedUnit:
    """The unit that `write_unit` makes."""
    return ExpectedUnit(group, range_id, FINGERPRINT, backend, GROUPS[group], tuple(RANGES[range_id]))


@backends
def test_a_unit_is_there_once_committed(tmp_path, backend):
    assert not committed_unit(tmp_path, planned(backend))
    assert write_unit(tmp_path, backend)
    assert committed_unit(tmp_path, planned(backend))
    with pytest.raises(UserError, match="a different teacher"):
        committed_unit(tmp_path, planned(backend)._replace(fingerprint="0" * 64))
    assert [path.name for path in (tmp_path / "units").iterdir()] == ["g000-r00000"]
    payload_file(tmp_path, "g000-r00000").unlink()
    assert not committed_unit(tmp_path, planned(backend))
    assert write_unit(tmp_path, backend)  # replaces the damaged one
    assert committed_unit(tmp_path, planned(backend))


@backends
def test_the_second_writer_of_a_unit_loses(tmp_path, backend):
    with open_unit(tmp_path, backend) as first, open_unit(tmp_path, backend) as second:
        fill(first)
        fill(second)
        assert second.commit({})
        before = tree(tmp_path / "units/g000-r00000")
        assert not first.commit({"other": {"mean": 1.0, "count": 1}})
    assert tree(tmp_path / "units/g000-r00000") == before
    assert [path.name for path in (tmp_path / "units").iterdir()] == ["g000-r00000"]


@backends
@pytest.mark.parametrize("when", ["append", "no commit", "commit"])
def test_an_unfinished_unit_leaves_nothing(tmp_path, backend, when, monkeypatch):
    def fail(*_):
        raise RuntimeError("killed")

    if when == "commit":
        monkeypatch.setattr("scalekd_cache.store.unit.read_back", fail)
    with contextlib.suppress(RuntimeError), open_unit(tmp_path, backend) as writer:
        fill(writer)
        assert len(list((tmp_path / "units").iterdir())) == 1
        if when == "commit":
            writer.commit({})
        elif when == "append":
            fail()
    assert list((tmp_path / "units").iterdir()) == []


@backends
def test_every_file_and_folder_is_fsynced_once_before_the_rename(tmp_path, backend, monkeypatch):
    synced, renames = [], []
    link = "/proc/self/fd/{}"
    monkeypatch.setattr(store_files, "fsync", lambda number: synced.append(os.readlink(link.format(number))))
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (renames.append((str(a), str(b), len(synced))), rename(a, b)))
    write_unit(tmp_path, backend)
    unit = unit_folder(tmp_path, 0, 0)
    (temp, final, before), others = renames[-1], renames[:-1]
    assert final == str(unit)
    assert all(".zarr" in other[1] for other in others)
    inside = [path.relative_to(unit).as_posix() for path in unit.rglob("*")]
    assert sorted(os.path.relpath(path, temp) for path in synced[:before]) == sorted([*inside, "."])
    assert synced[before:] == [str(tmp_path / "units"), str(tmp_path)]


def test_views_must_agree(tmp_path):
    with open_unit(tmp_path, "webdataset") as writer:
        writer.append(0, make_record(0, 0))
        with pytest.raises(AssertionError):
            writer.append(1, make_record(1, 1))
    with open_unit(tmp_path, "webdataset") as writer:
        writer.append(0, make_record(0, 0))
        with pytest.raises(AssertionError):
            writer.commit({})


@backends
def test_bytes_that_change_on_the_way_are_noticed(tmp_path, backend, monkeypatch):
    name = "v0000.tar" if backend == "webdataset" else "v0000.zarr/features/c/0"

    def flip(folder, files):
        if name in files:
            flip_byte(folder / name, 3000)
        store_files.read_back(folder, files)

    monkeypatch.setattr("scalekd_cache.store.unit.read_back", flip)
    with pytest.raises(UserError, match="read back"):
        write_unit(tmp_path, backend)
    assert list((tmp_path / "units").iterdir()) == []


@backends
def test_a_full_disk_leaves_nothing_and_says_how_much_is_needed(tmp_path, backend, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_files, "fsync", full)
    with pytest.raises(UserError, match=r"the disk is full\n.* bytes free.*\n.*at least [0-9,]+ bytes"):
        write_unit(tmp_path, backend)
    assert list((tmp_path / "units").iterdir()) == []


@backends
def test_a_really_full_disk(tmp_path, backend):
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", tmp_path]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with pytest.raises(UserError, match="the disk is full"):
            write_unit(tmp_path, backend)
        assert list((tmp_path / "units").iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@backends
def test_skipped_images(tmp_path, backend):
    for group in (0, 1):
        for range_id, (start, stop) in enumerate(RANGES):
            with open_unit(tmp_path, backend, group, range_id) as writer:
                for position in order(group)[start:stop].tolist():
                    record = make_record(position, 0)
                    if position in (4, 30):
                        writer.skip(record.key, "truncated JPEG")
                        continue
                    for view in GROUPS[group]:
                        writer.append(view, make_record(position, view))
                assert writer.commit({})
    write_manifest(tmp_path, build_manifest(tmp_path, facts(backend), RANGES))
    cache = Cache.open(tmp_path)
    assert len(cache) == NUM_SAMPLES - 2
    kept = [record for record in expected(2) if record.key[-3:] not in ("004", "030")]
    assert cache.read(range(38), 2) == kept
    reasons = [row for group in (0, 1) for r in (0, 1) for row in read_unit(unit_folder(tmp_path, group, r))[0].skipped]
    assert len(reasons) == 4


@backends
def test_a_range_in_which_every_image_was_skipped(tmp_path, backend):
    with open_unit(tmp_path, backend) as writer:
        for number in range(21):
            writer.skip(f"image{number}", "unreadable")
        assert writer.commit({})
    assert write_unit(tmp_path, backend, 0, 1)
    one_group = facts(backend, groups=GROUPS[:1])
    write_manifest(tmp_path, build_manifest(tmp_path, one_group, RANGES))
    assert Cache.open(tmp_path).read(range(19), 1) == expected(1)[21:]
    assert verify_cache(tmp_path, deep=True) == []
