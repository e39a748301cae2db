"""One conformance suite for both backends: the same records in, the same records out, damage always an error."""

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from cache_facts import FINGERPRINT
from commands import LIMIT_S
from store_cases import (
    GROUPS,
    NUM_SAMPLES,
    RANGES,
    backends,
    expected,
    facts,
    fill,
    make_record,
    open_unit,
    order,
    write_cache,
    write_unit,
)

from scalekd_cache.errors import UserError
from scalekd_cache.store import durable_files as store_files
from scalekd_cache.store.base import BACKENDS, Record, record_crc
from scalekd_cache.store.manifest import build_manifest, read_manifest, write_manifest
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.resume import unit_committed
from scalekd_cache.store.sealed_json import SEAL, sealed
from scalekd_cache.store.sidecar import read_unit, unit_folder
from scalekd_cache.store.verify import verify_cache
from scalekd_cache.store.verify_unit import ExpectedUnit


def planned(backend: str, group: int = 0, range_id: int = 0) -> ExpectedUnit:
    """What `write_unit` makes."""
    return ExpectedUnit(group, range_id, FINGERPRINT, backend, GROUPS[group], tuple(RANGES[range_id]))


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk():
    """Thousands of small fsyncs take longer than all the rest; one test below counts them instead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_files, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module", params=list(BACKENDS))
def whole(request, tmp_path_factory) -> Path:
    """A cache that tests must not change."""
    return write_cache(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A cache that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def payload_file(root: Path, unit: str = "g000-r00001", view: int = 1) -> Path:
    """The file of a shard that holds features."""
    stem = root / "units" / unit / f"v{view:04d}"
    tar = stem.with_suffix(".tar")
    return tar if tar.exists() else stem.with_suffix(".zarr") / "features/c/0"


# Round trips


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
    """That of a tar's record is computed again in tests/support/format_reader.py."""
    write_cache(tmp_path, "zarr")
    cache = Cache.open(tmp_path)
    cache.read(range(NUM_SAMPLES), 0)
    found = [crc for _, reader in sorted(cache._readers.items()) for crc in reader.crcs.tolist()]
    assert found == [record_crc(record) for record in expected(0)]
    assert record_crc(Record("k", 1, "{}", "00", b"p", b"f", b"l")) == 0x81260AAD  # stands in docs/FORMAT.md


@pytest.mark.parametrize("byte", range(36))
def test_a_flip_in_any_byte_of_an_index_row_is_noticed_by_a_reader(tmp_path, byte):
    """Not only by `make verify`: a reader goes by the row, whose sha256 it does not take."""
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
    """Runs end at `RUN_BYTES`, at the end of a unit and where rows do not follow each other; chunks are crossed."""
    for module in ("webdataset", "zarr_read"):
        monkeypatch.setattr(f"scalekd_cache.store.{module}.RUN_BYTES", run_bytes)
    cache, records = Cache.open(whole), expected(0)
    for ids in ([*range(3, 30), 7, 8, 8, 9, 2, 1, 0, 1], range(NUM_SAMPLES)):
        assert cache.read(ids, 0) == [records[position] for position in ids]


# Other readers


def test_other_readers_open_the_shards(whole):
    records = expected(1)[:21]
    unit = unit_folder(whole, 0, 0)
    assert (unit / "keys.txt").read_text().splitlines() == [record.key for record in records]
    if read_manifest(whole).backend == "zarr":
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
        one = facts(backend, groups=[[2]], ranges=[[[0, 1]]])
        with pytest.raises(UserError):  # the unit is of group 1
            build_manifest(tmp_path / backend, one)
    with tarfile.open(unit_folder(tmp_path / "webdataset", 1, 0) / "v0002.tar") as tar:
        assert tar.getnames()[0] == key + ".json"


@pytest.mark.parametrize("key", ["", "/a", "a/", "../a", "a/../b", "a.b", "a b", "a\nb", "a\\b", "x" * 1025, "a\u2028"])
def test_keys_that_no_tar_should_hold_are_refused(tmp_path, key):
    with open_unit(tmp_path, "webdataset") as writer, pytest.raises(UserError, match="bad sample key"):
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
    code = "import sys, scalekd_cache.store; print({'torch', 'zarr', 'deepspeed'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


# Commit


@backends
def test_a_unit_is_there_once_committed(tmp_path, backend):
    assert not unit_committed(tmp_path, planned(backend))
    assert write_unit(tmp_path, backend)
    assert unit_committed(tmp_path, planned(backend))
    with pytest.raises(UserError, match="another teacher"):
        unit_committed(tmp_path, planned(backend)._replace(fingerprint="0" * 64))
    assert [path.name for path in (tmp_path / "units").iterdir()] == ["g000-r00000"]
    payload_file(tmp_path, "g000-r00000").unlink()
    assert not unit_committed(tmp_path, planned(backend))
    assert write_unit(tmp_path, backend)  # replaces the damaged one
    assert unit_committed(tmp_path, planned(backend))


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
    write_manifest(tmp_path, build_manifest(tmp_path, facts(backend)))
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
    one_group = facts(backend, groups=GROUPS[:1], ranges=[[list(bounds) for bounds in RANGES]])
    write_manifest(tmp_path, build_manifest(tmp_path, one_group))
    assert Cache.open(tmp_path).read(range(19), 1) == expected(1)[21:]
    assert verify_cache(tmp_path, deep=True) == []


