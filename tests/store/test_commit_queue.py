"""Units committed in the background: in order, one at a time, without lost errors."""

import threading

import pytest
from commands import LIMIT_S

from scalekd_cache.errors import UserError
from scalekd_cache.store import durable_files as store_files
from scalekd_cache.store.background import CommitQueue, FilledUnit
from scalekd_cache.store.base import Record
from scalekd_cache.store.resume import committed_unit
from scalekd_cache.store.unit import UnitWriter
from scalekd_cache.store.verify_unit import ExpectedUnit

FINGERPRINT = "0" * 64


def filled(root, number):
    writer = UnitWriter(
        root,
        backend="webdataset",
        group=0,
        range_id=number,
        start=number,
        stop=number + 1,
        views=[0],
        fingerprint=FINGERPRINT,
    )
    writer.append(0, Record(f"image{number}", 0, "{}", "0" * 16, b"", b"features", b"logits"))
    return FilledUnit(writer, {})


def is_there(root, number=0):
    unit = ExpectedUnit(0, number, FINGERPRINT, "webdataset", [0], (number, number + 1))
    return committed_unit(root, unit) is not None


def commit(root, units, done, then=lambda: None):
    with CommitQueue() as commits:
        for number in range(units):
            commits.put([filled(root, number)], done)
        then()


def left(root):
    return sorted(path.name for path in (root / "units").iterdir())


def test_units_are_published_in_order_and_reported_to_the_callers_thread(tmp_path):
    reported = []
    with CommitQueue() as commits:
        for number in range(3):
            report = (number, threading.current_thread())
            commits.put([filled(tmp_path, number)], lambda report=report: reported.append(report))
            assert [number for number, _ in reported] == list(range(number))
    assert [number for number, _ in reported] == [0, 1, 2]
    assert {thread for _, thread in reported} == {threading.main_thread()}
    assert all(is_there(tmp_path, number) for number in range(3))


def test_the_caller_goes_on_while_the_disk_is_waited_for(tmp_path, monkeypatch):
    may_end = threading.Event()
    fsync = store_files.fsync

    def slow(descriptor):
        assert may_end.wait(LIMIT_S), "the caller waited for the disk"
        fsync(descriptor)

    monkeypatch.setattr(store_files, "fsync", slow)
    with CommitQueue() as commits:
        commits.put([filled(tmp_path, 0)], lambda: None)
        assert not is_there(tmp_path)
        may_end.set()
    assert is_there(tmp_path)


@pytest.mark.parametrize("units", [1, 2])
def test_an_error_of_the_disk_reaches_the_caller_and_leaves_nothing(tmp_path, monkeypatch, units):
    def broken(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store_files, "fsync", broken)
    reported = []
    with pytest.raises(UserError, match="I/O error on the disk"):
        commit(tmp_path, units, lambda: reported.append(1))
    assert left(tmp_path) == []
    assert reported == []


def test_an_error_of_the_caller_waits_for_the_unit_that_is_whole(tmp_path):
    def fail():
        raise RuntimeError("of the teacher")

    with pytest.raises(RuntimeError, match="of the teacher"):
        commit(tmp_path, 1, lambda: None, then=fail)
    assert left(tmp_path) == ["g000-r00000"]
    assert is_there(tmp_path)


def test_a_unit_of_two_caches_is_published_first_in_the_first(tmp_path, monkeypatch):
    """If the first cache's disk fails, or another writer was faster there, the second cache does not get the unit."""
    first, second = tmp_path / "first", tmp_path / "second"
    with CommitQueue() as commits:
        commits.put([filled(first, 0), filled(second, 0)], lambda: None)
    assert left(first) == left(second) == ["g000-r00000"]
    with CommitQueue() as commits:
        commits.put([filled(first, 0), filled(second, 1)], lambda: None)
    assert left(second) == ["g000-r00000"]
    monkeypatch.setattr(UnitWriter, "_publish", broken)
    with pytest.raises(UserError, match="broken"), CommitQueue() as commits:
        commits.put([filled(first, 2), filled(second, 2)], lambda: None)
    assert left(first) == left(second) == ["g000-r00000"]


def broken(_):
    raise UserError("broken")
