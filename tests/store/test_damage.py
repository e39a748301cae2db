"""One conformance suite for both backends: damage is an error that names the shard (and the sample, if known), never
zeros and never fewer records."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from store_cases import (
    NUM_SAMPLES,
    expected,
    flip_byte,
    make_record,
    open_unit,
    order,
    payload_file,
)

from scalekd_cache.errors import UserError
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.sidecar import read_unit, unit_folder
from scalekd_cache.store.verify import verify_cache


def assert_damage_is_seen(root: Path, match: str, *, key: bool = False, fast: bool = False) -> None:
    with pytest.raises(UserError, match=match):
        Cache.open(root).read(range(NUM_SAMPLES), 1)
    for view in (0, 2):
        assert len(Cache.open(root).read(range(15), view)) == 15  # other shards are not affected
    problems = verify_cache(root, deep=True)
    assert any(match in problem.where or match in problem.what for problem in problems), problems
    if key:
        assert any(problem.key is not None for problem in problems), problems
    if fast:
        assert verify_cache(root)


def test_a_flipped_byte_in_every_part_of_a_shard(copy):
    path = payload_file(copy)
    whole_file = path.read_bytes()
    missed = []
    for offset in range(0, len(whole_file), max(1, len(whole_file) // 60)):
        flip_byte(path, offset)
        try:
            seen = Cache.open(copy).read(range(NUM_SAMPLES), 1) == expected(1)
        except UserError as error:
            seen = "g000-r00001/v0001" in str(error)
        missed += [] if seen else [offset]
        path.write_bytes(whole_file)
    assert missed == []


def test_a_flipped_payload_byte_names_the_sample(copy):
    path = payload_file(copy)
    record = expected(1)[21 + 4]
    at = path.read_bytes().find(record.features[100:164])
    assert at > 0
    flip_byte(path, at)
    assert_damage_is_seen(copy, "g000-r00001/v0001", key=True)
    assert [problem.key for problem in verify_cache(copy, deep=True) if problem.key] == [record.key]


def test_a_truncated_shard(copy):
    path = payload_file(copy)
    if path.suffix == ".tar":
        with tarfile.open(path) as tar:
            end = tar.getmembers()[-6].offset  # two samples fewer, but still a valid tar
        path.write_bytes(path.read_bytes()[:end])
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) == 3 * 17
    else:
        path.write_bytes(path.read_bytes()[:-40])
    assert_damage_is_seen(copy, "v0001", fast=True)


def test_a_deleted_shard(copy):
    payload_file(copy).unlink()
    assert_damage_is_seen(copy, "v0001", fast=True)


def test_every_file_of_a_shard_is_missed(copy):
    unit = unit_folder(copy, 0, 1)
    for path in sorted(path for path in unit.rglob("*") if path.is_file() and "v0000" not in path.as_posix()):
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(UserError):
            Cache.open(copy).read(range(NUM_SAMPLES), 1)
        assert verify_cache(copy), path
        path.write_bytes(data)
    assert verify_cache(copy) == []


def swap(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


@pytest.mark.parametrize("what", ["views", "ranges", "whole units", "payload only"])
def test_swapped_shards(copy, what):
    ends = ("v0001.zarr",) if read_manifest(copy).facts.backend == "zarr" else ("v0001.tar", "v0001.idx")
    unit, other = unit_folder(copy, 0, 1), unit_folder(copy, 0, 0)
    if what == "whole units":
        swap(unit, other)
    elif what == "payload only":
        path = payload_file(copy)
        swap(path, Path(path.as_posix().replace("v0001", "v0000")))
    else:
        for end in ends:
            swap(unit / end, other / end if what == "ranges" else unit / end.replace("1", "0"))
    with pytest.raises(UserError, match="damaged"):
        Cache.open(copy).read(range(NUM_SAMPLES), 1)
    assert verify_cache(copy, deep=True)


def test_a_stale_unit_that_is_whole_in_itself_is_not_the_one_in_the_manifest(copy):
    backend = read_manifest(copy).facts.backend
    shutil.rmtree(unit_folder(copy, 0, 1))
    with open_unit(copy, backend, 0, 1) as writer:
        for position in order(0)[21:40].tolist():
            for view in (0, 1):
                writer.append(view, make_record(position, view)._replace(label=3))
        writer.commit({})
    with pytest.raises(UserError, match="does not match the manifest"):
        Cache.open(copy).read([30], 1)
    assert verify_cache(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.update(count=2**60),
        lambda f: f.update(stop=2**60, count=2**60 - 21),
        lambda f: f["files"].update({"../../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
        lambda f: f.update(format=7),
        lambda f: f.update(views=[0, 0]),
        lambda f: f.update(files=[]),
    ],
)
def test_a_sidecar_that_lies_is_refused(copy, change):
    path = unit_folder(copy, 0, 1) / "unit.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    assert_damage_is_seen(copy, "unit.json", fast=True)
    with pytest.raises(UserError):
        read_unit(path.parent)


def test_a_missing_zarr_chunk_is_not_zeros(copy):
    if read_manifest(copy).facts.backend != "zarr":
        pytest.skip("zarr only")
    import google_crc32c

    path = payload_file(copy)
    data = bytearray(path.read_bytes())
    meta = json.loads((path.parents[1] / "zarr.json").read_text())
    (chunk,) = meta["codecs"][0]["configuration"]["chunk_shape"]
    index = len(data) - 4 - 16 * (meta["chunk_grid"]["configuration"]["chunk_shape"][0] // chunk)
    data[index : index + 16] = b"\xff" * 16  # the first entry of the index: "never written"
    data[-4:] = google_crc32c.value(bytes(data[index:-4])).to_bytes(4, "little")
    path.write_bytes(data)
    assert_damage_is_seen(copy, "chunk is missing", key=True)


def test_a_zstd_frame_that_declares_too_much_is_refused_before_decoding(copy):
    if read_manifest(copy).facts.backend != "zarr":
        pytest.skip("zarr only")
    from numcodecs import zstd

    from scalekd_cache.store.formats.zarr_read import zstd_content_size

    for size in (0, 1, 255, 256, 300, 65_791, 65_792, 10**6):
        assert zstd_content_size(zstd.compress(bytes(size))) == size
    path = payload_file(copy).parents[2] / "labels" / "c" / "0"
    data = bytearray(path.read_bytes())
    start = 5 if data[4] & 0x20 else 6
    data[start : start + (1 << (data[4] >> 6))] = b"\xfe" * (1 << (data[4] >> 6))
    path.write_bytes(data)
    assert_damage_is_seen(copy, "has the wrong content size")
