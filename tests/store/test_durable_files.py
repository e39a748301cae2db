"""Buffered files: the same bytes, length and checksum for all piece sizes and all partial writes."""

import os
import random
import stat

import google_crc32c
import numpy as np
import pytest

from scalekd_cache.errors import UserError
from scalekd_cache.store import durable_files as files
from scalekd_cache.store.durable_files import NewFile, read_back, write_atomically


def as_array(data):
    return np.frombuffer(data, np.uint8)


def pieces_of(count, seed=0):
    draw = random.Random(seed)
    return [draw.choice((bytes, as_array))(draw.randbytes(draw.choice((0, 1, 7, 300, 5_000)))) for _ in range(count)]


def written(path, calls):
    file = NewFile(path)
    for call in calls:
        file.write(*call)
    return file.finish()


@pytest.mark.parametrize("buffered", [1, 1_000, files.BUFFER_BYTES])
@pytest.mark.parametrize("at_once", [1, 3, 2_500])
def test_what_is_written_is_there(tmp_path, monkeypatch, buffered, at_once):
    monkeypatch.setattr(files, "BUFFER_BYTES", buffered)
    pieces = pieces_of(2_600)  # more than one system call accepts
    whole = b"".join(map(bytes, pieces))
    done = written(tmp_path / "x", [pieces[start : start + at_once] for start in range(0, len(pieces), at_once)])
    assert (tmp_path / "x").read_bytes() == whole
    assert done == (len(whole), google_crc32c.value(whole))
    assert read_back(tmp_path, {"x": done})["x"].bytes == len(whole)


def test_a_call_that_takes_a_part(tmp_path, monkeypatch):
    real = os.writev

    def some(descriptor, pieces):
        return real(descriptor, [b"".join(map(bytes, pieces))[:1_000]])

    monkeypatch.setattr(os, "writev", some)
    pieces = pieces_of(300, seed=1)
    written(tmp_path / "x", [pieces[:299], pieces[299:]])
    assert (tmp_path / "x").read_bytes() == b"".join(map(bytes, pieces))


def test_an_abandoned_file_writes_nothing_more(tmp_path):
    file = NewFile(tmp_path / "x")
    file.write(b"waits")
    file.abort()
    assert (tmp_path / "x").read_bytes() == b""


@pytest.mark.parametrize("kind", ["device", "stream"])
def test_a_device_is_never_replaced_by_a_file(tmp_path, kind):
    place = tmp_path / "out"
    if kind == "device":
        try:
            os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(1, 3))  # a second /dev/null
        except PermissionError:
            pytest.skip("creating a device needs root")
    else:
        place.symlink_to("/proc/self/fd/1")  # as /dev/stdout
    before = place.lstat()
    with pytest.raises(UserError, match="cannot write to a device"):
        write_atomically(place, b"data")
    assert os.path.samestat(place.lstat(), before)
    assert list(tmp_path.iterdir()) == [place]
