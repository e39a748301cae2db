"""Pulling from servers that fail, send wrong bytes, or change: one clear error, and no partial cache."""

import dataclasses
import shutil
import threading

import pytest
from commands import LIMIT_S
from servers import faulty_server
from small_cache import reseal
from store_cases import RANGES, facts, tree, write_cache

from scalekd_cache.config.pull import PullConfig
from scalekd_cache.config.remote import RemoteConfig
from scalekd_cache.errors import UserError
from scalekd_cache.publishing import pull as pull_module
from scalekd_cache.publishing.pull import pull_cache
from scalekd_cache.publishing.transfers import THREAD
from scalekd_cache.store.durable_files import hash_file
from scalekd_cache.store.manifest import build_manifest, write_manifest
from scalekd_cache.store.plan import Plan, write_plan
from scalekd_cache.store.sidecar import read_unit, sidecar_text

UNIT = "units/g000-r00001"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A cache that tests must not change."""
    root = write_cache(tmp_path_factory.mktemp("source") / "cache", "webdataset")
    write_plan(root, Plan(facts=facts("webdataset"), ranges=[list(pair) for pair in RANGES]))
    return root


@pytest.fixture
def served(source, tmp_path):
    """A server with a private copy of the cache."""
    shutil.copytree(source, tmp_path / "site" / "cache")
    with faulty_server(tmp_path / "site") as server:
        yield server


def pull(server, root, **options):
    remote = RemoteConfig(backoff_s=0.01, timeout_s=30, attempts=2)
    return pull_cache(PullConfig(url=f"{server.url}/cache", cache=str(root), remote=remote, **options))


def is_no_cache(root):
    return not (root / "manifest.json").exists() and not (root / "units").exists()


def test_a_cache_from_a_server_without_ranges(served, source, tmp_path):
    root = tmp_path / "cache"
    pull(served, root)
    assert tree(root) == tree(source)
    files = served.gets("")
    assert pull(served, root).complete
    assert served.gets("") - files == 1  # the manifest


def wait_for_transfers():
    """A pull that fails does not wait for the request that its other thread has just sent; the server logs it later."""
    for thread in threading.enumerate():
        if thread.name.startswith(THREAD):
            thread.join(LIMIT_S)
            assert not thread.is_alive()


TEMPORARY = [("v0001.tar", kind) for kind in (500, 503, "drop", "short", "flipped", "zeros", "endless")]
TEMPORARY += [(name, kind) for name in ("unit.json", "keys.txt", "v0000.idx") for kind in ("short", "flipped")]


@pytest.mark.parametrize(("name", "kind"), TEMPORARY)
def test_a_fault_that_passes_is_retried(served, source, tmp_path, name, kind):
    served.fail(f"{UNIT}/{name}", kind, times=1)
    pull(served, tmp_path / "cache")
    assert tree(tmp_path / "cache") == tree(source)


@pytest.mark.parametrize("name", ["unit.json", "v0001.tar", "v0001.idx", "keys.txt"])
@pytest.mark.parametrize("kind", [404, "flipped", "short"])
def test_a_fault_that_stays_is_one_error_and_the_rest_is_kept(served, source, tmp_path, name, kind):
    root = tmp_path / "cache"
    served.fail(f"{UNIT}/{name}", kind)
    with pytest.raises(UserError, match=rf"cannot download a file(?s:.)*{UNIT}/{name}"):
        pull(served, root, connections=2)
    assert is_no_cache(root)
    wait_for_transfers()
    served.faults.clear()
    before = len(served.log)
    pull(served, root)
    assert tree(root) == tree(source)
    again = [path for _, path in served.log[before:] if "/units/" in path]
    assert len(again) == len(set(again))
    assert f"/cache/{UNIT}/{name}" in again


PAGE = b"<html><body>Please log in</body></html>\n"


@pytest.mark.parametrize("name", ["manifest.json", f"{UNIT}/unit.json", f"{UNIT}/v0000.tar", "codec.json"])
def test_a_page_with_status_200_is_no_file(served, source, tmp_path, name):
    root = tmp_path / "cache"
    (served.folder / "cache" / name).write_bytes(PAGE)
    with pytest.raises(UserError, match=name.rpartition("/")[2]):
        pull(served, root)
    assert is_no_cache(root)


def swap(one, other):
    data = one.read_bytes(), other.read_bytes()
    one.write_bytes(data[1])
    other.write_bytes(data[0])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (f"{UNIT}/v0000.tar", f"{UNIT}/v0001.tar"),  # of equal size
        (f"{UNIT}/v0000.idx", f"{UNIT}/v0001.idx"),
        ("units/g000-r00000/v0000.tar", f"{UNIT}/v0000.tar"),
        ("units/g000-r00000/unit.json", f"{UNIT}/unit.json"),
    ],
)
def test_two_swapped_files_are_caught(served, tmp_path, one, other):
    folder = served.folder / "cache"
    sizes = {(folder / name).stat().st_size for name in (one, other)}
    assert len(sizes) == 1 or one[-21:] != other[-21:]
    swap(folder / one, folder / other)
    with pytest.raises(UserError, match=r"received (sha256|only|more|[0-9,]+ bytes)"):
        pull(served, tmp_path / "cache")
    assert is_no_cache(tmp_path / "cache")


def test_swapped_shards_with_matching_sidecars_are_caught(served, tmp_path):
    """Two whole units exchanged: every file matches its sidecar, but the sidecars are not those of the manifest."""
    folder = served.folder / "cache" / "units"
    (folder / "g000-r00000").rename(folder / "aside")
    (folder / "g000-r00001").rename(folder / "g000-r00000")
    (folder / "aside").rename(folder / "g000-r00001")
    with pytest.raises(UserError, match=r"received sha256(?s:.)*unit\.json"):
        pull(served, tmp_path / "cache")


def test_an_old_manifest_is_caught(served, tmp_path):
    """Shards of a cache that was made again, under its old manifest."""
    other = write_cache(tmp_path / "other", "webdataset", replayed=True)
    for unit in other.glob("units/*"):
        shutil.copytree(unit, served.folder / "cache" / "units" / unit.name, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"does not match this cache's manifest"):
        pull(served, tmp_path / "cache")
    assert is_no_cache(tmp_path / "cache")


def test_a_publication_that_changes_between_manifest_and_shard(served, source, tmp_path, monkeypatch):
    """The error says so; the next pull takes the new files and none of the old ones, though of equal size."""
    root, whole, folder = tmp_path / "cache", pull_module.fetch_file, served.folder / "cache"
    other = write_cache(tmp_path / "other", "webdataset")
    tar = other / UNIT / "v0001.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"\1")  # after the end of the tar: a file of equal length

    def changing(transfer, check_stop):
        if transfer.target.name == "v0001.tar" and UNIT in str(transfer.target):
            shutil.copytree(rebuilt(other), folder, dirs_exist_ok=True)
        return whole(transfer, check_stop)

    monkeypatch.setattr(pull_module, "fetch_file", changing)
    with pytest.raises(UserError, match="the published cache has changed since this pull started"):
        pull(served, root, connections=1)
    monkeypatch.undo()
    assert is_no_cache(root)
    pull(served, root)
    assert tree(root) == tree(folder) != tree(source)


def rebuilt(root):
    """The cache, with the sidecar, manifest and plan of its files as they are now."""
    for folder in root.glob("units/*"):
        info, _ = read_unit(folder)
        files = {name: hash_file(folder / name) for name in info.files}
        (folder / "unit.json").write_text(sidecar_text(dataclasses.replace(info, files=files)))
    write_manifest(root, build_manifest(root, facts("webdataset"), RANGES))
    write_plan(root, Plan(facts=facts("webdataset"), ranges=[list(pair) for pair in RANGES]))
    return root


def test_a_manifest_that_does_not_match_its_hash(served, tmp_path):
    path = served.folder / "cache" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"num_samples": 40', b'"num_samples": 41'))
    with pytest.raises(UserError, match="self_sha256"):
        pull(served, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_file_names_stay_inside_the_folder(served, tmp_path):
    reseal(served.folder / "cache/manifest.json", lambda fields: fields["units"][0].__setitem__(1, -1))
    with pytest.raises(UserError, match="manifest"):
        pull(served, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
