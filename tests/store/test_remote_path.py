"""A cache behind a URL: correct records, or an error that names file and reason, for any behavior of the server."""

import multiprocessing
import os
import pickle
import signal
import sys
import time
from pathlib import PurePosixPath
from types import SimpleNamespace

import numpy as np
import pytest
from commands import LIMIT_S
from remote_cases import ALL, config
from servers import faulty_server
from store_cases import NUM_SAMPLES, expected, write_cache
from torch.utils.data import DataLoader, Dataset

from scalekd_cache.errors import UserError
from scalekd_cache.store.base import BACKENDS, Record
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.remote.remote_path import RemotePath
from scalekd_cache.store.verify import verify_cache

PAYLOAD = {"webdataset": "g000-r00001/v0001.tar", "zarr": "g000-r00001/v0001.zarr/features/c/0"}
PASSING = [("503 twice", 503, 2), ("429", 429, 1), ("drop", "drop", 1), ("short", "short", 1),
           ("flipped", "flipped", 1), ("zeros", "zeros", 1), ("slow", "slow", 1)]  # fmt: skip


@pytest.fixture(scope="module", params=list(BACKENDS))
def whole(request, tmp_path_factory):
    """A cache on disk that tests must not change."""
    return write_cache(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def tar_cache(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("tar"), "webdataset")


@pytest.fixture
def server(whole):
    with faulty_server(whole) as running:
        yield running


@pytest.fixture
def tar_server(tar_cache):
    with faulty_server(tar_cache) as running:
        yield running


def payload(server):
    """Path suffix of a file that holds features of view 1."""
    return next(end for end in PAYLOAD.values() if (server.folder / "units" / end).exists())


def copies(folder):
    """Names and lengths of the local copies."""
    return {path.name: path.stat().st_size for path in folder.glob("??/*")}


def leftovers(folder):
    return sorted(path.name for path in folder.glob("incoming/*"))


def test_records_are_those_of_the_folder_and_come_from_copies_the_second_time(server, tmp_path):
    cache = Cache.open(server.url, config(tmp_path))
    for view in range(3):
        assert cache.read(ALL, view) == expected(view)
    gets = server.gets("units/" + payload(server)), len(server.log)
    assert gets[0] == 1
    assert cache.read(ALL, 1) == expected(1)
    assert len(server.log) == gets[1]
    assert Cache.open(server.url + "/", config(tmp_path)).read(ALL, 2) == expected(2)
    assert server.gets() == gets[1] - sum(method == "HEAD" for method, _ in server.log[: gets[1]]) + 1  # the manifest
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("kind", "times"), [row[1:] for row in PASSING], ids=[row[0] for row in PASSING])
def test_a_fault_that_passes_is_not_noticed(server, tmp_path, kind, times):
    server.fail(payload(server), kind, times)
    assert Cache.open(server.url, config(tmp_path)).read(ALL, 1) == expected(1)
    assert server.gets(payload(server)) == times + 1


@pytest.mark.parametrize("name", ["manifest.json", "unit.json", "keys.txt"])
def test_faults_of_small_files_pass_too(tar_server, tmp_path, name):
    tar_server.fail(name, 503, 2)
    tar_server.fail(name, "drop", 1)
    assert Cache.open(tar_server.url, config(tmp_path)).read(ALL, 1) == expected(1)


@pytest.mark.parametrize("kind", [503, "drop", "short", "flipped", "zeros", "slow", "endless"])
def test_a_fault_that_stays_is_an_error_that_names_the_file(server, tmp_path, kind):
    server.fail(payload(server), kind)
    cache = Cache.open(server.url, config(tmp_path, attempts=2, timeout_s=0.2))
    with pytest.raises(UserError) as caught:
        cache.read(ALL, 1)
    text = str(caught.value)
    assert f"{server.url}/units/{payload(server)}" in text
    assert "2 of 2 attempts" in text
    assert "what to do" in text
    assert {
        503: "status 503",
        "short": "expected",
        "flipped": "sha256",
        "zeros": "sha256",
        "endless": "more than the expected",
    }.get(kind, "") in text
    assert server.gets(payload(server)) == 2
    assert leftovers(tmp_path) == []
    assert cache.read(ALL, 2) == expected(2)  # other shards are not affected
    server.faults.clear()
    assert cache.read(ALL, 1) == expected(1)


@pytest.mark.parametrize("status", [403, 404, 410])
def test_what_will_not_change_is_asked_once(server, tmp_path, status):
    server.fail(payload(server), status)
    with pytest.raises(UserError, match=f"status {status}.*1 of 4 attempts") as caught:
        Cache.open(server.url, config(tmp_path)).read(ALL, 1)
    assert payload(server) in str(caught.value)
    assert server.gets(payload(server)) == 1


def test_without_a_manifest_it_is_no_finished_cache(tar_server, tmp_path):
    with pytest.raises(UserError, match="not a finished cache") as caught:
        Cache.open(tar_server.url + "/elsewhere", config(tmp_path))
    assert f"{tar_server.url}/elsewhere/manifest.json" in str(caught.value)
    address = tar_server.url
    tar_server.fail("manifest.json", 503)
    with pytest.raises(UserError, match=r"status 503.*4 of 4 attempts"):
        Cache.open(address, config(tmp_path))