# Manifest


def test_manifest(whole):
    manifest = read_manifest(whole)
    assert (manifest.num_samples, manifest.num_views, len(manifest.units)) == (NUM_SAMPLES, 3, 4)
    sizes = manifest.bytes_per_view
    parts = sizes["pixels"] + sizes["features"] + sizes["target"] + sizes["index"]
    assert sizes["total"] == pytest.approx(parts, abs=0.3)
    on_disk = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file() and path.name != "manifest.json")
    assert sizes["total"] * 3 * NUM_SAMPLES == pytest.approx(on_disk, abs=10)
    assert manifest.fidelity["cosine"] == {"mean": 1.0, "p1": 0.25, "count": 40}


def test_an_incomplete_cache_gets_no_manifest(copy):
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a finished cache"):
        Cache.open(copy)
    backend = read_unit(unit_folder(copy, 0, 0))[0].backend
    with pytest.raises(UserError, match="another cache"):
        build_manifest(copy, facts(backend, fingerprint="0" * 64))
    shutil.rmtree(unit_folder(copy, 1, 1))
    with pytest.raises(UserError, match="g001-r00001"):
        build_manifest(copy, facts(backend))


def test_groups_must_hold_the_same_images(tmp_path):
    for group in (0, 1):
        with open_unit(tmp_path, "webdataset", group, start=0, stop=2) as writer:
            for position in (0, group + 1):
                for view in GROUPS[group]:
                    writer.append(view, make_record(position, view))
            writer.commit({})
    with pytest.raises(UserError, match="same images"):
        build_manifest(tmp_path, facts("webdataset", ranges=[[[0, 2]], [[0, 2]]]))


def change_manifest(root: Path, change) -> None:
    """A lie with the right checksum over it."""
    path = root / "manifest.json"
    fields = json.loads(path.read_text())
    del fields[SEAL]
    change(fields)
    path.write_bytes(sealed(fields))


MANIFEST_CHANGES = {
    "num_samples": lambda f: f.update(num_samples=2**60),
    "unit count": lambda f: f["units"][0].__setitem__(2, 2**60),
    "all counts": lambda f: (f.update(num_samples=2**60), [row.__setitem__(2, 2**59) for row in f["units"]]),
    "small lie": lambda f: f.update(num_samples=39),
    "views": lambda f: f.update(num_views=2**60),
    "bool": lambda f: f.update(num_samples=True),
    "float": lambda f: f.update(num_samples=40.0),
    "negative": lambda f: f["units"][0].__setitem__(0, -1),
    "missing unit": lambda f: f["units"].pop(),
    "other sha": lambda f: f["units"][0].__setitem__(3, "0" * 64),
    "missing field": lambda f: f.pop("codec"),
    "unknown field": lambda f: f.update(extra=1),
    "version": lambda f: f.update(format_version=1),
    "backend": lambda f: f.update(backend="../../x"),
    "groups": lambda f: f.update(groups=[[0, 1], "2"]),
    "nested": lambda f: f.update(units={}),
}


@pytest.mark.parametrize("change", MANIFEST_CHANGES)
def test_a_manifest_that_lies_is_refused(copy, change):
    change_manifest(copy, MANIFEST_CHANGES[change])
    with pytest.raises(UserError):
        Cache.open(copy)
    assert [problem.where for problem in verify_cache(copy)] == ["manifest.json", "plan.json"]


@pytest.mark.parametrize("text", ["", "[]", "{", "NaN", '{"format_version": NaN}', "[" * 100_000])
def test_a_manifest_that_is_not_json_is_refused(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(UserError):
        Cache.open(copy)


# Damage: an error that names the shard (and the sample where it is known), never zeros, never fewer records


def flip_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


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
            end = tar.getmembers()[-6].offset  # two samples fewer, and still a tar for every reader
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
    ends = ("v0001.zarr",) if read_manifest(copy).backend == "zarr" else ("v0001.tar", "v0001.idx")
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
    backend = read_manifest(copy).backend
    shutil.rmtree(unit_folder(copy, 0, 1))
    with open_unit(copy, backend, 0, 1) as writer:
        for position in order(0)[21:40].tolist():
            for view in (0, 1):
                writer.append(view, make_record(position, view)._replace(label=3))
        writer.commit({})
    with pytest.raises(UserError, match="not the one in the manifest"):
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
    if read_manifest(copy).backend != "zarr":
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
    assert_damage_is_seen(copy, "never written", key=True)


def test_a_zstd_frame_that_declares_too_much_is_refused_before_decoding(copy):
    if read_manifest(copy).backend != "zarr":
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
    assert_damage_is_seen(copy, "declares another size")


@pytest.mark.parametrize("name", ["k.json", "a/b/c.features", "x" * 100, "x" * 101, "größe.json", "d/" * 60 + "f.jpg"])
@pytest.mark.parametrize("size", [0, 1, 77_812, 8**11 - 1, 8**11])
def test_tar_headers_are_those_of_tarfile(name, size):
    from scalekd_cache.store.formats.webdataset import member_header

    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    assert member_header(name, size) == info.tobuf(tarfile.PAX_FORMAT)
