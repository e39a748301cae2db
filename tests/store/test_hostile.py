"""Malicious files: no pickle runs, declared sizes are checked, memory is bounded, the result is correct or an error."""

import ast
import io
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs import zstd
from small_cache import copy_of_cache, make, reseal, shared_cache, shared_weights

import pipelines
import scalekd_cache
from scalekd_cache.audit.records import RecordChecker
from scalekd_cache.config.base import from_plain, to_plain
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.config.stage2 import ScaleKDConfig
from scalekd_cache.errors import UserError
from scalekd_cache.store.base import Record, ShardId, record_crc
from scalekd_cache.store.formats.tar_index import HEADER, ROW, load_index, pack_index
from scalekd_cache.store.formats.zarr_read import ShardedArray, zstd_content_size
from scalekd_cache.store.manifest import NAME, read_manifest
from scalekd_cache.store.plan import NAME as PLAN
from scalekd_cache.store.plan import read_plan
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.remote.local_copies import LocalCopies
from scalekd_cache.store.sealed_json import SEAL, sealed
from scalekd_cache.store.sidecar import read_unit
from scalekd_cache.store.verify import check_cache, verify_cache

FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "_pickle", "torch.hub"}
bounded = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def modules():
    for package in (scalekd_cache, pipelines):
        yield from sorted(Path(package.__path__[0]).rglob("*.py"))


def test_no_module_unpickles():
    checked = 0
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
                # allows tensors and containers, makes everything else inert (test_upstream_checkpoint.py)
                assert names.isdisjoint(FORBIDDEN) or (path.name, names) == ("upstream_file.py", {"pickle"}), path
            elif isinstance(node, ast.ImportFrom):
                assert node.module not in FORBIDDEN, path
            elif isinstance(node, ast.Call):
                checked += 1
                _check_call(node, path)
    assert checked > 1000


def _check_call(node, path):
    name = ast.unparse(node.func)
    given_values = {word.arg: ast.unparse(word.value) for word in node.keywords}
    where = f"{path}:{node.lineno}"
    if name in ("torch.load", "load") and "torch" in path.read_text():
        assert name != "torch.load" or given_values.get("weights_only") == "True", where
    assert given_values.get("allow_pickle", "False") == "False", where
    assert name not in ("np.load", "numpy.load", "yaml.load", "eval", "exec", "os.system"), where
    assert not (name.endswith(".decode") and "webdataset" in name), where
    assert not name.endswith((".extractall", ".extract")), where


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def read_everything(root):
    """Check, read and decode a cache, as any command does."""
    findings = check_cache(root, deep=True, make_checker=lambda expected: RecordChecker(expected.fields, root, None))
    try:
        cache = Cache.open(root)
        for view in range(cache.manifest.num_views):
            cache.read(range(len(cache)), view)
    except UserError as error:
        return findings.problems, error
    return findings.problems, None


@pytest.fixture(scope="module")
def zarr_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile") / "cache"
    make(root, shared_weights(), data={"max_samples": 16}, cache={"backend": "zarr", "samples_per_shard": 8})
    return root


@pytest.mark.parametrize("backend", ["webdataset", "zarr"])
def test_planted_pickles_do_not_run(tmp_path, backend, zarr_root):
    bomb = tmp_path / "exploded"
    payload = pickle.dumps(Bomb(bomb))
    pickle.loads(payload)  # noqa: S301 - it is armed
    bomb.rmdir()

    def all_records(root):
        cache = Cache.open(root)
        return [cache.read(range(len(cache)), view) for view in (0, 1)]

    npy = io.BytesIO()
    np.save(npy, np.array([Bomb(bomb)], dtype=object), allow_pickle=True)
    pristine = shared_cache().root if backend == "webdataset" else zarr_root
    root, kept = Path(shutil.copytree(pristine, tmp_path / "cache")), all_records(pristine)
    for path in sorted(
        path
        for path in root.rglob("*")
        if path.is_file() and not re.search("r00000|v0000|/(pixels|logits|target|crc32c)", path.as_posix())
    ):
        data = path.read_bytes()
        for hostile in (payload, npy.getvalue(), payload + data[len(payload) :], npy.getvalue() + data[npy.tell() :]):
            path.write_bytes(hostile)
            assert verify_cache(root, deep=True), path
            found = right_or_refused(lambda: all_records(root))
            assert found is None or found == kept  # readers do not use the names in a tar
            assert found is None or path.suffix in (".tar", ".safetensors") or path.name in (PLAN, "images.txt")
        path.write_bytes(data)
    assert not bomb.exists()