def test_a_server_that_is_gone(tmp_path):
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1") as caught:
        Cache.open("http://me:secret@127.0.0.1:1/cache", config(tmp_path))
    assert "secret" not in str(caught.value)
    assert "remote.attempts=4" in str(caught.value)


def test_a_sidecar_of_another_cache_is_refused(tar_cache, tar_server, tmp_path):
    tar_server.fail("g000-r00000/unit.json", "flipped")
    with pytest.raises(UserError, match="sha256") as caught:
        Cache.open(tar_server.url, config(tmp_path)).read([0], 0)
    assert "g000-r00000/unit.json" in str(caught.value)


# Copies on disk


def test_copies_stay_within_the_limit_and_the_least_recently_used_go(tar_server, tmp_path):
    sizes = {str(path): path.stat().st_size for path in tar_server.folder.rglob("*.tar")}
    limit = 2 * max(sizes.values()) + 20_000  # two of the six shards, and their indexes
    cache = Cache.open(tar_server.url, config(tmp_path, limit_bytes=limit))
    for view, position in [(0, 0), (1, 0), (0, 0), (2, 0)]:
        assert cache.read([position], view) == [expected(view)[position]]
        assert sum(copies(tmp_path).values()) <= limit
    assert tar_server.gets("g000-r00000/v0000.tar") == 1
    assert cache.read([0], 0) == [expected(0)[0]]  # view 1 was evicted
    assert tar_server.gets("g000-r00000/v0000.tar") == 1
    for view in (0, 1, 2, 0, 1):
        assert cache.read(ALL, view) == expected(view)
        assert sum(copies(tmp_path).values()) <= limit
    assert tar_server.gets("g000-r00000/v0001.tar") == 3


def test_a_file_larger_than_the_limit_is_an_error(tar_server, tmp_path):
    with pytest.raises(UserError, match=r"larger than the size limit for local copies") as caught:
        Cache.open(tar_server.url, config(tmp_path, limit_bytes=20_000)).read(ALL, 1)
    assert "remote.limit_bytes" in str(caught.value)


@pytest.mark.parametrize("damage", ["flip", "cut", "zeros"])
def test_a_copy_that_rots_is_fetched_again(server, tmp_path, damage):
    Cache.open(server.url, config(tmp_path)).read(ALL, 1)
    for path in tmp_path.glob("??/*"):
        data = bytearray(path.read_bytes())
        if damage == "flip":
            for at in range(0, len(data), 97):
                data[at] ^= 4
        path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-7]), "zeros": bytes(len(data))}[damage])
    assert Cache.open(server.url, config(tmp_path)).read(ALL, 1) == expected(1)
    cache = Cache.open(server.url, config(tmp_path))  # also with a shard that is already open
    cache.read([0], 1)
    for path in tmp_path.glob("??/*"):
        path.write_bytes(bytes(path.stat().st_size))
    assert cache.read(ALL, 1) == expected(1)


def read_all(url, settings, results, views=(0, 1, 2)):
    cache = Cache.open(url, settings)
    results.put(all(cache.read(ALL, view) == expected(view) for view in views))


def in_processes(count, *arguments):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=read_all, args=(*arguments, results)) for _ in range(count)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=LIMIT_S) for _ in processes]
    for process in processes:
        process.join(10)
    return answers


def test_processes_share_copies_and_fetch_each_file_once(tar_server, tmp_path):
    assert in_processes(4, tar_server.url, config(tmp_path, timeout_s=20)) == [True] * 4
    fetched = [path for method, path in tar_server.log if method == "GET" and "/units/" in path]
    assert len(fetched) == len(set(fetched)) == 4 * 2 + 2 * 2 * 2 + 2 * 2  # sidecar and keys; group 0; group 1
    assert leftovers(tmp_path) == []


def test_processes_that_push_each_other_out_still_read_right(tar_server, tmp_path):
    limit = max(path.stat().st_size for path in tar_server.folder.rglob("*.tar")) + 30_000
    assert in_processes(3, tar_server.url, config(tmp_path, timeout_s=20, limit_bytes=limit)) == [True] * 3
    assert sum(copies(tmp_path).values()) <= limit
    assert leftovers(tmp_path) == []


def test_a_process_killed_while_it_fetches_leaves_nothing_that_is_believed(tar_server, tmp_path):
    settings = config(tmp_path, timeout_s=20)
    tar_server.fail("g000-r00000/v0001.tar", "held", 1)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=read_all, args=(tar_server.url, settings, context.Queue(), (1,)))
    process.start()
    assert tar_server.reached.wait(LIMIT_S)
    for _ in range(200):
        if any(path.stat().st_size for path in tmp_path.glob("incoming/*.data")):
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert [name.partition(".")[2] for name in leftovers(tmp_path)] == ["data", "lock"]
    cache = Cache.open(tar_server.url, settings)
    assert cache.read(ALL, 2) == expected(2)
    assert leftovers(tmp_path) == []  # removed by another fetch
    assert cache.read(ALL, 1) == expected(1)


