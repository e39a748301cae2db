"""One conformance suite for both backends: the records that are written are the records that are read."""

import itertools
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from commands import LIMIT_S
from store_cases import (
    NUM_SAMPLES,
    backends,
    expected,
    facts,
    make_record,
    open_unit,
    payload_file,
    tree,
    write_cache,
)

from scalekd_cache.errors import UserError
from scalekd_cache.store import reader
from scalekd_cache.store.base import BACKENDS, Record, record_crc
from scalekd_cache.store.manifest import build_manifest, read_manifest
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.sidecar import unit_folder
from scalekd_cache.store.verify import verify_cache


def test_records_come_back_in_every_order(whole):
    cache = Cache.open(whole)
    assert len(cache) == NUM_SAMPLES
    for view in range(3):
        assert cache.read(np.arange(NUM_SAMPLES), view) == expected(view)
    ids = np.random.default_rng(5).integers(0, NUM_SAMPLES, 100)  # with repeats, across units
    assert cache.read(ids, 1) == [expected(1)[position] for position in ids]
    assert cache.read([], 0) == []
    with pytest.raises(UserError, match="no such view"):
        cache.read([0], 3)
    with pytest.raises(AssertionError):
        cache.read([NUM_SAMPLES], 0)
    assert verify_cache(whole) == verify_cache(whole, deep=True) == []


@backends
def test_replayed_views_have_no_pixels(tmp_path, backend):
    root = write_cache(tmp_path, backend, replayed=True)
    records = Cache.open(root).read(range(NUM_SAMPLES), 2)
    assert all(record.pixels == b"" for record in records)
    assert verify_cache(root, deep=True) == []
    assert read_manifest(root).bytes_per_view["features"] > 0


@backends
def test_a_second_write_gives_the_same_bytes(whole, tmp_path, backend):
    if backend in whole.as_posix():
        assert tree(write_cache(tmp_path, backend)) == tree(whole)


def test_a_zarr_record_has_the_checksum_of_its_fields(tmp_path):
    """tests/support/format_reader.py recomputes the checksum of a tar's record."""
    write_cache(tmp_path, "zarr")
    cache = Cache.open(tmp_path)
    cache.read(range(NUM_SAMPLES), 0)
    found = [crc for _, reader in sorted(cache._readers.items()) for crc in reader.crcs.tolist()]
    assert found == [record_crc(record) for record in expected(0)]
    assert record_crc(Record("k", 1, "{}", "00", b"p", b"f", b"l")) == 0x81260AAD  # documented in docs/FORMAT.md


@pytest.mark.parametrize("byte", range(36))
def test_a_flip_in_any_byte_of_an_index_row_is_noticed_by_a_reader(tmp_path, byte):
    """Detected not only by `scalekd verify`: a reader uses the index row without checking its sha256."""
    root = write_cache(tmp_path, "webdataset")
    index = root / "units" / "g000-r00000" / "v0000.idx"
    data = bytearray(index.read_bytes())
    data[48 + 3 * 40 + byte] ^= 1
    index.write_bytes(data)
    with pytest.raises(UserError, match="damaged cache"):
        Cache.open(root).read(range(NUM_SAMPLES), 0)


@backends
def test_large_arrays_span_shard_files(tmp_path, backend, monkeypatch):
    import scalekd_cache.store.formats.zarr as zarr_store

    monkeypatch.setattr(zarr_store, "SHARD_BYTES", 8192)
    monkeypatch.setattr(zarr_store, "CHUNK_BYTES", (1024, 1024))
    root = write_cache(tmp_path, backend)
    assert Cache.open(root).read(range(NUM_SAMPLES), 0) == expected(0)
    if backend == "zarr":
        assert payload_file(root).with_name("1").exists()
        import zarr

        group = zarr.open_group(payload_file(root, "g000-r00000", 0).parents[2], mode="r")
        assert group["features"][:].tobytes() == b"".join(record.features for record in expected(0)[:21])
        assert group["pixels"][:].tobytes() == b"".join(record.pixels for record in expected(0)[:21])


@pytest.mark.parametrize("run_bytes", [1, 2_000, 5_000, 1 << 20])
def test_neighbors_are_read_at_once_and_cut_rightly(whole, run_bytes, monkeypatch):
    """Runs end at `RUN_BYTES`, at the end of a unit and at gaps between rows; they may cross chunks."""
    for module in ("webdataset", "zarr_read"):
        monkeypatch.setattr(f"scalekd_cache.store.formats.{module}.RUN_BYTES", run_bytes)
    cache, records = Cache.open(whole), expected(0)
    for ids in ([*range(3, 30), 7, 8, 8, 9, 2, 1, 0, 1], range(NUM_SAMPLES)):
        assert cache.read(ids, 0) == [records[position] for position in ids]


# Other readers


def test_other_readers_open_the_shards(whole):
    records = expected(1)[:21]
    unit = unit_folder(whole, 0, 0)
    assert (unit / "keys.txt").read_text().splitlines() == [record.key for record in records]
    if read_manifest(whole).facts.backend == "zarr":
        _check_with_zarr(unit / "v0001.zarr", records)
    else:
        _check_with_tar(unit / "v0001.tar", records)