def test_pickled_members_under_their_own_names_do_not_run(tmp_path):
    root, bomb = copy_of_cache(tmp_path / "cache"), tmp_path / "exploded"
    payload = pickle.dumps(Bomb(bomb))
    with tarfile.open(root / "units/g000-r00001/v0000.tar", "a") as tar:
        for name in ("a.pkl", "a.pyd", "../../a.pickle", "/tmp/a.pth"):
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    problems, error = read_everything(root)
    assert "v0000.tar" in problems[0].where
    assert "v0000" in str(error)
    assert not bomb.exists()
    assert not (root.parent / "a.pickle").exists()


# Declared sizes and types


def peak_bytes(action):
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.update(num_samples=2**60),
        lambda f: f.update(num_views=2**60),
        lambda f: (f.update(num_samples=2**60), [row.__setitem__(2, 2**60) for row in f["units"]]),
        lambda f: f["groups"][0].append(2**60),
        lambda f: f["units"].append([0, 2**60, 1, "0" * 64]),
        lambda f: f["units"].append([2**60, 0, 1, "0" * 64]),
    ],
)
def test_a_manifest_that_claims_the_world_costs_nothing(tmp_path, change):
    root = copy_of_cache(tmp_path / "cache")
    reseal(root / NAME, change)

    def refuse():
        with pytest.raises(UserError):
            Cache.open(root)

    assert peak_bytes(refuse) < 5e6
    assert verify_cache(root)[0].where == NAME


@pytest.mark.parametrize("change", [
    lambda f: f["ranges"].append([0, 2**60]),
    lambda f: f.update(groups=[[2**60]]),
    lambda f: f.update(samples_per_shard=2**60),
    lambda f: f.update(groups=[]),
    lambda f: f.update(groups=[[0], "1"]),
    lambda f: f.update(backend="../x"),
    lambda f: f.pop("recipe"),
    lambda f: f.update(more=1),
])  # fmt: skip
def test_a_plan_that_lies_is_refused(tmp_path, change):
    root = copy_of_cache(tmp_path / "cache")
    reseal(root / PLAN, change)
    with pytest.raises(UserError, match="plan"):
        read_plan(root)
    assert [problem.where for problem in verify_cache(root)] == [PLAN]


def test_a_zstd_frame_that_claims_300_megabytes_is_not_decoded(tmp_path):
    frame = zstd.compress(bytes(300_000_000), 1)
    assert len(frame) < 100_000
    assert zstd_content_size(frame) == 300_000_000
    folder = tmp_path / "array"
    (folder / "c").mkdir(parents=True)
    import google_crc32c

    index = struct.pack("<QQ", 0, len(frame))
    (folder / "c/0").write_bytes(frame + index + struct.pack("<I", google_crc32c.value(index)))
    codec = {"name": "bytes", "configuration": {"endian": "little"}}
    inner = {"chunk_shape": [64], "codecs": [codec, {"name": "zstd"}], "index_codecs": [codec, {"name": "crc32c"}]}
    meta = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [64],
        "data_type": "uint8",
        "fill_value": 0,
        "attributes": {},
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [64]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
    }
    (folder / "zarr.json").write_text(json.dumps(meta))
    array = ShardedArray(folder, "uint8", 64)

    def refuse():
        with pytest.raises(UserError, match="has the wrong content size"):
            array.all()

    assert peak_bytes(refuse) < 5e6


# Random content


def right_or_refused(action):
    try:
        return action()
    except UserError:
        return None


@bounded
@given(name=st.sampled_from(sorted(json.loads((shared_cache().root / NAME).read_text()))), value=json_values)
def test_any_field_of_a_manifest(tmp_path_factory, name, value):
    root = tmp_path_factory.mktemp("m")
    fields = json.loads((shared_cache().root / NAME).read_text())
    was = fields.pop(SEAL) and fields.get(name)
    if name == SEAL:
        (root / NAME).write_text(json.dumps({**fields, SEAL: value}))
        assert right_or_refused(lambda: read_manifest(root)) is None
        return
    (root / NAME).write_bytes(sealed({**fields, name: value}))
    manifest = right_or_refused(lambda: read_manifest(root))
    pinned = ("num_samples", "num_views", "groups", "units", "units_digest", "format_version", "backend")
    assert manifest is None or name not in pinned or value == was


@bounded
@given(data=st.binary(max_size=400), cut=st.integers(0, 4000))
def test_any_bytes_as_manifest_plan_and_sidecar(tmp_path_factory, data, cut):
    root = tmp_path_factory.mktemp("b")
    for name, read in ((NAME, read_manifest), (PLAN, read_plan)):
        whole = (shared_cache().root / name).read_bytes()
        changed = whole[:cut] + data + whole[cut + len(data) + 1 :]
        (root / name).write_bytes(changed)
        assert (right_or_refused(lambda read=read: read(root)) is None) == (changed != whole)
    unit = root / "units/g000-r00000"
    unit.mkdir(parents=True)
    whole = (shared_cache().root / "units/g000-r00000/unit.json").read_bytes()
    (unit / "unit.json").write_bytes(whole[:cut] + data + whole[cut + len(data) :])
    right_or_refused(lambda: read_unit(unit))
    assert verify_cache(root, deep=True)


