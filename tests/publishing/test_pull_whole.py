"""Publishing and pulling from end to end: killed at random moments, from the hub and from S3; training afterwards."""

import os
import random
import shutil
import signal
import time

import pytest
from buckets import s3_server
from commands import STUDENT, TRAIN_OPTIONS, assert_same_losses, distill_flags, run
from hub import hub_server
from publications import finished_cache, published
from small_cache import copy_of_cache
from store_cases import tree

from scalekd_cache.config.pull import PullConfig
from scalekd_cache.publishing.pull import pull_cache

KILLS = 20


def pull(source, root, **options):
    return pull_cache(PullConfig(url=str(source), cache=str(root), **options))


def killed(call, wait_s):
    """Whether a call in a forked process was killed after a time, because it had not returned before."""
    child = os.fork()
    if child == 0:
        try:
            call()
        finally:
            os._exit(0)
    time.sleep(wait_s)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kill_often(call, check, clean):
    """Kill a call at `KILLS` random moments; after each, `check`; after a call that was faster, `clean`."""
    draw, kills, longest, end = random.Random(0), 0, 0.2, time.monotonic() + 300
    while kills < KILLS and time.monotonic() < end:
        dead = killed(lambda: call(draw), draw.uniform(0, longest))
        kills += dead
        check()
        if not dead:
            clean()
        longest = longest * (1.3 if dead else 0.8)
    assert kills == KILLS


@pytest.mark.slow
def test_a_pull_that_is_killed_finishes_bit_for_bit(tmp_path):
    source, root = finished_cache(tmp_path / "source", "zarr"), tmp_path / "cache"

    def check():
        if (root / "manifest.json").exists() and not (root / ".tmp-pull").exists():
            names = [path.name for path in (root / "units").iterdir()]
            assert not [name for name in names if name.startswith(".")]

    kill_often(
        lambda draw: pull(source, root, views=draw.choice(["0", "0-1", None])), check, lambda: shutil.rmtree(root)
    )
    pull(source, root)
    assert tree(root) == tree(source)


@pytest.mark.slow
@pytest.mark.parametrize("without_pixels", [False, True])
def test_a_publication_that_is_killed_finishes_bit_for_bit(tmp_path, without_pixels):
    """Into a folder; until its last file is there, no reader takes it for a cache."""
    source, place, whole = finished_cache(tmp_path / "source", "webdataset"), tmp_path / "place", tmp_path / "whole"
    published(source, whole, without_pixels=without_pixels)
    expected = tree(whole)

    def check():
        if (place / "manifest.json").exists():
            assert {name: data for name, data in tree(place).items() if name in expected} == expected

    kill_often(lambda _: published(source, place, without_pixels=without_pixels), check, lambda: shutil.rmtree(place))
    published(source, place, without_pixels=without_pixels)
    assert tree(place) == expected


def test_a_cache_published_to_s3(tmp_path):
    cache, url = copy_of_cache(tmp_path / "cache"), "s3://bucket/cache"
    with s3_server():
        published(cache, url)
        pull(url, tmp_path / "first", views="0")
        pull(url, tmp_path / "pulled")
        pull(url, tmp_path / "made", without_pixels=True, data="demo")
    assert tree(tmp_path / "pulled") == tree(tmp_path / "made") == tree(cache)


@pytest.mark.slow
def test_a_cache_from_the_hub_trains_to_the_same_losses(tmp_path):
    cache = copy_of_cache(tmp_path / "cache")
    with hub_server():
        published(cache, "hf://datasets/ann/pets")
        pull("hf://datasets/ann/pets", tmp_path / "elsewhere" / "pulled")
        pull("hf://datasets/ann/pets", tmp_path / "made", without_pixels=True, data="demo")
    assert tree(tmp_path / "made") == tree(cache)
    assert tree(tmp_path / "elsewhere" / "pulled") == tree(cache)
    settings = {**TRAIN_OPTIONS, "train.epochs": 1, "student.name": STUDENT}
    for name, folder in (("here", cache), ("there", tmp_path / "elsewhere" / "pulled")):
        run("distill", *distill_flags(folder, tmp_path / name, **settings))
    assert_same_losses(tmp_path / "there", tmp_path / "here", relative=0, steps=3)