def _check_with_zarr(path: Path, records: list[Record]) -> None:
    import zarr

    group = zarr.open_group(path, mode="r")
    assert group["labels"][:].tolist() == [record.label for record in records]
    for name in ("features", "pixels", "logits"):
        offsets, flat = group[f"{name}_offsets"][:], group[name][:]
        cut = [flat[a:b].tobytes() for a, b in itertools.pairwise(offsets)]
        assert cut == [getattr(record, name) for record in records]
    assert group["crc32c"][:].tolist() == [record_crc(record) for record in records]


def _check_with_tar(path: Path, records: list[Record]) -> None:
    import webdataset

    names = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True).stdout.splitlines()
    assert names == [record.key + end for record in records for end in (".json", ".jpg", ".features")]
    with tarfile.open(path) as tar:
        assert {(member.mtime, member.uid, member.mode, member.uname) for member in tar} == {(0, 0, 0o644, "")}
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [record.key for record in records]
    for sample, record in zip(samples, records, strict=True):
        fields = json.loads(sample["json"])
        assert (sample["jpg"], sample["features"]) == (record.pixels, record.features + record.logits)
        assert fields["features_bytes"] == len(record.features)
        assert (fields["label"], fields["digest"], fields["view"]) == (
            record.label, record.digest, json.loads(record.view))  # fmt: skip


def test_long_and_unusual_keys(tmp_path):
    key = "größe/" + "x" * 300
    for backend in BACKENDS:
        record = make_record(0, 2)._replace(key=key)
        with open_unit(tmp_path / backend, backend, 1, start=0, stop=1) as writer:
            writer.append(2, record)
            assert writer.commit({})
        one = facts(backend, groups=[[2]])
        with pytest.raises(UserError):  # the unit is of group 1
            build_manifest(tmp_path / backend, one, [[0, 1]])
    with tarfile.open(unit_folder(tmp_path / "webdataset", 1, 0) / "v0002.tar") as tar:
        assert tar.getnames()[0] == key + ".json"


@pytest.mark.parametrize("key", ["", "/a", "a/", "../a", "a/../b", "a.b", "a b", "a\nb", "a\\b", "x" * 1025, "a\u2028"])
def test_keys_that_no_tar_should_hold_are_refused(tmp_path, key):
    with open_unit(tmp_path, "webdataset") as writer, pytest.raises(UserError, match="invalid sample key"):
        writer.append(0, make_record(0, 0)._replace(key=key))


def test_the_same_key_twice_is_refused(tmp_path):
    with open_unit(tmp_path, "webdataset") as writer:
        writer.append(0, make_record(0, 0))
        with pytest.raises(UserError, match="same key"):
            writer.append(0, make_record(0, 0))


# Processes


def _read_in_worker(cache: Cache, queue) -> None:
    queue.put(cache.read(range(NUM_SAMPLES), 0) == expected(0))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_cache_travels_to_workers(whole, method):
    cache = Cache.open(whole)
    cache.read(range(30), 0)  # files are open in the parent
    assert len(pickle.dumps(cache)) < 10_000
    assert pickle.loads(pickle.dumps(cache)).read([3], 2) == cache.read([3], 2)  # noqa: S301 - our own bytes
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=_read_in_worker, args=(cache, queue))
    worker.start()
    assert queue.get(timeout=LIMIT_S)
    worker.join(60)


def test_few_files_stay_open(whole, monkeypatch):
    monkeypatch.setattr("scalekd_cache.store.reader.OPEN_SHARDS", 1)
    cache = Cache.open(whole)
    before = len(os.listdir("/proc/self/fd"))
    for position in (0, 39, 1, 38):
        cache.read([position], 0)
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_importing_the_store_is_light():
    modules = ", ".join(f"scalekd_cache.store.{name}" for name in ("growing", "unit", "verify"))
    code = f"import sys, {modules}; print({{'torch', 'zarr', 'deepspeed'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["k.json", "a/b/c.features", "x" * 100, "x" * 101, "größe.json", "d/" * 60 + "f.jpg"])
@pytest.mark.parametrize("size", [0, 1, 77_812, 8**11 - 1, 8**11])
def test_tar_headers_are_those_of_tarfile(name, size):
    from scalekd_cache.store.formats.webdataset import member_header

    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    assert member_header(name, size) == info.tobuf(tarfile.PAX_FORMAT)


def test_a_range_without_records_hides_no_sample(whole, monkeypatch):
    """All images of a range may be unreadable."""
    read = reader.read_keys
    cache = Cache.open(whole)
    first = cache._unit_info(cache._units[0][0])
    monkeypatch.setattr(reader, "read_keys", lambda *unit: [] if unit == first else read(*unit))
    cache = Cache.open(whole)
    key = expected(0)[-1].key
    assert cache[key, 0] == expected(0)[-1]
    with pytest.raises(UserError, match="no such sample"):
        cache.position("none", 0)
