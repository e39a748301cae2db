"""Pulling from end to end: killed at random moments, from the hub and from S3, and training from what was pulled."""

import os
import random
import shutil
import signal
import time

import pytest
from commands import STUDENT, TRAIN_OPTIONS, assert_same_losses, distill_flags, run
from hub import hub_server
from small_cache import copy_of_cache
from store_cases import RANGES, facts, tree, write_cache

from scalekd_cache.config.publishing import PublishConfig
from scalekd_cache.config.pull import PullConfig
from scalekd_cache.publishing.publish import publish
from scalekd_cache.publishing.pull import pull_cache
from scalekd_cache.store.plan import Plan, write_plan

KILLS = 20


def pull(source, root, **options):
    return pull_cache(PullConfig(url=str(source), cache=str(root), **options))


def pull_in_child(source, root, views, wait_s):
    """Pull in a forked process, which is killed after a time; returns whether it was."""
    child = os.fork()
    if child == 0:
        try:
            pull(source, root, views=views)
        finally:
            os._exit(0)
    time.sleep(wait_s)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_a_pull_that_is_killed_finishes_bit_for_bit(tmp_path):
    source = write_cache(tmp_path / "source", "zarr")
    write_plan(source, Plan(facts=facts("zarr"), ranges=[list(pair) for pair in RANGES]))
    root, draw, kills, longest = tmp_path / "cache", random.Random(0), 0, 0.2
    end = time.monotonic() + 300
    while kills < KILLS and time.monotonic() < end:
        killed = pull_in_child(source, root, draw.choice(["0", "0-1", None]), draw.uniform(0, longest))
        kills += killed
        if (root / "manifest.json").exists() and not (root / ".tmp-pull").exists():
            names = [path.name for path in (root / "units").iterdir()]
            assert not [name for name in names if name.startswith(".")]
        if not killed:
            shutil.rmtree(root)
        longest = longest * (1.3 if killed else 0.8)
    assert kills == KILLS
    pull(source, root)
    assert tree(root) == tree(source)


@pytest.fixture(scope="module")
def s3():
    """An S3-compatible server, configured only by environment variables, and a bucket."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    import boto3

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="pulls")
        yield "s3://pulls/cache"
    server.stop()


def published(cache, to):
    publish(PublishConfig(cache=str(cache), to=to, data_license="cc-by-4.0", teacher_license="mit"))
    return to


def test_a_cache_published_to_s3(s3, tmp_path):
    cache = copy_of_cache(tmp_path / "cache")
    pull(published(cache, s3), tmp_path / "first", views="0")
    pull(s3, tmp_path / "pulled")
    pull(s3, tmp_path / "made", without_pixels=True, data="demo")
    assert tree(tmp_path / "pulled") == tree(tmp_path / "made") == tree(cache)


@pytest.mark.slow
def test_a_cache_from_the_hub_trains_to_the_same_losses(tmp_path):
    cache = copy_of_cache(tmp_path / "cache")
    with hub_server():
        pull(published(cache, "hf://datasets/ann/pets"), tmp_path / "elsewhere" / "pulled")
        pull("hf://datasets/ann/pets", tmp_path / "made", without_pixels=True, data="demo")
    assert tree(tmp_path / "made") == tree(cache)
    assert tree(tmp_path / "elsewhere" / "pulled") == tree(cache)
    settings = {**TRAIN_OPTIONS, "train.epochs": 1, "student.name": STUDENT}
    for name, folder in (("here", cache), ("there", tmp_path / "elsewhere" / "pulled")):
        run("distill", *distill_flags(folder, tmp_path / name, **settings))
    assert_same_losses(tmp_path / "there", tmp_path / "here", relative=0, steps=3)