@bounded
@given(name=st.sampled_from(sorted(json.loads((shared_cache().root / "units/g000-r00000/unit.json").read_text()))),
       value=json_values)  # fmt: skip
def test_any_field_of_a_sidecar(tmp_path_factory, name, value):
    unit = tmp_path_factory.mktemp("s") / "units/g000-r00000"
    unit.mkdir(parents=True)
    fields = json.loads((shared_cache().root / "units/g000-r00000/unit.json").read_text())
    (unit / "unit.json").write_text(json.dumps({**fields, name: value}))
    found = right_or_refused(lambda: read_unit(unit))
    assert found is None or 0 <= found[0].count <= 65_536


ROWS = np.array([(512, 2048, 4096, 100, 200, 300, 7), (5120, 6144, 8192, 100, 200, 300, 8)], ROW)
SHARD = ShardId(1, 2, 3)


@bounded
@given(at=st.integers(0, HEADER.size + 2 * ROW.itemsize - 1), value=st.integers(0, 255), size=st.integers(0, 200))
def test_any_index(tmp_path_factory, at, value, size):
    path = tmp_path_factory.mktemp("i") / "v0003.idx"
    good = pack_index(ROWS, SHARD, 10_240)
    path.write_bytes(good)
    assert load_index(path, SHARD, 2, 10_240).tolist() == ROWS.tolist()
    path.write_bytes(good[:at] + bytes([value]) + good[at + 1 :])
    rows = right_or_refused(lambda: load_index(path, SHARD, 2, 10_240))
    if rows is not None:  # header and lengths are correct, every member is inside the tar
        assert at >= HEADER.size or good[at] == value
        for member in ("json", "pixels", "features"):
            assert (rows[f"{member}_offset"] + rows[f"{member}_bytes"] <= 10_240).all()
    path.write_bytes(good[:size])
    if size < len(good):
        assert right_or_refused(lambda: load_index(path, SHARD, 2, 10_240)) is None


@pytest.mark.parametrize("member", ["json", "pixels", "features"])
def test_a_record_that_claims_gigabytes_is_refused_before_they_are_allocated(member, tmp_path):
    rows, tar_bytes = ROWS.copy(), 64 << 30
    rows[f"{member}_bytes"][1] = (1 << 32) - 1
    rows["pixels_offset"][1], rows["features_offset"][1] = 10 << 30, 20 << 30  # a gap between members is invalid too
    path = tmp_path / "v0003.idx"
    path.write_bytes(pack_index(rows, SHARD, tar_bytes))
    with pytest.raises(UserError, match=r"too large(?s:.*)268,435,456"):
        load_index(path, SHARD, 2, tar_bytes)


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop"])
def test_something_else_in_the_place_of_a_local_copy_is_an_error(kind, tmp_path):
    copies = LocalCopies(tmp_path, 1 << 20)
    path = copies.path("ab" * 32)
    path.parent.mkdir()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name)
    with pytest.raises(UserError, match="a local copy"):
        copies.open("ab" * 32, 3, lambda target: target.write_bytes(b"abc"))


records = st.builds(
    Record,
    key=st.text(max_size=9),
    label=st.integers(-(2**63), 2**63 - 1),
    view=st.text(max_size=9) | json_values.map(json.dumps),
    digest=st.text(max_size=16),
    pixels=st.binary(max_size=40),
    features=st.binary(max_size=40),
    logits=st.binary(max_size=40),
)


@bounded
@given(record=records, other=records)
def test_any_record_is_examined_and_has_its_own_checksum(record, other):
    cache = shared_cache()
    findings = RecordChecker(cache.manifest.facts.fingerprint_fields, cache.root, 10)([record], ShardId(0, 0, 0), [0])
    assert findings
    assert {finding.key for finding in findings} == {record.key}
    try:
        assert (record_crc(record) == record_crc(other)) == (record == other)
    except UnicodeEncodeError:  # lone surrogates are not allowed in keys or JSON
        assert any("\ud800" <= letter <= "\udfff" for letter in str(record) + str(other))


@bounded
@given(kind=st.sampled_from([ViewConfig, ScaleKDConfig]), data=st.data())
def test_any_value_in_a_configuration(kind, data):
    plain = to_plain(kind())
    name = data.draw(st.sampled_from(sorted(plain)))
    value = data.draw(st.integers(-5, 2**62) | st.floats() | st.just(plain[name]))
    if isinstance(value, type(plain[name])) and not isinstance(value, bool):
        found = right_or_refused(lambda: kind(**from_plain({**plain, name: value})))
        assert found is None or to_plain(found)[name] == value
    assert to_plain(kind(**from_plain(plain))) == plain
