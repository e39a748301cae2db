"""Publishing to buckets: S3 (moto) and Google Cloud Storage (an emulator)."""

import contextlib
import logging

import pytest
from buckets import gs_server, new_clients, s3_server
from publications import finished_cache, published
from remote_cases import ALL
from store_cases import GROUPS, expected, tree

from scalekd_cache.config.remote import RemoteConfig
from scalekd_cache.errors import UserError
from scalekd_cache.publishing import to_bucket
from scalekd_cache.store.reader import Cache

OWN = {"README.md", "publication.json"}
SECRET = "averysecretkey0123"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return finished_cache(tmp_path_factory.mktemp("cache") / "cache", "webdataset")


@pytest.fixture(scope="module")
def s3():
    """Its log has a line for each request; the log of a failed test would show thousands."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3_server() as client:
        yield client


@pytest.fixture(autouse=True)
def _settings(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALEKD_CACHE_DIR", str(tmp_path / "copies"))


def objects(client, prefix):
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=f"{prefix}/")
    found = [one for page in pages for one in page.get("Contents", [])]
    return {
        one["Key"].removeprefix(f"{prefix}/"): client.get_object(Bucket="bucket", Key=one["Key"])["Body"].read()
        for one in found
    }


def test_the_bucket_has_the_cache_and_a_rerun_sends_nothing(cache, s3, monkeypatch):
    facts = published(cache, "s3://bucket/deep/place")
    there = objects(s3, "deep/place")
    assert {name: data for name, data in there.items() if name not in OWN} == tree(cache)
    assert facts["bytes"] == sum(map(len, there.values()))
    monkeypatch.setattr(to_bucket, "upload", None)  # never called
    assert published(cache, "s3://bucket/deep/place")["bytes_sent"] == 0
    assert Cache.open("s3://bucket/deep/place").read(ALL, 1) == expected(1)


@pytest.mark.parametrize("without_pixels", [False, True])
def test_an_upload_that_stops_resumes(cache, s3, monkeypatch, without_pixels):
    name, upload = f"stops-{without_pixels}", to_bucket.upload
    last = "publication.json" if without_pixels else "manifest.json"

    def some(path, target, remote):
        if len(names) == 16:
            raise UserError("stopped")
        upload(path, target, remote)
        names.append(target.removeprefix(f"s3://bucket/{name}/"))

    monkeypatch.setattr(to_bucket, "upload", some)
    for _ in range(3):
        names = []
        with contextlib.suppress(UserError):
            published(cache, f"s3://bucket/{name}", without_pixels=without_pixels, connections=1)
        if last in names:
            break
        units = [one for one in names if "/g00" in one]
        assert len(units) >= 14
        assert last not in objects(s3, name)
    assert names[-1] == last
    monkeypatch.setattr(to_bucket, "upload", upload)
    published(cache, f"s3://bucket/{name}-whole", without_pixels=without_pixels)
    whole = objects(s3, f"{name}-whole")
    assert {one: data for one, data in objects(s3, name).items() if one not in OWN} == {
        one: data for one, data in whole.items() if one not in OWN
    }


def test_a_unit_with_another_shard_of_the_same_length_is_sent_again(cache, s3, tmp_path):
    """A publication that stopped, then a repair that gave a unit other bytes: its unit.json tells them apart."""
    url = "s3://bucket/repaired"
    published(cache, url)
    for name in ("manifest.json", "publication.json"):
        s3.delete_object(Bucket="bucket", Key=f"repaired/{name}")
    unit = "units/g000-r00000"
    old = (cache / unit / "v0000.tar").read_bytes()
    s3.put_object(Bucket="bucket", Key=f"repaired/{unit}/v0000.tar", Body=bytes(len(old)))
    text = (cache / unit / "unit.json").read_text().replace('"torch"', '"Torch"')
    s3.put_object(Bucket="bucket", Key=f"repaired/{unit}/unit.json", Body=text.replace("0.5", "0.6").encode())
    assert published(cache, url)["units_sent"] == 1
    assert {name: data for name, data in objects(s3, "repaired").items() if name not in OWN} == tree(cache)


def test_growth(s3, tmp_path):
    cache = finished_cache(tmp_path / "cache", "webdataset", GROUPS[:1])
    published(cache, "s3://bucket/grows")
    finished_cache(cache, "webdataset")
    assert published(cache, "s3://bucket/grows")["units_sent"] == 2
    assert {name: data for name, data in objects(s3, "grows").items() if name not in OWN} == tree(cache)


@pytest.fixture
def s3_clients():
    with new_clients(pytest.importorskip("s3fs").S3FileSystem) as files:
        yield files


def test_a_folder_made_in_the_console_is_empty(cache, s3):
    for name in ("console/", "console/place/", "console/place/units/"):
        s3.put_object(Bucket="bucket", Key=name, Body=b"")
    published(cache, "s3://bucket/console/place")
    there = {name: data for name, data in objects(s3, "console/place").items() if name and not name.endswith("/")}
    assert {name: data for name, data in there.items() if name not in OWN} == tree(cache)
    assert published(cache, "s3://bucket/console/place")["bytes_sent"] == 0


def test_s3_says_no(cache, s3, monkeypatch, s3_clients):
    with pytest.raises(UserError, match="must already exist"):
        published(cache, "s3://no-such-bucket/place")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)

    async def denied(*_, **__):
        raise PermissionError(f"AccessDenied for {SECRET} at https://key:{SECRET}@host/x?sig={SECRET}")

    monkeypatch.setattr(s3_clients, "_put_file", denied)
    s3_clients.clear_instance_cache()
    with pytest.raises(UserError, match="write access to this bucket") as caught:
        published(cache, "s3://bucket/denied")
    assert SECRET not in str(caught.value)
    assert objects(s3, "denied") == {}


@pytest.mark.usefixtures("s3", "s3_clients")
def test_no_network(cache, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(to_bucket, "RemoteConfig", lambda: RemoteConfig(attempts=2, backoff_s=0.01))
    with pytest.raises(UserError, match="check that the server is running"):
        published(cache, "s3://bucket/unreachable")


def test_a_cache_on_gs(cache):
    with gs_server():
        pytest.importorskip("gcsfs").GCSFileSystem().pipe_file("bucket/place/", b"")  # a folder made in the console
        published(cache, "gs://bucket/place")
        assert published(cache, "gs://bucket/place")["bytes_sent"] == 0
        found = Cache.open("gs://bucket/place")
        for view in range(3):
            assert found.read(ALL, view) == expected(view)
