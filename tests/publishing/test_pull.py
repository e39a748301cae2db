"""Pulling a published cache: the same files, resumed, grown, the first views; and folders that are rejected."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_cache import reseal
from store_cases import GROUPS, NUM_SAMPLES, RANGES, backends, expected, facts, payload_file, tree, write_cache

from scalekd_cache.config.base import fingerprint
from scalekd_cache.config.pull import PullConfig
from scalekd_cache.errors import UserError
from scalekd_cache.publishing import local_cache, transfers
from scalekd_cache.publishing import pull as pull_module
from scalekd_cache.publishing.local_cache import STAGING, staging_folder
from scalekd_cache.publishing.pull import pull_cache
from scalekd_cache.store.base import BACKENDS
from scalekd_cache.store.durable_files import hash_file
from scalekd_cache.store.manifest import build_manifest, read_manifest, write_manifest
from scalekd_cache.store.plan import Plan, read_plan, write_plan
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.sidecar import read_unit
from scalekd_cache.store.verify import verify_cache

ALL = range(NUM_SAMPLES)


def with_plan(root, backend, groups=GROUPS, **changes):
    """The cache of the first groups, with a plan, as stage 1 leaves it."""
    known = facts(backend, groups=groups, **changes)
    write_manifest(root, build_manifest(root, known, RANGES))
    write_plan(root, Plan(facts=known, ranges=[list(pair) for pair in RANGES]))
    return root


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """A cache in each store; tests must not change them."""
    folder = tmp_path_factory.mktemp("published")
    return {backend: with_plan(write_cache(folder / backend, backend), backend) for backend in BACKENDS}


@pytest.fixture
def published(caches):
    """Most of this does not depend on the store."""
    return caches["webdataset"]


def pull(source, root, **options):
    return pull_cache(PullConfig(url=str(source), cache=str(root), **options))


def stats(root):
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in root.rglob("*")}


@backends
def test_a_pulled_cache_has_the_same_files_and_a_rerun_does_nothing(caches, backend, tmp_path):
    published = caches[backend]
    root = tmp_path / "deep" / "cache"
    done = pull(published, root)
    assert done.bytes > 0
    assert not done.complete
    assert tree(root) == tree(published)
    before = stats(root)
    assert pull(published, root) == done._replace(bytes=0, complete=True)
    assert pull(published, root, views="0-1").complete  # it has more
    assert stats(root) == before


@pytest.mark.parametrize(
    ("backend", "steps"),
    [
        ("webdataset", ("0", "0-1", None)),
        ("webdataset", ("0-1", "0-2")),
        ("webdataset", ("0", None)),
        ("zarr", ("0", None)),
    ],
)
def test_the_first_views_are_a_cache_and_another_pull_adds_more(caches, tmp_path, backend, steps):
    published = caches[backend]
    root, sent = tmp_path / "cache", 0
    for step in steps:
        done = pull(published, root, views=step)
        sent += done.bytes
        assert verify_cache(root, deep=True) == []
        cache = Cache.open(root)
        assert cache.manifest.facts.fingerprint == read_manifest(published).facts.fingerprint
        for view in range(cache.manifest.num_views):
            assert cache.read(ALL, view) == expected(view)
    assert tree(root) == tree(published)
    whole = sum(fact.bytes for unit in units_of(published) for fact in unit.files.values())
    lists = sum(unit.files["keys.txt"].bytes for unit in units_of(published))
    assert whole <= sent <= whole + lists  # shards are fetched once; a cut unit keeps its list of keys


def units_of(root):
    return [read_unit(folder)[0] for folder in sorted((root / "units").iterdir())]


@backends
def test_payload_of_cut_units_adds_up(caches, backend, tmp_path):
    """Of the views of one group, every payload byte is counted once."""
    published = caches[backend]
    pull(published, tmp_path / "one", views="0")
    pull(published, tmp_path / "two", views="0-1")
    one, two = units_of(tmp_path / "one"), units_of(tmp_path / "two")
    assert two == [unit for unit in units_of(published) if unit.group == 0]
    for small, large in zip(one, two, strict=True):
        rest = {kind: large.payload_bytes[kind] - small.payload_bytes[kind] for kind in large.payload_bytes}
        assert rest["pixels"] == small.payload_bytes["pixels"]  # of the same length in each view of these records
        assert rest["target"] > 0
        assert rest["features"] == small.payload_bytes["features"]


@pytest.mark.parametrize(
    "views", ["1", "3", "1-2", "0-3", "2-0", "-1", "0..2", "0,2", "all", "", "0-", "x-1", "0-99999999"]
)
def test_other_views_are_refused(published, tmp_path, views):
    with pytest.raises(UserError, match=r"(only views from 0|has fewer views).*\n.*\n.*numbered from 0"):
        pull(published, tmp_path / "cache", views=views)
    assert not (tmp_path / "cache").exists()


def test_a_grown_publication_sends_only_what_is_new(published, tmp_path):
    backend = read_manifest(published).facts.backend
    source, root = shutil.copytree(published, tmp_path / "source"), tmp_path / "cache"
    for unit in source.glob("units/g001-*"):
        unit.rename(tmp_path / unit.name)
    with_plan(source, backend, GROUPS[:1])
    pull(source, root)
    before = stats(root / "units")
    for unit in tmp_path.glob("g001-*"):
        unit.rename(source / "units" / unit.name)
    with_plan(source, backend)
    done = pull(source, root)
    assert done.bytes == sum(fact.bytes for unit in units_of(source) if unit.group for fact in unit.files.values())
    assert tree(root) == tree(source) == tree(published)
    after = stats(root / "units")
    assert all(after[path] == was for path, was in before.items() if "g000" in str(path))


@backends
@pytest.mark.parametrize("damage", ["missing", "cut", "sidecar", "unit"])
def test_a_finished_cache_with_a_damaged_file_is_completed(caches, backend, tmp_path, damage):
    published, root = caches[backend], tmp_path / "cache"
    pull(published, root)
    unit = root / "units/g000-r00001"
    if damage == "unit":
        shutil.rmtree(unit)
    else:
        file = unit / "unit.json" if damage == "sidecar" else payload_file(root)
        data = file.read_bytes()
        file.unlink()
        if damage != "missing":
            file.write_bytes(data[:-1])
    before = tree(root)
    with pytest.raises(UserError, match="a damaged cache with more views than this pull"):
        pull(published, root, views="0")
    assert tree(root) == before
    assert not pull(published, root).complete
    assert tree(root) == tree(published)
    assert pull(published, root).complete


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_teacher_file_is_fetched_again(tmp_path, damage):
    published, root = write_cache(tmp_path / "source", "webdataset"), tmp_path / "cache"
    tail = published / "tail.safetensors"
    save_file({"weight": np.zeros(4, np.float32)}, str(tail))
    with_plan(published, "webdataset", tail_sha256=hash_file(tail).sha256)
    pull(published, root)
    (root / tail.name).unlink()
    if damage == "cut":
        (root / tail.name).write_bytes(tail.read_bytes()[:-1])
    assert pull(published, root).bytes == tail.stat().st_size
    assert tree(root) == tree(published)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("victim", ["fetch_file", "_finish", "install", "build_manifest", "_exchange"])
@pytest.mark.parametrize("views", [("0-2",), ("0", "0-2")])
def test_an_interrupted_pull_is_no_cache_and_resumes(published, tmp_path, monkeypatch, victim, views):
    """Stopped at the second call of a step: the folder is no cache, or the one that it was."""
    root = tmp_path / "cache"
    for step in views[:-1]:
        pull(published, root, views=step)
    there = tree(root) if root.exists() else {}
    module = next(one for one in (pull_module, local_cache) if hasattr(one, victim))
    whole, calls = getattr(module, victim), []

    def stopping(*args):
        calls.append(args)
        if len(calls) == (1 if victim in ("install", "build_manifest") else 2):
            raise Killed
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, victim, stopping)
        with pytest.raises(Killed):
            pull(published, root, views=views[-1], connections=1)
    if (root / "manifest.json").exists():
        assert {name: data for name, data in tree(root).items() if STAGING not in name} == there
    sent = pull(published, root, views=views[-1]).bytes
    assert tree(root) == tree(published)
    assert victim == "fetch_file" or sent < 1000  # of what had arrived, nothing is sent again


@pytest.mark.parametrize("victim", ["_exchange", "build_manifest", "write_plan", "write_atomically"])
@pytest.mark.parametrize("views", ["0-1", "0-2"])
def test_an_interrupted_pull_of_more_groups_resumes(published, tmp_path, monkeypatch, victim, views):
    """The folder still has the manifest of fewer groups, but it may have the plan of all."""
    root = tmp_path / "cache"
    pull(published, root, views="0-1")
    with monkeypatch.context() as patch:
        patch.setattr(local_cache, victim, lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            pull(published, root)
    assert read_manifest(root).num_views == 2
    pull(published, root, views=views)
    assert not (root / STAGING).exists()
    assert read_plan(root).facts.groups == read_manifest(root).facts.groups
    pull(published, root)
    assert tree(root) == tree(published)


def test_a_file_that_has_arrived_is_not_read_again(published, tmp_path, monkeypatch):
    root, sent = tmp_path / "cache", []
    whole = transfers.fetch

    def broken(path, *args):
        if path.name == "keys.txt" and "g001" in str(path):
            raise UserError("broken")
        sent.append(str(path))
        whole(path, *args)

    monkeypatch.setattr(transfers, "fetch", broken)
    with pytest.raises(UserError, match="broken"):
        pull(published, root, connections=1)
    first = set(sent)
    monkeypatch.setattr(transfers, "fetch", lambda path, *args: sent.append(str(path)) or whole(path, *args))
    pull(published, root, connections=1)
    assert tree(root) == tree(published)
    assert len(set(sent)) > len(first) > 0
    assert len(sent) - len(set(sent)) <= 1  # the one that was stopped


@pytest.mark.parametrize("inside", ["sub", "units/sub"])
def test_a_pull_does_not_write_into_another_cache(published, tmp_path, inside):
    cache = tmp_path / "cache"
    pull(published, cache)
    before = tree(cache)
    with pytest.raises(UserError, match=r"is inside the cache \S+/cache: choose a different folder"):
        pull(published, cache / inside)
    assert tree(cache) == before


def test_two_pulls_into_one_folder(published, tmp_path):
    root = tmp_path / "cache"
    with staging_folder(root), pytest.raises(UserError, match="another `scalekd pull` is writing"):
        pull(published, root)
    pull(published, root)
    assert tree(root) == tree(published)


@pytest.mark.parametrize("what", ["file", "notes", "plan", "other_units", "grown_here", "other_store"])
def test_a_folder_with_something_else_is_refused(published, tmp_path, what):
    root, words = tmp_path / "cache", "the folder (contains|is not empty)"
    backend = read_manifest(published).facts.backend
    if what == "file":
        root.write_text("x")
        words = "not a folder"
    elif what == "notes":
        root.mkdir()
        (root / "notes.txt").write_text("mine")
    elif what == "plan":
        root.mkdir()
        shutil.copy(published / "plan.json", root)
    elif what == "other_units":
        shutil.copytree(published, root)
        sidecar = root / "units/g000-r00001/unit.json"
        sidecar.write_text(sidecar.read_text() + " ")
        with_plan(root, backend)
    elif what == "grown_here":
        pull(published, root, views="0-1")
        write_plan(root, Plan(facts=facts(backend), ranges=[list(pair) for pair in RANGES]))
    elif what == "other_store":
        other = next(name for name in BACKENDS if name != backend)
        with_plan(write_cache(root, other), other, GROUPS[:1])
    before = tree(root) if root.is_dir() else {}
    with pytest.raises(UserError, match=words):
        pull(published, root)
    assert (tree(root) if root.is_dir() else {}) == before


def test_parts_of_another_cache_are_refused(published, tmp_path, monkeypatch):
    root = tmp_path / "cache"
    monkeypatch.setattr(pull_module, "_finish", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        pull(published, root)
    other = shutil.copytree(published, tmp_path / "other")
    reseal(other / "manifest.json", lambda fields: change_fingerprint(fields, "bfloat16"))
    with pytest.raises(UserError, match="interrupted pull of a different cache"):
        pull(other, root)


def change_fingerprint(fields, precision):
    fields["fingerprint_fields"]["precision"] = precision
    fields["fingerprint"] = fingerprint(fields["fingerprint_fields"])


def test_another_cache_is_refused(published, tmp_path):
    root = shutil.copytree(published, tmp_path / "cache")
    reseal(root / "manifest.json", lambda fields: change_fingerprint(fields, "bfloat16"))
    before = tree(root)
    with pytest.raises(UserError, match=r"cannot add views to.*\n.*fingerprint"):
        pull(published, root)
    assert tree(root) == before


def test_a_full_disk_is_found_before_anything_is_fetched(published, tmp_path, monkeypatch):
    monkeypatch.setattr(pull_module, "free_bytes", lambda _: 1000)
    for views, fewer in ((None, True), ("0", False)):
        with pytest.raises(UserError, match=r"not enough free disk space for the cache\n.*1\.00 KB free") as error:
            pull(published, tmp_path / "cache", views=views)
        assert (", or pull only the first few views (--views 0-" in str(error.value)) is fewer
    assert not list((tmp_path / "cache").rglob("*.tar"))
    assert not (tmp_path / "cache/manifest.json").exists()


@pytest.mark.parametrize("place", ["nowhere", "empty", "file.txt"])
def test_nothing_is_published_there(tmp_path, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(UserError, match="no published cache"):
        pull(tmp_path / place, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("first", [None, "0-1"])
def test_a_pull_of_fewer_views_leaves_nothing_of_an_interrupted_one(published, tmp_path, monkeypatch, first):
    root = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(pull_module, "install", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            pull(published, root, views=first)
    pull(published, root, views="0")
    pull(published, tmp_path / "alone", views="0")
    assert tree(root) == tree(tmp_path / "alone")