class Records(Dataset):
    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, position):
        record = self.cache.read([position], 1)[0]
        return tuple(bytes(field) if isinstance(field, memoryview) else field for field in record)


def test_forked_loader_workers_read_after_their_parent_has(server, tmp_path):
    cache = Cache.open(server.url, config(tmp_path, timeout_s=20))
    cache.read([0], 0)  # the parent's event loop is running when the workers start
    loader = DataLoader(Records(cache), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=LIMIT_S)
    assert [Record(*fields) for fields in loader] == expected(1)


def test_an_open_cache_survives_pickle(tar_server, tmp_path):
    cache = Cache.open(tar_server.url, config(tmp_path))
    cache.read(ALL, 0)
    again = pickle.loads(pickle.dumps(cache))  # noqa: S301 - our own bytes
    assert again.read(ALL, 1) == expected(1)


# Which URLs


@pytest.mark.parametrize("url", ["pipe:cat /etc/passwd", "ftp://host/cache", "ssh://host/x", "simplecache::http://h/x",
                                 "zip://x::http://h/y", "http:/host/x", "memory://x", "PIPE:true",
                                 "http://h/x::pipe:true"])  # fmt: skip
def test_other_urls_are_refused(url):
    for action in (Cache.open, verify_cache):
        with pytest.raises(UserError, match="file://, gs://, hf://, http://, https://, s3://"):
            action(url)


def test_queries_are_refused():
    with pytest.raises(UserError, match="query"):
        Cache.open("https://host/cache?signature=1")


def test_a_file_url_is_a_folder(whole, tmp_path):
    folder = tmp_path / "a folder"
    folder.symlink_to(whole)
    cache = Cache.open(f"file://{folder}".replace(" ", "%20"))
    assert cache.root == folder
    assert cache.read(ALL, 1) == expected(1)
    assert verify_cache(f"file://{whole}", deep=True) == []


OPTIONAL = pytest.mark.parametrize(
    ("url", "module", "extra"),
    [
        ("s3://b/c", "s3fs", "remote"),
        ("gs://b/c", "gcsfs", "gcs"),
        ("https://h/c", "aiohttp", "remote"),
        ("https://h/c", "fsspec", "remote"),
    ],
)


@OPTIONAL
def test_a_missing_package_is_named_with_the_command(url, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{module}, which is not installed(?s:.*)scalekd-cache\[{extra}\]"):
        Cache.open(url)


@OPTIONAL
def test_a_broken_package_is_named_with_its_version(url, module, extra, monkeypatch, tmp_path):
    (tmp_path / f"{module}.py").write_text("raise ValueError('invalid literal for int(): post0')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(UserError, match=rf"cannot be imported(?s:.*)post0(?s:.*){module} \d(?s:.*)\[{extra}\]"):
        Cache.open(url)


def test_limits_come_from_the_environment(tar_server, tmp_path, monkeypatch):
    monkeypatch.setenv("SCALEKD_CACHE_DIR", str(tmp_path / "here"))
    monkeypatch.setenv("SCALEKD_CACHE_BYTES", "20000")
    with pytest.raises(UserError, match="20,000"):
        Cache.open(tar_server.url).read(ALL, 1)
    assert copies(tmp_path / "here")
    monkeypatch.setenv("SCALEKD_CACHE_BYTES", "50GB")
    with pytest.raises(UserError, match="SCALEKD_CACHE_BYTES"):
        Cache.open(tar_server.url)


# Checks


def test_verify_reads_what_is_on_the_server_now(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SCALEKD_CACHE_DIR", str(tmp_path))
    assert verify_cache(server.url) == verify_cache(server.url, deep=True) == []
    server.fail(payload(server), 404)
    server.fail("g001-r00000/keys.txt", 404)
    found = verify_cache(server.url, deep=True)  # the earlier copies are complete
    places = {problem.where for problem in found}
    assert f"units/{payload(server)}" in places
    assert any(place.startswith("units/g001-r00000") for place in places)
    assert all(place.startswith(("units/g001-r00000", "units/g000-r00001")) for place in places)


def test_verify_compares_lengths_without_fetching(tar_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("SCALEKD_CACHE_DIR", str(tmp_path))
    with faulty_server(tar_cache) as running:
        assert verify_cache(running.url) == []
        assert running.gets(".tar") == 0
        assert sum(path.endswith(".tar") for _, path in running.log) == 6


def test_positions_are_read_in_any_order(tar_server, tmp_path):
    ids = np.random.default_rng(3).integers(0, NUM_SAMPLES, 60)
    assert Cache.open(tar_server.url, config(tmp_path)).read(ids, 2) == [expected(2)[position] for position in ids]


@pytest.mark.parametrize("url", ["https://host/caches/x", "https://host/caches/x/", "s3://bucket/caches/x"])
def test_the_root_is_named_after_its_url(url):
    root = RemotePath(SimpleNamespace(url=url), PurePosixPath())
    assert root.name == "x"
    assert (root / "units").name == "units"
