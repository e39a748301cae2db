"""Whole commands and readers with real servers: nginx with range support, S3 and Google Cloud Storage."""

import shutil
import urllib.request
from urllib.parse import quote

import pytest
from buckets import gs_server, s3_server
from commands import ENV, STUDENT, TRAIN_OPTIONS, assert_same_losses, distill_flags, make, run
from servers import nginx
from small_cache import copy_of_cache, shared_cache
from store_cases import NUM_SAMPLES, expected, write_cache

from scalekd_cache.config.remote import RemoteConfig
from scalekd_cache.errors import UserError
from scalekd_cache.store.base import BACKENDS
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.verify import verify_cache

ALL = range(NUM_SAMPLES)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """nginx serving a folder with one cache per backend; (URL, folder)."""
    folder = tmp_path_factory.mktemp("site")
    for backend in BACKENDS:
        write_cache(folder / backend, backend)
    (folder / "closed").mkdir()
    with nginx(folder, tmp_path_factory.mktemp("nginx")) as url:
        yield url, folder


@pytest.fixture(scope="module")
def s3():
    with s3_server() as client:
        yield client


@pytest.fixture(scope="module")
def gs():
    """Uploads a folder to the emulator."""
    with gs_server() as site:

        def put(folder, prefix):
            for path in folder.rglob("*"):
                if path.is_file():
                    name = quote(f"{prefix}/{path.relative_to(folder).as_posix()}", safe="")
                    url = f"{site}/upload/storage/v1/b/bucket/o?uploadType=media&name={name}"
                    header = {"Content-Type": "application/octet-stream"}
                    urllib.request.urlopen(urllib.request.Request(url, path.read_bytes(), header)).close()
            return f"gs://bucket/{prefix}"

        yield put


def upload(client, folder, prefix):
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "bucket", f"{prefix}/{path.relative_to(folder).as_posix()}")
    return f"s3://bucket/{prefix}"


@pytest.fixture(autouse=True)
def _copies(tmp_path, monkeypatch):
    """A separate folder of local copies for this test and its commands."""
    monkeypatch.setenv("SCALEKD_CACHE_DIR", str(tmp_path / "copies"))
    monkeypatch.setitem(ENV, "SCALEKD_CACHE_DIR", str(tmp_path / "copies"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_on_nginx(site, backend):
    url = site[0]
    request = urllib.request.Request(f"{url}/{backend}/manifest.json", headers={"Range": "bytes=2-5"})
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 206  # nginx supports ranges, Python's server does not
    cache = Cache.open(f"{url}/{backend}")
    for view in range(3):
        assert cache.read(ALL, view) == expected(view)
    assert verify_cache(f"{url}/{backend}", deep=True) == []


def test_nginx_says_no(site):
    with pytest.raises(UserError, match=r"status 403.*1 of 5 attempts") as caught:
        Cache.open(f"{site[0]}/closed")
    assert "credentials" in str(caught.value)
    with pytest.raises(UserError, match="not a finished cache"):
        Cache.open(f"{site[0]}/nothing")


def test_damage_on_nginx_is_found(site):
    url, folder = site
    damaged = shutil.copytree(folder / "webdataset", folder / "damaged")
    tar = damaged / "units/g000-r00001/v0001.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])
    (damaged / "units/g001-r00000/v0002.idx").unlink()
    problems = verify_cache(f"{url}/damaged")
    assert [problem.where for problem in problems] == [
        "units/g000-r00001/v0001.tar",
        "units/g001-r00000/v0002.idx",
    ]
    with pytest.raises(UserError, match=r"g000-r00001/v0001\.tar"):
        Cache.open(f"{url}/damaged", RemoteConfig(attempts=1)).read(ALL, 1)


def test_a_cache_on_s3(s3, tmp_path):
    url = upload(s3, write_cache(tmp_path / "cache", "webdataset"), "shards")
    cache = Cache.open(url)
    for view in range(3):
        assert cache.read(ALL, view) == expected(view)
    assert verify_cache(url, deep=True) == []
    file = "units/g000-r00000/unit.json"
    s3.put_object(Bucket="bucket", Key=f"shards/{file}", Body=b"{}")
    assert [problem.where for problem in verify_cache(url)] == [file]


def test_s3_says_no(s3):
    for url in ("s3://bucket/nothing", "s3://no-such-bucket/cache"):
        with pytest.raises(UserError, match="not a finished cache"):
            Cache.open(url)


@pytest.mark.ci_slow
def test_make_verify_on_s3(s3, tmp_path):
    url = upload(s3, shared_cache().root, "whole")
    assert "no problems (every byte checked" in make("verify", CACHE=url, DEEP=1)
    s3.delete_object(Bucket="bucket", Key="whole/tail.safetensors")
    assert "tail.safetensors: missing" in run("verify", "--cache", url, status=1)


def test_a_cache_on_gs(gs, tmp_path):
    folder = write_cache(tmp_path / "cache", "webdataset")
    url = gs(folder, "shards")
    cache = Cache.open(url)
    for view in range(3):
        assert cache.read(ALL, view) == expected(view)
    assert verify_cache(url, deep=True) == []
    tar = folder / "units/g000-r00001/v0001.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])
    gs(folder, "shards")
    assert [problem.where for problem in verify_cache(url)] == ["units/g000-r00001/v0001.tar"]
    with pytest.raises(UserError, match="not a finished cache"):
        Cache.open("gs://bucket/nothing")


def test_make_verify_refuses_a_command(tmp_path):
    marker = tmp_path / "ran"
    assert "file://, gs://, hf://, http://" in make("verify", status=2, CACHE=f"pipe:touch {marker}")
    assert not marker.exists()


@pytest.mark.slow
def test_make_distill_over_http_gives_the_run_of_the_folder(site, tmp_path):
    """Two loader workers, and the tail from the URL: every loss equals that of the same run from the folder."""
    url, folder = site
    copy_of_cache(folder / "whole")
    settings = {**TRAIN_OPTIONS, "train.epochs": 1, "train.workers": 2}
    words = " ".join(f"{name}={value}" for name, value in settings.items())
    make("distill", STUDENT=STUDENT, CACHE=f"{url}/whole", RUN=tmp_path / "remote", SET=words)
    run("distill", *distill_flags(folder / "whole", tmp_path / "local", **settings))
    assert_same_losses(tmp_path / "remote", tmp_path / "local", relative=0, steps=3)
